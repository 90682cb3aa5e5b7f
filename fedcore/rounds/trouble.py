"""The clients that give trouble: left out, clipped, or hardly weighted, and how often.

Counted from `clients.parquet`, so that a run that goes on knows what came before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedcore.rounds.client_table import read_clients

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FAILING", "NO_FAULT", "Trouble", "failing_clients", "troubles"]

FAILING = 8
"""Rounds in a row without a usable update, after which a client is failing."""

NO_FAULT = frozenset(("dropout", "not needed"))
"""Reasons that are none of the client's: simulated, or the round had enough reports."""

COLUMNS = ("round", "function", "client", "left_out", "clipped", "capped", "weight")
AFTERWARDS = ("evaluate", "finetune")  # work that is not part of a round


class Trouble(NamedTuple):
    """One client of a run; rounds in which it was not asked do not count."""

    client: int
    rounds: int  # in which it was asked
    left_out: int
    streak: int  # rounds in a row, up to its last one, in which it was left out
    reason: str  # of the last time that it was left out; "" where it never was
    clipped: int
    capped: int
    # Mean of its weight over the mean weight of a round's clients: 1 where all weigh
    # the same, 0 for one that a rule never took; NaN without a rule.
    weight: float


def troubles(folder: Path, up_to: int | None = None) -> list[Trouble]:
    """The clients that were left out, clipped or capped, or weigh below half.

    Those come first that were left out most often, then those of the least weight,
    then those that were clipped most often. Reads the run directory up to round
    `up_to`. Raises OSError or pyarrow's ArrowException for a file that cannot be read.
    """
    found = []
    for trouble in _counted(folder, up_to):
        is_light = trouble.weight < 0.5
        if trouble.left_out or trouble.clipped or trouble.capped or is_light:
            found.append(trouble)
    return sorted(found, key=_place)


def _place(trouble: Trouble) -> tuple[float, ...]:
    weight = 1.0 if math.isnan(trouble.weight) else trouble.weight
    often = -(trouble.clipped + trouble.capped)
    return -trouble.left_out, round(weight, 3), often, trouble.client


def failing_clients(folder: Path, up_to: int) -> dict[int, tuple[int, str]]:
    """Clients left out of their last round, up to round `up_to`: (streak, reason)."""
    failing = {}
    for trouble in _counted(folder, up_to):
        if trouble.streak:
            failing[trouble.client] = (trouble.streak, trouble.reason)
    return failing


def _counted(folder: Path, up_to: int | None) -> list[Trouble]:
    """Every client that was asked in a round, by id."""
    table = read_clients(folder, up_to=up_to, columns=COLUMNS)
    rows = _rows(table)
    if len(rows["client"]) == 0:
        return []
    ids, index = np.unique(rows["client"], return_inverse=True)
    # A client counts once a round, however often it was asked.
    base = int(rows["round"].max()) + 1
    pairs, inverse = np.unique(index * base + rows["round"], return_inverse=True)
    whose = pairs // base  # ascending; of each, the rounds ascend
    is_fault = _any(rows["left_out"] != "", inverse, len(pairs))
    counts = {"rounds": np.bincount(whose, minlength=len(ids))}
    counts["left_out"] = np.bincount(whose, is_fault, len(ids)).astype(int)
    for name in ("clipped", "capped"):
        is_so = _any(rows[name], inverse, len(pairs))
        counts[name] = np.bincount(whose, is_so, len(ids)).astype(int)
    counts["streak"] = _streaks(whose, is_fault, len(ids))
    weights = _relative_weights(rows, index, len(ids))
    reasons = dict(zip(*_last_reasons(rows, index), strict=True))
    clients = []
    for number, client in enumerate(ids.tolist()):
        clients.append(
            Trouble(
                client,
                reason=reasons.get(number, ""),
                weight=float(weights[number]),
                **{name: int(values[number]) for name, values in counts.items()},
            )
        )
    return clients


def _rows(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of rows that belong to a round, and whose reason is the client's."""
    import pyarrow.compute as pc

    is_afterwards = pc.is_in(table["function"], _value_set(AFTERWARDS))
    is_excused = pc.is_in(table["left_out"], _value_set(sorted(NO_FAULT)))
    table = table.filter(pc.invert(pc.or_(is_afterwards, is_excused)))
    empty = {"clipped": False, "capped": False, "weight": math.nan}
    rows = {}
    for name in COLUMNS:
        if name in table.column_names:
            rows[name] = table[name].to_numpy()
        else:
            rows[name] = np.full(len(table), empty[name])
    return rows


def _value_set(values: Sequence[str]) -> pa.Array:
    """Values to look for in a column."""
    import pyarrow as pa

    return pa.array(values)


def _any(is_so: np.ndarray, groups: np.ndarray, n: int) -> np.ndarray:
    """Whether any row of each group is so. [n]"""
    return np.bincount(groups, is_so, n) > 0


def _streaks(whose: np.ndarray, is_fault: np.ndarray, n: int) -> np.ndarray:
    """The number of faults of each client since its last round without one. [n]

    `whose` ascends, and the rounds of each client ascend.
    """
    places = np.arange(len(whose))
    last_good = np.full(n, -1)
    np.maximum.at(last_good, whose[~is_fault], places[~is_fault])
    return np.bincount(whose, is_fault & (places > last_good[whose]), n).astype(int)


def _relative_weights(
    rows: dict[str, np.ndarray], index: np.ndarray, n: int
) -> np.ndarray:
    """The mean of each client's weight over the mean weight beside it. [n]"""
    is_weighted = ~np.isnan(rows["weight"])
    if not is_weighted.any():
        return np.full(n, np.nan)
    weights, whose = rows["weight"][is_weighted], index[is_weighted]
    # A round may aggregate twice, by functions of two names.
    functions = np.unique(rows["function"][is_weighted], return_inverse=True)[1]
    key = rows["round"][is_weighted].astype(np.int64) * (functions.max() + 1)
    groups = np.unique(key + functions, return_inverse=True)[1]
    means = np.bincount(groups, weights) / np.bincount(groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = weights / means[groups]
        return np.asarray(np.bincount(whose, relative, n) / np.bincount(whose, None, n))


def _last_reasons(
    rows: dict[str, np.ndarray], index: np.ndarray
) -> tuple[list[int], list[str]]:
    """(clients that were left out, why each was the last time)."""
    is_left = rows["left_out"] != ""
    order = np.argsort(rows["round"][is_left], kind="stable")
    whose, reasons = index[is_left][order], rows["left_out"][is_left][order]
    # The first from the end is the last.
    clients, place = np.unique(whose[::-1], return_index=True)
    return clients.tolist(), reasons[::-1][place].tolist()
