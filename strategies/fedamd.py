"""FedAMD - anchor sampling with cached gradients (Wu et al., ICML 2023, Algorithm 1).

Cached large-batch gradients guide local steps.

x_t  global parameters           y_k  local parameters
v_i  cached gradient of client i on all its examples     vbar  mean of the v_i
p  probability that a participant is an anchor, not a miner
K  local steps of a miner        eta_l, eta_s  local and server step size

    anchors   v_i <- grad f_i(x_t), after vbar was used
    miners    g_0 = vbar;  g_k = g_{k-1} + grad f_i(y_k; B) - grad f_i(y_{k-1}; B);
              y_{k+1} = y_k - eta_l g_k
    server    x_{t+1} = x_t + eta_s (mean of y_K - x_t over the miners);
              x_t without miners

Choice:  caches are the server's, as in the authors' code: a message that is lost
         changes nothing. Before the first round every client is asked for its
         gradient; a client that did not answer has no cache, is left out of vbar, and
         is an anchor when it first takes part. `period` is the authors' sequential
         schedule. The server tosses the coins, so that only miners get vbar.
Reduces: with period 2, K = 1 and everybody taking part, to a step of gradient descent
         every second round; to FedAvg never (K > 1).
Heed:    dropout, momentum or clipping inside local steps break the recursion. Anchors
         send raw gradients, the most telling message.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad_and_value

from fedcore import trees
from fedcore.local import full_gradient, wide
from fedcore.method import (
    TRAINING,
    Method,
    MethodSettings,
    Round,
    Setting,
    on_client,
)
from fedcore.reports import equally
from fedcore.rng import rng
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.01, gt=0, description="eta_l, step size of a local step")
    server_lr: float = Field(1.0, gt=0, description="eta_s, step size of the server")
    p: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="probability that a participant is an anchor, in (0, 1)",
    )
    period: int | None = Field(
        None,
        ge=2,
        description="tau: all are anchors every tau-th round, else miners; replaces p",
    )


class Server(NamedTuple):
    params: Params
    # vbar, the mean of the caches that there are; float64, because it is a running sum
    v: Params
    # [N] int64, rounds elapsed at the last refresh of client i's cache; 0 = it has none
    refreshed: Tensor


class Guide(NamedTuple):
    params: Params  # x_t
    v: Params  # vbar


class Gradient(NamedTuple):
    v: Params  # grad f_i(x_t)
    loss: Tensor  # f_i(x_t), for the log


class Up(NamedTuple):
    delta: Params  # y_K - x_t
    loss: Tensor  # mean training loss, for the log


class FedAMD(Method[Settings]):
    differences = False  # the anchors send gradients
    remembers = True

    def asks_everybody_first(self) -> bool:
        return True

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return (
                "a round is two exchanges: gradients of anchors, and then the work of "
                "miners that start from them"
            )
        if setting in TRAINING:
            return "its steps are a recursion of gradients of its own"
        return super().refuses(setting)

    def init_server(self, params: Params, population: int) -> Server:
        return Server(
            params,
            trees.zeros_like(params, torch.float64),
            torch.zeros(population, dtype=torch.int64),
        )

    def init_memory(self, params: Params) -> Params:
        return trees.zeros_like(params)  # v_i

    def exchanged(self, down: Any, up: Any) -> tuple[Params, Params] | None:
        if isinstance(up, Gradient):
            return down.params, trees.scale(up.v, -1)  # as one step of size 1
        return super().exchanged(down, up)

    @on_client(data="all")
    def anchor(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Gradient, Stateless]:
        return Gradient(*full_gradient(task.loss, down.params, batches)), state

    @on_client
    def mine(
        self, task: Task, t: Tensor, down: Guide, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        gradient = grad_and_value(task.loss)
        before, y, g = down.params, down.params, down.v
        dtype = wide(down.params)
        steps = total = torch.zeros((), dtype=dtype, device=batches.mask.device)
        for k, (x, target, mask) in enumerate(trees.unbind(batches)):
            real = (mask.sum() > 0).to(dtype)
            if k == 0:  # the difference of two equal gradients is zero
                loss = task.loss(y, x, target, mask)
            else:
                now, loss = gradient(y, x, target, mask)  # the same B in both
                then, _ = gradient(before, x, target, mask)
                g = trees.axpy(real, trees.sub(now, then), g)
            steps, total = steps + real, total + real * loss
            before, y = y, trees.axpy(-self.s.local_lr * real, g, y)
        return Up(trees.sub(y, down.params), total / steps.clamp(min=1)), state

    def news(
        self, up: Gradient, v: Params, num_examples: Tensor
    ) -> tuple[Gradient, Params]:
        change = trees.sub(trees.double(up.v), v)
        return Gradient(change, up.loss), up.v

    def round(self, server: Server, r: Round) -> Server:
        if not bool((server.refreshed > 0).any()):
            everybody = torch.arange(r.population)
            server = self._refresh(server, r, everybody)
        anchors, miners = self._roles(server, r)
        # Caches as of the end of the round before.
        guide = Guide(server.params, trees.like(server.v, server.params))
        mean = r.mean(self.mine, miners, guide, equally)
        after = self._refresh(server, r, anchors)
        x = server.params
        if len(mean.clients):
            step = self.s.server_lr / len(mean.clients)
            x = trees.axpy(step, mean.total.delta, x)
        r.log["v_norm"] = trees.dot(guide.v, guide.v).sqrt().item()
        ages = r.t + 1 - after.refreshed[after.refreshed > 0]
        r.log["cache_age"] = ages.double().mean().item()
        return after._replace(params=x)

    def _roles(self, server: Server, r: Round) -> tuple[Tensor, Tensor]:
        """(anchors, miners) of the cohort."""
        if self.s.period is not None:
            is_anchor = torch.full((len(r.cohort),), r.t % self.s.period == 0)
        else:
            coins = [rng(r.seed, "anchor", r.t, i).random() for i in r.cohort.tolist()]
            is_anchor = torch.tensor(coins, dtype=torch.float64) < self.s.p
        # A client without a cache has to make one.
        is_anchor |= (server.refreshed[r.cohort] == 0).cpu()
        return r.cohort[is_anchor], r.cohort[~is_anchor]

    def _refresh(self, server: Server, r: Round, clients: Tensor) -> Server:
        """v_i <- grad f_i(x_t) for these clients, and vbar with them."""
        total = trees.scale(server.v, int((server.refreshed > 0).sum()))
        refreshed = server.refreshed.clone()
        down = Model(server.params)
        mean = r.mean(self.anchor, clients, down, equally, self.news)
        if len(mean.clients):
            total = trees.add(total, mean.total.v)
        refreshed[mean.clients] = r.t + 1
        caches = max(int((refreshed > 0).sum()), 1)
        return server._replace(v=trees.scale(total, 1 / caches), refreshed=refreshed)
