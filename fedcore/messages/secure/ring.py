"""The ring of a secure sum: fixed-point integers that add without an order.

    n_max  clients in a sum at most      L  levels at full weight, a power of two
    c      reach                         W  cap on weights; both powers of two

    y = clip(x, -c, c) (w / W) L / c;    q = floor(y) + [u < y - floor(y)], mod 2^32
    sum_i w_i x_i = int32(sum q) c W / L

Numbers of tensors are words of 32 bits, scalars (weights, counts, losses) of 64.
Integers add up to the same bits in any order, so the sum is that of every engine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Encoded", "Ring", "power_of_two"]

SCALE = 2.0**20
"""Units of a scalar's word: what it holds is a multiple of 2^-20."""

LARGEST = 2.0**20
"""Scalars of messages are clipped to +- this."""

BLOCK = 2**15  # numbers at a time, so that float64 copies of them stay in the cache


class Encoded(NamedTuple):
    """What a client adds to a secure sum, on the CPU, and the sum of several."""

    numbers: Tensor  # [d] int32, mod 2^32
    words: Tensor  # [s] int64, mod 2^64

    @property
    def nbytes(self) -> int:
        """Bytes of one such message, masked or not."""
        return 4 * self.numbers.numel() + 8 * self.words.numel()

    def add_(self, other: Encoded) -> None:
        """Add another client's message, in place. Both types wrap around."""
        self.numbers.add_(other.numbers)
        self.words.add_(other.words)


class Ring(NamedTuple):
    """What all clients of a sum have to agree on.

    >>> ring = Ring(n_max=4, reach=8.0, cap=4.0)
    >>> x, half = torch.tensor([0.5, -0.25, 9.0]), torch.full((3,), 0.5)
    >>> numbers, num_clipped = ring.encode(x, weight=3, draws=half)
    >>> numbers.tolist(), num_clipped
    ([12582912, -6291456, 201326592], 1)
    >>> ring.decode(4 * numbers) / 12
    tensor([ 0.5000, -0.2500,  8.0000], dtype=torch.float64)
    """

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

    def encode(
        self, x: Tensor, weight: float, draws: Tensor | torch.Generator
    ) -> tuple[Tensor, int]:
        """(the integers of w x, int32 [d]; how many entries were cut off at +- c).

        `x` [d] is on the CPU, and finite; `weight` is from 0 to W. `draws` are the u of
        each entry, [d], or the generator that they come from: the same numbers for
        every thread count, as they are drawn one after another. Exact before it is
        rounded where x is float32 and w a whole number below 2^29.
        """
        factor = weight / self.cap * (self.levels / self.reach)
        numbers = torch.empty(len(x), dtype=torch.int32)
        num_clipped = 0
        for start in range(0, len(x), BLOCK):
            piece = x[start : start + BLOCK].double()
            if isinstance(draws, Tensor):
                u = draws[start : start + BLOCK].double()
            else:
                u = torch.rand(len(piece), generator=draws, dtype=torch.float64)
            y = piece.clamp(-self.reach, self.reach)
            num_clipped += int(torch.count_nonzero(y != piece))
            y *= factor
            low = y.floor()
            y -= low  # the part that is left is the probability to round up
            low += u < y
            numbers[start : start + BLOCK] = low
        return numbers, num_clipped

    def decode(self, numbers: Tensor) -> Tensor:
        """sum_i w_i x_i of the sum of integers, float64 [d]."""
        return numbers.double() * self.step


def words_of(values: Tensor, largest: float = LARGEST) -> Tensor:
    """Scalars in fixed point, clipped to +- `largest`, int64 [s].

    >>> words_of(torch.tensor([0.5, -1.0, 1e30])).tolist()
    [524288, -1048576, 1099511627776]
    """
    clipped = values.double().clamp(-largest, largest)
    return (clipped * SCALE).round().long()


def values_of(words: Tensor) -> Tensor:
    """The scalars, or sums of them, that words stand for, float64 [s]."""
    return words.double() / SCALE


def power_of_two(value: float) -> float:
    """The smallest power of two that is at least `value`, and 1 at least.

    >>> power_of_two(1000), power_of_two(4096.0), power_of_two(0.3)
    (1024.0, 4096.0, 1.0)
    """
    power = 1.0
    while power < value:
        power *= 2
    return power
