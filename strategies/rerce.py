"""RERCE-Fed - dual-free ADMM over noisy links (Lari et al., 2024, arXiv 2409.13451).

Clients are scheduled at random.

w_k  model of client k           w_n  global model        C  clients asked a round
rho  penalty     J_k  objective, H_k its Hessian          N_k = (H_k + rho I)^-1
zeta, eta  noise of down- and uplink (settings `links`)
g_k  gradient of J_k at w_k      p  see below

    server   s_n = 2 w_n - w_{n-1}, formed before it is sent: the client hears the noise
             once, not five times its power
    client   w_k <- argmin J_k(w) - <g_k, w> + rho/2 |w - s_n|^2,
             which for a quadratic J_k is w_k + rho N_k (s_n - w_k)
    server   w_{n+1} = (1/C) sum of the w_k that arrived; clients that were not asked
             keep w_k

Choice:  p = sum over rounds and clients of w_k - s_n, and s_n = w_n + p/C: the equation
         above while C is constant, and when clients drop out or cohorts vary,
         sum_k H_k w_k + rho p is still conserved, on which the limit depends alone.
         solver "exact": J_k is the sum of the losses, as in the paper; every client
         starts once, by itself, in the first round. A loss that is not quadratic is
         replaced by its expansion at zero. solver "sgd": J_k is the mean loss, every
         client counting the same; g_k is tracked, g_k <- g_k - rho (w_k - s_n) from 0,
         which is right at the limit however few the steps. With g_k computed anew from
         w_k it would not be: any consensus would be a fixed point.
Reduces: to two-variable ADMM when everybody takes part and nothing is lost; then s_n is
         also FedDyn's model (alpha = rho).
Heed:    a client that works and is not heard, or whose round is skipped (keep
         min_reports at 1), shifts that sum, hence the limit, for good. One client a
         round may diverge, noise or not. The data enter through the start alone, and
         noise is integrated: |w - w*|^2 has a term that grows for ever, by
         rho^2 C (sigma_zeta^2 + sigma_eta^2) tr((sum H)^-2) a round, which is small for
         rho far below the curvature.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedcore import trees
from fedcore.errors import TooFewReports
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
    start: Literal["ls", "paper", "corrected"] = Field(
        "ls",
        description="exact: w_k by least squares; or N_k b_k, and w_{-1} 0 (limit off "
        "unless C = K) or (1 - K/C) w_0",
    )

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.solver == "sgd" and self.start != "ls":
            raise ValueError(
                f'start = "{self.start}" is for the exact solver: with sgd all clients '
                "start from the initial model"
            )
        return self


class Server(NamedTuple):
    params: Params  # w_n
    p: Params
    started: Tensor  # 0-d, 1 after the start


class Client(NamedTuple):
    w: Params  # w_k
    g: Params  # g_k, tracked by "sgd"; the exact solver has no dual
    J: Quadratic | Stateless  # J_k, of the exact solver


class Down(NamedTuple):
    s: Params


class Up(NamedTuple):
    w: Params
    loss: Tensor  # mean training loss, for the log


class RERCE(Method[Settings]):
    differences = False  # w_k

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.zeros_like(params), torch.zeros(()))

    def init_client(self, params: Params) -> Client:
        if self.s.solver == "exact":
            return Client(params, {}, unknown(params))
        return Client(params, trees.zeros_like(params), Stateless())

    def check(self, task: Task, cohort: int) -> str | None:
        if self.s.solver == "exact":
            memory.require(*hessian_memory(task))
        if cohort > 1:
            return None
        return (
            "RERCE-Fed with one client a round may diverge: its s_n swings from one "
            "client to the next"
        )

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return (
                "its server sends what the last cohort changed, divided by the size "
                "of this one, and a buffer's clients got several versions of that"
            )
        is_exact = self.s.solver == "exact"
        if setting in TRAINING and is_exact:
            return 'method.solver = "exact" takes no local steps'
        if setting == "secure" and is_exact:
            return (
                'method.solver = "exact" reaches what rounding to integers does not: '
                'set method.solver = "sgd"'
            )
        if setting != "rule":
            return super().refuses(setting)
        return (
            "its clients' models build on each other through what the server remembers "
            "of all of them, so that one poisoned message acts in every later round"
        )

    def exchanged(self, down: Any, up: Any) -> tuple[Params, Params] | None:
        return (down.s, trees.sub(up.w, down.s)) if isinstance(up, Up) else None

    def model_for(self, server: Any, state: Client) -> Params:
        """The client's own estimate where it is exact, as the paper measures it.

        For networks it is the global model.
        """
        return state.w if self.s.solver == "exact" else server.params

    def personalises(self) -> bool:
        return self.s.solver == "exact"

    def asks_everybody_first(self) -> bool:
        return self.s.solver == "exact"

    @on_client(data="all")
    def start(
        self, task: Task, t: Tensor, down: Stateless, state: Client, batches: Batches
    ) -> tuple[Stateless, Client]:
        J = quadratic(task.loss, state.w, batches, task.weights)
        if self.s.start == "ls":
            w = J.least_squares(state.w)
        else:
            w = J.ridge(self.s.rho, state.w)
        return Stateless(), Client(w, {}, J)

    @on_client(data="all")
    def tell(
        self, task: Task, t: Tensor, down: Stateless, state: Client, batches: Batches
    ) -> tuple[Params, Client]:
        return state.w, state

    @on_client(data="all")
    def solve(
        self, task: Task, t: Tensor, down: Down, state: Client, batches: Batches
    ) -> tuple[Up, Client]:
        assert isinstance(state.J, Quadratic)
        # w_k + rho N_k (s_n - w_k)
        step = state.J.solve(self.s.rho, trees.sub(down.s, state.w))
        w = trees.axpy(self.s.rho, step, state.w)
        return Up(w, task.evaluate(w, batches)["loss"]), state._replace(w=w)

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Down, state: Client, batches: Batches
    ) -> tuple[Up, Client]:
        rho, lr = self.s.rho, self.s.local_lr
        slope = trees.scale(state.g, -1)
        w, steps, loss = local_sgd(
            task.loss, state.w, batches, lr, slope, prox=rho, center=down.s
        )
        # Without an example J_k = 0.
        w = trees.where(steps > 0, w, trees.axpy(1 / rho, state.g, down.s))
        g = trees.axpy(-rho, trees.sub(w, down.s), state.g)
        return Up(w, loss), state._replace(w=w, g=g)

    def round(self, server: Server, r: Round) -> Server:
        is_exact = self.s.solver == "exact"
        if is_exact and not bool(server.started):
            server = self._start(server, r)
        if len(r.cohort) == 0:
            return server
        # s_n = 2 w_n - w_{n-1}
        s = trees.axpy(1 / len(r.cohort), server.p, server.params)
        mean = r.mean(
            self.solve if is_exact else self.train, r.cohort, Down(s), equally
        )
        arrived = len(mean.clients)
        if arrived == 0:
            raise TooFewReports("nobody reported")
        w = trees.scale(mean.total.w, 1 / arrived)
        p = trees.axpy(arrived, trees.sub(w, s), server.p)
        moved = trees.sub(w, server.params)
        r.log["step_norm"] = trees.dot(moved, moved).sqrt().item()
        return Server(w, p, server.started)

    def _start(self, server: Server, r: Round) -> Server:
        everybody, started = torch.arange(r.population), torch.ones(())
        for _ in r.each(self.start, everybody, Stateless()):
            pass
        if self.s.start == "ls":
            return server._replace(started=started)
        mean = r.mean(self.tell, everybody, Stateless(), equally)
        told = len(mean.clients)
        w = trees.scale(mean.total, 1 / max(told, 1))  # w_0
        # C (w_0 - w_{-1}); with an empty first cohort as if w_{-1} = w_0
        p = trees.scale(w, len(r.cohort) if self.s.start == "paper" else told)
        return Server(w, p, started)
