"""The Gram matrix of a round's rows, and what distances it holds.

All of it is float64. A distance is a difference of large numbers where rows are far
from zero, and float32 would leave nothing of it; rows are never centred by their mean,
which one row alone can move anywhere.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import Tensor

from fedcore.messages.aggregation.passes import (
    THREADS,
    Array,
    Piece,
    double,
    over_columns,
    row_squares,
)
from fedcore.messages.aggregation.rows import Rows

WIDTH = 1024  # columns that are added to the matrix at a time, at least


def gram(rows: Rows, extra: Tensor | None = None) -> Array:
    """G = X X^T of the rows [n, d], followed by the rows of `extra` [e, d].

    >>> import torch
    >>> gram(Rows.of(torch.tensor([[1.0, 2.0], [3.0, 0.0]])))
    array([[5., 3.],
           [3., 9.]])
    """
    # At the first call: a run without a rule does not wait for this import.
    from scipy.linalg.blas import dsyrk

    size = rows.n + (0 if extra is None else len(extra))
    totals = [np.zeros((size, size), order="F") for _ in range(THREADS)]

    def add(thread: int, start: int, piece: Piece) -> None:
        values = double(piece)
        if extra is not None:
            columns = extra[:, start : start + piece.shape[1]]
            values = np.concatenate([values, double(columns.double().numpy())])
        # The transposed piece lies in memory as the library wants it. It adds to the
        # upper triangle of the total, at half the work of a product.
        totals[thread] = dsyrk(
            1.0, values.T, 1.0, totals[thread], trans=1, overwrite_c=1
        )

    over_columns(rows, add, least_width=WIDTH)
    total = np.sum(totals, axis=0)
    upper = np.triu(total)
    return cast(Array, upper + np.triu(total, 1).T)


def squared_norms(rows: Rows) -> Array:
    """The squared norm of every row: the diagonal of the Gram matrix alone."""
    totals = np.zeros((THREADS, rows.n))

    def add(thread: int, start: int, piece: Piece) -> None:
        totals[thread] += row_squares(double(piece))

    over_columns(rows, add)
    return cast(Array, totals.sum(axis=0))


def star(rows: Rows, centre: Tensor) -> Array:
    """The Gram matrix of the rows and a last one, without products among the rows.

    Its diagonal, last row and last column are there: n products instead of n^2.
    """
    n = rows.n
    totals = np.zeros((THREADS, n))
    squares = np.zeros((THREADS, n))

    def add(thread: int, start: int, piece: Piece) -> None:
        values = double(piece)
        columns = centre[start : start + piece.shape[1]].double().numpy()
        totals[thread] += values @ double(columns)
        squares[thread] += row_squares(values)

    over_columns(rows, add)
    matrix = np.diag(np.append(squares.sum(axis=0), 0.0))
    matrix[:n, n] = matrix[n, :n] = totals.sum(axis=0)
    own = double(centre.double().numpy())
    matrix[n, n] = own @ own
    return matrix


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
