"""FedStale - a mixture of fresh and stale updates (Rodio and Neglia, 2024).

arXiv 2405.04171.

w_t  global parameters           w_i  local parameters
Delta_i = w_i - w_t (the paper's sign is the opposite)    beta  stale weight
h_i  last Delta_i that arrived before round t, 0 before the first
H = (1/N) sum_i a_i h_i          S_t  clients whose update arrived
q_i  p_i, the rate at which client i takes part, or an estimate
a_i  weight in the objective, mean 1       N  population

    U = beta H + (1/N) sum_{i in S_t} (a_i / q_i) (Delta_i - beta h_i)
    w_{t+1} = w_t + eta_s U;   then h_i <- Delta_i for i in S_t

E[U] = (1/N) sum_i a_i Delta_i for every beta and every memory, if q_i = p_i; beta
decides the variance. With weights = "examples" this holds from the round on in which
every client has been heard: before, nbar (below) is that of clients that come often.

Choice:  fixed a_i over all clients: a client that was not seen yet contributes 0. With
         weights = "examples" a_i = n_i / nbar from the numbers that clients report, and
         nbar is their mean over the clients heard so far. A round without updates moves
         along beta H, which keeps E[U] (the authors' code stands still there); their
         weight decay on the server is no part of the method and left out. Estimated
         rates are those of FedAU, from earlier rounds only; `cutoff` bounds 1 / q_i
         from above.
Reduces: to inverse-probability FedAvg (weighting "known") at beta = 0, to FedVARP
         (weighting "known") at beta = 1; to FedAvg with weighting "participating" for
         every beta when everybody always takes part.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import intervals, trees
from fedcore.intervals import Intervals
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import Reports
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


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
        description="estimated: rounds after which an absence ends an interval; "
        "default: none",
    )
    weights: Literal["uniform", "examples"] = Field(
        "uniform", description="a_i: all 1, or in proportion to the number of examples"
    )


class Server(NamedTuple):
    params: Params
    # (1/N) sum_i n_i h_i, with n_i = 1 for uniform weights: H nbar. float64, because it
    # is a running sum.
    h: Params
    intervals: Intervals
    # [N] float64, as reported last; -1 = not heard yet. [0] for uniform weights.
    num_examples: Tensor


class Up(NamedTuple):
    delta: Params  # Delta_i
    loss: Tensor  # mean training loss, for the log


class FedStale(Method[Settings]):
    needs_updates = True  # remembers the last of every client

    def init_server(self, params: Params, population: int) -> Server:
        weighed = population if self.s.weights == "examples" else 0
        return Server(
            params,
            trees.zeros_like(params, torch.float64),
            intervals.start(population),
            torch.full((weighed,), -1.0, dtype=torch.float64),
        )

    def init_memory(self, params: Params) -> Params:
        return trees.zeros_like(params)  # n_i h_i

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(w, down.params), loss), state

    def needs_rates(self) -> bool:
        return self.s.rates == "known"

    def round(self, server: Server, r: Round) -> Server:
        beta, N = self.s.beta, r.population
        fresh, news = trees.zeros_like(server.params), trees.zeros_like(server.h)
        num_examples, arrived, largest = server.num_examples.clone(), [], []
        for p in r.each(self.train, r.cohort, Model(server.params)):
            n, inverse = self._examples(p), self._inverse_rates(server, r, p.clients)
            delta = self._scaled(p.up.delta, n)  # n_i Delta_i
            h = r.memory.gather(p.clients)  # n_i h_i
            # From the difference: its terms are large and cancel where q_i is small.
            fresh = trees.add_weighted_(fresh, trees.axpy(-beta, h, delta), inverse)
            change = trees.sub(trees.double(delta), h)
            news = trees.add_weighted_(news, change, torch.ones(len(p.clients)))
            r.memory.put(p.clients, delta)  # h_i <- Delta_i
            if self.s.weights == "examples":
                num_examples[p.clients] = n.to(num_examples)
            arrived.append(p.clients)
            largest.append((n * inverse).max().item())
        heard = num_examples[num_examples >= 0]
        nbar = heard.mean().item() if heard.sum() > 0 else 1.0
        if largest:
            r.log["weight_max"] = max(largest) / nbar
        # U, with H of before
        stale = trees.like(trees.scale(server.h, 1 / nbar), fresh)
        u = trees.axpy(beta, stale, trees.scale(fresh, 1 / (N * nbar)))
        return Server(
            trees.axpy(self.s.server_lr, u, server.params),
            trees.axpy(1 / N, news, server.h),
            intervals.after(server.intervals, arrived, r.t, self.s.cutoff),
            num_examples,
        )

    def _examples(self, p: Reports) -> Tensor:
        """n_i as reported, or 1 for uniform weights; float64 [n] on the CPU."""
        if self.s.weights == "uniform":
            return torch.ones(len(p.clients), dtype=torch.float64)
        return p.num_examples.double().cpu()

    def _scaled(self, delta: Params, n: Tensor) -> Params:
        if self.s.weights == "uniform":
            return delta

        def times(x: Tensor) -> Tensor:
            return x * n.to(x).reshape(-1, *[1] * (x.ndim - 1))

        scaled: Params = trees.map(times, delta)
        return scaled

    def _inverse_rates(self, server: Server, r: Round, clients: Tensor) -> Tensor:
        """1 / q_i, float64 [n] on the CPU."""
        if self.s.rates == "known":
            return 1 / r.known_rates()[clients]
        omega = intervals.omega(server.intervals, clients, r.t, self.s.cutoff)
        return omega.cpu()
