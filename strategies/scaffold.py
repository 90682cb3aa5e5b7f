"""SCAFFOLD - stochastic controlled averaging (Karimireddy et al., ICML 2020, Alg. 1).

x  global parameters     y  local parameters     c, c_i  control variates
K  local steps           N  population           S  clients that reported
eta_l, eta_g  local and server step size

Choice:  option II for c_i, from the difference that is sent anyway: no extra gradient,
         noisier than option I when K is small. Clients count the same, as in the paper;
         c_i starts at zero. A client whose report is lost on the way keeps its new c_i,
         as it cannot know: c is then off by that change for good, while c_i itself
         stays right.
Reduces: to FedAvg with weighting "participating" while all control variates are zero
         (the first round of every run).
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import STEPS, Method, MethodSettings, Round, Setting, on_client
from fedcore.reports import equally
from fedcore.task import Task
from fedcore.types import Batches, Params


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta_l, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta_g, step size of the server")


class Server(NamedTuple):
    params: Params
    c: Params


class Up(NamedTuple):
    delta: Params  # y - x
    dc: Params  # c_i^+ - c_i
    loss: Tensor  # mean training loss, for the log


class Scaffold(Method[Settings]):
    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.zeros_like(params))

    def init_client(self, params: Params) -> Params:
        return trees.zeros_like(params)  # c_i

    def counts_equally(self) -> bool:
        return True

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return (
                "its server moves c by |S| / N, the share of clients that worked on "
                "one version of the model"
            )
        if setting in STEPS:
            return "its control variates are differences divided by K eta_l"
        return super().refuses(setting)

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Server, state: Params, batches: Batches
    ) -> tuple[Up, Params]:
        lr = self.s.local_lr
        drift = trees.sub(down.c, state)  # c - c_i
        y, steps, loss = local_sgd(task.loss, down.params, batches, lr, drift)
        delta = trees.sub_(y, down.params)
        # (x - y) / (K eta_l)
        slope = trees.scale(delta, -1 / (steps.clamp(min=1) * lr))
        # c_i^+ - c_i, option II; 0 without a step
        change = trees.axpy(-1.0, down.c, slope)
        dc = trees.scale(change, (steps > 0).to(steps.dtype))
        return Up(delta, dc, loss), trees.add(state, dc)

    def round(self, server: Server, r: Round) -> Server:
        mean = r.mean(self.train, r.cohort, server, equally)
        if len(mean.clients) == 0:
            return server
        # x + eta_g / |S| sum delta
        x = trees.axpy(self.s.server_lr, mean.value.delta, server.params)
        # c + |S| / N mean dc: the mean of all c_i
        c = trees.axpy(1 / r.population, mean.total.dc, server.c)
        return Server(x, c)
