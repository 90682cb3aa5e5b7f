"""FedAU - aggregation weights from participation intervals (Wang and Ji, ICLR 2024).

Algorithms 1 and 2.

x_t  global parameters           y  local parameters      Delta_n = y - x_t
omega_n  estimate of 1 / p_n     K  cut-off, in rounds    N  population
S_t  clients whose update arrived      gamma, eta  local and server step size

Minimises F = (1/N) sum_n F_n: every client counts the same, whatever its data size and
however seldom it takes part.

Choice:  the weight of round t uses earlier rounds only, and a client's first update has
         weight 1 however late it comes (without cut-off), as in the authors' code.
         Intervals are kept on the server, in closed form: a client cannot choose its
         own weight, and an update that is lost counts as an absence.
Reduces: to FedAvg with weighting "all" at K = 1; to FedAvg with weighting
         "participating" when everybody always takes part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import intervals, trees
from fedcore.intervals import Intervals
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="gamma, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta, step size of the server")
    cutoff: int | None = Field(
        None,
        ge=1,
        description="K, rounds after which an absence ends an interval; "
        "default: no cut-off",
    )


class Server(NamedTuple):
    params: Params
    intervals: Intervals


class Up(NamedTuple):
    delta: Params  # Delta_n
    loss: Tensor  # mean training loss, for the log


class FedAU(Method[Settings]):
    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, intervals.start(population))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        y, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(y, down.params), loss), state

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return "its weights count the rounds between two answers of a client"
        if setting == "secure" and self.s.cutoff is None:
            return (
                "without method.cutoff nothing bounds the weight of a client: set it, "
                "e.g. method.cutoff = 50"
            )
        return super().refuses(setting)

    def round(self, server: Server, r: Round) -> Server:
        cutoff = self.s.cutoff
        omega = intervals.omega(server.intervals, r.cohort, r.t, cutoff)  # Algorithm 2
        # sum over S_t of omega_n Delta_n
        mean = r.mean(self.train, r.cohort, Model(server.params), omega)
        # Over N, never over |S_t|.
        delta = trees.scale(mean.total.delta, 1 / r.population)
        if len(mean.clients):
            arrived = torch.isin(r.cohort, mean.clients)
            r.log["omega_max"] = omega.cpu()[arrived].max().item()
        history = intervals.after(server.intervals, [mean.clients], r.t, cutoff)
        return Server(trees.axpy(self.s.server_lr, delta, server.params), history)
