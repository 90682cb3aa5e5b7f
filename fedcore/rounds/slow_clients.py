"""Who is heard, by speed: what the slowest clients of a run bring and get.

Deadlines, goals and discounts of staleness cost slow clients their say, and a speed-up
does not show it. So a run with a clock says how many of the updates that were used came
from the slowest fifth and tenth of clients, and how good the model is for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedcore.clock.arrivals import LATE, read_arrivals
from fedcore.clock.durations import Durations
from fedcore.clock.settings import ClockSettings, Replay
from fedcore.rounds.client_table import read_clients

if TYPE_CHECKING:
    import pyarrow as pa

    from fedcore.config import Experiment

__all__ = [
    "SHARES",
    "Group",
    "Heard",
    "Speeds",
    "group",
    "heard_clients",
    "last_evaluation",
    "slowest",
]

SHARES = {"slowest_fifth": 2, "slowest_tenth": 1}  # tenths of the clients
MOST = 200_000  # clients whose speed is drawn; of more, those that were asked
SECOND = 1_000_000  # microseconds

Columns = dict[str, np.ndarray]  # of arrivals.parquet, by name; [rows]


class Speeds(NamedTuple):
    """How fast clients are, where a simulated clock says it."""

    clock: ClockSettings
    seed: int
    batch_size: int | None
    population: int

    @classmethod
    def of(cls, experiment: Experiment, population: int) -> Speeds | None:
        """Those of a run; None in the field, and for one that follows a recording."""
        is_grid = experiment.engine.name == "grid"
        is_replay = isinstance(experiment.schedule, Replay)
        if is_grid or is_replay or not experiment.clock.is_on:
            return None
        size = experiment.local.batch_size
        return cls(experiment.clock, experiment.seed, size, population)


class Heard(NamedTuple):
    """The clients of a run by their speed, the fastest first; each [clients]."""

    clients: np.ndarray
    seconds: np.ndarray  # of a usual piece of work; inf where it never came back
    usable: np.ndarray  # answers that were used
    unused: np.ndarray  # pieces of work that came to nothing


class Group(NamedTuple):
    """Clients of a run that are about equally fast."""

    clients: int
    from_s: float | None  # that the fastest of them needs; None: it never came back
    to_s: float | None  # that the slowest of them needs
    arrivals: float | None  # share of the updates that were used; None without any
    measure: float | None  # mean of those that were evaluated last; None without any


def heard_clients(folder: Path, speeds: Speeds | None, up_to: int) -> Heard | None:
    """The clients of the run in `folder`, from its arrivals up to round `up_to`.

    A simulated clock knows how fast a client is that was never asked; without `speeds`
    those that were asked are all, by the median of their times. None where nothing
    has arrived, or all clients are equally fast. Raises OSError, KeyError,
    SettingsError or pyarrow's ArrowException for a file that cannot be read.
    """
    heard = _heard(read_arrivals(folder), speeds, up_to)
    if heard is None or heard.seconds.min() == heard.seconds.max():
        return None
    return heard


def group(
    heard: Heard,
    tenths: tuple[int, int],
    evaluated: Mapping[str, np.ndarray],
    measure: str,
) -> Group:
    """The clients between two tenths, the slowest last: (8, 10) is the slowest fifth.

    `evaluated` are measures of clients by name, with their ids as "client". [n]

    >>> ids, used = np.arange(4), np.array([3, 3, 2, 0])
    >>> heard = Heard(ids, np.array([1.0, 1, 2, 9]), used, 0 * used)
    >>> evaluated = {"client": np.array([0, 3]), "accuracy": np.array([0.9, 0.4])}
    >>> group(heard, (5, 10), evaluated, "accuracy")
    Group(clients=2, from_s=2.0, to_s=9.0, arrivals=0.25, measure=0.4)
    """
    n = len(heard.clients)
    # Rounded so that the slowest part has a client at least.
    first, last = (n * place // 10 for place in tenths)
    ids, seconds = heard.clients[first:last], heard.seconds[first:last]
    used, everybody = heard.usable[first:last].sum(), heard.usable.sum()
    mean = None
    if measure in evaluated and "client" in evaluated:
        values = np.asarray(evaluated[measure], dtype=np.float64)
        values = values[np.isin(evaluated["client"], ids)]
        values = values[np.isfinite(values)]
        mean = float(values.mean()) if len(values) else None
    return Group(
        len(ids),
        _finite(seconds[:1]),
        _finite(seconds[-1:]),
        float(used / everybody) if everybody else None,
        mean,
    )


def _finite(value: np.ndarray) -> float | None:
    """The number in an array of at most one; None where it is none, or infinite."""
    return float(value[0]) if len(value) and np.isfinite(value[0]) else None


def slowest(
    heard: Heard, evaluated: Mapping[str, np.ndarray], measure: str
) -> dict[str, dict[str, float | None]]:
    """The slowest fifth and tenth of the clients, as of `group`, ready for JSON."""
    found = {}
    for name, tenths in SHARES.items():
        found[name] = group(heard, (10 - tenths, 10), evaluated, measure)._asdict()
    return found


def last_evaluation(folder: Path, up_to: int) -> Columns:
    """Measures of each client with examples, as of the last evaluation; maybe none."""
    table = read_clients(folder, "evaluate", up_to=up_to)
    if len(table) == 0:
        return {}
    columns = {name: table[name].to_numpy() for name in table.column_names}
    is_last = columns["round"] == columns["round"].max()
    kept = is_last & (columns["num_examples"] > 0)
    return {name: values[kept] for name, values in columns.items()}


def _heard(table: pa.Table, speeds: Speeds | None, up_to: int) -> Heard | None:
    columns = {name: table[name].to_numpy() for name in table.column_names}
    is_done = columns["update"] <= up_to
    columns = {name: values[is_done] for name, values in columns.items()}
    if len(columns["client"]) == 0:
        return None
    ids, rows = np.unique(columns["client"], return_inverse=True)
    if speeds is None or ids[-1] >= speeds.population:
        seconds = _measured(columns, rows, len(ids))
    else:
        if speeds.population <= MOST:
            ids = np.arange(speeds.population)
        seconds = _expected(columns, speeds, ids)
    place = np.searchsorted(ids, columns["client"])
    is_usable = columns["outcome"] == ""
    # An answer that was late in the field has a row of its round already.
    is_unused = ~is_usable & (columns["outcome"] != LATE)
    usable = np.bincount(place[is_usable], minlength=len(ids))
    unused = np.bincount(place[is_unused], minlength=len(ids))
    order = np.lexsort((ids, seconds))
    return Heard(ids[order], seconds[order], usable[order], unused[order])


def _measured(columns: Columns, rows: np.ndarray, n: int) -> np.ndarray:
    """The median seconds from sent to back of each client, inf where none was. [n]"""
    took = (columns["back_us"] - columns["sent_us"]) / SECOND
    return _medians(rows, took, columns["back_us"] >= 0, n, np.inf)


def _expected(columns: Columns, speeds: Speeds, ids: np.ndarray) -> np.ndarray:
    """Seconds of a usual piece of work of these clients, by the clock. [n]

    A client that was never asked has as many steps as others in the middle.
    """
    durations = Durations(
        speeds.clock, speeds.population, speeds.seed, speeds.batch_size
    )
    rows = np.searchsorted(ids, columns["client"])
    everything = np.ones(len(rows), dtype=bool)
    middle = float(np.median(columns["steps"]))
    steps = _medians(rows, columns["steps"], everything, len(ids), middle)
    down = int(np.median(columns["bytes_down"]))
    sent = columns["bytes_up"][columns["bytes_up"] > 0]
    up = int(np.median(sent)) if len(sent) else 0
    return durations.expected(ids, np.rint(steps).astype(np.int64), down, up)


def _medians(
    rows: np.ndarray, values: np.ndarray, is_kept: np.ndarray, n: int, other: float
) -> np.ndarray:
    """The lower median of the values of each of `n` rows; `other` without any. [n]"""
    rows, values = rows[is_kept], values[is_kept]
    order = np.lexsort((values, rows))
    counts = np.bincount(rows, minlength=n)
    starts = np.cumsum(counts) - counts
    medians = np.full(n, other, dtype=np.float64)
    is_there = counts > 0
    medians[is_there] = values[order][(starts + (counts - 1) // 2)[is_there]]
    return medians
