"""Ditto - a personal model beside the global one, held near it (Li et al., ICML 2021).

Algorithm 1 with FedAvg.

w_t  global parameters           v_k  personal model of client k
lambda  how near                 eta  local step size of both

    client   w^k by local SGD from w_t, sent;
             v_k <- v_k - eta (grad f(v_k) + lambda (v_k - w_t)), kept

Choice:  both train on the client's plan of batches, each with a shuffle of its own; a
         client that has never taken part uses w_t. Another thing by this name is
         fine-tuning at the end with a penalty: settings `finetune.epochs` and
         `finetune.penalty`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.personal import Own, Update, used
from fedcore.task import Task
from fedcore.types import Batches, Model, Params


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")
    lam: float = Field(
        1.0, ge=0, description="lambda, of 1/2 |v - w|^2; 0.1, 1 or 2 in the paper"
    )


class Ditto(Method[Settings]):
    buffered = True

    def init_client(self, params: Params) -> Own:
        return Own.start(params)

    def passes(self) -> int:
        return 2

    def model_for(self, server: Any, state: Own) -> Params:
        return used(state, server.params)

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Own, batches: Batches
    ) -> tuple[Update, Own]:
        half, lr = len(batches.mask) // 2, self.s.local_lr
        for_w = trees.at(batches, slice(half))
        for_v = trees.at(batches, slice(half, None))
        w, steps, loss = local_sgd(task.loss, down.params, for_w, lr)
        v, _, _ = local_sgd(
            task.loss, state.v, for_v, lr, prox=self.s.lam, center=down.params
        )
        return Update(trees.sub_(w, down.params), loss), state.after(v, steps)

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server).value
        return Model(trees.add(server.params, mean.delta))
