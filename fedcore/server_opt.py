"""Server optimizers as (init, update), on the pseudo-gradient.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 2.

    Delta_t   mean of the clients' deltas (local minus global), a descent direction
    eta       server learning rate
    m_t, v_t  first and second moment
    tau       degree of adaptivity
Every optimizer steps along +Delta: the pseudo-gradient is -Delta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.types import Params

__all__ = [
    "Moments",
    "Momentum",
    "ServerOptimizer",
    "adagrad",
    "adam",
    "momentum",
    "yogi",
]


class Momentum(NamedTuple):
    """State of `momentum`."""

    velocity: Params


class Moments(NamedTuple):
    """State of the adaptive optimizers."""

    m: Params
    v: Params


class ServerOptimizer(NamedTuple):
    """`init(params) -> state`, `update(delta, state) -> (step, state)`.

    The new model is params + step.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any], tuple[Params, Any]]


def momentum(lr: float, beta: float) -> ServerOptimizer:
    """velocity <- beta velocity + Delta, step = eta velocity (Hsu, Qi, Brown 2019).

    FedAvgM, without Nesterov's correction.

    >>> optimizer = momentum(lr=1.0, beta=0.5)
    >>> delta = {"w": torch.ones(1)}
    >>> step, state = optimizer.update(delta, optimizer.init(delta))
    >>> step, state = optimizer.update(delta, state)
    >>> step["w"]
    tensor([1.5000])
    """

    def update(delta: Params, state: Momentum) -> tuple[Params, Momentum]:
        velocity = trees.axpy(beta, state.velocity, delta)
        return trees.scale(velocity, lr), Momentum(velocity)

    return ServerOptimizer(lambda params: Momentum(trees.zeros_like(params)), update)


def adagrad(lr: float, beta1: float, tau: float) -> ServerOptimizer:
    """v <- v + Delta^2."""
    return _adaptive(lr, beta1, tau, lambda v, d: v + d * d)


def adam(lr: float, beta1: float, beta2: float, tau: float) -> ServerOptimizer:
    """v <- beta2 v + (1 - beta2) Delta^2; no bias correction, as in Algorithm 2."""
    return _adaptive(lr, beta1, tau, lambda v, d: beta2 * v + (1 - beta2) * d * d)


def yogi(lr: float, beta1: float, beta2: float, tau: float) -> ServerOptimizer:
    """v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)."""

    def second(v: Tensor, d: Tensor) -> Tensor:
        return v - (1 - beta2) * d * d * torch.sign(v - d * d)

    return _adaptive(lr, beta1, tau, second)


def _adaptive(
    lr: float, beta1: float, tau: float, second: Callable[[Tensor, Tensor], Tensor]
) -> ServerOptimizer:
    """`second` makes the new v of the old one and Delta."""

    def init(params: Params) -> Moments:
        # v_{-1} = tau^2, the smallest start that Algorithm 2 allows.
        v = trees.map(lambda p: torch.full_like(p, tau**2), params)
        return Moments(trees.zeros_like(params), v)

    def update(delta: Params, state: Moments) -> tuple[Params, Moments]:
        m = trees.map(lambda m, d: beta1 * m + (1 - beta1) * d, state.m, delta)
        v = trees.map(second, state.v, delta)
        step = trees.map(lambda m, v: lr * m / (v.sqrt() + tau), m, v)
        return step, Moments(m, v)

    return ServerOptimizer(init, update)
