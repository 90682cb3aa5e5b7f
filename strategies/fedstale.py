"""FedStale - a mixture of fresh and stale updates (Rodio and Neglia, 2024, arXiv 2405.04171).

w_t  global parameters   w_i  local parameters   Delta_i = w_i - w_t (the paper's sign is the opposite)   beta  stale weight
h_i  last Delta_i that arrived before round t, 0 before the first   H = (1/N) sum_i a_i h_i   S_t  clients whose update arrived
q_i  p_i, the rate at which client i takes part, or an estimate   a_i  weight in the objective, mean 1   N  population
    U = beta H + (1/N) sum_{i in S_t} (a_i / q_i) (Delta_i - beta h_i);   w_{t+1} = w_t + eta_s U;   then h_i <- Delta_i, i in S_t
E[U] = (1/N) sum_i a_i Delta_i for every beta and every memory, if q_i = p_i; beta decides the variance.
Choice:  fixed a_i over all clients: who was not seen yet contributes 0. A round without updates moves along beta H, which keeps
         E[U] (the authors' code stands still there); their weight decay on the server is no part of the method and left out.
         Estimated rates are those of FedAU, from earlier rounds only; `cutoff` bounds 1 / q_i from above.
Reduces: to inverse-probability FedAvg (weighting "known") at beta = 0, to FedVARP (weighting "known") at beta = 1; to FedAvg with
         weighting "participating" for every beta when everybody always takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedcore import intervals, trees
from fedcore.intervals import Intervals
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Round, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta_c, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta_s, step size of the server")
    beta: float = Field(
        0.5, ge=0, le=1, description="beta, weight of stale updates, in [0, 1]"
    )
    rates: Literal["known", "estimated"] = Field(
        "estimated", description="q_i: the true p_i, or learned from who took part"
    )
    cutoff: int | None = Field(
        None,
        ge=1,
        description="estimated: rounds after which an absence ends an interval; default: none",
    )
    weights: Literal["uniform", "examples"] = Field(
        "uniform", description="a_i: all 1, or in proportion to the number of examples"
    )


class Server(NamedTuple):
    params: Params
    h: Params  # H; float64, because it is a running sum
    intervals: Intervals


class Up(NamedTuple):
    delta: Params  # Delta_i
    loss: Tensor  # mean training loss, for the log


class FedStale(Method[Settings]):
    def init_server(self, params: Params, population: int) -> Server:
        return Server(
            params, trees.zeros_like(params, torch.float64), intervals.start(population)
        )

    def init_memory(self, params: Params) -> Params:
        return trees.zeros_like(params)  # h_i

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(w, down.params), loss), state

    def round(self, server: Server, r: Round) -> Server:
        beta, weight = self.s.beta, self._weights(r)
        fresh, news, arrived = (
            trees.zeros_like(server.params),
            trees.zeros_like(server.h),
            [],
        )
        for p in r.each(self.train, r.cohort, Model(server.params)):
            clients, delta, h = p.clients, p.up.delta, r.memory.gather(p.clients)
            a, inverse = (
                weight(clients),
                self._inverse_rates(server, r, clients),
            )  # a_i, 1 / q_i
            # From the difference: its two terms are large and cancel where q_i is small.
            fresh = trees.add_weighted_(fresh, trees.axpy(-beta, h, delta), a * inverse)
            news = trees.add_weighted_(news, trees.sub(trees.double(delta), h), a)
            r.memory.put(clients, delta)  # h_i <- Delta_i
            arrived.append(clients)
            r.log["weight_max"] = max(
                r.log.get("weight_max", 0.0), (a * inverse).max().item()
            )
        u = trees.axpy(
            beta, trees.like(server.h, fresh), trees.scale(fresh, 1 / r.population)
        )  # U, with H of before
        h_new = trees.axpy(1 / r.population, news, server.h)
        history = intervals.after(server.intervals, arrived, r.t, self.s.cutoff)
        return Server(trees.axpy(self.s.server_lr, u, server.params), h_new, history)

    def needs_rates(self) -> bool:
        return self.s.rates == "known"

    def _inverse_rates(self, server: Server, r: Round, clients: Tensor) -> Tensor:
        if self.s.rates == "known":
            return 1 / r.known_rates()[clients]
        return intervals.omega(server.intervals, clients, r.t, self.s.cutoff).cpu()

    def _weights(self, r: Round) -> Callable[[Tensor], Tensor]:
        """clients -> a_i, float64 [n]."""
        if self.s.weights == "uniform":
            return lambda clients: torch.ones(len(clients), dtype=torch.float64)
        n = r.task.data.num_examples(np.arange(r.population), "train")
        mean = n.mean()
        return lambda clients: torch.from_numpy(n[clients.numpy()] / mean)
