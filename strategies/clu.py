"""CLU - RERCE-Fed with continual local updates (Lari et al., arXiv 2409.13451, 2024).

Clients that were not asked go on by themselves.

w_k  model of client k           sbar_k  model that it received last
tbar_k  its last message that the server received         K  population
rho  penalty     J_k  objective, H_k its Hessian          N_k = (H_k + rho I)^-1
g_k  gradient of J_k at w_k

    server   sends s_n to the cohort, which stores it: sbar_k <- s_n
    client   EVERY one:  v <- argmin J_k(w) - <g_k, w> + rho/2 |w - sbar_k|^2;
             t_k <- 2 v - w_k;  w_k <- v
             for a quadratic J_k: v = w_k + rho N_k (sbar_k - w_k).
             The cohort sends t_k, the others send nothing
    server   tbar_k <- t_k;  s_{n+1} = (1/K) sum over all K of tbar_k, fresh or not

Choice:  the model to evaluate is w_{n+1} = (s_{n+1} + w_n) / 2, the clients' mean when
         everybody takes part; s_n is extrapolated. Solvers as in RERCE-Fed. exact:
         every client starts from N_k b_k and sends twice that, once; sbar_k = 0 before
         the first contact, as in the authors' code. sgd: all start from the initial
         model. K clients work a round, C of them are heard.
Reduces: to RERCE-Fed when everybody takes part.
Heed:    with fewer, the limit without noise depends on the schedule; as in RERCE-Fed,
         noise is integrated.
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
from fedcore.types import Batches, Params, Stateless


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


class Server(NamedTuple):
    params: Params  # w_n
    s: Params  # s_n; float64, because it is a running mean
    started: Tensor  # 0-d, 1 after the start


class Client(NamedTuple):
    w: Params  # w_k
    g: Params  # g_k, tracked by "sgd"; the exact solver has no dual
    s: Params  # sbar_k
    J: Quadratic | Stateless  # J_k, of the exact solver


class Down(NamedTuple):
    s: Params


class Up(NamedTuple):
    t: Params  # t_k
    loss: Tensor  # mean training loss, for the log


class CLU(Method[Settings]):
    differences = False  # t_k
    remembers = True
    works_unasked = True

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.double(params), torch.zeros(()))

    def init_client(self, params: Params) -> Client:
        if self.s.solver == "exact":
            return Client(params, {}, trees.zeros_like(params), unknown(params))
        return Client(params, trees.zeros_like(params), params, Stateless())

    def init_memory(self, params: Params) -> Params:
        return params  # tbar_k

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
                "clients that are not asked work on in every round, which a server "
                "update is not"
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
        return (down.s, trees.sub(up.t, down.s)) if isinstance(up, Up) else None

    @on_client(data="all")
    def start(
        self, task: Task, t: Tensor, down: Stateless, state: Client, batches: Batches
    ) -> tuple[Params, Client]:
        J = quadratic(task.loss, state.w, batches, task.weights)
        w = J.ridge(self.s.rho, state.w)
        return trees.scale(w, 2), state._replace(w=w, s=trees.zeros_like(w), J=J)

    # Two solvers, and each for a client that was asked and for one that goes on alone.

    @on_client(data="all")
    def solve(
        self, task: Task, t: Tensor, down: Down, state: Client, batches: Batches
    ) -> tuple[Up, Client]:
        v = self._exactly(down.s, state)
        loss = task.evaluate(v, batches)["loss"]
        return Up(_beyond(v, state), loss), state._replace(w=v, s=down.s)

    @on_client(data="all")
    def solve_alone(
        self, task: Task, t: Tensor, down: Stateless, state: Client, batches: Batches
    ) -> tuple[Stateless, Client]:
        return Stateless(), state._replace(w=self._exactly(state.s, state))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Down, state: Client, batches: Batches
    ) -> tuple[Up, Client]:
        v, g, loss = self._by_sgd(task, down.s, state, batches)
        return Up(_beyond(v, state), loss), state._replace(w=v, g=g, s=down.s)

    @on_client
    def train_alone(
        self, task: Task, t: Tensor, down: Stateless, state: Client, batches: Batches
    ) -> tuple[Stateless, Client]:
        v, g, _ = self._by_sgd(task, state.s, state, batches)
        return Stateless(), state._replace(w=v, g=g)

    def _exactly(self, s: Params, state: Client) -> Params:
        assert isinstance(state.J, Quadratic)
        # w_k + rho N_k (sbar_k - w_k)
        step = state.J.solve(self.s.rho, trees.sub(s, state.w))
        v: Params = trees.axpy(self.s.rho, step, state.w)
        return v

    def _by_sgd(
        self, task: Task, s: Params, state: Client, batches: Batches
    ) -> tuple[Params, Params, Tensor]:
        rho, lr = self.s.rho, self.s.local_lr
        slope = trees.scale(state.g, -1)
        v, steps, loss = local_sgd(
            task.loss, state.w, batches, lr, slope, prox=rho, center=s
        )
        # Without an example J_k = 0.
        v = trees.where(steps > 0, v, trees.axpy(1 / rho, state.g, s))
        return v, trees.axpy(-rho, trees.sub(v, s), state.g), loss

    def news(self, up: Up, tbar: Params, num_examples: Tensor) -> tuple[Up, Params]:
        change = trees.sub(trees.double(up.t), tbar)
        return Up(change, up.loss), up.t  # tbar_k <- t_k

    def round(self, server: Server, r: Round) -> Server:
        is_exact = self.s.solver == "exact"
        if is_exact and not bool(server.started):
            server = self._start(server, r)
        down = Down(trees.like(server.s, server.params))
        train = self.solve if is_exact else self.train
        mean = r.mean(train, r.cohort, down, equally, self.news)
        everybody = torch.arange(r.population)
        others = everybody[~torch.isin(everybody, r.cohort)]
        go_on = self.solve_alone if is_exact else self.train_alone
        for _ in r.each(go_on, others, Stateless()):
            pass
        # s_{n+1}
        s = trees.axpy(1 / r.population, mean.total.t, server.s)
        w = trees.map(lambda w, s: ((w + s) / 2).to(w.dtype), server.params, s)
        return Server(w, s, server.started)

    def _start(self, server: Server, r: Round) -> Server:
        total = trees.zeros_like(server.s)
        for p in r.each(self.start, torch.arange(r.population), Stateless()):
            total = trees.add_weighted_(total, p.up, torch.ones(len(p.clients)))
            r.memory.put(p.clients, p.up)
        s = trees.scale(total, 1 / r.population)
        w = trees.like(trees.scale(s, 0.5), server.params)
        return Server(w, s, torch.ones(()))


def _beyond(v: Params, state: Client) -> Params:
    # t_k = 2 v - w_k
    t: Params = trees.axpy(2.0, v, trees.scale(state.w, -1))
    return t
