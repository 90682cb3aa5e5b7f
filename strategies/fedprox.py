"""FedProx - FedAvg with a proximal term on the clients (Li et al., MLSys 2020, Alg. 2).

w_t  global parameters           w^k  local parameters of client k
mu   weight of the proximal term       eta  local step size

Client k minimises h_k(w; w_t) = F_k(w) + mu/2 |w - w_t|^2, inexactly, by local SGD.

Choice:  clients are weighted by number of examples, as in the authors' experiments;
         stragglers' partial work is fewer local steps, not a setting here.
Reduces: to FedAvg with mu = 0.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")
    mu: float = Field(
        0.01, ge=0, description="mu, weight of the proximal term; 0 is FedAvg"
    )


class Up(NamedTuple):
    delta: Params  # w^k - w_t
    loss: Tensor  # mean training loss F_k, for the log


class FedProx(Method[Settings]):
    buffered = True

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        # argmin h_k
        w, _, loss = local_sgd(
            task.loss, down.params, batches, self.s.local_lr, prox=self.s.mu
        )
        return Up(trees.sub_(w, down.params), loss), state

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server).value
        return Model(trees.add(server.params, mean.delta))
