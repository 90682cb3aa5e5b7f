"""FedAlt - partial personalisation, alternating update (Pillutla et al., ICML 2022).

u  shared parameters             v_i  personal parameters of client i
v0  their start, the same for all      lambda  penalty on |v - v0|^2
tau_u, tau_v  passes over the client's plan of batches, each freshly shuffled
gamma_u, gamma_v  step sizes     n_i  examples of client i

    client   tau_v passes over v with u as received:
                 v <- v - gamma_v (grad_v f + 2 lambda (v - v0))
             then tau_u passes over u with the new v:  u <- u - gamma_u grad_u f
    server   u <- u + eta mean of the u_i - u;  v_i stays where it is

Choice:  weights n_i (the authors' code has the number of batches); no 1/2 in the
         penalty, and its centre is v0, as in their code. With tau_u = tau_v = 1 it
         computes twice as many gradients as FedSim, each of one part only.
Reduces: to FedAvg, bit for bit, with personal = []. FedRep (Collins et al., ICML 2021):
         ["output"], tau_v 10; FedBABU (Oh et al., ICLR 2022): ["output"], tau_v 0, and
         fine-tuning at the end.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Round, Setting, on_client
from fedcore.personal import Partial, Personal, PersonalSettings, Update, initial
from fedcore.statistics import with_statistics
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
    shared_passes: int = Field(
        1,
        ge=0,
        description="tau_u, passes over u in units of the local epochs or steps",
    )
    personal_passes: int = Field(
        1,
        ge=0,
        description="tau_v, passes over v in units of the local epochs or steps",
    )
    penalty: float = Field(0.0, ge=0, description="lambda, of |v - v0|^2, without 1/2")
    server_lr: float = Field(
        1.0, gt=0, description="eta, step size of the server; 1 is the mean of the u_i"
    )

    @model_validator(mode="after")
    def _works(self) -> Settings:
        if self.shared_passes + self.personal_passes == 0:
            raise ValueError(
                "shared_passes and personal_passes are both 0: expected one of them to "
                "be positive"
            )
        return self


class FedAlt(Partial[Settings]):
    buffered = True

    def refuses(self, setting: Setting) -> str | None:
        if setting == "moments":
            return "it trains u and v one after the other"
        return super().refuses(setting)

    def passes(self) -> int:
        return self.s.shared_passes + self.s.personal_passes

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Personal, batches: Batches
    ) -> tuple[Update, Personal]:
        u, v, s = down.params, state.v, self.s
        first = len(batches.mask) // self.passes() * s.shared_passes
        for_u = trees.at(batches, slice(first))
        for_v = trees.at(batches, slice(first, None))
        value = batches.mask.new_zeros(())
        if v and s.personal_passes:
            lr, v0 = s.personal_lr or s.local_lr, initial(task, v)
            v, _, value = local_sgd(
                task.loss, v, for_v, lr, prox=2 * s.penalty, center=v0, fixed=u
            )
        if not (u and s.shared_passes):
            return Update(trees.zeros_like(u), value), Personal(v)
        # Statistics are of v, and move in every pass.
        start, fixed = with_statistics(task.model, u, v)
        new, _, value = local_sgd(task.loss, start, for_u, s.local_lr, fixed=fixed)
        v = {name: new.get(name, old) for name, old in v.items()}
        new = {name: new[name] for name in u}
        return Update(trees.sub_(new, u), value), Personal(v)

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server).value  # weights n_i
        return Model(trees.axpy(self.s.server_lr, mean.delta, server.params))
