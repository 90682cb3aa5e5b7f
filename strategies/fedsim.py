"""FedSim - partial personalisation, simultaneous update (Pillutla et al., ICML 2022).

u  shared parameters             v_i  personal parameters of client i
v0  their start, the same for all      lambda  penalty on |v - v0|^2
gamma_u, gamma_v  local step sizes     n_i  examples of client i

    client   both gradients at the same point:
             v <- v - gamma_v (grad_v f + 2 lambda (v - v0)),  u <- u - gamma_u grad_u f
    server   u <- u + eta mean of the u_i - u;  v_i stays where it is

Choice:  weights n_i (the authors' code has the number of batches); no 1/2 in the
         penalty, and its centre is v0, as in their code.
Reduces: to FedAvg, bit for bit, with personal = []; to local training with ["all"].
         FedPer: ["output"]; LG-FedAvg: ["body"]; FedBN: ["norm"]; pFedPara: ["factors"]
         of a pfedpara model; FedPerfix: ["prefix", "output"] of a vit with prefixes.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Round, Setting, on_client
from fedcore.personal import Partial, Personal, PersonalSettings, Update, initial
from fedcore.statistics import statistic_names
from fedcore.task import Task
from fedcore.types import Batches, Model


class Settings(PersonalSettings):
    local_lr: float = Field(
        0.1, gt=0, description="gamma_u, local step size of the shared parameters"
    )
    personal_lr: float | None = Field(
        None,
        gt=0,
        description="gamma_v, local step size of the personal ones; default: local_lr",
    )
    penalty: float = Field(
        0.0,
        ge=0,
        description="lambda, of |v - v0|^2, without 1/2; part of the logged loss",
    )
    server_lr: float = Field(
        1.0, gt=0, description="eta, step size of the server; 1 is the mean of the u_i"
    )


class FedSim(Partial[Settings]):
    buffered = True

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Personal, batches: Batches
    ) -> tuple[Update, Personal]:
        u, v, s = down.params, state.v, self.s
        v0, statistics = initial(task, v), statistic_names(task.model)

        def penalised(params: dict[str, Tensor], *batch: Tensor) -> Tensor:
            value = task.loss(params, *batch)
            for name, start in v0.items():
                if name in statistics:
                    continue  # they follow the data
                value = value + s.penalty * (params[name] - start).square().sum()
            return value

        loss = penalised if s.penalty else task.loss
        w, _, value = local_sgd(loss, {**u, **v}, batches, self._step_sizes(u, v))
        delta = {name: w[name] - u[name] for name in u}
        return Update(delta, value), Personal({name: w[name] for name in v})

    def refuses(self, setting: Setting) -> str | None:
        if setting == "dp" and self.s.penalty:
            return "method.penalty is of no example, so set it to 0"
        return super().refuses(setting)

    def _step_sizes(
        self, u: dict[str, Tensor], v: dict[str, Tensor]
    ) -> float | dict[str, float]:
        """gamma_u for shared parameters, gamma_v for personal ones."""
        if not self.s.personal_lr:
            return self.s.local_lr
        shared = dict.fromkeys(u, self.s.local_lr)
        return shared | dict.fromkeys(v, self.s.personal_lr)

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server).value  # weights n_i
        return Model(trees.axpy(self.s.server_lr, mean.delta, server.params))
