"""ADMM - consensus ADMM with two variables (Lari et al., 2024, arXiv 2409.13451).

The baseline of RERCE-Fed.

w_n  global model                w_k, z_k  model and dual of client k
K  population    rho  penalty    J_k  objective, H_k its Hessian
N_k = (H_k + rho I)^-1           b_k = -grad J_k(0)

    client   z_k <- z_k + rho (w_k - w_n);
             w_k <- argmin J_k(w) + <z_k, w> + rho/2 |w - w_n|^2,
             that is N_k (b_k - z_k + rho w_n)
    server   w_{n+1} = (1/K) sum over k of w_k + z_k / rho, the vector that is sent

Choice:  `absent` says what stands for a client that did not send this round: its "last"
         message, or "zero" (as figure 4.2 of the first author's thesis must have it,
         whose curve it meets: a model shrunk by C/K, of no other use).
         exact: J_k is the sum of the losses; every client starts from N_k b_k and sends
         it, once. sgd: J_k is the mean loss, every client counting the same, local
         steps from the client's own w_k; all start from the initial model.
Heed:    the client uses the w_n that it heard twice, in both of its lines.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.method import (
    TRAINING,
    Method,
    MethodSettings,
    Round,
    Setting,
    on_client,
)
from fedcore.proximal import Quadratic, hessian_memory, quadratic, unknown
from fedcore.reports import equally
from fedcore.storage import memory
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless, Tree


class Settings(MethodSettings):
    rho: float = Field(
        1.0,
        gt=0,
        description="rho, penalty; 1 in the paper; sgd feels rho x local_lr x local "
        "steps of it",
    )
    solver: Literal["exact", "sgd"] = Field(
        "sgd", description="of the local problem: exact for quadratic losses"
    )
    local_lr: float = Field(0.1, gt=0, description="sgd: step size of a local step")
    absent: Literal["last", "zero"] = Field(
        "last", description="what stands for a client that did not send this round"
    )


class Server(NamedTuple):
    params: Params  # w_n
    total: Params  # sum of the last messages; float64, because it is a running sum
    started: Tensor  # 0-d, 1 after the start


class Client(NamedTuple):
    w: Params  # w_k
    z: Params  # z_k
    J: Quadratic | Stateless  # J_k, of the exact solver


class Up(NamedTuple):
    m: Params  # w_k + z_k / rho
    loss: Tensor  # mean training loss, for the log


class ADMM(Method[Settings]):
    differences = False  # w_k + z_k / rho
    remembers = True

    def init_server(self, params: Params, population: int) -> Server:
        total = trees.scale(trees.double(params), population)
        return Server(params, total, torch.zeros(()))

    def init_client(self, params: Params) -> Client:
        J = unknown(params) if self.s.solver == "exact" else Stateless()
        return Client(params, trees.zeros_like(params), J)

    def init_memory(self, params: Params) -> Tree:
        return params if self.s.absent == "last" else Stateless()  # last message

    def check(self, task: Task, cohort: int) -> str | None:
        if self.s.solver == "exact":
            memory.require(*hessian_memory(task))
        return None

    def model_for(self, server: Any, state: Client) -> Params:
        """The client's own estimate where it is exact, as the paper measures it.

        For networks it is the global model.
        """
        return state.w if self.s.solver == "exact" else server.params

    def personalises(self) -> bool:
        return self.s.solver == "exact"

    def asks_everybody_first(self) -> bool:
        return self.s.solver == "exact"

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return (
                "a client's z follows every model that it hears of, and a step from "
                "an older one than the server's is another algorithm"
            )
        if setting in TRAINING and self.s.solver == "exact":
            return 'method.solver = "exact" takes no local steps'
        if setting == "secure" and self.s.solver == "exact":
            return (
                'method.solver = "exact" reaches what rounding to integers does not: '
                'set method.solver = "sgd"'
            )
        return super().refuses(setting)

    def exchanged(self, down: Any, up: Any) -> tuple[Params, Params] | None:
        if not isinstance(up, Up):
            return None
        return down.params, trees.sub(up.m, down.params)

    @on_client(data="all")
    def start(
        self, task: Task, t: Tensor, down: Stateless, state: Client, batches: Batches
    ) -> tuple[Params, Client]:
        J = quadratic(task.loss, state.w, batches, task.weights)
        w = J.ridge(self.s.rho, state.w)
        return w, state._replace(w=w, z=trees.zeros_like(w), J=J)

    @on_client(data="all")
    def solve(
        self, task: Task, t: Tensor, down: Model, state: Client, batches: Batches
    ) -> tuple[Up, Client]:
        z, rho = self._dual(down, state), self.s.rho
        assert isinstance(state.J, Quadratic)
        # N_k (b_k - z_k + rho w_n)
        b = trees.unravel(state.J.b, z)
        slope = trees.add(trees.sub(b, z), trees.scale(down.params, rho))
        w = state.J.solve(rho, slope)
        loss = task.evaluate(w, batches)["loss"]
        return self._message(w, z, loss), state._replace(w=w, z=z)

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Client, batches: Batches
    ) -> tuple[Up, Client]:
        z, rho, lr = self._dual(down, state), self.s.rho, self.s.local_lr
        w, steps, loss = local_sgd(
            task.loss, state.w, batches, lr, z, prox=rho, center=down.params
        )
        # Without an example J_k = 0.
        w = trees.where(steps > 0, w, trees.axpy(-1 / rho, z, down.params))
        return self._message(w, z, loss), state._replace(w=w, z=z)

    def _dual(self, down: Model, state: Client) -> Params:
        # z_k + rho (w_k - w_n)
        gap = trees.sub(state.w, down.params)
        z: Params = trees.axpy(self.s.rho, gap, state.z)
        return z

    def _message(self, w: Params, z: Params, loss: Tensor) -> Up:
        return Up(trees.axpy(1 / self.s.rho, z, w), loss)

    def news(
        self, up: Up, last: Params | Stateless, num_examples: Tensor
    ) -> tuple[Up, Params | Stateless]:
        m = trees.double(up.m)
        if isinstance(last, Stateless):  # absent = "zero"
            return Up(m, up.loss), last
        return Up(trees.sub(m, last), up.loss), up.m

    def round(self, server: Server, r: Round) -> Server:
        is_exact = self.s.solver == "exact"
        if is_exact and not bool(server.started):
            server = self._start(server, r)
        work, down = self.solve if is_exact else self.train, Model(server.params)
        total = r.mean(work, r.cohort, down, equally, self.news).total.m
        if self.s.absent == "last":
            total = trees.add(server.total, total)
        return self._mean(server, total, server.started, r.population)

    def _start(self, server: Server, r: Round) -> Server:
        total = trees.zeros_like(server.total)
        for p in r.each(self.start, torch.arange(r.population), Stateless()):
            total = trees.add_weighted_(total, p.up, torch.ones(len(p.clients)))
            if self.s.absent == "last":
                r.memory.put(p.clients, p.up)
        return self._mean(server, total, torch.ones(()), r.population)

    def _mean(
        self, server: Server, total: Params, started: Tensor, population: int
    ) -> Server:
        w = trees.like(trees.scale(total, 1 / population), server.params)
        return Server(w, total, started)
