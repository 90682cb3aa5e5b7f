"""FedVARP - variance reduction by last updates (Jhunjhunwala et al., UAI 2022, Alg. 1).

w_t  global parameters           w_i  local parameters    Delta_i = w_i - w_t
y_i  last Delta_i that arrived, 0 before the first        y = (1/N) sum_j y_j
S_t  clients whose update arrived      p_i  rate at which client i takes part
N  population

    v = y + (1/|S_t|) sum_{i in S_t} (Delta_i - y_i);   w_{t+1} = w_t + eta_s v;
    y_i <- Delta_i for i in S_t

Choice:  a round without updates moves along y, as the equation says (the code of the
         FedAU paper stands still there). The paper samples cohorts of one size; where
         clients take part at rates of their own, weighting = "known" puts 1 / (N p_i)
         in the place of 1/|S_t|, which keeps v unbiased.
Reduces: to FedAvg with weighting "participating" when everybody always takes part; with
         "known" it is FedStale at beta = 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.reports import Weight, equally
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta_c, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta_s, step size of the server")
    weighting: Literal["participating", "known"] = Field(
        "participating", description="1/|S_t|, or 1 / (N p_i) with the true p_i"
    )


class Server(NamedTuple):
    params: Params
    # Mean of the memory over the population; float64, because it is a running sum.
    y: Params


class Up(NamedTuple):
    delta: Params  # Delta_i
    loss: Tensor  # mean training loss, for the log


class Change(NamedTuple):
    delta: Params  # Delta_i - y_i, in float64
    weighed: Params | Stateless  # Delta_i - y_i, counted 1 / p_i with known rates
    loss: Tensor


class FedVARP(Method[Settings]):
    remembers = True
    buffered = True

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.zeros_like(params, torch.float64))

    def init_memory(self, params: Params) -> Params:
        return trees.zeros_like(params)  # y_i

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(w, down.params), loss), state

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered" and self.needs_rates():
            return (
                'method.weighting = "known" divides by N p_i, and a buffer has no such '
                'rates: set it to "participating"'
            )
        return super().refuses(setting)

    def needs_rates(self) -> bool:
        return self.s.weighting == "known"

    def news(self, up: Up, y: Params, num_examples: Tensor) -> tuple[Change, Params]:
        change = trees.sub(trees.double(up.delta), y)
        weighed = trees.sub(up.delta, y) if self.needs_rates() else Stateless()
        return Change(change, weighed, up.loss), up.delta  # y_i <- Delta_i

    def round(self, server: Server, r: Round) -> Server:
        weight: dict[str, Weight | Tensor] = {"delta": equally}
        if self.needs_rates():
            weight["weighed"] = 1 / r.known_rates()[r.cohort]
        down = Model(server.params)
        mean = r.mean(self.train, r.cohort, down, weight, self.news)
        news = mean.total.delta
        if self.needs_rates():
            fresh = trees.scale(mean.total.weighed, 1 / r.population)
        else:
            fresh = trees.scale(news, 1 / max(len(mean.clients), 1))
            fresh = trees.like(fresh, server.params)
        v = trees.add(trees.like(server.y, fresh), fresh)
        return Server(
            trees.axpy(self.s.server_lr, v, server.params),
            trees.axpy(1 / r.population, news, server.y),
        )
