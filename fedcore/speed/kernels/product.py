"""A convolution as one matrix product; it can be differentiated, and batched."""

from __future__ import annotations

import torch
from torch import Tensor


def product(w: Tensor, columns: Tensor, places: tuple[int, int]) -> Tensor:
    """Weights w [..., D, C, k, k] times unfolded images, one product for all of them.

    columns [..., C k k, B h w] to [..., B, D, h, w], where `places` are (h, w).
    """
    y = w.flatten(-3) @ columns  # [..., D, B h w]
    return torch.unflatten(y, -1, (-1, *places)).transpose(-4, -3)
