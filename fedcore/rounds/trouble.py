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

NO_FAULT = frozenset(
    ("dropout", "not needed", "late", "stale", "superseded", "unavailable")
)
"""Reasons that are none of the client's: simulated, or the server had no use for it."""

LIGHT = 0.5
"""The weight, of the mean, below which a client gives trouble."""

LONG = 3.0
"""The norm, of the median, above which a client gives trouble. Rules by column have no
weights: there the length tells who lies."""

FLAGS = ("clipped", "capped")
NUMBERS = ("weight", "norm_ratio")
COLUMNS = ("round", "function", "client", "left_out", *FLAGS, *NUMBERS)
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
    # Mean of its message's norm over the median norm of a round; NaN without a rule.
    norm_ratio: float


def troubles(folder: Path, up_to: int | None = None) -> list[Trouble]:
    """The clients that were left out, clipped or capped, are light, or send long ones.

    Those come first that were left out most often, then those of the least weight,
    then those of the longest messages, then those that were clipped most often. Reads
    the run directory up to round `up_to`. Raises OSError or pyarrow's ArrowException
    for a file that cannot be read.
    """
    found = []
    for trouble in _counted(folder, up_to):
        is_odd = trouble.weight < LIGHT or trouble.norm_ratio > LONG
        if trouble.left_out or trouble.clipped or trouble.capped or is_odd:
            found.append(trouble)
    return sorted(found, key=_place)


def _place(trouble: Trouble) -> tuple[float, ...]:
    weight = 1.0 if math.isnan(trouble.weight) else trouble.weight
    length = trouble.norm_ratio if trouble.norm_ratio > LONG else 0.0
    often = trouble.clipped + trouble.capped
    return -trouble.left_out, round(weight, 3), -length, -often, trouble.client


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
    rows, kinds = _rows(table)
    if len(rows["client"]) == 0:
        return []
    ids, index = np.unique(rows["client"], return_inverse=True)
    # A client counts once a round, however often it was asked.
    base = int(rows["round"].max()) + 1
    pairs, inverse = np.unique(index * base + rows["round"], return_inverse=True)
    whose = pairs // base  # ascending; of each, the rounds ascend
    is_fault = _any(rows["left_out"] >= 0, inverse, len(pairs))
    counts = {"rounds": np.bincount(whose, minlength=len(ids))}
    counts["left_out"] = np.bincount(whose, is_fault, len(ids)).astype(int)
    for name in FLAGS:
        is_so = _any(rows[name], inverse, len(pairs))
        counts[name] = np.bincount(whose, is_so, len(ids)).astype(int)
    counts["streak"] = _streaks(whose, is_fault, len(ids))
    weights = _relative_weights(rows, index, len(ids))
    lengths = _means(rows["norm_ratio"], index, len(ids))
    last = _last_reasons(rows, index, len(ids)).tolist()
    clients = []
    for number, client in enumerate(ids.tolist()):
        clients.append(
            Trouble(
                client,
                reason=kinds[last[number]] if last[number] >= 0 else "",
                weight=float(weights[number]),
                norm_ratio=float(lengths[number]),
                **{name: int(values[number]) for name, values in counts.items()},
            )
        )
    return clients


def _rows(table: pa.Table) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of rows that belong to a round, and whose reason is the client's.

    Functions and reasons are numbers; reasons are places in the list that is second,
    and -1 for a report.
    """
    import pyarrow.compute as pc

    is_afterwards = pc.is_in(table["function"], _value_set(AFTERWARDS))
    is_excused = pc.is_in(table["left_out"], _value_set(sorted(NO_FAULT)))
    table = table.filter(pc.invert(pc.or_(is_afterwards, is_excused)))
    empty = dict.fromkeys(FLAGS, False) | dict.fromkeys(NUMBERS, math.nan)
    rows, kinds = {}, list[str]()
    for name in COLUMNS:
        if name in ("function", "left_out"):
            encoded = table[name].combine_chunks().dictionary_encode()
            rows[name] = encoded.indices.to_numpy(zero_copy_only=False)
            if name == "left_out":
                kinds = encoded.dictionary.to_pylist()
        elif name in table.column_names:
            rows[name] = table[name].to_numpy()
        else:
            rows[name] = np.full(len(table), empty[name])
    rows["left_out"] = np.where(
        _is_report(rows["left_out"], kinds), -1, rows["left_out"]
    )
    return rows, kinds


def _is_report(codes: np.ndarray, kinds: list[str]) -> np.ndarray:
    """Whether a reason, by its place among all kinds, is none."""
    return codes == kinds.index("") if "" in kinds else np.zeros(len(codes), bool)


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
    functions = rows["function"][is_weighted]
    key = rows["round"][is_weighted].astype(np.int64) * (int(functions.max()) + 1)
    groups = np.unique(key + functions, return_inverse=True)[1]
    means = np.bincount(groups, weights) / np.bincount(groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _means(weights / means[groups], whose, n)


def _means(values: np.ndarray, whose: np.ndarray, n: int) -> np.ndarray:
    """The mean of each client's values that are numbers; NaN without one. [n]"""
    is_number = ~np.isnan(values)
    values, whose = values[is_number], whose[is_number]
    with np.errstate(invalid="ignore"):
        means = np.bincount(whose, values, n) / np.bincount(whose, minlength=n)
    return np.asarray(means)


def _last_reasons(rows: dict[str, np.ndarray], index: np.ndarray, n: int) -> np.ndarray:
    """The place of the reason why each client was left out the last time, or -1. [n]"""
    is_left = rows["left_out"] >= 0
    order = np.argsort(rows["round"][is_left], kind="stable")
    last = np.full(n, -1)
    # Of several values for one place, NumPy keeps the last.
    last[index[is_left][order]] = rows["left_out"][is_left][order]
    return last
