"""Methods and tasks for tests: they fail, wait, or refuse to be batched."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fedcore.strategies.scaffold import Scaffold, Server
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.local import full_gradient, local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.metrics import squared_error
from fedcore.task import Task
from fedcore.tasks import TASKS
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = 0.05


class Guided(NamedTuple):
    params: Params
    c: Params


class Two(Method[Settings]):
    """Two kinds of work in a round: full gradients, then training corrected by them."""

    @on_client(data="all")
    def slope(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Params, Stateless]:
        return full_gradient(task.loss, down.params, batches)[0], state

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Guided, state: Stateless, batches: Batches
    ) -> tuple[Model, Stateless]:
        y, _, _ = local_sgd(
            task.loss, down.params, batches, self.s.local_lr, correction=down.c
        )
        return Model(trees.sub(y, down.params)), state

    def round(self, server: Model, r: Round) -> Model:
        gradient = r.mean(self.slope, r.cohort, server).value
        down = Guided(server.params, trees.scale(gradient, 0.5))
        mean = r.mean(self.train, r.cohort, down).value
        return Model(trees.add(server.params, mean.params))


class Weather(NamedTuple):
    delta: Params
    seen: Tensor


class BadWeather(Method[Settings]):
    """Clients whose examples start with the marks 666 and 667 raise, or send NaN."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Weather, Stateless]:
        first = batches.x.flatten()[0]
        if not torch._C._functorch.is_batchedtensor(first) and first == 666:
            raise ValueError("this client is broken")
        y, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        delta = trees.map(
            lambda a, b: torch.where(first == 667, torch.nan, a - b), y, down.params
        )
        return Weather(delta, loss), state

    def round(self, server: Model, r: Round) -> Model:
        return Model(
            trees.add(
                server.params,
                r.mean(self.train, r.cohort, server).value.delta,
            )
        )


class NoBatching(Method[Settings]):
    """A client function that vmap cannot take: it asks a tensor for its value."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Model, Stateless]:
        y, steps, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        scale = 1.0 if steps.item() > 0 else 0.0
        return Model(trees.scale(trees.sub(y, down.params), scale)), state

    def round(self, server: Model, r: Round) -> Model:
        return Model(
            trees.add(
                server.params,
                r.mean(self.train, r.cohort, server).value.params,
            )
        )


class Gated(Scaffold):
    """SCAFFOLD that begins a round when $FEDCORE_TEST_GATE lets it.

    The file holds the number of rounds that may begin. So a test stops a run in the
    middle of a round, however busy the machine is.
    """

    def round(self, server: Server, r: Round) -> Server:
        gate = Path(os.environ["FEDCORE_TEST_GATE"])
        while int(gate.read_text()) <= r.t:
            time.sleep(0.01)
        return super().round(server, r)


def crashing(e: Experiment) -> Task:
    """Least squares whose process kills itself.

    It does so when training examples are read the $FEDCORE_TEST_CRASH-th time.
    """
    task = layered(e) if e.lora.rank else TASKS["least-squares"](e)
    left = int(os.environ.get("FEDCORE_TEST_CRASH", "0"))
    rows = task.data.rows

    def counted(client: int, data: str) -> np.ndarray:
        nonlocal left
        left -= data != "test"
        if left == 0 and "FEDCORE_TEST_CRASH" in os.environ:
            os.kill(os.getpid(), 9)
        return rows(client, data)

    task.data.rows = counted  # type: ignore[method-assign]
    return task


def layered(e: Experiment) -> Task:
    """Least squares through two linear layers, so that there is something to split."""
    task = TASKS["least-squares"](e)
    first, last = nn.Linear(task.data.x.shape[1], 4), nn.Linear(4, 1)
    return Task(nn.Sequential(first, last), task.data, loss=squared_error, metrics={})


def with_an_empty_client(e: Experiment) -> Task:
    """Least squares of 11 clients; the twelfth has no example."""
    task = TASKS["least-squares"](e.model_copy(update={"population": 11}))
    data = task.data
    offsets = np.append(data.offsets, data.offsets[-1])
    task.data = FederatedData(Examples(data.x, data.y), data.test, data.order, offsets)
    return task
