"""Clients in chunks, each one batched computation, side by side on all cores.

The default engine. Local steps run from recordings (`fedcore.speed.recording`). On a
CPU every chunk is the work of one process, a fork of this one, on one thread: no core
waits for another at every small operation, and the process that does it changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import (
    Done,
    Work,
    added_done,
    keep_states,
    one_thread,
)
from fedcore.engines.calibration import Calibration
from fedcore.engines.chunks import Chunks, pack
from fedcore.engines.packing import Forms, Job, Outcome, packed, unpacked
from fedcore.engines.readout import Readout, added
from fedcore.method import evaluates
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.speed import forks
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

PIECE = 8  # clients that a process takes at once where they go one by one
PROCESSES = "processes"  # beside the chunk sizes by function in `choices`


class Call(NamedTuple):
    """One call of a client function for a cohort."""

    fn: ClientFunction
    down: Tree
    t: int
    size: int
    weight: Weight | None  # None: single updates are wanted

    @property
    def name(self) -> str:
        return self.fn.__name__


class Vectorised:
    """Client functions batched over clients, on all cores."""

    def __init__(
        self, work: Work, states: StateStore, chunk: int | None = None
    ) -> None:
        """`chunk` clients a batch, 1 = one after another; None = measure."""
        self.work, self.states, self.chunk = work, states, chunk
        self.choices: dict[str, Any] = {}
        self.late = 0
        self.processes = 1
        if work.task.device.type == "cpu" and forks.possible():
            self.processes = torch.get_num_threads()
        # By client function, as soon as a client succeeded in it; and as forks know it.
        self._forms: dict[str, Forms] = {}
        self._forms_in_forks: dict[str, Forms] = {}
        self._forks: forks.Forks | None = None

    @cached_property
    def _chunks(self) -> Chunks:
        """Made at the first use, when the model is what it will be."""
        return Chunks(self.work)

    @property
    def _is_cuda(self) -> bool:
        return self.work.task.device.type == "cuda"

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        for done in self._done(fn, clients, down, t, None):
            yield done.reports

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weight: Weight,
        total: RunningSum,
    ) -> Iterator[Readout]:
        if self._is_cuda:  # single updates stay on the GPU, and are summed there
            yield from added(self.each(fn, clients, down, t), weight, total)
            return
        for done in self._done(fn, clients, down, t, weight):
            yield from added_done(done, weight, total)

    def _done(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weight: Weight | None,
    ) -> Iterator[Done]:
        """Chunks that are done, whose states are stored."""
        if len(clients) == 0:
            return
        with nullcontext() if self._is_cuda else one_thread():
            ids = clients.numpy()
            self._chunks.begin_round(t)
            call = Call(fn, down, t, self._chunk_size(fn, ids, down, t), weight)
            chunks = self.chunks(fn, ids)
            if self._is_cuda:
                yield from self._on_gpu(call, chunks)
                return
            for done in self._on_cpu(call, chunks):
                keep_states(self.states, fn, done)
                yield done

    def _chunk_size(
        self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int
    ) -> int:
        if self.chunk is not None:
            return self.chunk
        if fn.__name__ not in self.choices:
            calibration = Calibration(self._chunks, self._gathered)
            self.choices[fn.__name__] = calibration.chunk_size(fn, ids, down, t)
        return int(self.choices[fn.__name__])

    def chunks(self, fn: ClientFunction, clients: np.ndarray) -> list[list[int]]:
        """Chunks of these clients, the longest first, once the size is known."""
        size = self.chunk or self.choices[fn.__name__]
        steps = self.work.steps(fn, clients)
        order = np.argsort(-steps, kind="stable")
        ordered = clients[order].tolist()
        processes = self.choices.setdefault(PROCESSES, self.processes)
        if size == 1:
            piece = min(max(len(clients) // (4 * processes), 1), PIECE)
            starts = range(0, len(ordered), piece)
            return [ordered[start : start + piece] for start in starts]
        # Every process has as many.
        count = processes * -(-len(clients) // (size * processes))
        return pack(ordered, steps[order].tolist(), -(-len(clients) // count))

    def _gathered(self, clients: list[int]) -> Tree:
        """Stacked states, on the task's device."""
        return trees.to(self.states.gather(clients), self.work.task.device)

    def _here(self, call: Call, chunk: list[int]) -> list[Done]:
        """A chunk in this process."""
        states, weights = self._gathered(chunk), self._weights(call, chunk)
        done = self._chunks.run(
            call.fn, chunk, call.down, states, call.t, call.size, weights
        )
        succeeded = [d for d in done if len(d.reports.clients)]
        if self.processes > 1 and succeeded:
            first = succeeded[0]
            structures = (call.down, states, first.reports.up, first.states)
            self._forms[call.name] = Forms(*map(pytree.tree_structure, structures))
        return done

    def _weights(self, call: Call, chunk: list[int]) -> Tensor | None:
        if call.weight is None:
            return None
        num_examples = self.work.num_examples(call.fn, chunk)
        return call.weight(torch.tensor(chunk), num_examples)

    # On a GPU

    def _on_gpu(self, call: Call, chunks: list[list[int]]) -> Iterator[Done]:
        """Chunks one after another.

        The new states of one are stored when the next is on its way, so that they are
        not waited for.
        """
        behind: list[tuple[Done, Callable[[], Tree]]] = []
        try:
            while chunks:
                chunk = chunks.pop(0)
                states = self._states_if_room(chunk)
                if states is None:
                    self._store(call, behind)
                    behind, half = [], len(chunk) // 2
                    self._chunks.make_room(call.fn, half)
                    chunks[:0] = [chunk[:half], chunk[half:]]
                    continue
                done = self._chunks.run(
                    call.fn, chunk, call.down, states, call.t, call.size
                )
                self._store(call, behind)
                behind = []
                if not evaluates(call.fn):
                    behind = [(d, trees.fetch(d.states)) for d in done]
                if len(done) > 1:  # single clients: stored before they are handed on
                    self._store(call, behind)
                    behind = []
                yield from done
        finally:
            self._store(call, behind)

    def _states_if_room(self, chunk: list[int]) -> Tree | None:
        try:
            return self._gathered(chunk)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
        return None

    def _store(self, call: Call, behind: list[tuple[Done, Callable[[], Tree]]]) -> None:
        for done, states in behind:
            keep_states(self.states, call.fn, done._replace(states=states()))

    # On all cores

    def _on_cpu(self, call: Call, chunks: list[list[int]]) -> Iterator[Done]:
        """Chunks in this process, until forks know all that they need; then in forks.

        Handed on in their order.
        """
        while chunks and not (len(chunks) > 1 and self._may_fork(call)):
            yield from self._here(call, chunks.pop(0))
        if not chunks:
            return
        if self._forks is None or self._forms_in_forks != self._forms:
            self.close()
            self._forms_in_forks = dict(self._forms)
            self._forks = forks.Forks(self.processes, self._in_fork)
        jobs = (self._job(call, chunk) for chunk in chunks)
        answers = self._forks.run(jobs, trees.leaves(call.down))
        for chunk, (outcomes, tensors) in zip(chunks, answers, strict=True):
            if isinstance(outcomes, str) and self._chunks.recorder is not None:
                self._chunks.recorder.give_up(outcomes)
            if outcomes is None or self._chunks.impurity is not None:
                yield from self._here(call, chunk)
            else:
                yield from unpacked(outcomes, tensors, self._forms[call.name])
        if self._chunks.impurity is not None:
            self.close()

    def _may_fork(self, call: Call) -> bool:
        """Whether forks know the structures that this call needs."""
        forms = self._forms.get(call.name)
        if self.processes == 1 or forms is None or self._chunks.impurity is not None:
            return False
        return bool(forms.down == pytree.tree_structure(call.down))

    def _job(self, call: Call, chunk: list[int]) -> tuple[Job, list[Tensor]]:
        weights, states = self._weights(call, chunk), self._gathered(chunk)
        job = Job(call.name, chunk, call.t, call.size, weights is not None)
        tensors = [] if weights is None else [weights]
        return job, tensors + trees.leaves(states)

    def _in_fork(
        self, job: Job, down: list[Tensor], tensors: list[Tensor]
    ) -> tuple[list[Outcome] | str | None, list[Tensor]]:
        """A chunk in a fork: outcomes, and their leaves.

        None where structures are not the known ones; the reason where the task's loss
        turned out to be impure.
        """
        fn, forms = getattr(self.work.method, job.function), self._forms[job.function]
        weights = tensors[0] if job.has_weights else None
        done = self._chunks.run(
            fn,
            job.chunk,
            pytree.tree_unflatten(down, forms.down),
            pytree.tree_unflatten(tensors[job.has_weights :], forms.state),
            job.t,
            job.size,
            weights,
        )
        if self._chunks.impurity is not None:
            return self._chunks.impurity, []
        return packed(done, forms)

    def describe(self) -> str:
        chosen = []
        for name, size in self.choices.items():
            if name != PROCESSES:
                how = "one by one" if size == 1 else f"{size} at a time"
                chosen.append(f"{name} {how}")
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        sizes = f" ({', '.join(chosen)})" if chosen else ""
        return f"vectorised on {self.work.task.device}{processes}{sizes}"

    def close(self) -> None:
        if self._forks is not None:
            self._forks.close()
            self._forks = None
