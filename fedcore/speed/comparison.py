"""Comparison of two computations of one thing, by how far they moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING = 4  # eps of a value: two sums of the same numbers may differ by so much
NOISE = 32  # times the change of the outputs where the inputs change by one eps


def deviation(
    values: list[Tensor],
    expected: list[Tensor],
    inputs: list[Tensor],
    by_client: bool,
    shaken: list[Tensor] | None = None,
) -> float:
    """The largest difference of `values` from `expected`, as a share of the movement.

    An output's movement is its largest distance from the nearest of the `inputs` of its
    shape, which it may replace, or from zero where that is nearer; `by_client`: of each
    row of its own. Rounding counts for nothing, and neither does noise: what changes
    in `shaken`, the outputs at inputs that were changed by one eps.
    """
    worst = 0.0
    for i, (value, right) in enumerate(zip(values, expected, strict=True)):
        if not right.is_floating_point():
            share = 0.0 if torch.equal(value, right) else math.inf
        elif right.numel() == 0:
            continue
        else:
            noise = None if shaken is None else shaken[i] - right
            share = _share(value, right, inputs, by_client, noise)
        worst = max(worst, share)
    return worst


def tolerance(outputs: list[Tensor]) -> float:
    """The deviation that the rounding of two ways of computing one thing explains."""
    roots = [math.sqrt(_eps(x)) for x in outputs if x.is_floating_point()]
    return max([0.01, *roots])


def movement(output: Tensor, inputs: list[Tensor], by_client: bool) -> Tensor:
    """How far an output is from the nearest input of its shape, or from zero.

    0-d, or [n, 1, ...] where each row of it counts by itself.
    """
    nearest = largest(output, by_client)
    for x in inputs:
        if may_replace(output, x, by_client):
            nearest = nearest.minimum(largest(output - x, by_client))
    return nearest


def may_replace(output: Tensor, x: Tensor, by_client: bool) -> bool:
    """Whether the output may stand in place of the input x in the next step."""
    shapes = [output.shape, output.shape[1:]] if by_client else [output.shape]
    has_axes = output.ndim > by_client and output.numel() > 0
    return has_axes and x.is_floating_point() and x.shape in shapes


def largest(x: Tensor, by_client: bool) -> Tensor:
    """The largest finite magnitude, 0-d, or of each row by itself, [n, 1, ...]."""
    sizes = x.nan_to_num(0, 0, 0).abs()
    if not by_client:
        return sizes.max()
    axes = tuple(range(1, x.ndim))
    return sizes.amax(axes, keepdim=True) if axes else sizes


def shake(inputs: list[Tensor], outputs: list[Tensor], by_client: bool) -> list[Tensor]:
    """The inputs, each number changed by one eps, up or down.

    Those that an output may replace stay: its movement starts from them.
    """
    return [
        x
        if any(may_replace(output, x, by_client) for output in outputs)
        else _shaken(x)
        for x in inputs
    ]


def _share(
    value: Tensor,
    right: Tensor,
    inputs: list[Tensor],
    by_client: bool,
    noise: Tensor | None,
) -> float:
    same = (value == right) | (value.isnan() & right.isnan())
    difference = (value - right).abs().where(~same, 0.0)
    excess = difference - ROUNDING * _eps(right) * right.abs().where(~same, 0.0)
    if noise is not None:
        excess = excess - NOISE * largest(noise, by_client)
    share = excess.clamp(min=0) / movement(right, inputs, by_client)
    # 0 / 0 is no difference; what is finite on one side alone has one without bounds.
    share = share.where(excess > 0, 0.0).where(difference.isfinite(), torch.inf)
    return float(share.max())


def _shaken(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    draw = torch.Generator(x.device).manual_seed(x.numel())
    signs = torch.randint(0, 2, x.shape, generator=draw, device=x.device) * 2 - 1
    return x * (1 + _eps(x) * signs)


def _eps(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).eps)
