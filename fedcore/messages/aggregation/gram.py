"""The Gram matrix of a round's rows, and sums of rows: one pass over blocks each.

All of it is float64. A distance is a difference of large numbers where rows are far
from zero, and float32 would leave nothing of it; rows are never centred by their mean,
which one row alone can move anywhere.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedcore.messages.aggregation.rows import Rows

Array = npt.NDArray[np.float64]

LARGEST = 1e100  # of a float64 entry, so that the square of a row stays finite


def double(block: Tensor) -> Array:
    """A block in float64.

    Entries beyond 1e100, which float64 alone can hold, become 1e100: they belong to
    nobody's update, and their squares would be infinite.
    """
    values = block.to(torch.float64)
    if block.dtype == torch.float64:
        values = values.clamp(-LARGEST, LARGEST)
    return cast(Array, values.numpy())


def gram(rows: Rows, extra: Tensor | None = None) -> Array:
    """G = X X^T of the rows [n, d], followed by the rows of `extra` [e, d].

    >>> gram(Rows.of(torch.tensor([[1.0, 2.0], [3.0, 0.0]])))
    array([[5., 3.],
           [3., 9.]])
    """
    # At the first call: a run without a rule does not wait for this import.
    from scipy.linalg.blas import dsyrk

    size = rows.n + (0 if extra is None else len(extra))
    total = np.zeros((size, size), order="F")
    start = 0
    for block in rows.blocks():
        stop = start + block.shape[1]
        if extra is not None:
            columns = extra[:, start:stop].to(block.dtype)
            block = torch.cat([block, columns])
        # The transposed block lies in memory as the library wants it. It adds to the
        # upper triangle of the total, at half the work of a product.
        total = dsyrk(1.0, double(block).T, 1.0, total, trans=1, overwrite_c=1)
        start = stop
    upper = np.triu(total)
    return upper + np.triu(total, 1).T


def squared_norms(rows: Rows) -> Array:
    """The squared norm of every row: the diagonal of the Gram matrix alone."""
    total = np.zeros(rows.n)
    for block in rows.blocks():
        total += row_squares(double(block))
    return total


def row_squares(values: Array) -> Array:
    """The sum of squares of each row of a block."""
    return cast(Array, np.einsum("ij,ij->i", values, values))


def products(rows: Rows, vector: Array) -> Array:
    """The inner product of every row with a vector [d]."""
    total = np.zeros(rows.n)
    start = 0
    for block in rows.blocks():
        stop = start + block.shape[1]
        total += double(block) @ vector[start:stop]
        start = stop
    return total


def squared_distances(gram: Array) -> Array:
    """Squared distances between all rows, from their Gram matrix.

    >>> squared_distances(np.array([[5.0, 3.0], [3.0, 9.0]]))
    array([[0., 8.],
           [8., 0.]])
    """
    squares = np.diagonal(gram)
    distances = squares[:, None] + squares[None, :] - 2 * gram
    np.fill_diagonal(distances, 0.0)
    return np.maximum(distances, 0.0)


def squared_distances_to(gram: Array, weights: Array) -> Array:
    """Squared distances of all rows to the sum of rows with these weights."""
    inner = gram @ weights
    distances = np.diagonal(gram) - 2 * inner + weights @ inner
    return cast(Array, np.maximum(distances, 0.0))
