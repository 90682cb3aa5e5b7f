"""What clients compute: local SGD with hooks, and the full gradient. Pure, and batchable over clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from fedcore import trees
from fedcore.speed import recording
from fedcore.task import Task
from fedcore.types import Batches, Params, Tree

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
    lr: float | Tensor | dict[str, float],
    correction: Params | None = None,
    prox: float = 0.0,
    center: Params | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    fixed: Params | None = None,
) -> LocalWork:
    """SGD over `batches`, one step each, from y = params and v = 0:

        v <- momentum v + g(y) + correction + prox (y - center) + weight_decay y;  y <- y - lr v

    `lr` is one step size, or one a parameter; `center` is params unless given; `fixed` are parameters of the
    model that stay. A batch that is all padding moves nothing, whatever the hooks: ragged clients train side by side.
    """
    y, dtype = params, wide(params)
    center, v = (
        params if center is None else center,
        trees.zeros_like(params) if momentum else {},
    )
    tensor = lr if isinstance(lr, Tensor) else ()
    number = (
        tuple(lr.items())
        if isinstance(lr, dict)
        else None
        if isinstance(lr, Tensor)
        else lr
    )
    # What a recording of the step depends on. A loss that is not the task's own may hold tensors that change: never recorded.
    task = getattr(loss, "__self__", None)
    names = tuple(params), tuple(fixed or ()), bool(correction)
    kind = (
        (prox, momentum, weight_decay, number, task.model.training, names)
        if isinstance(task, Task)
        else None
    )

    def step(i: _Inputs) -> _Outputs:
        real = (i.mask.sum() > 0).to(dtype)
        g, value = grad_and_value(
            lambda y: loss({**i.fixed, **y}, i.x, i.target, i.mask)
        )(i.y)
        if i.correction:
            g = trees.add(g, i.correction)
        if prox:
            g = trees.map(lambda g, a, b: g + prox * (a - b), g, i.y, i.center)
        if weight_decay:
            g = trees.axpy(weight_decay, i.y, g)
        v = i.v
        if momentum:
            g = v = trees.axpy(real, g, trees.scale(v, 1 - real * (1 - momentum)))
        if isinstance(lr, dict):
            y = {
                name: torch.addcmul(value, g[name], -lr[name] * real)
                for name, value in i.y.items()
            }
        else:
            y = trees.axpy(-(i.lr if isinstance(i.lr, Tensor) else lr) * real, g, i.y)
        return _Outputs(y, v, real, value)

    steps = total = torch.zeros((), dtype=dtype, device=batches.mask.device)
    own: Params = {}
    for x, target, mask in zip(
        batches.x.unbind(), batches.y.unbind(), batches.mask.unbind(), strict=True
    ):
        inputs = _Inputs(
            y,
            v,
            fixed or {},
            correction or {},
            center if prox else {},
            x,
            target,
            mask,
            tensor,
        )
        y, v, real, value = recording.run(step, kind, inputs, own)
        own = y
        steps, total = steps + real, total + real * value
    if not len(batches.mask):
        y = trees.map(
            torch.clone, y
        )  # the caller's own, also where there was nothing to do
    return LocalWork(y, steps, total / steps.clamp(min=1))


class _Inputs(NamedTuple):
    """All tensors that a step reads."""

    y: Params
    v: Params
    fixed: Params
    correction: Params
    center: Params
    x: Tensor
    target: Tensor
    mask: Tensor
    lr: Tree  # a 0-d tensor, where it is not a number


class _Outputs(NamedTuple):
    y: Params
    v: Params
    real: Tensor  # 0-d, 1 where the batch had an example
    value: Tensor  # 0-d, the loss before the update


def full_gradient(
    loss: Loss, params: Params, batches: Batches
) -> tuple[Params, Tensor]:
    """Gradient and value of the mean loss over all real examples of `batches`."""
    dtype = wide(params)
    total = batches.mask.sum().clamp(min=1).to(dtype)
    gradient, value = (
        trees.zeros_like(params),
        torch.zeros((), dtype=dtype, device=batches.mask.device),
    )
    for x, y, mask in zip(
        batches.x.unbind(), batches.y.unbind(), batches.mask.unbind(), strict=True
    ):
        share = mask.sum() / total
        g, v = grad_and_value(loss)(params, x, y, mask)
        gradient, value = trees.axpy(share, g, gradient), value + share * v
    return gradient, value


def wide(params: Params) -> torch.dtype:
    """For step sizes and counters: float32 would round a float64 model, and bfloat16 counts to 256."""
    return torch.promote_types(next(iter(params.values())).dtype, torch.float32)
