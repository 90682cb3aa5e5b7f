"""Clients as one batched computation under `torch.func.vmap`.

Their local steps run from recordings.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fedcore import trees
from fedcore.checks.gradient import why_not_batched
from fedcore.checks.trials import drawing
from fedcore.checks.watch import Watch
from fedcore.dpsgd import SampledBatches
from fedcore.engines.base import Done, Work, run_alone
from fedcore.engines.run_client import run_checked
from fedcore.local import steps_run_by
from fedcore.method import data_of
from fedcore.reports import Reports
from fedcore.speed import loss_recorder
from fedcore.speed.cuda_graphs import Graphs
from fedcore.types import Batches, ClientFunction, Tree, Tuning

log = logging.getLogger("fedcore")

PADDING = 0.1  # of a round's local steps, at most, may be padding
# Of chunks of ragged clients, in clients: few, as each is recorded anew.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)


class Chunks:
    """The work of one process, on one thread or one GPU."""

    def __init__(self, work: Work) -> None:
        # The layer, or the loss, that draws. Draws depend on shapes, so that models
        # which draw keep the shapes of `sequential`.
        self.drawing = drawing(work.task)
        is_cuda = work.task.device.type == "cuda"
        self.work = work if self.drawing else work.with_few_widths()
        self.recorder = None if self.drawing else loss_recorder(work.task)
        self.graphs = None
        if is_cuda and not self.drawing:
            self.graphs = Graphs(self.recorder)
        self._watch = None if self.recorder is None else Watch(work.task)
        # Most clients at once, by function, since a GPU had no room for twice as many.
        self._room: dict[str, int] = {}
        self._is_noted = False  # that clients cannot be batched
        self._process = os.getpid()  # forks leave the note to it

    @property
    def impurity(self) -> str | None:
        """Why the task's loss follows from more than its arguments, where it does."""
        return None if self.recorder is None else self.recorder.reason

    def begin_round(self, t: int) -> None:
        """Recordings are compared with their steps again after some rounds.

        At once where a value has changed that model and loss read from elsewhere.
        """
        model = self.work.task.model
        if self.recorder is not None and not model.training:
            model.train()  # the round before ended with an evaluation
        if self.recorder is None or self._watch is None:
            return
        change = self._watch.change() if self.recorder.reason is None else None
        if change is not None:
            self.recorder.give_up(change)
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
                    return self._batch(fn, chunk, down, states, t, weights)
                except torch.OutOfMemoryError:
                    pass  # the tensors that it holds are freed when this block is left
                except Exception as error:  # one client of the chunk, or vmap itself
                    log.debug("chunk %s failed, now one by one", chunk, exc_info=True)
                    done = self._one_by_one(fn, chunk, down, states, t)
                    if not any(client.reports.failed for client in done):
                        self.note_unbatched(fn, error)
                    return done
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
    ) -> list[Done]:
        with self.work.model_noise(fn, t, chunk[0]):
            batches = self.work.batches(fn, chunk, t)
            up, new, is_finite = self.batched(fn, down, states, batches, t, chunk)
        # Contiguous, for sums must not depend on the layout.
        up = trees.map(lambda x: x if x.stride(0) == 0 else x.contiguous(), up)
        num_examples = self.work.num_examples(fn, chunk)
        done = Done(Reports(torch.tensor(chunk), up, num_examples), new)
        whole = done if weights is None else summed(done, weights)
        spoiled = self._spoiled(fn, chunk, whole, is_finite)
        if not spoiled.any():
            return [whole]
        # Alone, a client has no batch that is all padding.
        repaired = []
        for i in np.flatnonzero(spoiled).tolist():
            state = row(states, i)
            repaired.append(run_alone(self.work, fn, chunk[i], down, state, t))
        if spoiled.all():
            return repaired
        others = torch.from_numpy(~spoiled)
        rest = _at(done, others)
        return [rest if weights is None else summed(rest, weights[others]), *repaired]

    def _spoiled(
        self, fn: ClientFunction, chunk: list[int], done: Done, is_finite: Tree
    ) -> np.ndarray:
        """Whose work is not finite, and had batches that are all padding; bool [n].

        Such a batch moves nothing because it counts 0 times, which NaN and Inf survive.
        """
        steps = self.work.steps(fn, np.asarray(chunk))
        is_padded: np.ndarray = steps < steps.max()
        has_states = isinstance(is_finite, Tensor)
        is_summed = done.total is not None and not has_states  # to a finite sum
        if data_of(fn) == "test" or is_summed or not is_padded.any():
            return np.zeros(len(chunk), dtype=bool)
        if not has_states:
            is_finite = torch.isfinite(trees.row_sums(done.reports.up))
        spoiled: np.ndarray = is_padded & ~is_finite.cpu().numpy()
        return spoiled

    def note_unbatched(self, fn: ClientFunction, error: Exception) -> None:
        """Warn, once, that clients run one after another, and why."""
        if not self._is_noted and os.getpid() == self._process:
            self._is_noted = True
            log.warning(
                "%s cannot be batched over clients (%s); they run one after another, "
                "which is slower",
                fn.__name__,
                why_not_batched(error),
            )

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
        batches: Batches | SampledBatches | Tuning,
        t: int,
        chunk: list[int] | None = None,
    ) -> tuple[Tree, Tree, Tree]:
        """(messages as they arrive, new states, is it finite) of clients `chunk`.

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

        client = partial(run_checked, fn, work.task, training=work.training)
        clients = vmap(client, in_dims=in_dims, randomness="different")
        inputs = (work.now(t), down, states, batches)
        with warnings.catch_warnings():
            # Of an operator that PyTorch computes for one client after another: whether
            # batching pays is measured.
            warnings.filterwarnings("ignore", "There is a performance drop")
            if self.graphs is None:
                up, new, is_finite = clients(*inputs)
            else:
                kind = (fn.__name__, in_dims, work.task.model.training)
                outputs = self.graphs.run(kind, lambda own: clients(*own), inputs)
                up, new, is_finite = outputs
        assert all(len(x) == n for x in trees.leaves(up))
        if chunk is not None and trees.leaves(up) and not work.arrives_as_is(fn):
            sent = []
            for i, client_id in enumerate(chunk):
                sent.append(work.send(trees.at(up, i), fn, t, client_id))
            up = trees.stack(sent)
        return up, new, is_finite


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


def _at(done: Done, rows: Tensor) -> Done:
    """Some of the clients; `rows` is bool [n]."""
    reports = done.reports
    there = rows.to(reports.num_examples.device)
    up, num_examples, states = trees.at(
        (reports.up, reports.num_examples, done.states), there
    )
    return Done(Reports(reports.clients[rows], up, num_examples), states)


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
