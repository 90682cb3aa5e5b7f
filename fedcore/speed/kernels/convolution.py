"""Convolutions with weights of their own for each client.

x [n, B, C, H, W] and w [n, D, C, k, k] give y [n, B, D, h, w]: by one call a client,
or by one matrix product a client over unfolded inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.speed.functorch import CONVOLUTION_BACKWARD, convolution
from fedcore.speed.kernels.product import product
from fedcore.speed.kernels.unfolding import folded, grid, unfolded

Gradients = tuple[Tensor | None, Tensor | None]
"""With respect to (x, w); None where it is not wanted."""


def convolutions(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """One call a client."""
    settings = (None, stride, padding, dilation, False, [0], 1)
    pairs = zip(x, w, strict=True)
    return torch.stack([convolution(one, weight, *settings) for one, weight in pairs])


def convolutions_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    wanted: list[bool],
) -> Gradients:
    """Gradients of `convolutions`, from that of its result, g [n, B, D, h, w]."""
    settings = (None, stride, padding, dilation, False, [0], 1, wanted)
    clients = zip(g, x, w, strict=True)
    gradients = [CONVOLUTION_BACKWARD(*client, *settings)[:2] for client in clients]
    dx, dw = zip(*gradients, strict=True)
    return (
        torch.stack(dx) if wanted[0] else None,
        torch.stack(dw) if wanted[1] else None,
    )


def products(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """`convolutions`, as one matrix product a client."""
    kernel = list(w.shape[3:])
    columns = unfolded(x, kernel, dilation, padding, stride)
    places = grid(x.shape[3:], w.shape[3:], dilation, padding, stride)
    return product(w, columns, places).contiguous()


def products_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    wanted: list[bool],
) -> Gradients:
    """`convolutions_backward`, as matrix products."""
    images, size, kernel = x.shape[1], list(x.shape[3:]), list(w.shape[3:])
    g = g.transpose(1, 2).flatten(2)  # [n, D, B h w]
    dx = dw = None
    if wanted[0]:
        columns = w.flatten(2).mT @ g
        dx = folded(columns, images, size, kernel, dilation, padding, stride)
    if wanted[1]:
        columns = unfolded(x, kernel, dilation, padding, stride)
        dw = torch.bmm(g, columns.mT).view(w.shape)
    return dx, dw
