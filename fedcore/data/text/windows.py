"""Windows of tokens: the examples that a text is cut into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

__all__ = ["NO_TARGET", "Windows", "rows_of_texts", "windows", "windows_of_all"]

NO_TARGET = -100  # a position without a target, as in PyTorch


class Windows(NamedTuple):
    """Inputs and the tokens that follow them."""

    x: np.ndarray  # int64 [n, L], `pad` after the end
    y: np.ndarray  # int64 [n, L], NO_TARGET after the end


def windows(ids: np.ndarray, length: int, pad: int) -> Windows:
    """Disjoint windows of `length` inputs, each with the token after it as target.

    Of `ids` [m], the last window padded; none of a text with a single token.

    >>> x, y = windows(np.array([5, 6, 7, 8]), length=2, pad=9)
    >>> x.tolist(), y.tolist()
    ([[5, 6], [7, 9]], [[6, 7], [8, -100]])
    """
    targets = max(len(ids) - 1, 0)
    number = -(-targets // length)
    x = np.full(number * length, pad, dtype=np.int64)
    y = np.full(number * length, NO_TARGET, dtype=np.int64)
    x[:targets] = ids[:targets]
    y[:targets] = ids[1:]
    return Windows(x.reshape(number, length), y.reshape(number, length))


def windows_of_all(
    texts: Iterable[np.ndarray], length: int, pad: int
) -> tuple[Windows, np.ndarray]:
    """(the windows of several texts, one after another; their offsets [texts + 1])."""
    inputs, targets, numbers = [], [], [0]
    for ids in texts:
        cut = windows(ids, length, pad)
        inputs.append(cut.x)
        targets.append(cut.y)
        numbers.append(len(cut.x))
    empty = np.empty((0, length), dtype=np.int64)
    x, y = np.concatenate([empty, *inputs]), np.concatenate([empty, *targets])
    return Windows(x, y), np.cumsum(numbers)


def rows_of_texts(texts: Iterable[np.ndarray], length: int, pad: int) -> np.ndarray:
    """One row a text [n, length]: its first tokens, padded at the end.

    >>> rows_of_texts([np.array([5, 6, 7]), np.array([8])], length=2, pad=9).tolist()
    [[5, 6], [8, 9]]
    """
    rows = []
    for ids in texts:
        row = np.full(length, pad, dtype=np.int64)
        row[: len(ids)] = ids[:length]
        rows.append(row)
    return np.array(rows, dtype=np.int64).reshape(len(rows), length)
