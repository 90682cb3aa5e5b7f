"""Clients as one batched computation under `torch.func.vmap`.

Their local steps run from recordings.
"""

from __future__ import annotations

import gc
import logging
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedcore import trees
from fedcore.engines.base import Done, Work, run_alone
from fedcore.engines.run_client import run_client
from fedcore.local import steps_run_by
from fedcore.reports import Reports
from fedcore.speed import loss_recorder
from fedcore.speed.cuda_graphs import Graphs
from fedcore.types import Batches, ClientFunction, Tree, Tuning

log = logging.getLogger("fedcore")

PADDING = 0.1  # of a round's local steps, at most, may be padding
# Of chunks of ragged clients, in clients: few, as each is recorded anew.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)

DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Chunks:
    """The work of one process, on one thread or one GPU."""

    def __init__(self, work: Work) -> None:
        self.noisy = noisy_layers(work.task.model)
        is_cuda = work.task.device.type == "cuda"
        # Draws depend on shapes: models that draw keep the shapes of `sequential`.
        self.work = work if self.noisy else work.with_few_widths()
        self.recorder = None if self.noisy else loss_recorder(work.task)
        self.graphs = None
        if is_cuda and not self.noisy:
            self.graphs = Graphs(self.recorder)
        # Most clients at once, by function, since a GPU had no room for twice as many.
        self._room: dict[str, int] = {}

    @property
    def impurity(self) -> str | None:
        """Why the task's loss follows from more than its arguments, where it does."""
        return None if self.recorder is None else self.recorder.reason

    def begin_round(self, t: int) -> None:
        """Recordings are compared with their steps again after some rounds."""
        if self.recorder is None:
            return
        model = self.work.task.model
        if not model.training:  # the round before ended with an evaluation
            model.train()
        self.recorder.begin_round(t)

    def run(
        self,
        fn: ClientFunction,
        chunk: list[int],
        down: Tree,
        states: Tree,
        t: int,
        size: int,
        weights: Tensor | None = None,
    ) -> list[Done]:
        """Clients with their stacked states, as one batch.

        One after another where `size` is 1 or the batch fails. With `weights`, one a
        client, only the batch's weighted sum is needed. A batch for which a GPU has no
        room is cut into halves.
        """
        with steps_run_by(self.recorder):
            if size == 1 or len(chunk) == 1:
                return self._one_by_one(fn, chunk, down, states, t)
            if len(chunk) <= self._room.get(fn.__name__, len(chunk)):
                try:
                    return [self._batch(fn, chunk, down, states, t, weights)]
                except torch.OutOfMemoryError:
                    pass  # the tensors that it holds are freed when this block is left
                except Exception:  # one client of the chunk, or vmap itself
                    log.debug("chunk %s failed, now one by one", chunk, exc_info=True)
                    return self._one_by_one(fn, chunk, down, states, t)
                self.make_room(fn, len(chunk) // 2)
            return self._in_halves(fn, chunk, down, states, t, size, weights)

    def _in_halves(
        self,
        fn: ClientFunction,
        chunk: list[int],
        down: Tree,
        states: Tree,
        t: int,
        size: int,
        weights: Tensor | None,
    ) -> list[Done]:
        half, done = len(chunk) // 2, []
        for rows in (slice(half), slice(half, None)):
            own_weights = None if weights is None else weights[rows]
            own_states = trees.at(states, rows)
            done += self.run(fn, chunk[rows], down, own_states, t, size, own_weights)
        return done

    def _one_by_one(
        self, fn: ClientFunction, chunk: list[int], down: Tree, states: Tree, t: int
    ) -> list[Done]:
        done = []
        for i, client in enumerate(chunk):
            done.append(run_alone(self.work, fn, client, down, row(states, i), t))
        return done

    def _batch(
        self,
        fn: ClientFunction,
        chunk: list[int],
        down: Tree,
        states: Tree,
        t: int,
        weights: Tensor | None,
    ) -> Done:
        with self.work.model_noise(fn, t, chunk[0]):
            batches = self.work.batches(fn, chunk, t)
            up, new = self.batched(fn, down, states, batches, t, chunk)
        # Contiguous, for sums must not depend on the layout.
        up = trees.map(lambda x: x if x.stride(0) == 0 else x.contiguous(), up)
        num_examples = self.work.num_examples(fn, chunk)
        done = Done(Reports(torch.tensor(chunk), up, num_examples), new)
        return done if weights is None else summed(done, weights)

    def make_room(self, fn: ClientFunction, clients: int) -> None:
        """After a failure for want of memory: from now on this many clients at once."""
        self._room[fn.__name__] = clients
        log.warning(
            "%s: no room on the GPU for more than about %d clients at once",
            fn.__name__,
            clients,
        )
        if self.graphs is not None:
            self.graphs.clear()
        gc.collect()  # a failed batch may hold tensors in cycles
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
        """(messages as they arrive, new states) of the clients `chunk`.

        Without `chunk` it is a trial, and nothing is lost on the way.
        """
        n, work = len(trees.leaves(batches)[0]), self.work
        is_sent = chunk is not None and bool(trees.leaves(down))
        has_own_down = is_sent and not work.links.is_silent("downlink", fn)
        if chunk is not None and has_own_down:  # each client receives its own message
            received = [work.links.carry(down, "downlink", fn, t, i) for i in chunk]
            down = trees.stack(received)
        down_dim = 0 if has_own_down else None
        in_dims = (None, down_dim, 0 if trees.leaves(states) else None, 0)

        client = partial(run_client, fn, work.task)
        clients = vmap(client, in_dims=in_dims, randomness="different")
        inputs = (work.now(t), down, states, batches)
        if self.graphs is None:
            up, new = clients(*inputs)
        else:
            kind = (fn.__name__, in_dims, work.task.model.training)
            up, new = self.graphs.run(kind, lambda own: clients(*own), inputs)
        assert all(len(x) == n for x in trees.leaves(up))
        if chunk is not None and trees.leaves(up) and not work.arrives_as_is(fn):
            sent = []
            for i, client_id in enumerate(chunk):
                sent.append(work.send(trees.at(up, i), fn, t, client_id))
            up = trees.stack(sent)
        return up, new


def noisy_layers(model: nn.Module) -> list[nn.Module]:
    """Layers that draw for each example; what they draw depends on shapes."""
    return [m for m in model.modules() if isinstance(m, DROPOUT) and m.p > 0]


def summed(done: Done, weights: Tensor) -> Done:
    """Clients with the weighted sum of their updates, of which the scalars stay.

    Unchanged where the sum is not finite: the server finds out by whose fault.
    """
    reports = done.reports
    total = trees.weighted_sum(reports.up, weights)
    if not bool(trees.finite(total)):
        return done
    scalars = trees.map(
        lambda x: x if x.ndim == 1 else x.new_empty(len(x), 0), reports.up
    )
    return Done(reports._replace(up=scalars), done.states, total)


def row(states: Tree, i: int) -> Tree:
    """Client i's of stacked states."""
    return trees.at(states, i) if trees.leaves(states) else states


def pack(ids: list[int], steps: list[int], most: int) -> list[list[int]]:
    """Chunks of at most `most` clients, ascending ids in each; `steps` descend.

    A chunk lasts as long as its longest client. As few steps as possible are done, with
    at most PADDING of them waiting.
    """
    if not ids or steps[0] == steps[-1]:
        cuts = [most] * (len(ids) // most) + [len(ids) % most]
    else:
        lengths = [n for n in LENGTHS if n < most] + [most]
        weight = 0.25
        while _waiting(steps, cuts := _cut(steps, lengths, weight)) > PADDING:
            weight *= 1.5
    chunks, start = [], 0
    for length in cuts:
        if length:
            chunks.append(sorted(ids[start : start + length]))
        start += length
    return chunks


def _cut(steps: list[int], lengths: list[int], weight: float) -> list[int]:
    """Lengths of successive chunks, of those allowed.

    The least sum, over chunks, of how long each lasts x (1 + weight x its clients); by
    dynamic programming.
    """
    count = len(steps)
    cost, last = [0.0] + [math.inf] * count, [0] * (count + 1)
    for i, longest in enumerate(steps):
        for n in lengths:
            if i + n > count:
                break
            candidate = cost[i] + longest * (1 + weight * n)
            if candidate < cost[i + n]:
                cost[i + n], last[i + n] = candidate, n
    cuts = []
    while count:
        cuts.append(last[count])
        count -= last[count]
    return cuts[::-1]


def _waiting(steps: list[int], cuts: list[int]) -> float:
    """Share of the chunks' steps that are padding; `steps` descend."""
    starts = np.cumsum([0, *cuts[:-1]])
    done = int(np.array(steps)[starts] @ np.array(cuts))
    return 1 - sum(steps) / max(done, 1)
