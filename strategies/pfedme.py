"""pFedMe - personalisation by Moreau envelopes (T. Dinh, Tran, Nguyen, NeurIPS 2020).

Algorithm 1.

w  global parameters     w_i  local copy      theta_i  personal model
lambda  of 1/2 |theta - w_i|^2                eta, gamma  step sizes

    client   for each batch: theta <- w_i, K steps on that batch of
             theta <- theta - gamma (grad f(theta) + lambda (theta - w_i));
             w_i <- w_i - eta lambda (w_i - theta)
    server   w <- (1 - beta) w + beta mean of the w_i, every client counting the same

Choice:  the last theta is the client's model; one that has never taken part uses w. The
         gradient of the penalty is really there: in the code that FedSim's and FedAlt's
         authors compare with it has no effect.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import STEP_SIZES, Method, MethodSettings, Round, Setting, on_client
from fedcore.personal import Own, Update, used
from fedcore.reports import equally
from fedcore.task import Task
from fedcore.types import Batches, Model, Params


class Settings(MethodSettings):
    local_lr: float = Field(
        0.05, gt=0, description="eta, step size of w_i; what counts is eta lambda"
    )
    personal_lr: float = Field(0.1, gt=0, description="gamma, step size of theta")
    lam: float = Field(15.0, ge=0, description="lambda; 15 in the paper's experiments")
    inner_steps: int = Field(5, ge=1, description="K, steps of theta on each batch")
    server_lr: float = Field(1.0, gt=0, description="beta; 1 is the mean of the w_i")


class PFedMe(Method[Settings]):
    buffered = True

    def init_client(self, params: Params) -> Own:
        return Own.start(params)

    def model_for(self, server: Any, state: Own) -> Params:
        return used(state, server.params)

    def counts_equally(self) -> bool:
        return True

    def refuses(self, setting: Setting) -> str | None:
        if setting in STEP_SIZES:
            return "only its steps of theta would follow, and those of w_i would not"
        if setting == "moments":
            return "it trains once for every batch"
        if setting == "dp":
            return "it takes several steps on one batch, which is drawn for one"
        return super().refuses(setting)

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Own, batches: Batches
    ) -> tuple[Update, Own]:
        s, w, theta = self.s, down.params, down.params
        steps = total = batches.mask.new_zeros(())
        for k in range(len(batches.mask)):
            again = _repeated(batches, k, s.inner_steps)
            near, _, loss = local_sgd(task.loss, w, again, s.personal_lr, prox=s.lam)
            real = batches.mask[k].sum() > 0
            theta = trees.where(real, near, theta)
            w = trees.axpy(-s.local_lr * s.lam, trees.sub(w, near), w)
            steps, total = steps + real, total + loss
        update = Update(trees.sub(w, down.params), total / steps.clamp(min=1))
        return update, state.after(theta, steps)

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server, equally).value
        return Model(trees.axpy(self.s.server_lr, mean.delta, server.params))


def _repeated(batches: Batches, k: int, steps: int) -> Batches:
    """Batch k, `steps` times."""
    repeated: Batches = trees.map(lambda x: x[k].expand(steps, *x.shape[1:]), batches)
    return repeated
