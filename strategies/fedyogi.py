"""FedYogi - Yogi on the server (Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 2).

x_t  global parameters   x_i  local parameters of client i   Delta_t  weighted mean of x_i - x_t   eta_l  local step size
m_t, v_t  first and second moment of Delta   eta  server step size   tau  degree of adaptivity
Choice:  no bias correction, and v starts at tau^2, as in Algorithm 2; clients are weighted by number of examples, as in the paper's
         experiments. Defaults are the paper's common choice (beta_1, beta_2, tau); both step sizes need tuning per task.
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
    server_lr: float = Field(0.01, gt=0, description="eta, step size of the server")
    beta1: float = Field(
        0.9, ge=0, lt=1, description="beta_1, decay of the first moment"
    )
    beta2: float = Field(
        0.99, ge=0, lt=1, description="beta_2, decay of the second moment"
    )
    tau: float = Field(
        1e-3,
        gt=0,
        description="tau, degree of adaptivity; larger is closer to plain SGD",
    )


class Server(NamedTuple):
    params: Params
    opt: server_opt.Moments


class Up(NamedTuple):
    delta: Params  # x_i - x_t
    loss: Tensor  # mean training loss, for the log


class FedYogi(Method[Settings]):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.opt = server_opt.yogi(
            settings.server_lr, settings.beta1, settings.beta2, settings.tau
        )

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
        )  # v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2);  x <- x + eta m / (sqrt(v) + tau)
        return Server(trees.add(server.params, step), opt)
