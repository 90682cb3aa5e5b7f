"""FedOpt - an optimizer on the server (Reddi et al., ICLR 2021, Algorithm 2).

Adaptive Federated Optimization; with `momentum` it is FedAvgM (Hsu, Qi, Brown, arXiv
1909.06335, 2019, Section 4.3).

x_t  global parameters           x_i  local parameters of client i
Delta_t  weighted mean of x_i - x_t      eta_l, eta  local and server step size
m_t, v_t  first and second moment of Delta      tau  degree of adaptivity

    momentum   m <- beta_1 m + Delta                   m is a velocity
               x <- x + eta m
    adagrad    v <- v + Delta^2
    adam       v <- beta_2 v + (1 - beta_2) Delta^2
    yogi       v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)
    all three  m <- beta_1 m + (1 - beta_1) Delta
               x <- x + eta m / (sqrt(v) + tau)

Choice:  no bias correction, and v starts at tau^2, as in Algorithm 2; clients are
         weighted by number of examples, as in the papers' experiments. Defaults are the
         paper's common choice for Adam and Yogi; its Adagrad has beta_1 = 0. Both step
         sizes need tuning for each task.
Reduces: to FedAvg with `momentum`, beta_1 = 0 and eta = 1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import server_opt, trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.server_opt import ServerOptimizer
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    optimizer: Literal["momentum", "adagrad", "adam", "yogi"] = Field(
        "adam", description="the server's optimizer: FedAvgM, FedAdagrad, ..."
    )
    local_lr: float = Field(0.1, gt=0, description="eta_l, step size of a local step")
    server_lr: float = Field(0.01, gt=0, description="eta, step size of the server")
    beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="beta_1, decay of the first moment; the momentum of FedAvgM",
    )
    beta2: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="beta_2, decay of the second moment (adam, yogi)",
    )
    tau: float = Field(
        1e-3,
        gt=0,
        description="tau, degree of adaptivity; larger is closer to plain SGD "
        "(adagrad, adam, yogi)",
    )


class Server(NamedTuple):
    params: Params
    opt: Any  # moments of the optimizer


class Up(NamedTuple):
    delta: Params  # x_i - x_t
    loss: Tensor  # mean training loss, for the log


class FedOpt(Method[Settings]):
    buffered = True

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, self._optimizer().init(params))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        x, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(x, down.params), loss), state

    def round(self, server: Server, r: Round) -> Server:
        mean = r.mean(self.train, r.cohort, Model(server.params)).value  # Delta_t
        step, opt = self._optimizer().update(mean.delta, server.opt)
        return Server(trees.add(server.params, step), opt)

    def _optimizer(self) -> ServerOptimizer:
        s = self.s
        match s.optimizer:
            case "momentum":
                return server_opt.momentum(s.server_lr, s.beta1)
            case "adagrad":
                return server_opt.adagrad(s.server_lr, s.beta1, s.tau)
            case "adam":
                return server_opt.adam(s.server_lr, s.beta1, s.beta2, s.tau)
            case "yogi":
                return server_opt.yogi(s.server_lr, s.beta1, s.beta2, s.tau)
