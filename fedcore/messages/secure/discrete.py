"""The discrete Gaussian on whole numbers, drawn exactly from a key of 256 bits.

    P(k) = exp(-k^2 / 2 s^2) / sum_j exp(-j^2 / 2 s^2),    |k| <= 14 s

    s  deviation, a whole number      F  cumulative probabilities in units of 2^-128

A draw is the number of F_k that a uniform number of 128 bits reaches. Its first 64 bits
decide but for one draw in 2^49 (s = 1024); the stream of AES-256-CTR has them one after
another, and behind them the last 64 bits of those draws that need them. F is made of
Python's integers, in fixed point with 384 bits: the distribution of a draw is within
2^-110 of P in total variation, and what P would have beyond 14 s is below 2^-140.

Floating-point Gaussian noise is not used here: its low bits depend on the value that
it is added to (Mironov, CCS 2012).
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["REACH", "DiscreteGaussian", "discrete_gaussian"]

REACH = 14  # deviations from zero up to which there are numbers
FIXED = 384  # bits behind the point
ONE = 1 << FIXED
LOW = (1 << 64) - 1
CELL = 18  # first bits of a word, which decide nearly always
BLOCK = 1 << 15  # words at a time, so that they stay in the cache
_ZEROS = memoryview(bytes(8 * BLOCK))

Words = npt.NDArray[np.uint64]
Draws = npt.NDArray[np.int32]


class DiscreteGaussian:
    """The discrete Gaussian of one deviation.

    >>> DiscreteGaussian(1).draw(10, key=bytes(32)).tolist()
    [0, 0, 1, 0, 0, -1, 0, 0, 0, 2]
    """

    def __init__(self, deviation: int) -> None:
        """`deviation` is s; the table has 28 s entries."""
        self.deviation = deviation
        self._least = -REACH * deviation
        thresholds = cumulative(deviation)
        self._high = np.array([f >> 64 for f in thresholds], np.uint64)
        self._low = np.array([f & LOW for f in thresholds], np.uint64)
        self._cells = _cells(self._high)

    def draw(self, count: int, key: bytes) -> Draws:
        """Independent draws, int32 [count]. A key of 32 bytes is used once."""
        stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        buffer = bytearray(8 * BLOCK + 16)  # the library wants a block to spare
        words = np.frombuffer(buffer, "<u8", BLOCK)
        draws = np.empty(count, np.int32)
        ties: list[tuple[int, int]] = []  # (place, word)
        for start in range(0, count, BLOCK):
            block = draws[start : start + BLOCK]
            stream.update_into(_ZEROS[: 8 * len(block)], buffer)
            drawn = words[: len(block)]
            block[:] = self._cells[drawn >> np.uint64(64 - CELL)]
            for place in self._settle(block, drawn):
                ties.append((start + place, int(drawn[place])))
        for place, word in ties:
            last = int.from_bytes(stream.update(bytes(8)), "little")
            draws[place] = self._reached(word, last)
        draws += self._least
        return draws

    def _settle(self, block: Draws, words: Words) -> list[int]:
        """Count thresholds where the first bits did not do; the places of ties."""
        places = np.flatnonzero(block < 0)
        wanted = words[places]
        first = np.searchsorted(self._high, wanted, side="left")
        behind = np.searchsorted(self._high, wanted, side="right")
        block[places] = first
        ties: list[int] = places[first < behind].tolist()
        return ties

    def _reached(self, word: int, last: int) -> int:
        """The number of thresholds that the number of 128 bits reaches."""
        wanted = np.uint64(word)
        first = int(np.searchsorted(self._high, wanted, side="left"))
        behind = int(np.searchsorted(self._high, wanted, side="right"))
        same = self._low[first:behind]
        return first + int(np.searchsorted(same, np.uint64(last), side="right"))


@lru_cache(maxsize=8)
def discrete_gaussian(deviation: int) -> DiscreteGaussian:
    """The discrete Gaussian of deviation s, made once a process.

    It is not kept on disk: it takes a tenth of a second, and whoever can write a file
    could take the noise away.
    """
    return DiscreteGaussian(deviation)


def cumulative(deviation: int) -> list[int]:
    """F_k = floor(2^128 P(less than or equal to k)) for all k but the last, ascending.

    >>> [f >> 118 for f in cumulative(1)][12:16]
    [59, 307, 716, 964]
    """
    half = weights(deviation)
    ascending = [*half[:0:-1], *half]
    total = sum(ascending)
    return [(part << 128) // total for part in itertools.accumulate(ascending[:-1])]


def weights(deviation: int) -> list[int]:
    """exp(-k^2 / 2 s^2) in fixed point, for k from 0 to 14 s.

    Each is the one before it times r^(2 k - 1), with r = exp(-1 / 2 s^2).
    """
    ratio = _exp_minus_one_over(2 * deviation**2)
    square = ratio * ratio >> FIXED
    values = [ONE]
    for _ in range(REACH * deviation):
        values.append(values[-1] * ratio >> FIXED)
        ratio = ratio * square >> FIXED
    return values


def _exp_minus_one_over(divisor: int) -> int:
    """exp(-1 / divisor) in fixed point, by its series."""
    total, term, n = ONE, ONE, 0
    while term:
        n += 1
        term //= divisor * n
        total += term if n % 2 == 0 else -term
    return total


def _cells(high: Words) -> Draws:
    """For each first CELL bits of a word, how many thresholds are below; else -1.

    -1 where a threshold begins with the same bits.
    """
    starts = np.arange(1 << CELL, dtype=np.uint64) << np.uint64(64 - CELL)
    ends = starts + np.uint64((1 << 64 - CELL) - 1)
    below = np.searchsorted(high, starts, side="left")
    up_to = np.searchsorted(high, ends, side="right")
    return np.where(below == up_to, below, -1).astype(np.int32)
