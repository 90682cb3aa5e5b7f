"""What recordings call where PyTorch's own operations are slower: convolutions of many clients, unfolding; and on a CPU pooling,
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


def convolutions(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Of each client's x [n, B, C, H, W] with its w [n, D, C, k, k]: [n, B, D, h, w]."""
    return torch.stack(
        [
            torch.convolution(a, b, None, stride, padding, dilation, False, [0], 1)
            for a, b in zip(x, w, strict=True)
        ]
    )


def convolutions_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolutions` with respect to (x, w), where they are wanted, from that of its result."""
    found = [
        aten.convolution_backward.default(
            *each, None, stride, padding, dilation, False, [0], 1, wanted
        )[:2]
        for each in zip(g, x, w, strict=True)
    ]
    dx, dw = (
        torch.stack(each) if want else None
        for each, want in zip(zip(*found, strict=True), wanted, strict=False)
    )
    return dx, dw


def products(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """`convolutions`, as one matrix product a client."""
    h, w_ = (
        _places(s, *rest)
        for s, *rest in zip(
            x.shape[3:], w.shape[3:], dilation, padding, stride, strict=True
        )
    )
    y = torch.bmm(
        w.flatten(2), unfolded(x, list(w.shape[3:]), dilation, padding, stride)
    )
    return y.view(len(x), w.shape[1], x.shape[1], h, w_).transpose(1, 2).contiguous()


def products_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """`convolutions_backward`, as matrix products."""
    g, kernel, dx, dw = g.transpose(1, 2).flatten(2), list(w.shape[3:]), None, None
    if wanted[0]:
        dx = folded(
            w.flatten(2).mT @ g,
            x.shape[1],
            list(x.shape[3:]),
            kernel,
            dilation,
            padding,
            stride,
        )
    if wanted[1]:
        dw = torch.bmm(g, unfolded(x, kernel, dilation, padding, stride).mT).view(
            w.shape
        )
    return dx, dw


def patches(
    x: Tensor,
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """`im2col`: of x [N, C, H, W] what a convolution sees, [N, C k k, h w]; in a third of PyTorch's time."""
    return unfolded(x.unsqueeze(1), kernel, dilation, padding, stride)


def spread(
    y: Tensor,
    size: list[int],
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """`col2im`, the adjoint of `patches`: of y [N, C k k, h w] the sums [N, C, H, W]; in half of PyTorch's time."""
    return folded(y, 1, size, kernel, dilation, padding, stride).squeeze(1)


def unfolded(
    x: Tensor,
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """What the convolutions of n clients see of x [n, B, C, H, W], as one copy of a view: [n, C k k, B h w]."""
    if any(padding):
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = _windows(x, kernel, dilation, stride)
    n, b, channels, *_, h, w = windows.shape
    return (
        windows.permute(0, 2, 3, 4, 1, 5, 6)
        .reshape(n, channels * math.prod(kernel), b * h * w)
        .contiguous()
    )


def folded(
    y: Tensor,
    images: int,
    size: list[int],
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Tensor:
    """The adjoint of `unfolded`: of y [n, C k k, B h w] of B `images` the sums [n, B, C, H, W]."""
    padded = [s + 2 * p for s, p in zip(size, padding, strict=True)]
    x = y.new_zeros(len(y), images, y.shape[1] // math.prod(kernel), *padded)
    windows = _windows(x, kernel, dilation, stride)
    pieces = y.reshape(len(y), x.shape[2], *kernel, images, *windows.shape[5:])
    for i, j in itertools.product(
        *map(range, kernel)
    ):  # within one of them no two elements are the same
        windows[:, :, :, i, j].add_(pieces[:, :, i, j].transpose(1, 2))
    return x[
        ..., padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]
    ].contiguous()


def _windows(
    x: Tensor, kernel: list[int], dilation: list[int], stride: list[int]
) -> Tensor:
    """A view of x [n, B, C, H, W] as [n, B, C, k, k, h, w]: element of the kernel, and where it is put."""
    for axis, (k, d, step) in enumerate(zip(kernel, dilation, stride, strict=True), 3):
        places = _places(x.shape[axis], k, d, 0, step)
        x = x.unfold(axis, (places - 1) * step + 1, d)[..., ::step].narrow(axis, 0, k)
    return x


def _places(size: int, k: int, dilation: int, padding: int, stride: int) -> int:
    """Where a kernel can be put along one axis."""
    return (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1


def averages(x: Tensor, kernel: list[int], *_: Any) -> Tensor:
    """`avg_pool2d` of x [N, C, H, W] in tiles: sums of slices, which take a fifth of the time of PyTorch's."""
    for axis, k in zip((2, 3), kernel, strict=True):
        x = functools.reduce(
            torch.add, torch.unflatten(x, axis, (-1, k)).unbind(axis + 1)
        )
    return x.div_(math.prod(kernel)).contiguous()


def averages_backward(g: Tensor, x: Tensor, kernel: list[int], *_: Any) -> Tensor:
    """From the gradient g [N, C, h, w] of `averages` that of its input."""
    rows = (g / math.prod(kernel)).repeat_interleave(kernel[1], 3)
    return rows.unsqueeze(3).expand(-1, -1, -1, kernel[0], -1).reshape(x.shape)


def log_softmax(x: Tensor, *_: Any) -> Tensor:
    """Over the last axis, where that is short: a quarter of PyTorch's time for ten classes."""
    x = (
        x - x.amax(-1, keepdim=True)
    ).contiguous()  # first: large numbers lose in their logsumexp what differs between them
    return x - x.exp().sum(-1, keepdim=True).log()


def log_softmax_backward(g: Tensor, y: Tensor, *_: Any) -> Tensor:
    """From the gradient g of y = `log_softmax`(x) that of x."""
    return torch.addcmul(g, y.exp(), g.sum(-1, keepdim=True), value=-1)
