"""Clients on Ray actors: all cores, several GPUs, or a cluster that `ray start` made.

Every worker holds the task once (its arrays shared, not copied, on one machine),
receives client ids and one broadcast of the server's message, and runs clients exactly
as `sequential` does; reports are handed on one client at a time, in ascending order. So
the result has the bits of `sequential`, whatever the number of workers. With
`engine.chunk` workers run chunks of so many clients as `vectorised` does: the same up
to rounding, and the same bits for any number of workers.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.checks.watch import Watch, put_values
from fedcore.engines.base import (
    Done,
    Work,
    added_done,
    failure,
    keep_states,
    one_thread,
    run_alone,
)
from fedcore.engines.chunks import Chunks, pack, row
from fedcore.engines.readout import Readout
from fedcore.errors import RunError
from fedcore.method import evaluates
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

if TYPE_CHECKING:
    from fedcore.config import EngineSettings

log = logging.getLogger("fedcore")

# Per worker: enough to even out ragged clients, few enough to cost nothing.
PIECES = 4
CPU = torch.device("cpu")


class Unit(NamedTuple):
    """Clients that are one batch, or a single one."""

    clients: list[int]
    states: Tree  # stacked
    weights: Tensor | None  # [n], where only the weighted sum is wanted


class Worker:
    """The actor: a resident task, and the work that other engines do in process."""

    def __init__(self, work: list[Any], device: str, chunk: int) -> None:
        import ray

        self.work: Work = ray.get(work[0])
        self.work.task.to(torch.device(device))
        self.chunks = Chunks(self.work) if chunk > 1 else None

    def put(self, changes: dict[str, Any]) -> None:
        """Take these values, by place, for those that model and loss read."""
        put_values(self.work.task, changes)
        if self.chunks is not None:  # recordings hold the old ones
            self.chunks = Chunks(self.work)

    def run(
        self, name: str, units: list[Unit], down: Tree, t: int
    ) -> tuple[list[list[Done]], list[float]]:
        """The clients of each unit, done, and the seconds that each unit took."""
        down = trees.to(down, self.work.task.device)
        if self.chunks is not None:
            self.chunks.begin_round(t)
        done, seconds = [], []
        for unit in units:
            begin = time.perf_counter()
            done.append(self._run_unit(name, unit, down, t))
            seconds.append(time.perf_counter() - begin)
        return done, seconds

    def _run_unit(self, name: str, unit: Unit, down: Tree, t: int) -> list[Done]:
        fn, device = getattr(self.work.method, name), self.work.task.device
        clients, weights = unit.clients, unit.weights
        states = trees.to(unit.states, device)
        with one_thread() if device.type == "cpu" else nullcontext():
            if self.chunks is None:
                state = row(states, 0)
                done = [run_alone(self.work, fn, clients[0], down, state, t)]
            else:
                size = len(clients)
                done = self.chunks.run(fn, clients, down, states, t, size, weights)
        return [_on_cpu(d, keeps_states=not evaluates(fn)) for d in done]


def _on_cpu(done: Done, keeps_states: bool) -> Done:
    """The same, ready to be sent."""
    states = trees.to(done.states, CPU) if keeps_states else {}
    total = None if done.total is None else trees.to(done.total, CPU)
    return Done(_moved(done.reports, CPU), states, total)


def _moved(reports: Reports, device: torch.device) -> Reports:
    return Reports(
        reports.clients,
        trees.to(reports.up, device),
        reports.num_examples.to(device),
        dict(reports.failed),
    )


class Ray:
    """A pool of actors, started at the first round."""

    def __init__(
        self,
        work: Work,
        states: StateStore,
        settings: EngineSettings,
        device: torch.device,
    ) -> None:
        self.work, self.states, self.device = work, states, device
        self.choices: dict[str, Any] = {}
        self.late = 0
        self.chunk = settings.chunk or 1
        share = settings.gpus_per_worker or 1.0
        self.gpus = share if device.type == "cuda" else 0.0
        self._requested_workers = settings.workers
        self._shared_work: Any = None  # held, so that a worker started anew finds it
        self._actors: list[Any] = []
        # Seconds that a client's work took when it was last done.
        self._seconds: dict[tuple[str, int], float] = {}
        self._started_ray = False
        self._watch: Watch | None = None
        self._changes: dict[str, Any] = {}  # values since workers got the task

    def _start(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if not ray.is_initialized():
                cpus = None
                if "RAY_ADDRESS" not in os.environ:
                    cpus = max(self._requested_workers or 0, os.cpu_count() or 1)
                ray.init(
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                self._started_ray = True
        cluster: Any = ray
        resources: dict[str, float] = cluster.cluster_resources()
        fitting = resources.get("CPU", 1)
        if self.gpus:
            fitting = resources.get("GPU", 0) / self.gpus
        workers = self._requested_workers or int(fitting)
        if workers < 1:
            raise RunError(
                f"engine.gpus_per_worker = {self.gpus}: Ray sees "
                f"{resources.get('GPU', 0):g} GPUs, too few for one worker"
            )
        self._shared_work = ray.put(self.work)
        self._watch = Watch(self.work.task)
        self._actors = [self._actor() for _ in range(workers)]

    def _share_changes(self) -> None:
        """Send workers the values that have changed, which their copies hold."""
        import ray

        change = None if self._watch is None else self._watch.change()
        if self._watch is None or change is None:
            return
        if not self._changes:
            log.warning(
                "%s: workers are told of such changes; a resumed run begins with the "
                "first value",
                change,
            )
        self._changes |= self._watch.latest
        ray.get([actor.put.remote(self._changes) for actor in self._actors])

    def _actor(self) -> Any:
        import ray

        actor = ray.remote(num_cpus=1, num_gpus=self.gpus)(Worker)
        worker: Any = actor.remote([self._shared_work], self.device.type, self.chunk)
        if self._changes:
            worker.put.remote(self._changes)
        return worker

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
        """Clients that are done, in the round's order; their states are stored."""
        if not self._actors:
            self._start()
        self._share_changes()
        import ray

        ids = clients.numpy()
        steps = self.work.steps(fn, ids)
        if self.chunk > 1:
            order = np.argsort(-steps, kind="stable")
            groups = pack(ids[order].tolist(), steps[order].tolist(), self.chunk)
            pieces = [[place] for place in range(len(groups))]
        else:
            groups = [[client] for client in ids.tolist()]
            expected = self._expected_seconds(fn.__name__, clients, steps)
            pieces = _pieces(expected, PIECES * len(self._actors))
        sent = ray.put(trees.to(down, CPU))

        def submit(actor: Any, piece: list[int]) -> Any:
            units = [self._unit(fn, groups[place], weight) for place in piece]
            return actor.run.remote(fn.__name__, units, sent, t)

        dispatch = Dispatch(self, fn.__name__, groups, pieces, submit)
        for unit in dispatch.in_order():
            for done in unit:
                reports = _moved(done.reports, self.work.task.device)
                done = done._replace(reports=reports)
                keep_states(self.states, fn, done)
                yield done

    def _unit(
        self, fn: ClientFunction, clients: list[int], weight: Weight | None
    ) -> Unit:
        weights = None
        if weight is not None and self.chunk > 1:
            num_examples = self.work.num_examples(fn, clients)
            weights = weight(torch.tensor(clients), num_examples)
        return Unit(clients, self.states.gather(clients), weights)

    def _expected_seconds(
        self, name: str, clients: Tensor, steps: np.ndarray
    ) -> np.ndarray:
        """Seconds of each client's work, [n]: as measured, or in proportion to steps.

        Without any measurement the steps themselves.
        """
        keys = [(name, client) for client in clients.tolist()]
        seconds = np.array([self._seconds.get(key, np.nan) for key in keys])
        is_measured = ~np.isnan(seconds)
        rate = 1.0
        if is_measured.any():
            rate = seconds[is_measured].sum() / max(steps[is_measured].sum(), 1)
        return np.where(is_measured, seconds, rate * steps)

    def actors(self) -> list[Any]:
        """The workers that are alive."""
        return list(self._actors)

    def replace(self, actor: Any) -> Any:
        """A new worker in the place of one that died."""
        self._actors.remove(actor)
        self._actors.append(self._actor())
        return self._actors[-1]

    def measured(self, name: str, clients: list[int], seconds: float) -> None:
        """Note how long the work of a single client took."""
        if self.chunk == 1:
            self._seconds[name, clients[0]] = seconds

    def describe(self) -> str:
        if not self._actors:
            return f"ray on {self.device}"
        share = f", {self.gpus:g} GPU each" if self.gpus else ""
        chunks = f", chunks of {self.chunk}" if self.chunk > 1 else ""
        return f"ray, {len(self._actors)} workers on {self.device}{share}{chunks}"

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False


class Dispatch:
    """The pieces of one call, on all workers."""

    def __init__(
        self,
        pool: Ray,
        function: str,
        groups: list[list[int]],
        pieces: list[list[int]],
        submit: Callable[[Any, list[int]], Any],
    ) -> None:
        """`groups` are the clients of each unit, `pieces` places in it.

        `submit(actor, piece)` sends work and returns Ray's reference to its result.
        """
        self._pool, self._function, self._groups = pool, function, groups
        self._submit = submit
        self._waiting = list(reversed(pieces))
        self._running: dict[Any, tuple[Any, list[int]]] = {}
        self._done: dict[int, list[Done]] = {}
        self._lost_once: set[int] = set()  # units whose worker died

    def in_order(self) -> Iterator[list[Done]]:
        """Each unit as soon as it and all before it are done."""
        for actor in self._pool.actors():
            self._next_piece(actor)
        for place in range(len(self._groups)):
            while place not in self._done:
                self._receive()
            yield self._done.pop(place)

    def _next_piece(self, actor: Any) -> None:
        if self._waiting:
            piece = self._waiting.pop()
            self._running[self._submit(actor, piece)] = (actor, piece)

    def _receive(self) -> None:
        import ray

        (ended,), _ = ray.wait(list(self._running), num_returns=1)
        actor, piece = self._running.pop(ended)
        try:
            units, seconds = ray.get(ended)
        except ray.exceptions.RayError as error:
            actor = self._pool.replace(actor)
            self._lost(piece, error)
        else:
            for place, done, took in zip(piece, units, seconds, strict=True):
                self._done[place] = done
                self._pool.measured(self._function, self._groups[place], took)
        self._next_piece(actor)

    def _lost(self, piece: list[int], error: Exception) -> None:
        """A worker died: its work is pure, and is done again, once."""
        if self._lost_once.isdisjoint(piece):
            self._lost_once.update(piece)
            self._waiting.append(piece)
            return
        first_line = str(error).strip().splitlines()[0]
        reason = f"error: the worker died: {first_line}"
        for place in piece:
            self._done[place] = [Done(failure(self._groups[place], reason), {})]


def _pieces(work: np.ndarray, count: int) -> list[list[int]]:
    """Places in about `count` pieces of like work.

    The heaviest come first, so that no long one starts last.
    """
    if len(work) == 0:
        return []
    order = np.argsort(-work, kind="stable").tolist()
    # Every client costs something.
    heavy = np.sort(work)[::-1] + max(float(work.mean()), 1e-9) / 100
    before = np.cumsum(heavy) - heavy
    numbers = np.minimum(before * count // heavy.sum(), count - 1).astype(int)
    pieces: dict[int, list[int]] = {}
    for place, number in zip(order, numbers.tolist(), strict=True):
        pieces.setdefault(number, []).append(place)
    return list(pieces.values())
