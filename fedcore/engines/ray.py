"""Clients on Ray actors: all cores, several GPUs, or a cluster that `ray start` made.

Every worker holds the task once (its arrays shared, not copied, on one machine), receives client ids and one broadcast of what the
server sends, and runs clients exactly as `sequential` does; reports are handed on one client at a time, in ascending order. So the
result has the bits of `sequential`, whatever the number of workers. With `engine.chunk` workers run chunks of so many clients as
`vectorised` does: the same up to rounding, and the same bits for any number of workers.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Done, Work, alone, failure, keep, one_thread
from fedcore.engines.chunks import Chunks, pack, row
from fedcore.errors import RunError
from fedcore.method import evaluates
from fedcore.storage.rows import StateStore
from fedcore.types import Answers, ClientFunction, Reports, Tree, Weight

if TYPE_CHECKING:
    from fedcore.config import EngineSettings

PIECES = 4  # per worker: enough to even out ragged clients, few enough to cost nothing


class Worker:
    """The actor: a resident task, and the same work that other engines do in one process."""

    def __init__(self, work: list[Any], device: str, chunk: int) -> None:
        import ray

        self.work: Work = ray.get(work[0])
        self.work.task.to(torch.device(device))
        self.chunks = Chunks(self.work) if chunk > 1 else None

    def run(
        self,
        name: str,
        units: list[list[int]],
        down: Tree,
        states: list[Tree],
        t: int,
        weight: Weight | None,
    ) -> tuple[list[list[Done]], list[float]]:
        """What is done of each unit, clients that are one batch, or a single one; and the seconds that each unit took."""
        fn, device = getattr(self.work.method, name), self.work.task.device
        down = trees.to(down, device)
        found: list[list[Done]] = []
        seconds: list[float] = []
        for unit, state in zip(units, states, strict=True):
            begin = time.perf_counter()
            state = trees.to(state, device)
            with one_thread() if device.type == "cpu" else nullcontext():
                if self.chunks is not None:
                    done = self.chunks.run(fn, unit, down, state, t, len(unit), weight)
                else:
                    done = [alone(self.work, fn, unit[0], down, row(state, 0), t)]
            cpu = torch.device("cpu")
            found.append(
                [
                    Done(
                        _to(d.reports, cpu),
                        {} if evaluates(fn) else trees.to(d.states, cpu),
                    )
                    for d in done
                ]
            )
            seconds.append(time.perf_counter() - begin)
        return found, seconds


def _to(r: Reports, device: torch.device) -> Reports:
    """On another device, and ready to be sent."""
    total = None if r.total is None else trees.to(r.total, device)
    return Reports(
        r.clients,
        trees.to(r.up, device),
        r.num_examples.to(device),
        dict(r.failed),
        total,
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
        self.gpus = (settings.gpus_per_worker or 1.0) if device.type == "cuda" else 0.0
        self._asked = settings.workers
        self._actors: list[Any] = []
        self._seconds: dict[
            tuple[str, int], float
        ] = {}  # that a client's work took when it was last done
        self._started_ray = False

    def _start(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if not ray.is_initialized():
                asked = (
                    max(self._asked or 0, os.cpu_count() or 1)
                    if "RAY_ADDRESS" not in os.environ
                    else None
                )
                ray.init(
                    num_cpus=asked,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                self._started_ray = True
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        workers = self._asked or int(
            resources.get("GPU", 0) / self.gpus
            if self.gpus
            else resources.get("CPU", 1)
        )
        if workers < 1:
            raise RunError(
                f"engine.gpus_per_worker = {self.gpus}: Ray sees {resources.get('GPU', 0):g} GPUs, too few for one worker"
            )
        self._work = ray.put(
            self.work
        )  # held here, so that a worker that is started again finds it
        self._actors = [self._actor() for _ in range(workers)]

    def _actor(self) -> Any:
        import ray

        return ray.remote(num_cpus=1, num_gpus=self.gpus)(Worker).remote(
            [self._work], self.device.type, self.chunk
        )

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
        if not self._actors:
            self._start()
        import ray

        name, ids = fn.__name__, clients.numpy()
        steps = self.work.steps(fn, ids)
        if self.chunk > 1:
            order = np.argsort(-steps, kind="stable")
            units = pack(ids[order].tolist(), steps[order].tolist(), self.chunk)
            pieces = [[i] for i in range(len(units))]
        else:
            units = [[i] for i in ids.tolist()]
            pieces = _pieces(
                np.arange(len(ids)),
                self._expected(name, clients, steps),
                PIECES * len(self._actors),
            )
        sent = ray.put(trees.to(down, torch.device("cpu")))
        todo, running = list(reversed(pieces)), {}
        found: dict[int, list[Done]] = {}
        again: set[int] = set()  # units whose worker died once

        def next_piece(actor: Any) -> None:
            if todo:
                piece = todo.pop()
                work = [units[i] for i in piece]
                states = [self.states.gather(unit) for unit in work]
                running[actor.run.remote(name, work, sent, states, t, weight)] = (
                    actor,
                    piece,
                )

        for actor in self._actors:
            next_piece(actor)
        for number in range(
            len(units)
        ):  # each as soon as it and all before it are there
            while number not in found:
                (ended,), _ = ray.wait(list(running), num_returns=1)
                actor, piece = running.pop(ended)
                try:
                    done, seconds = ray.get(ended)
                    found.update(zip(piece, done, strict=True))
                    if self.chunk == 1:
                        self._seconds.update(
                            {
                                (name, units[i][0]): took
                                for i, took in zip(piece, seconds, strict=True)
                            }
                        )
                except ray.exceptions.RayError as e:
                    self._actors.remove(actor)
                    actor = self._actor()
                    self._actors.append(actor)
                    if again.isdisjoint(
                        piece
                    ):  # client work is pure: it can simply be done again
                        again.update(piece)
                        todo.append(piece)
                    else:
                        reason = (
                            f"error: the worker died: {str(e).strip().splitlines()[0]}"
                        )
                        found.update(
                            {i: [Done(failure(units[i], reason), {})] for i in piece}
                        )
                next_piece(actor)
            for d in found.pop(number):
                yield keep(
                    self.states,
                    fn,
                    Done(_to(d.reports, self.work.task.device), d.states),
                )

    def _expected(self, name: str, clients: Tensor, steps: np.ndarray) -> np.ndarray:
        """Seconds of each client's work, [n]: as measured, or in proportion to its steps; without any measurement its steps."""
        known = np.array(
            [self._seconds.get((name, i), np.nan) for i in clients.tolist()]
        )
        measured = ~np.isnan(known)
        rate = (
            known[measured].sum() / max(steps[measured].sum(), 1)
            if measured.any()
            else 1.0
        )
        return np.where(measured, known, rate * steps)

    def describe(self) -> str:
        share = (f", {self.gpus:g} GPU each" if self.gpus else "") + (
            f", chunks of {self.chunk}" if self.chunk > 1 else ""
        )
        return (
            f"ray, {len(self._actors)} workers on {self.device}{share}"
            if self._actors
            else f"ray on {self.device}"
        )

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False


def _pieces(clients: np.ndarray, work: np.ndarray, count: int) -> list[list[int]]:
    """Clients in about `count` pieces of like work, the heaviest clients first, so that no long one starts last."""
    order = clients[np.argsort(-work, kind="stable")].tolist()
    heavy = np.sort(work)[::-1] + max(float(work.mean()), 1e-9) / 100  # nobody is free
    piece_of = np.minimum(
        (np.cumsum(heavy) - heavy) * count // heavy.sum(), count - 1
    ).astype(int)
    pieces: dict[int, list[int]] = {}
    for client, piece in zip(order, piece_of.tolist(), strict=True):
        pieces.setdefault(piece, []).append(client)
    return list(pieces.values())
