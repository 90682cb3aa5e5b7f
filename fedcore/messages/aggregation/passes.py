"""Passes over the columns of a round's rows, in two threads and in pieces.

A piece is small enough to stay in a core's cache while it is made float64, or sorted.
Each thread has its share of the columns whatever the machine, so that sums over columns
are the same bits everywhere that the arithmetic is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fedcore.messages.aggregation.rows import Rows

Array = npt.NDArray[np.float64]
Piece = npt.NDArray[np.floating]  # [n, b], float32 or float64, to be read only
Work = Callable[[int, int, Piece], None]

THREADS = 2
PIECE_VALUES = 2**17  # 1 MB of float64
LARGEST = 1e100  # of a float64 entry, so that the square of a row stays finite


def over_columns(rows: Rows, work: Work, least_width: int = 64) -> None:
    """`work(thread, start, piece)` for all columns, from `start` on in each piece.

    Calls of one thread follow each other; those of two threads run at the same time.
    """
    width = max(least_width, PIECE_VALUES // max(rows.n, 1))
    start = 0
    with _one_thread_a_call(), ThreadPoolExecutor(THREADS) as pool:
        for block in rows.blocks():
            # NumPy has no bfloat16, and nothing is faster in float16.
            small = block.dtype in (torch.float16, torch.bfloat16)
            values = (block.float() if small else block).numpy()
            share = -(-values.shape[1] // THREADS)
            shares = []
            for thread in range(THREADS):
                first = thread * share
                part = values[:, first : first + share]
                arguments = (work, thread, start + first, part, width)
                shares.append(pool.submit(_in_pieces, *arguments))
            for one in shares:
                one.result()
            start += values.shape[1]


def _in_pieces(work: Work, thread: int, start: int, part: Piece, width: int) -> None:
    for first in range(0, part.shape[1], width):
        work(thread, start + first, part[:, first : first + width])


def _one_thread_a_call() -> Any:
    """Inside, a call of the linear algebra library uses the thread that made it.

    Its own threads wait for each other by spinning: on a machine with other work to do,
    ten times slower than alone.
    """
    return _controller().limit(limits=1, user_api="blas")


@functools.cache
def _controller() -> Any:
    # At the first call: a run without a rule does not wait for these imports. The first
    # one loads the library that is to be limited; scikit-learn brings the second.
    import scipy.linalg.blas  # noqa: F401
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


def double(piece: Piece) -> Array:
    """A piece in float64, as a copy.

    Entries beyond 1e100, which float64 alone can hold, become 1e100: they belong to
    nobody's update, and their squares would be infinite.
    """
    values = piece.astype(np.float64)
    if piece.dtype == np.float64:
        np.clip(values, -LARGEST, LARGEST, out=values)
    return values


def row_squares(values: Array) -> Array:
    """The sum of squares of each row of a piece."""
    return cast(Array, np.einsum("ij,ij->i", values, values))
