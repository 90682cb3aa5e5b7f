"""MIFA - memory-augmented impatient federated averaging (Gu et al., NeurIPS 2021).

Algorithm 1.

w_t  global parameters           w_i  local parameters    Delta_i = w_i - w_t
G_i  last Delta_i that arrived, 0 before the first
N  population                    S_t  clients whose update arrived

    G_i <- Delta_i for i in S_t, first;   w_{t+1} = w_t + eta_s (1/N) sum_j G_j

Choice:  the paper lets every client take part in its first round; here G starts at zero
         and the divisor is N from the start, as in the comparison of Wang and Ji (ICLR
         2024), so that it starts slowly. A round without updates moves along the
         memory.
Reduces: to FedAvg with weighting "participating" when everybody always takes part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import equally
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta_s, step size of the server")


class Server(NamedTuple):
    params: Params
    # Mean of the memory over the population; float64, because it is a running sum.
    g: Params


class Up(NamedTuple):
    delta: Params  # Delta_i
    loss: Tensor  # mean training loss, for the log


class Mifa(Method[Settings]):
    remembers = True
    buffered = True

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.zeros_like(params, torch.float64))

    def init_memory(self, params: Params) -> Params:
        return trees.zeros_like(params)  # G_i

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(w, down.params), loss), state

    def news(self, up: Up, G: Params, num_examples: Tensor) -> tuple[Up, Params]:
        change = trees.sub(trees.double(up.delta), G)
        return Up(change, up.loss), up.delta  # G_i <- Delta_i

    def round(self, server: Server, r: Round) -> Server:
        down = Model(server.params)
        mean = r.mean(self.train, r.cohort, down, equally, self.news)
        # Before the step, unlike in FedVARP and FedStale.
        g = trees.axpy(1 / r.population, mean.total.delta, server.g)
        step = trees.like(g, server.params)
        return Server(trees.axpy(self.s.server_lr, step, server.params), g)
