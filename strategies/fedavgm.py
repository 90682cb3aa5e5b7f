"""FedAvgM - FedAvg with server momentum (Hsu, Qi, Brown, arXiv 1909.06335, 2019, Section 4.3).

x_t  global parameters   x_i  local parameters of client i   Delta_t  weighted mean of x_i - x_t   eta_l  local step size
v_t  velocity   beta  server momentum   eta  server step size
Choice:  the mean is weighted by number of examples.
Reduces: to FedAvg with beta = 0 and eta = 1.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import server_opt, trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Round, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta_l, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta, step size of the server")
    beta: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="beta, server momentum; 0 is FedAvg with a server step size",
    )


class Server(NamedTuple):
    params: Params
    opt: server_opt.Momentum


class Up(NamedTuple):
    delta: Params  # x_i - x_t
    loss: Tensor  # mean training loss, for the log


class FedAvgM(Method[Settings]):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.opt = server_opt.momentum(settings.server_lr, settings.beta)

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, self.opt.init(params))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        x, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(x, down.params), loss), state

    def round(self, server: Server, r: Round) -> Server:
        mean = trees.weighted_mean(
            r.each(self.train, r.cohort, Model(server.params))
        )  # Delta_t
        step, opt = self.opt.update(
            mean.delta, server.opt
        )  # v <- beta v + Delta;  x <- x + eta v
        return Server(trees.add(server.params, step), opt)
