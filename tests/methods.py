"""Methods that only tests use: what the shipped ones do not exercise yet (client state, two calls in a round, failing clients)."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.local import full_gradient, local_sgd
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Round, Stateless


class Settings(MethodSettings):
    local_lr: float = 0.05
    wait: float = 0.0  # seconds a round, so that a test can kill it in the middle


class Up(NamedTuple):
    delta: Params
    dc: Params


class Server(NamedTuple):
    params: Params
    c: Params


class Scaffold(Method[Settings]):
    """SCAFFOLD (Karimireddy et al. 2020, option II): a client state of the size of the model."""

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.zeros_like(params))

    def init_client(self, params: Params) -> Params:
        return trees.zeros_like(params)

    @on_client
    def train(self, task: Task, t: Tensor, down: Server, state: Params, batches: Batches) -> tuple[Up, Params]:
        drift = trees.sub(down.c, state)
        y, steps, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr, drift)
        delta = trees.sub(y, down.params)
        slope = trees.scale(delta, -1 / (steps.clamp(min=1) * self.s.local_lr))
        c_new = trees.sub(slope, drift)
        return Up(delta, trees.sub(c_new, state)), c_new

    def round(self, server: Server, r: Round) -> Server:
        time.sleep(self.s.wait)
        mean = trees.uniform_mean(r.each(self.train, r.cohort, server))
        return Server(trees.add(server.params, mean.delta), trees.axpy(len(r.cohort) / r.population, mean.dc, server.c))


class Two(Method[Settings]):
    """Two kinds of work in one round: the cohort's full gradient, then training corrected by it."""

    @on_client(data="all")
    def slope(self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches) -> tuple[Params, Stateless]:
        return full_gradient(task.loss, down.params, batches)[0], state

    @on_client
    def train(self, task: Task, t: Tensor, down: Server, state: Stateless, batches: Batches) -> tuple[Model, Stateless]:
        y, _, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr, correction=down.c)
        return Model(trees.sub(y, down.params)), state

    def round(self, server: Model, r: Round) -> Model:
        gradient = trees.weighted_mean(r.each(self.slope, r.cohort, server))
        down = Server(server.params, trees.scale(gradient, 0.5))
        mean = trees.weighted_mean(r.each(self.train, r.cohort, down))
        return Model(trees.add(server.params, mean.params))


class Weather(NamedTuple):
    delta: Params
    seen: Tensor


class BadWeather(Method[Settings]):
    """Clients whose examples start with the marks 666 and 667 raise, or send NaN."""

    @on_client
    def train(self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches) -> tuple[Weather, Stateless]:
        first = batches.x.flatten()[0]
        if not torch._C._functorch.is_batchedtensor(first) and first == 666:
            raise ValueError("this client is broken")
        y, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        delta = trees.map(lambda a, b: torch.where(first == 667, torch.nan, a - b), y, down.params)
        return Weather(delta, loss), state

    def round(self, server: Model, r: Round) -> Model:
        return Model(trees.add(server.params, trees.weighted_mean(r.each(self.train, r.cohort, server)).delta))


class NoBatching(Method[Settings]):
    """A client function that vmap cannot take: it asks a tensor for its value."""

    @on_client
    def train(self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches) -> tuple[Model, Stateless]:
        y, steps, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        scale = 1.0 if steps.item() > 0 else 0.0
        return Model(trees.scale(trees.sub(y, down.params), scale)), state

    def round(self, server: Model, r: Round) -> Model:
        return Model(trees.add(server.params, trees.weighted_mean(r.each(self.train, r.cohort, server)).params))


class Crash(Scaffold):
    """Kills its own process, with no chance to tidy up, at the round in $FEDCORE_TEST_CRASH."""

    def round(self, server: Server, r: Round) -> Server:
        if str(r.t) == os.environ.get("FEDCORE_TEST_CRASH"):
            for _ in r.each(self.train, r.cohort[: len(r.cohort) // 2], server):
                pass
            os.kill(os.getpid(), 9)
        return super().round(server, r)
