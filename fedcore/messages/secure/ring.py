"""The ring of a secure sum: fixed-point integers that add without an order.

    n_max  clients in a sum at most      L  levels at full weight, a power of two
    c      reach                         W  cap on weights; both powers of two

    y = clip(x, -c, c) (w / W) L / c;    q = floor(y) + [u < y - floor(y)], mod 2^32
    sum_i w_i x_i = int32(sum q) c W / L

Numbers of tensors are words of 32 bits, scalars (weights, counts, losses) of 64.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Encoded", "Ring"]


class Ring(NamedTuple):
    """What all clients of a sum have to agree on."""

    n_max: int
    reach: float = 8.0  # c
    cap: float = 4096.0  # W

    @property
    def levels(self) -> float:
        """L = 2^e with e = 31 - bit_length(n_max): no sum of n_max clients wraps.

        >>> Ring(n_max=1000).levels == 2.0**21
        True
        """
        return float(2 ** (31 - self.n_max.bit_length()))

    @property
    def step(self) -> float:
        """c W / L: what one unit of a sum stands for."""
        return self.reach * self.cap / self.levels


class Encoded(NamedTuple):
    """What a client adds to a secure sum, on the CPU, and the sum of several."""

    numbers: Tensor  # [d] int32, mod 2^32
    words: Tensor  # [s] int64, mod 2^64
