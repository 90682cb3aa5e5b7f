"""FedAU - aggregation weights from participation intervals (Wang and Ji, ICLR 2024, Algorithms 1 and 2).

x_t  global parameters   y  local parameters   Delta_n = y - x_t   omega_n  estimate of 1 / p_n   K  cut-off, in rounds
N  population   S_t  clients whose update arrived   gamma  local step size   eta  server step size
Minimises F = (1/N) sum_n F_n: every client counts the same, whatever its data size and however seldom it takes part.
Choice:  the weight of round t uses earlier rounds only, and a client's first update has weight 1 however late it comes (without
         cut-off), as in the authors' code. Intervals are kept on the server, in closed form: a client cannot choose its own weight,
         and an update that is lost counts as an absence.
Reduces: to FedAvg with weighting "all" at K = 1; to FedAvg with weighting "participating" when everybody always takes part.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import intervals, trees
from fedcore.intervals import Intervals
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Round, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="gamma, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta, step size of the server")
    cutoff: int | None = Field(
        None,
        ge=1,
        description="K, rounds after which an absence ends an interval; default: no cut-off",
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

    def round(self, server: Server, r: Round) -> Server:
        total, arrived = trees.zeros_like(server.params), []
        for p in r.each(self.train, r.cohort, Model(server.params)):
            omega = intervals.omega(
                server.intervals, p.clients, r.t, self.s.cutoff
            )  # Algorithm 2
            total = trees.add_weighted_(
                total, p.up.delta, omega
            )  # sum over S_t of omega_n Delta_n
            arrived.append(p.clients)
            r.log["omega_max"] = max(r.log.get("omega_max", 0.0), omega.max().item())
        mean = trees.scale(total, 1 / r.population)  # over N, never over |S_t|
        history = intervals.after(server.intervals, arrived, r.t, self.s.cutoff)
        return Server(trees.axpy(self.s.server_lr, mean, server.params), history)
