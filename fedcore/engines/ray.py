"""Clients on Ray actors: all cores, several GPUs, or a cluster that `ray start` made.

Every worker holds the task once (its arrays shared, not copied, on one machine), receives client ids and one broadcast of what the
server sends, and runs clients exactly as `sequential` does; reports are handed on one client at a time, in ascending order. So the
result has the bits of `sequential`, whatever the number of workers.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Work, failure, one_thread, report
from fedcore.errors import RunError
from fedcore.method import evaluates
from fedcore.state import StateStore
from fedcore.types import ClientFunction, Reports, Tree

if TYPE_CHECKING:
    from fedcore.config import EngineSettings

PIECES = 4  # per worker: enough to even out ragged clients, few enough to cost nothing

Answer = tuple[Tree, Tree] | str
"""(up, new state) of one client, or why there is none."""


class Worker:
    """The actor: a resident task, and the same work that `sequential` does."""

    def __init__(self, work: list[Any], device: str) -> None:
        import ray

        self.work: Work = ray.get(work[0])
        self.work.task.to(torch.device(device))

    def run(self, name: str, clients: list[int], down: Tree, states: list[Tree], t: int) -> tuple[list[Answer], list[float]]:
        """Answers, and the seconds that each client took."""
        fn = getattr(self.work.method, name)
        device, cpu = self.work.task.device, torch.device("cpu")
        down = trees.to(down, device)
        answers: list[Answer] = []
        seconds: list[float] = []
        for client, state in zip(clients, states, strict=True):
            begin = time.perf_counter()
            try:
                with one_thread():
                    up, new = self.work.one(fn, client, down, trees.to(state, device), t)
                answers.append((trees.to(up, cpu), {} if evaluates(fn) else trees.to(new, cpu)))
            except Exception as e:  # a client may fail in any way; the round goes on without it
                answers.append(next(iter(failure([client], e).failed.values())))
            seconds.append(time.perf_counter() - begin)
        return answers, seconds


class Ray:
    """A pool of actors, started at the first round."""

    def __init__(self, work: Work, states: StateStore, settings: EngineSettings, device: torch.device) -> None:
        self.work, self.states, self.device = work, states, device
        self.choices: dict[str, Any] = {}
        self.late = 0
        self.gpus = (settings.gpus_per_worker or 1.0) if device.type == "cuda" else 0.0
        self._asked = settings.workers
        self._actors: list[Any] = []
        self._seconds: dict[tuple[str, int], float] = {}  # that a client's work took when it was last done
        self._started_ray = False

    def _start(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if not ray.is_initialized():
                asked = max(self._asked or 0, os.cpu_count() or 1) if "RAY_ADDRESS" not in os.environ else None
                ray.init(num_cpus=asked, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
                self._started_ray = True
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        workers = self._asked or int(resources.get("GPU", 0) / self.gpus if self.gpus else resources.get("CPU", 1))
        if workers < 1:
            raise RunError(
                f"engine.gpus_per_worker = {self.gpus}: Ray sees {resources.get('GPU', 0):g} GPUs, too few for one worker"
            )
        self._work = ray.put(self.work)  # held here, so that a worker that is started again finds it
        self._actors = [self._actor() for _ in range(workers)]

    def _actor(self) -> Any:
        import ray

        return ray.remote(num_cpus=1, num_gpus=self.gpus)(Worker).remote([self._work], self.device.type)

    def each(self, fn: ClientFunction, clients: Tensor, down: Tree, t: int) -> Iterator[Reports]:
        if not self._actors:
            self._start()
        import ray

        name = fn.__name__
        steps = self.work.steps(fn, clients.numpy())
        pieces = _pieces(clients.numpy(), self._expected(name, clients, steps), PIECES * len(self._actors))
        sent = ray.put(trees.to(down, torch.device("cpu")))
        todo, running = list(reversed(pieces)), {}
        answers: dict[int, Answer] = {}
        again: set[int] = set()  # clients whose worker died once

        def next_piece(actor: Any) -> None:
            if todo:
                piece = todo.pop()
                states = [self.states.get(i) for i in piece]
                running[actor.run.remote(name, piece, sent, states, t)] = (actor, piece)

        for actor in self._actors:
            next_piece(actor)
        for client in clients.tolist():  # in ascending order, each as soon as it and all before it are there
            while client not in answers:
                (done,), _ = ray.wait(list(running), num_returns=1)
                actor, piece = running.pop(done)
                try:
                    found, seconds = ray.get(done)
                    answers.update(zip(piece, found, strict=True))
                    self._seconds.update({(name, i): took for i, took in zip(piece, seconds, strict=True)})
                except ray.exceptions.RayError as e:
                    self._actors.remove(actor)
                    actor = self._actor()
                    self._actors.append(actor)
                    if again.isdisjoint(piece):  # client work is pure: it can simply be done again
                        again.update(piece)
                        todo.append(piece)
                    else:
                        reason = str(e).strip().splitlines()[0]
                        answers.update(dict.fromkeys(piece, f"error: the worker died: {reason}"))
                next_piece(actor)
            answer = answers.pop(client)
            if isinstance(answer, str):
                yield failure([client], answer)
                continue
            up, new = answer
            if not evaluates(fn):
                self.states.put([client], trees.map(lambda x: x[None], new))
            yield report(self.work, fn, client, trees.to(up, self.work.task.device))

    def _expected(self, name: str, clients: Tensor, steps: np.ndarray) -> np.ndarray:
        """Seconds of each client's work, [n]: as measured, or in proportion to its steps; without any measurement its steps."""
        known = np.array([self._seconds.get((name, i), np.nan) for i in clients.tolist()])
        measured = ~np.isnan(known)
        rate = known[measured].sum() / max(steps[measured].sum(), 1) if measured.any() else 1.0
        return np.where(measured, known, rate * steps)

    def describe(self) -> str:
        share = f", {self.gpus:g} GPU each" if self.gpus else ""
        return f"ray, {len(self._actors)} workers on {self.device}{share}" if self._actors else f"ray on {self.device}"

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
    piece_of = np.minimum((np.cumsum(heavy) - heavy) * count // heavy.sum(), count - 1).astype(int)
    pieces: dict[int, list[int]] = {}
    for client, piece in zip(order, piece_of.tolist(), strict=True):
        pieces.setdefault(piece, []).append(client)
    return list(pieces.values())
