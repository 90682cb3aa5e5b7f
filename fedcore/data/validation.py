"""Who holds which rows, checked once: what disagrees is refused, with the first row.

    order       row numbers of train, one client's after another's
    offsets     where each client's begin, from 0 on, and the end; never descending

Two clients may hold the same row; one client may not hold it twice, since it could then
train on what it is evaluated on. Rows of train that no client holds are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fedcore import trees
from fedcore.arrays import as_examples, as_indices
from fedcore.errors import SettingsError
from fedcore.types import Tree

__all__ = ["checked_holders", "checked_test"]


def checked_test(test: Any, train: tuple[Tree, Tensor]) -> tuple[Tree, Tensor]:
    """The test set; without one, or with `None`, no rows of the kind of `train`'s."""
    if test is None:
        x, y = trees.at(train[0], slice(0)), train[1][:0]
        return x, y
    return as_examples("test", test)


def checked_holders(
    order: Any, offsets: Any, rows: int, holdout: float
) -> tuple[np.ndarray, np.ndarray]:
    """(order, offsets) as int64, of a training set of so many rows.

    Raises SettingsError where they do not say who holds what.

    >>> order, offsets = checked_holders([2, 0, 1], [0, 1, 3], rows=3, holdout=0.0)
    >>> order[offsets[1] : offsets[2]]
    array([0, 1])
    """
    is_share = isinstance(holdout, int | float | np.number) and 0 <= holdout < 1
    if not is_share:
        raise SettingsError(
            f"holdout = {holdout!r}: must be in [0, 1), the share of each client's "
            "examples that it does not train on"
        )
    if rows == 0:
        raise SettingsError(
            "train has no rows: expected an example of one client at least"
        )
    order = as_indices(
        "order",
        order,
        "row numbers of train, those of one client after another (np.concatenate of "
        "lists)",
    )
    offsets = as_indices(
        "offsets",
        offsets,
        "where the rows of each client begin in order, and the end "
        "(np.cumsum([0, *sizes]))",
    )
    _check_offsets(offsets, len(order))
    if len(order) == 0:  # as on the server of devices that have data of their own
        return order, offsets
    _check_range(order, rows)
    _check_twice(order, offsets, rows)
    return order, offsets


def _check_offsets(offsets: np.ndarray, end: int) -> None:
    if len(offsets) < 2:
        raise SettingsError(
            f"offsets has {len(offsets)} entries: expected one more than there are "
            "clients, e.g. [0, 3, 5] for two clients of 3 and 2 rows"
        )
    if offsets[0] != 0:
        raise SettingsError(
            f"offsets[0] = {offsets[0]}: expected 0, where the rows of client 0 begin; "
            "write np.cumsum([0, *sizes])"
        )
    descents = np.flatnonzero(np.diff(offsets) < 0)
    if len(descents):
        i = int(descents[0]) + 1
        raise SettingsError(
            f"offsets[{i}] = {offsets[i]} comes after {offsets[i - 1]}: expected "
            "numbers that never descend; write np.cumsum([0, *sizes])"
        )
    beyond = np.flatnonzero(offsets > end)
    if len(beyond):
        i = int(beyond[0])
        raise SettingsError(
            f"offsets[{i}] = {offsets[i]}: order has {end} entries; expected at most "
            "that"
        )
    if offsets[-1] < end:
        raise SettingsError(
            f"offsets end at {offsets[-1]}, so that order[{offsets[-1]}] and what "
            f"follows is with no client: expected offsets[-1] = {end}, the length of "
            "order; cut order, or add a client"
        )


def _check_range(order: np.ndarray, rows: int) -> None:
    if order.min() >= 0 and order.max() < rows:
        return
    i = int(np.flatnonzero((order < 0) | (order >= rows))[0])
    raise SettingsError(
        f"order[{i}] = {order[i]}: train has {rows} rows; expected 0 to {rows - 1}"
    )


def _check_twice(order: np.ndarray, offsets: np.ndarray, rows: int) -> None:
    if np.bincount(order, minlength=rows).max() <= 1:
        return
    client = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    # Sorted by client, then row, then place: equal neighbours are held twice.
    places = np.lexsort((order, client))
    again = (np.diff(order[places]) == 0) & (np.diff(client[places]) == 0)
    if not again.any():
        return
    second = int(places[1:][again].min())
    raise SettingsError(
        f"order[{second}] = {order[second]}: client {client[second]} holds that row of "
        "train twice, so that it could train on what it is evaluated on; leave it out "
        "(np.unique), or repeat the row in train. Two clients may hold the same row"
    )
