"""Clients in chunks, each chunk one batched computation under `torch.func.vmap`, chunks side by side on all cores; the default.

Local steps run from recordings (`fedcore.speed.recording`). On a CPU every chunk is the work of one process, a fork of this one, on one
thread: no core waits for another at every small operation, and who does it changes no bit.

How many clients make a chunk decides the speed: too few waste the batching, too many fall out of the cache. No rule predicts it, so
it is measured, once a (method, model, batches, device), and remembered on disk: two runs of one seed then compute the same bits.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fedcore import __version__, trees
from fedcore.engines.base import Done, Work, failure, keep, one_thread
from fedcore.engines.chunks import Chunks, pack, row
from fedcore.engines.run_client import run_client
from fedcore.local import steps_run_by
from fedcore.method import evaluates
from fedcore.speed import forks
from fedcore.storage import cache
from fedcore.storage.rows import StateStore
from fedcore.types import Answers, ClientFunction, Reports, Tree, Weight

log = logging.getLogger("fedcore")

SIZES = (
    4,
    8,
    16,
    32,
    64,
    128,
    256,
)  # chunks to try, after 1 = one client after another without vmap
BUDGET = 1.0  # seconds of this thread after which no larger chunk is tried
WORTH = 0.97  # of the time of a smaller chunk, at most, for a larger one to be taken: it needs more memory
STEPS = 2  # local steps in a trial
HANDLING = 1e-3  # seconds that it takes to send a report, of however many clients, and to hand it on
PIECE = 8  # clients that a process takes at once where they go one by one
PROCESSES = "processes"  # beside the chunk sizes by function in what the engine chose


class Forms(NamedTuple):
    """The structures of what a client function gets and gives: a fork knows them, and only their leaves are sent."""

    down: pytree.TreeSpec
    state: pytree.TreeSpec
    up: pytree.TreeSpec
    new: pytree.TreeSpec


class Vectorised:
    """Client functions batched over clients, on all cores."""

    def __init__(
        self, work: Work, states: StateStore, chunk: int | None = None
    ) -> None:
        """`chunk` clients a batch, 1 = one after another; None = measure."""
        self.work, self.states, self.chunk = work, states, chunk
        self.choices: dict[str, Any] = {}
        self.processes = (
            torch.get_num_threads()
            if work.task.device.type == "cpu" and forks.possible()
            else 1
        )
        self._forms: dict[
            str, Forms
        ] = {}  # by client function, as soon as a client succeeded in it
        self._forks: forks.Forks | None = None
        self._forked: dict[str, Forms] = {}  # what the forks know of them
        self.late = 0

    @cached_property
    def _one(self) -> Chunks:
        """Made at the first use, when the model is what it will be."""
        return Chunks(self.work)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        return Answers(partial(self._each, fn, clients, down, t))

    def _each(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weight: Weight | None,
    ) -> Iterator[Reports]:
        if len(clients) == 0:
            return
        with one_thread() if self.work.task.device.type == "cpu" else nullcontext():
            if self._one.recorder is not None:
                self._one.recorder.begin_round(t)
            size = self._chunk(fn, clients.numpy(), down, t)
            pieces = self.chunks(fn, clients.numpy())
            if self.work.task.device.type == "cuda":
                yield from self._on_gpu(fn, pieces, down, t, size)
                return
            while pieces and (
                self.processes == 1
                or len(pieces) == 1
                or self._one.impure is not None
                or not self._known(fn, down)
            ):
                yield from self._keep(
                    fn, self._here(fn, pieces.pop(0), down, t, size, weight)
                )
            if pieces:
                yield from self._side_by_side(fn, pieces, down, t, size, weight)

    def chunks(self, fn: ClientFunction, clients: np.ndarray) -> list[list[int]]:
        """How these clients are split, the longest first, once the size is known."""
        size, steps = (
            self.chunk or self.choices[fn.__name__],
            self.work.steps(fn, clients),
        )
        order = np.argsort(-steps, kind="stable")
        processes = self.choices.setdefault(PROCESSES, self.processes)
        if size == 1:
            piece = min(max(len(clients) // (4 * processes), 1), PIECE)
            return [
                clients[order[i : i + piece]].tolist()
                for i in range(0, len(order), piece)
            ]
        chunks = processes * -(
            -len(clients) // (size * processes)
        )  # everyone has as many
        return pack(
            clients[order].tolist(), steps[order].tolist(), -(-len(clients) // chunks)
        )

    def _here(
        self,
        fn: ClientFunction,
        piece: list[int],
        down: Tree,
        t: int,
        size: int,
        weight: Weight | None,
    ) -> list[Done]:
        """A piece in this process."""
        states = self._states(piece)
        done = self._one.run(fn, piece, down, states, t, size, weight)
        if self.processes > 1 and (
            some := next((d for d in done if len(d.reports.clients)), None)
        ):
            self._forms[fn.__name__] = Forms(
                *map(
                    pytree.tree_structure, (down, states, some.reports.up, some.states)
                )
            )
        return done

    def _keep(self, fn: ClientFunction, done: list[Done]) -> Iterator[Reports]:
        return (keep(self.states, fn, d) for d in done)

    def _on_gpu(
        self, fn: ClientFunction, pieces: list[list[int]], down: Tree, t: int, size: int
    ) -> Iterator[Reports]:
        """Pieces one after another. The new states of one are stored when the next is on its way, so that nobody waits for them.

        Always whole updates: who sums them does so here and on the same GPU.
        """
        behind: list[tuple[Done, Callable[[], Tree]]] = []
        try:
            while pieces:
                piece = pieces.pop(0)
                if (states := self._states_if_room(piece)) is None:
                    self._store(fn, behind)
                    behind, half = [], len(piece) // 2
                    self._one.make_room(fn, half)
                    pieces[:0] = [piece[:half], piece[half:]]
                    continue
                done = self._one.run(fn, piece, down, states, t, size)
                self._store(fn, behind)
                behind = (
                    [] if evaluates(fn) else [(d, trees.fetch(d.states)) for d in done]
                )
                if (
                    len(done) > 1
                ):  # of single clients: each is stored before anybody hears of it
                    self._store(fn, behind)
                    behind = []
                yield from (d.reports for d in done)
        finally:
            self._store(fn, behind)

    def _states_if_room(self, piece: list[int]) -> Tree | None:
        try:
            return self._states(piece)
        except torch.OutOfMemoryError:
            if len(piece) == 1:
                raise
        return None

    def _store(
        self, fn: ClientFunction, behind: list[tuple[Done, Callable[[], Tree]]]
    ) -> None:
        for done, states in behind:
            keep(self.states, fn, done._replace(states=states()))

    # On all cores

    def _known(self, fn: ClientFunction, down: Tree) -> bool:
        forms = self._forms.get(fn.__name__)
        return forms is not None and forms.down == pytree.tree_structure(down)

    def _side_by_side(
        self,
        fn: ClientFunction,
        pieces: list[list[int]],
        down: Tree,
        t: int,
        size: int,
        weight: Weight | None,
    ) -> Iterator[Reports]:
        """Pieces on all processes; handed on in their order."""
        if (
            self._forks is None or self._forked != self._forms
        ):  # what a fork knows is what we knew then
            self.close()
            self._forked = dict(self._forms)
            self._forks = forks.Forks(self.processes, self._there)
        forms = self._forms[fn.__name__]
        jobs = (
            ((fn.__name__, piece, t, size, weight), trees.leaves(self._states(piece)))
            for piece in pieces
        )
        for piece, (found, tensors) in zip(
            pieces, self._forks.run(jobs, trees.leaves(down)), strict=True
        ):
            if isinstance(found, str) and self._one.recorder is not None:
                self._one.recorder.give_up(found)
            if found is None or self._one.impure is not None:
                yield from self._keep(fn, self._here(fn, piece, down, t, size, weight))
                continue
            rest, done = iter(tensors), []
            for clients, failed, is_summed in found:
                if failed:
                    done.append(Done(failure([], "")._replace(failed=failed), {}))
                else:
                    num_examples = next(rest)
                    sent = (forms.up, forms.new, *([forms.up] if is_summed else []))
                    up, new, *total = (
                        pytree.tree_unflatten(islice(rest, form.num_leaves), form)
                        for form in sent
                    )
                    done.append(
                        Done(
                            Reports(
                                torch.tensor(clients), up, num_examples, {}, *total
                            ),
                            new,
                        )
                    )
            yield from self._keep(fn, done)
        if self._one.impure is not None:
            self.close()

    def _there(
        self,
        job: tuple[str, list[int], int, int, Weight | None],
        down: list[Tensor],
        states: list[Tensor],
    ) -> tuple[Any, list[Tensor]]:
        """A piece in a fork: (clients, failures, whether summed) of all that is done, and its leaves; None where not as known."""
        name, piece, t, size, weight = job
        fn, forms = getattr(self.work.method, name), self._forms[name]
        found, tensors = [], []
        for reports, new in self._one.run(
            fn,
            piece,
            pytree.tree_unflatten(down, forms.down),
            pytree.tree_unflatten(states, forms.state),
            t,
            size,
            weight,
        ):
            if not reports.failed and (
                pytree.tree_structure(reports.up),
                pytree.tree_structure(new),
            ) != (forms.up, forms.new):
                return None, []
            found.append(
                (
                    reports.clients.tolist(),
                    dict(reports.failed),
                    reports.total is not None,
                )
            )
            if not reports.failed:
                tensors += [
                    reports.num_examples,
                    *trees.leaves(reports.up),
                    *trees.leaves(new),
                ]
                tensors += [] if reports.total is None else trees.leaves(reports.total)
        if self._one.impure is not None:
            return self._one.impure, []
        return found, tensors

    def _states(self, clients: list[int]) -> Tree:
        return trees.to(self.states.gather(clients), self.work.task.device)

    # Calibration

    def _chunk(self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int) -> int:
        if self.chunk is not None:
            return self.chunk
        name = fn.__name__
        if name not in self.choices:
            key = self._key(fn, ids, down)
            known = cache.load(key)
            if known is None:
                try:
                    size, measured = self._measure(fn, ids, down, t)
                finally:
                    if self._one.graphs is not None:
                        self._one.graphs.clear()  # of trials, which have fewer steps
                if measured:
                    cache.save(key, chunk=np.array(size))
                    known = cache.load(
                        key
                    )  # of two runs that measured at once, both take what was written last
            self.choices[name] = int(known["chunk"]) if known else size
        return int(self.choices[name])

    def _key(self, fn: ClientFunction, ids: np.ndarray, down: Tree) -> str:
        data = self.work.task.data
        facts = {
            "function": f"{type(self.work.method).__module__}.{fn.__qualname__}",
            "settings": [
                self.work.method.s.model_dump(mode="json"),
                self.work.method.finetuning.model_dump(mode="json"),
            ],
            "model": str(self.work.task.model),
            "down": [
                (path, list(x.shape), str(x.dtype))
                for path, x in trees.flatten(down).items()
            ],
            "batch": [list(data.x.shape[1:]), self.work.local.model_dump(mode="json")],
            "clients": 1 << len(ids).bit_length(),
            "machine": [
                str(self.work.task.device),
                platform.processor(),
                os.cpu_count(),
                torch.get_num_threads(),
                torch.__version__,
                __version__,
            ],
        }
        return cache.key_of("chunk", facts)

    def _measure(
        self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int
    ) -> tuple[int, bool]:
        """(chunk size with the least time a client, whether it was measured), on the first clients of this round, a few steps each.

        What a client raises is no measurement: it may be the client's own fault, which the loop will name.
        """
        if len(ids) == 1:
            return 1, False
        ids = ids[np.argsort(-self.work.steps(fn, ids), kind="stable")]
        if noisy := self._one.noisy:
            log.warning(
                "%s draws for each client on its own: clients run one after another",
                type(noisy[0]).__name__,
            )
            return 1, True
        try:
            best, best_time = 1, self._trial(fn, ids[:2], down, t, batched=False)
        except Exception:
            return 1, False
        start = time.thread_time()  # without what PyTorch imports at its first gradient
        sizes = {s for s in SIZES if s <= max(len(ids), SIZES[0])}
        if self.work.task.device.type == "cuda" and len(ids) <= SIZES[-1]:
            sizes.add(len(ids))  # there is one process: the whole cohort may be a chunk
        for size in sorted(sizes):
            try:
                seconds = self._trial(fn, ids[:size], down, t, batched=True)
            except torch.OutOfMemoryError:
                break
            except Exception as e:
                reason = (
                    str(e).strip().splitlines()[0]
                    if str(e).strip()
                    else type(e).__name__
                )
                log.warning(
                    "%s cannot be batched over clients (%s); they run one after another",
                    fn.__name__,
                    reason,
                )
                return 1, False
            if seconds < WORTH * best_time:
                best, best_time = size, seconds
            elif seconds > 1.3 * best_time or time.thread_time() - start > BUDGET:
                break
        return best, True

    def _trial(
        self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int, batched: bool
    ) -> float:
        """Seconds a client, the best of several tries."""
        chunk = ids.tolist()
        few = STEPS * self.work.passes(fn)
        states = self._states(chunk)
        # On a CPU this thread's own time: what else runs on the machine does not choose for us.
        clock = (
            time.thread_time
            if self.work.task.device.type == "cpu"
            else time.perf_counter
        )
        times = []
        for _ in range(
            5
        ):  # the first two record, and compare the recording with what it stands for
            begin = clock()
            batches = trees.map(lambda x: x[:, :few], self.work.batches(fn, chunk, t))
            with steps_run_by(self._one.recorder):
                if batched:
                    self._one.batched(fn, down, states, batches, t)
                else:
                    for i in range(len(chunk)):
                        run_client(
                            fn,
                            self.work.task,
                            self.work.now(t),
                            down,
                            row(states, i),
                            trees.at(batches, i),
                        )
            if self.work.task.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((clock() - begin) / len(chunk))
        return min(times) + HANDLING / (len(chunk) if batched else 1)

    def describe(self) -> str:
        sizes = {name: n for name, n in self.choices.items() if name != PROCESSES}
        chosen = ", ".join(
            f"{name} {'one by one' if n == 1 else f'{n} at a time'}"
            for name, n in sizes.items()
        )
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"vectorised on {self.work.task.device}{processes}" + (
            f" ({chosen})" if chosen else ""
        )

    def close(self) -> None:
        if self._forks is not None:
            self._forks.close()
            self._forks = None
