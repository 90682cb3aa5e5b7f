"""Steps before a rule: matrices A, where the rule sees the rows of Y = A X.

nnm         each row becomes the mean of its n - f nearest (Allouah et al., 2023)
bucketing   means of random buckets of s rows (Karimireddy, He, Jaggi, ICLR 2022)
clip        rows longer than the median norm are cut to it
arc         the longest are cut to the longest of the others (arXiv 2405.14432)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.messages.aggregation.gram import squared_distances
from fedcore.messages.aggregation.passes import Array


class Mixing(NamedTuple):
    """A step before a rule, in one of three forms: Y = A X."""

    matrix: Array  # A [m, n]
    factors: Array | None = None  # [n], where A is diagonal
    order: npt.NDArray[np.int64] | None = None  # [n], where A has means of buckets
    size: int = 1  # of a bucket

    def of(self, values: Array) -> Array:
        """A times a piece of the rows, [n, b], without zeros where A is mostly zero."""
        if self.factors is not None:
            return values * self.factors[:, None]
        if self.order is not None:
            starts = np.arange(0, len(self.order), self.size)
            sums = np.add.reduceat(values[self.order], starts, axis=0)
            counts = np.diff(np.append(starts, len(self.order)))
            return sums / counts[:, None]
        return self.matrix @ values


def nearest_neighbour_mixing(gram: Array, f: int) -> Array:
    """A [n, n] of the means of the n - f nearest rows, the row itself among them."""
    n = len(gram)
    distances = squared_distances(gram)
    np.fill_diagonal(distances, -1.0)  # nearer than a row that is equal
    order = np.argsort(distances, axis=1, kind="stable")
    mixing = np.zeros((n, n))
    np.put_along_axis(mixing, order[:, : n - f], 1.0 / (n - f), axis=1)
    return mixing


def buckets(order: npt.NDArray[np.int64], size: int) -> Array:
    """A [n / size, n] of the means of rows that follow each other in `order`.

    The last bucket is smaller where `size` does not divide n.

    >>> buckets(np.array([2, 0, 1]), 2)
    array([[0.5, 0. , 0.5],
           [0. , 1. , 0. ]])
    """
    n = len(order)
    count = -(-n // size)
    mixing = np.zeros((count, n))
    for number in range(count):
        members = order[number * size : (number + 1) * size]
        mixing[number, members] = 1.0 / len(members)
    return mixing


def clip_factors(norms: Array, bound: float) -> Array:
    """min(1, bound / norm) for each row, 1 for a row of zeros."""
    factors = np.ones(len(norms))
    np.divide(bound, norms, out=factors, where=norms > bound)
    return factors


def arc_factors(norms: Array, f: int) -> Array:
    """Factors that cut the k = floor(2f (n - f) / n) longest rows.

    They get the norm of the longest of the others.
    """
    n = len(norms)
    k = 2 * f * (n - f) // n
    return clip_factors(norms, float(np.sort(norms)[n - k - 1]))
