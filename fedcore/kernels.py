"""What recordings call on a CPU, where PyTorch's own operations are slower: convolutions of many clients, unfolding, pooling,
log-softmax over few classes. All return contiguous tensors.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


def convolutions(x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Of each client's x [n, B, C, H, W] with its w [n, D, C, k, k]: [n, B, D, h, w]."""
    return torch.stack([torch.convolution(a, b, None, stride, padding, dilation, False, [0], 1) for a, b in zip(x, w, strict=True)])


def convolutions_backward(
    g: Tensor, x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolutions` with respect to (x, w), where they are wanted, from that of its result."""
    found = [
        aten.convolution_backward.default(*each, None, stride, padding, dilation, False, [0], 1, wanted)[:2]
        for each in zip(g, x, w, strict=True)
    ]
    dx, dw = (torch.stack(each) if want else None for each, want in zip(zip(*found, strict=True), wanted, strict=False))
    return dx, dw


def patches(x: Tensor, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> Tensor:
    """`im2col`: of x [N, C, H, W] what a convolution sees, [N, C k k, h w], as one copy of a view, in a third of PyTorch's time."""
    if any(padding):
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for axis, (k, d, step) in enumerate(zip(kernel, dilation, stride, strict=True)):
        x = _windows(x, 2 + axis, k, d, step)
    n, channels, *_, h, w = x.shape
    return x.reshape(n, channels * math.prod(kernel), h * w).contiguous()


def spread(y: Tensor, size: list[int], kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> Tensor:
    """`col2im`, the adjoint of `patches`: of y [N, C k k, h w] the sums [N, C, H, W], in half of PyTorch's time."""
    x = y.new_zeros(len(y), y.shape[1] // math.prod(kernel), *(s + 2 * p for s, p in zip(size, padding, strict=True)))
    windows: Tensor = x
    for axis, (k, d, step) in enumerate(zip(kernel, dilation, stride, strict=True)):
        windows = _windows(windows, 2 + axis, k, d, step)
    pieces = y.reshape(windows.shape)
    for i, j in itertools.product(*map(range, kernel)):  # within one of them no two elements are the same
        windows[:, :, i, j].add_(pieces[:, :, i, j])
    return x[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].contiguous()


def _windows(x: Tensor, axis: int, k: int, dilation: int, stride: int) -> Tensor:
    """A view in which this axis is two: which element of the kernel, [k], and next to the last axes where it is put."""
    places = (x.shape[axis] - dilation * (k - 1) - 1) // stride + 1
    found = x.unfold(axis, (places - 1) * stride + 1, dilation)[..., ::stride]
    return found.narrow(axis, 0, k)


def averages(x: Tensor, kernel: list[int], *_: Any) -> Tensor:
    """`avg_pool2d` of x [N, C, H, W] in tiles: sums of slices, which take a fifth of the time of PyTorch's."""
    for axis, k in zip((2, 3), kernel, strict=True):
        x = functools.reduce(torch.add, torch.unflatten(x, axis, (-1, k)).unbind(axis + 1))
    return x.div_(math.prod(kernel)).contiguous()


def averages_backward(g: Tensor, x: Tensor, kernel: list[int], *_: Any) -> Tensor:
    """From the gradient g [N, C, h, w] of `averages` that of its input."""
    rows = (g / math.prod(kernel)).repeat_interleave(kernel[1], 3)
    return rows.unsqueeze(3).expand(-1, -1, -1, kernel[0], -1).reshape(x.shape)


def log_softmax(x: Tensor, *_: Any) -> Tensor:
    """Over the last axis, where that is short: a quarter of PyTorch's time for ten classes."""
    x = (x - x.amax(-1, keepdim=True)).contiguous()  # first: large numbers lose in their logsumexp what differs between them
    return x - x.exp().sum(-1, keepdim=True).log()


def log_softmax_backward(g: Tensor, y: Tensor, *_: Any) -> Tensor:
    """From the gradient g of y = `log_softmax`(x) that of x."""
    return torch.addcmul(g, y.exp(), g.sum(-1, keepdim=True), value=-1)
