"""FedAvg - federated averaging (McMahan et al., AISTATS 2017, Algorithm 1).

w_t  global parameters   w^k  local parameters of client k   n_k  its number of examples   eta  local step size
Choice:  the server adds the mean of the differences w^k - w_t, which is the paper's mean of the w^k.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Round, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")


class Up(NamedTuple):
    delta: Params  # w^k - w_t
    loss: Tensor  # mean training loss, for the log


class FedAvg(Method[Settings]):
    @on_client
    def train(self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)  # ClientUpdate
        return Up(trees.sub(w, down.params), loss), state

    def round(self, server: Model, r: Round) -> Model:
        mean = trees.weighted_mean(r.each(self.train, r.cohort, server))  # weights n_k / n
        return Model(trees.add(server.params, mean.delta))
