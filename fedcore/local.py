"""What clients compute: local SGD with hooks, and the full gradient. Pure, and batchable over clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from fedcore import trees
from fedcore.types import Batches, Params

Loss = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
"""(params, x [B, ...], y [B, ...], mask [B]) -> mean loss over the real examples, 0-d."""


class LocalWork(NamedTuple):
    """Where local training ended."""

    params: Params
    steps: Tensor  # 0-d, the steps that had an example
    loss: Tensor  # 0-d, mean training loss over those steps, each before its update


def local_sgd(
    loss: Loss,
    params: Params,
    batches: Batches,
    lr: float | Tensor,
    correction: Params | None = None,
    prox: float = 0.0,
) -> LocalWork:
    """SGD over `batches`, one step each: y <- y - lr (g(y) + correction + prox (y - params)).

    A batch that is all padding moves nothing, whatever the hooks: ragged clients train side by side.
    """
    y, dtype = params, next(iter(params.values())).dtype  # a step size in float32 would round a float64 model
    steps = total = torch.zeros((), dtype=dtype, device=batches.mask.device)
    for x, target, mask in zip(batches.x.unbind(), batches.y.unbind(), batches.mask.unbind(), strict=True):
        real = (mask.sum() > 0).to(dtype)
        g, value = grad_and_value(loss)(y, x, target, mask)
        if correction is not None:
            g = trees.add(g, correction)
        if prox:
            g = trees.map(lambda g, a, b: g + prox * (a - b), g, y, params)
        y = trees.axpy(-lr * real, g, y)
        steps, total = steps + real, total + real * value
    return LocalWork(y, steps, total / steps.clamp(min=1))


def full_gradient(loss: Loss, params: Params, batches: Batches) -> tuple[Params, Tensor]:
    """Gradient and value of the mean loss over all real examples of `batches`."""
    dtype = next(iter(params.values())).dtype
    total = batches.mask.sum().clamp(min=1).to(dtype)
    gradient, value = trees.zeros_like(params), torch.zeros((), dtype=dtype, device=batches.mask.device)
    for x, y, mask in zip(batches.x.unbind(), batches.y.unbind(), batches.mask.unbind(), strict=True):
        share = mask.sum() / total
        g, v = grad_and_value(loss)(params, x, y, mask)
        gradient, value = trees.axpy(share, g, gradient), value + share * v
    return gradient, value
