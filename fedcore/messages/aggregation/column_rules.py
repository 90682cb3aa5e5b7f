"""Rules that treat every column on its own.

Columns arrive transposed, [b, n]: the values of one column, in order of client id, lie
next to each other. Results are float64, and those of a column do not depend on the
columns beside it, to the last bit.

    median, trimmed_mean   Yin et al., ICML 2018
    meamed                 Xie et al., 2018; also the second half of Bulyan
    sign_vote              Bernstein et al., ICLR 2019
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from fedcore.messages.aggregation.gram import Array

Columns = npt.NDArray[np.floating]


def median(columns: Columns, weights: Array | None = None) -> Array:
    """The median of each column, the mean of the two middle values where n is even.

    With weights, the smallest value at which half of their sum is reached; the mean
    with the next one where it is reached exactly.

    >>> median(np.array([[3.0, 1.0, 9.0, 2.0]]))
    array([2.5])
    >>> median(np.array([[3.0, 1.0, 9.0, 2.0]]), np.array([1.0, 1.0, 7.0, 1.0]))
    array([9.])
    """
    if weights is not None and (weights != weights[0]).any():
        return _weighted_median(columns, weights)
    n = columns.shape[1]
    low, high = (n - 1) // 2, n // 2
    sorted_there = np.partition(columns, [low, high], axis=1)
    return (_double(sorted_there[:, low]) + _double(sorted_there[:, high])) / 2


def _weighted_median(columns: Columns, weights: Array) -> Array:
    order = np.argsort(columns, axis=1, kind="stable")
    values = np.take_along_axis(columns, order, axis=1)
    reached = np.cumsum(weights[order], axis=1)
    # Sums of the same weights in another order differ in their last bits.
    half = reached[:, -1:] / 2
    slack = half * 1e-12
    low = np.argmax(reached >= half - slack, axis=1)
    high = np.argmax(reached > half + slack, axis=1)
    rows = np.arange(len(columns))
    return (_double(values[rows, low]) + _double(values[rows, high])) / 2


def trimmed_mean(columns: Columns, f: int, weights: Array | None = None) -> Array:
    """The mean of each column without its f smallest and f largest values.

    With weights, the mass f / n of their sum is cut from each end, a value partly
    where the cut goes through it.

    >>> trimmed_mean(np.array([[3.0, 1.0, 9.0, 2.0]]), 1)
    array([2.5])
    """
    n = columns.shape[1]
    if weights is not None and (weights != weights[0]).any():
        return _weighted_trimmed_mean(columns, f / n, weights)
    if f == 0:
        return _mean(columns)
    inner = np.partition(columns, [f, n - f - 1], axis=1)[:, f : n - f]
    return _mean(inner)


def _weighted_trimmed_mean(columns: Columns, share: float, weights: Array) -> Array:
    order = np.argsort(columns, axis=1, kind="stable")
    values = np.take_along_axis(columns, order, axis=1)
    sorted_weights = weights[order]
    reached = np.cumsum(sorted_weights, axis=1)
    total = reached[:, -1:]
    low, high = share * total, (1 - share) * total
    # The part of each value's mass, from `reached - weight` to `reached`, that is left.
    left = np.minimum(reached, high) - np.maximum(reached - sorted_weights, low)
    left = np.maximum(left, 0.0)
    # A value that is cut off may be too large to be multiplied by anything.
    kept = np.where(left > 0, values, 0).astype(np.float64)
    return cast(Array, (kept * left).sum(axis=1) / left.sum(axis=1))


def nearest_mean(columns: Columns, keep: int) -> Array:
    """The mean of the `keep` values of each column that are nearest to its median.

    >>> nearest_mean(np.array([[3.0, 1.0, 9.0, 2.0]]), 3)
    array([2.])
    """
    n = columns.shape[1]
    values = _double(columns)
    if keep >= n:
        return _mean(columns)
    distances = np.abs(values - median(columns)[:, None])
    farthest = np.partition(distances, keep - 1, axis=1)[:, keep - 1 : keep]
    kept = distances <= farthest
    # Where several are equally far, the lowest ids of them fill what is left.
    crowded = np.flatnonzero(kept.sum(axis=1) > keep)
    if len(crowded):
        nearer = distances[crowded] < farthest[crowded]
        ties = distances[crowded] == farthest[crowded]
        room = keep - nearer.sum(axis=1, keepdims=True)
        kept[crowded] = nearer | (ties & (np.cumsum(ties, axis=1) <= room))
    return cast(Array, np.where(kept, values, 0.0).sum(axis=1) / keep)


def sign_vote(columns: Columns, step: float) -> Array:
    """The sign of the sum of signs, times a step.

    >>> sign_vote(np.array([[3.0, 1.0, -9.0], [-1.0, 0.0, 1.0]]), step=0.5)
    array([0.5, 0. ])
    """
    votes = (columns > 0).sum(axis=1) - (columns < 0).sum(axis=1)
    return cast(Array, step * np.sign(votes).astype(np.float64))


def _double(values: Columns) -> Array:
    return values.astype(np.float64)


def _mean(columns: Columns) -> Array:
    # A copy first: NumPy sums values that it converts on the way in pieces, which
    # begin at other places in other blocks.
    return cast(Array, _double(columns).sum(axis=1) / columns.shape[1])
