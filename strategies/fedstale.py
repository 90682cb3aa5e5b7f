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
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.reports import Weight, equally
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


class Heard(NamedTuple):
    """Clients that reported, and the examples that each reported last."""

    clients: Tensor  # 0-d float64
    examples: Tensor  # 0-d float64


class Server(NamedTuple):
    params: Params
    # (1/N) sum_i n_i h_i, with n_i = 1 for uniform weights: H nbar. float64, because it
    # is a running sum.
    h: Params
    intervals: Intervals
    heard: Heard | Stateless  # Stateless for uniform weights


class Up(NamedTuple):
    delta: Params  # Delta_i
    loss: Tensor  # mean training loss, for the log


class Last(NamedTuple):
    h: Params  # n_i h_i
    heard: Heard | Stateless  # of this client: 1 and n_i, or 0 and 0


class Change(NamedTuple):
    fresh: Params  # n_i (Delta_i - beta h_i), counted 1 / q_i
    h: Params  # n_i (Delta_i - h_i), in float64
    heard: Heard | Stateless
    loss: Tensor


class FedStale(Method[Settings]):
    remembers = True

    def init_server(self, params: Params, population: int) -> Server:
        return Server(
            params,
            trees.zeros_like(params, torch.float64),
            intervals.start(population),
            self._nobody(),
        )

    def init_memory(self, params: Params) -> Last:
        return Last(trees.zeros_like(params), self._nobody())

    def _nobody(self) -> Heard | Stateless:
        if self.s.weights == "uniform":
            return Stateless()
        return Heard(*torch.zeros(2, dtype=torch.float64))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(w, down.params), loss), state

    def needs_rates(self) -> bool:
        return self.s.rates == "known"

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            if self.needs_rates():
                return "its weights are 1 / p_i, and a buffer has no such rates"
            return "its weights count the rounds between two answers of a client"
        if setting == "secure" and self.s.weights == "examples":
            return (
                'method.weights = "examples" makes messages as large as clients have '
                'examples, which no fixed range holds: set method.weights = "uniform"'
            )
        if setting == "secure" and not self.needs_rates() and self.s.cutoff is None:
            return (
                "without method.cutoff nothing bounds the weight of a client: set it, "
                "e.g. method.cutoff = 50"
            )
        return super().refuses(setting)

    def news(self, up: Up, last: Last, num_examples: Tensor) -> tuple[Change, Last]:
        now = Last(up.delta, last.heard)
        heard: Heard | Stateless = Stateless()
        if isinstance(last.heard, Heard):
            n = num_examples.to(last.heard.examples)
            now = Last(_times(n, up.delta), Heard(torch.ones_like(n), n))
            heard = trees.sub(now.heard, last.heard)
        # From the difference: its terms are large and cancel where q_i is small.
        fresh = trees.axpy(-self.s.beta, last.h, now.h)
        change = trees.sub(trees.double(now.h), last.h)
        return Change(fresh, change, heard, up.loss), now  # h_i <- Delta_i

    def round(self, server: Server, r: Round) -> Server:
        beta, N = self.s.beta, r.population
        inverse = self._inverse_rates(server, r)
        weight: dict[str, Weight | Tensor] = {"fresh": inverse, "h": equally}
        down = Model(server.params)
        mean = r.mean(self.train, r.cohort, down, weight, self.news)
        heard, nbar = server.heard, 1.0
        if isinstance(heard, Heard):
            heard = trees.add(heard, mean.total.heard)
            if heard.examples > 0:
                nbar = (heard.examples / heard.clients).item()
        if len(mean.clients):
            arrived = torch.isin(r.cohort, mean.clients)
            r.log["weight_max"] = inverse[arrived].max().item()
        # U, with H of before
        stale = trees.like(trees.scale(server.h, 1 / nbar), mean.total.fresh)
        u = trees.axpy(beta, stale, trees.scale(mean.total.fresh, 1 / (N * nbar)))
        return Server(
            trees.axpy(self.s.server_lr, u, server.params),
            trees.axpy(1 / N, mean.total.h, server.h),
            intervals.after(server.intervals, [mean.clients], r.t, self.s.cutoff),
            heard,
        )

    def _inverse_rates(self, server: Server, r: Round) -> Tensor:
        """1 / q_i of the cohort, float64 [n] on the CPU."""
        if self.s.rates == "known":
            return 1 / r.known_rates()[r.cohort]
        omega = intervals.omega(server.intervals, r.cohort, r.t, self.s.cutoff)
        return omega.cpu()


def _times(n: Tensor, delta: Params) -> Params:
    """n_i Delta_i, for every row of delta."""

    def times(x: Tensor) -> Tensor:
        return x * n.to(x).reshape(-1, *[1] * (x.ndim - 1))

    scaled: Params = trees.map(times, delta)
    return scaled
