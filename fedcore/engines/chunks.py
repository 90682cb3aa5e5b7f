"""Clients as one batched computation under `torch.func.vmap`, their local steps run from recordings."""

from __future__ import annotations

import gc
import logging
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedcore import trees
from fedcore.engines.base import Done, Work, alone
from fedcore.engines.run_client import run_client
from fedcore.local import steps_run_by
from fedcore.speed import loss_recorder
from fedcore.speed.cuda_graphs import Graphs
from fedcore.types import Batches, ClientFunction, Reports, Tree, Tuning, Weight

log = logging.getLogger("fedcore")

PADDING = 0.1  # of a round's local steps, at most, may be padding
LENGTHS = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
)  # of chunks of ragged clients: few, as each is recorded anew


class Chunks:
    """The work of one process, on one thread or one GPU."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.noisy = [
            m
            for m in work.task.model.modules()
            if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
        ]
        """Layers that draw for each example: what they draw depends on shapes, so that these stay as `sequential` has them."""
        self.recorder = None if self.noisy else loss_recorder(work.task)
        self.graphs = (
            Graphs(self.recorder)
            if work.task.device.type == "cuda" and not self.noisy
            else None
        )
        self._room: dict[
            str, int
        ] = {}  # clients at most, by function, since the GPU had no room for twice as many
        work.even = not self.noisy

    @property
    def impure(self) -> str | None:
        """Why the task's loss follows from more than its arguments; None if it does not."""
        return None if self.recorder is None else self.recorder.reason

    def run(
        self,
        fn: ClientFunction,
        piece: list[int],
        down: Tree,
        states: Tree,
        t: int,
        size: int,
        weight: Weight | None = None,
    ) -> list[Done]:
        """Clients with their stacked states: one batch, or one after another where `size` is 1 or the batch fails.

        With `weight` nobody needs more of a batch than its sum. A batch for which a GPU has no room is cut into halves.
        """
        with steps_run_by(self.recorder):
            if size == 1 or len(piece) == 1:
                return self._one_by_one(fn, piece, down, states, t)
            if len(piece) <= self._room.get(fn.__name__, len(piece)):
                try:
                    return [self._batch(fn, piece, down, states, t, weight)]
                except torch.OutOfMemoryError:
                    pass  # what it still holds is freed when this block is left
                except Exception:  # one client of the chunk, or vmap itself: the loop finds out which, and saves the others
                    log.debug(
                        "chunk %s failed, going through it one by one",
                        piece,
                        exc_info=True,
                    )
                    return self._one_by_one(fn, piece, down, states, t)
                self.make_room(fn, len(piece) // 2)
            half = len(piece) // 2
            parts = [
                (piece[rows], trees.at(states, rows))
                for rows in (slice(half), slice(half, None))
            ]
            return [
                done
                for part, own in parts
                for done in self.run(fn, part, down, own, t, size, weight)
            ]

    def _one_by_one(
        self, fn: ClientFunction, piece: list[int], down: Tree, states: Tree, t: int
    ) -> list[Done]:
        return [
            alone(self.work, fn, client, down, row(states, i), t)
            for i, client in enumerate(piece)
        ]

    def _batch(
        self,
        fn: ClientFunction,
        piece: list[int],
        down: Tree,
        states: Tree,
        t: int,
        weight: Weight | None,
    ) -> Done:
        with self.work.model_noise(fn, t, piece[0]):
            up, new = self.batched(
                fn, down, states, self.work.batches(fn, piece, t), t, piece
            )
        up = trees.map(
            lambda x: x if x.stride(0) == 0 else x.contiguous(), up
        )  # sums must not depend on the layout
        found = Reports(torch.tensor(piece), up, self.work.num_examples(fn, piece))
        return Done(found if weight is None else summed(found, weight), new)

    def make_room(self, fn: ClientFunction, clients: int) -> None:
        self._room[fn.__name__] = clients
        log.warning(
            "%s: no room on the GPU for more than about %d clients at once",
            fn.__name__,
            clients,
        )
        if self.graphs is not None:
            self.graphs.clear()
        gc.collect()  # what failed may hold tensors in cycles
        torch.cuda.empty_cache()

    def batched(
        self,
        fn: ClientFunction,
        down: Tree,
        states: Tree,
        batches: Batches | Tuning,
        t: int,
        chunk: list[int] | None = None,
    ) -> tuple[Tree, Tree]:
        """(what arrives, new states) of the clients `chunk`; without it nothing is lost on the way, for a trial."""
        n, work = len(trees.leaves(batches)[0]), self.work
        own_down = (
            chunk is not None
            and bool(trees.leaves(down))
            and not work.links.silent("downlink", fn)
        )
        if chunk is not None and own_down:  # each client receives a message of its own
            down = trees.stack(
                [work.links.carry(down, "downlink", fn, t, i) for i in chunk]
            )
        in_dims = (
            None,
            0 if own_down else None,
            0 if trees.leaves(states) else None,
            0,
        )

        def client(
            now: Tensor, down: Tree, state: Tree, batch: Batches | Tuning
        ) -> tuple[Tree, Tree]:
            return run_client(fn, work.task, now, down, state, batch)

        def clients(inputs: Tree) -> tuple[Tree, Tree]:
            found: tuple[Tree, Tree] = vmap(
                client, in_dims=in_dims, randomness="different"
            )(*inputs)
            return found

        inputs = (work.now(t), down, states, batches)
        if self.graphs is None:
            up, new = clients(inputs)
        else:
            up, new = self.graphs.run(
                (fn.__name__, in_dims, work.task.model.training), clients, inputs
            )
        assert all(len(x) == n for x in trees.leaves(up))
        if chunk is not None and trees.leaves(up) and not work.arrives_as_is(fn):
            up = trees.stack(
                [work.send(trees.at(up, row), fn, t, i) for row, i in enumerate(chunk)]
            )
        return up, new


def summed(r: Reports, weight: Weight) -> Reports:
    """With `total` in place of all that is no scalar. As it was where that is not finite: the loop finds out by whose fault."""
    total = trees.weighted_sum(r.up, weight(r))
    if not bool(trees.finite(total)):
        return r
    return r._replace(
        up=trees.map(lambda x: x if x.ndim == 1 else x.new_empty(len(x), 0), r.up),
        total=total,
    )


def row(states: Tree, i: int) -> Tree:
    """Client i's of stacked states."""
    return trees.at(states, i) if trees.leaves(states) else states


def pack(ids: list[int], steps: list[int], most: int) -> list[list[int]]:
    """Chunks of at most `most` clients, ascending ids in each; `steps` descend.

    A chunk lasts as long as its longest client. As few steps as possible are done, with at most PADDING of them waiting.
    """
    if not ids or steps[0] == steps[-1]:
        cuts = [most] * (len(ids) // most) + [len(ids) % most]
    else:
        weight = 0.25
        while (
            _waiting(
                steps,
                cuts := _cut(steps, [n for n in LENGTHS if n < most] + [most], weight),
            )
            > PADDING
        ):
            weight *= 1.5
    ends = np.cumsum(cuts).tolist()
    return [sorted(ids[end - n : end]) for n, end in zip(cuts, ends, strict=True) if n]


def _cut(steps: list[int], lengths: list[int], weight: float) -> list[int]:
    """Lengths of successive chunks, of those allowed: the least sum of what each lasts x (1 + weight x its clients)."""
    count = len(steps)
    cost, last = [0.0] + [math.inf] * count, [0] * (count + 1)
    for i, longest in enumerate(steps):
        for n in lengths:
            if i + n > count:
                break
            if (found := cost[i] + longest * (1 + weight * n)) < cost[i + n]:
                cost[i + n], last[i + n] = found, n
    cuts = []
    while count:
        cuts.append(last[count])
        count -= last[count]
    return cuts[::-1]


def _waiting(steps: list[int], cuts: list[int]) -> float:
    """Share of the chunks' steps that are padding; `steps` descend."""
    starts = np.cumsum([0, *cuts[:-1]])
    return 1 - sum(steps) / max(int(np.array(steps)[starts] @ np.array(cuts)), 1)
