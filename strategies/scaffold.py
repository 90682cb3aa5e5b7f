"""SCAFFOLD - stochastic controlled averaging (Karimireddy et al., ICML 2020, Algorithm 1).

x  global parameters   y  local parameters   c, c_i  control variates   K  local steps   N  population   S  clients that reported
eta_l, eta_g  local and server step size
Choice:  option II for c_i, from the difference that is sent anyway: no extra gradient, noisier than option I when K is small.
         Clients count the same, as in the paper; c_i starts at zero. A client whose report is lost on the way keeps its new c_i, as
         it cannot know: c is then off by that change for good, while c_i itself stays right.
Reduces: to FedAvg with weighting "participating" while all control variates are zero (the first round of every run).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.types import Batches, Params, Round


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

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Server, state: Params, batches: Batches
    ) -> tuple[Up, Params]:
        drift = trees.sub(down.c, state)  # c - c_i
        y, steps, loss = local_sgd(
            task.loss, down.params, batches, self.s.local_lr, drift
        )
        delta = trees.sub_(y, down.params)
        slope = trees.scale(
            delta, -1 / (steps.clamp(min=1) * self.s.local_lr)
        )  # (x - y) / (K eta_l)
        dc = trees.scale(
            trees.axpy(-1.0, down.c, slope), (steps > 0).to(steps.dtype)
        )  # c_i^+ - c_i, option II; 0 without a step
        return Up(delta, dc, loss), trees.add(state, dc)

    def round(self, server: Server, r: Round) -> Server:
        delta, dc, reported = (
            trees.zeros_like(server.params),
            trees.zeros_like(server.c),
            0,
        )
        for p in r.each(self.train, r.cohort, server):
            ones = torch.ones(len(p.clients))
            delta = trees.add_weighted_(delta, p.up.delta, ones)
            dc = trees.add_weighted_(dc, p.up.dc, ones)
            reported += len(p.clients)
        mean = trees.scale(delta, 1 / max(reported, 1))
        return Server(
            trees.axpy(
                self.s.server_lr, mean, server.params
            ),  # x + eta_g / |S| sum delta
            trees.axpy(
                1 / r.population, dc, server.c
            ),  # c + |S| / N mean dc: the mean of all c_i
        )
