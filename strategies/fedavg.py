"""FedAvg - federated averaging (McMahan et al., AISTATS 2017, Algorithm 1).

w_t  global parameters           w^k  local parameters of client k
n_k  its number of examples      eta  local step size
S_t  clients whose update arrived      N  population
p_k  rate at which client k takes part

Weights of the differences w^k - w_t, the last three as Wang and Ji compare them (FedAU,
ICLR 2024):

    examples       n_k / n over S_t, the paper's mean of the w^k
    participating  1 / |S_t|           follows the clients that come often
    all            1 / N               the same, and slower by the mean rate: needs a
                                       larger server step
    known          1 / (N p_k)         unbiased with the true p_k: the oracle that a
                                       deployment does not have
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.reports import by_examples, equally
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")
    server_lr: float = Field(
        1.0, gt=0, description="step size of the server; 1 is the paper's mean"
    )
    weighting: Literal["examples", "participating", "all", "known"] = Field(
        "examples", description="of the updates that arrived"
    )


class Up(NamedTuple):
    delta: Params  # w^k - w_t
    loss: Tensor  # mean training loss, for the log


class FedAvg(Method[Settings]):
    buffered = True

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        # ClientUpdate
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub_(w, down.params), loss), state

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered" and self.s.weighting in ("all", "known"):
            divisor = "N p_k" if self.needs_rates() else "N"
            return (
                f'method.weighting = "{self.s.weighting}" divides by {divisor}, which '
                'stands for the cohort of a round: set it to "participating"'
            )
        return super().refuses(setting)

    def needs_rates(self) -> bool:
        return self.s.weighting == "known"

    def counts_equally(self) -> bool:
        return self.s.weighting in ("participating", "all")

    def round(self, server: Model, r: Round) -> Model:
        if self.s.weighting in ("examples", "participating"):
            weight = by_examples if self.s.weighting == "examples" else equally
            mean = r.mean(self.train, r.cohort, server, weight).value.delta
        else:
            total = r.mean(self.train, r.cohort, server, self._weights(r)).total.delta
            mean = trees.scale(total, 1 / r.population)  # nothing moves without updates
        return Model(trees.axpy(self.s.server_lr, mean, server.params))

    def _weights(self, r: Round) -> Tensor:
        """1 or 1 / p_k, [cohort]."""
        if self.s.weighting == "known":
            return 1 / r.known_rates()[r.cohort]
        return torch.ones(len(r.cohort))
