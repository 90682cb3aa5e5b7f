"""A clock from a recorded run: the speed and the latency of every client.

    took      = back - max(sent, back of the client's work before)
    step_s    = median of work / steps              work: the device's own measure
    latency_s = median of (took - work) / 2         messages are in it

A simulation measures no work: there step_s is the median of took / steps, and the
latency is 0. A device does one thing at a time. Medians are not moved by a few works
that were disturbed. A client without an answer gets the medians of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.clock.arrivals import NEVER
from fedcore.clock.files import Floats, Ints
from fedcore.errors import SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Fit", "fit"]

SECOND = 1e6  # microseconds
LEAST_S = 1e-6  # of a step: a clock counts no smaller times
ENOUGH = 3  # works of a client from which its jitter is read


class Fit(NamedTuple):
    """What a recording says of the devices of a population."""

    step_s: Floats  # [population]
    latency_s: Floats  # [population]
    num_works: Ints  # [population]: answers that it follows from
    is_measured: bool  # whether devices said how long they worked
    jitter: float  # sigma_j, spread of the logarithm of one work's step_s
    server_s: float  # median from an update's last answer to the next work
    # Of later works, by the clock that the earlier half of each client's gives; NaN
    # where nobody worked twice.
    error: float  # median of |predicted - took| / took
    error_90: float  # nine in ten are below
    bias: float  # sum of predicted / sum of took, less 1


class _Works(NamedTuple):
    """Works that came back, by client and then by time."""

    client: Ints
    steps: Ints
    took: Floats  # seconds
    work: Floats  # seconds, the device's own measure; 0: none

    def at(self, rows: npt.NDArray[np.bool_]) -> _Works:
        """Those in these rows, bool [works]."""
        return _Works(
            self.client[rows], self.steps[rows], self.took[rows], self.work[rows]
        )


def fit(arrivals: pa.Table, population: int | None = None) -> Fit:
    """The clock of a recording, as `read_arrivals` gives it.

    `population`: default, up to the largest client in it. Raises SettingsError where
    nobody answered, or for a smaller population than that.
    """
    largest = int(arrivals["client"].to_numpy().max())
    if population is None:
        population = largest + 1
    if largest >= population:
        raise SettingsError(
            f"population {population}: the recording has a client {largest}; expected "
            f"at least {largest + 1}"
        )
    works = _works(arrivals)
    if len(works.client) == 0:
        raise SettingsError(
            "no work with local steps came back in the recording: nothing says how "
            "fast its clients are"
        )
    step_s, latency_s = _medians(works, population)
    error, error_90, bias = _errors(works, population)
    return Fit(
        _filled(step_s),
        _filled(latency_s),
        np.bincount(works.client, minlength=population),
        bool((works.work > 0).any()),
        _jitter(works, step_s),
        _server_s(arrivals),
        error,
        error_90,
        bias,
    )


def _works(arrivals: pa.Table) -> _Works:
    columns = {}
    for name in ("client", "steps", "sent_us", "back_us", "work_us"):
        columns[name] = arrivals[name].to_numpy()
    is_back = (columns["back_us"] != NEVER) & (columns["steps"] > 0)
    order = np.lexsort((columns["back_us"], columns["client"]))
    order = order[is_back[order]]
    client, steps = columns["client"][order], columns["steps"][order]
    begin, back = columns["sent_us"][order].copy(), columns["back_us"][order]
    is_next = client[1:] == client[:-1]
    begin[1:][is_next] = np.maximum(begin[1:], back[:-1])[is_next]
    took = (back - begin) / SECOND
    work = np.minimum(columns["work_us"][order] / SECOND, took)
    return _Works(client, steps, took, work)


def _medians(works: _Works, population: int) -> tuple[Floats, Floats]:
    """(step_s, latency_s), each [population]; NaN of clients without a work."""
    step_s, latency_s = np.full(population, np.nan), np.full(population, np.nan)
    clients, starts = np.unique(works.client, return_index=True)
    ends = np.append(starts[1:], len(works.client))
    for client, start, end in zip(clients, starts, ends, strict=True):
        steps, took = works.steps[start:end], works.took[start:end]
        work = works.work[start:end]
        is_measured = work > 0
        if is_measured.any():
            rest = (took - work)[is_measured]
            step_s[client] = np.median((work / steps)[is_measured])
            latency_s[client] = np.median(rest) / 2
        else:
            step_s[client] = np.median(took / steps)
            latency_s[client] = 0.0
    return np.maximum(step_s, LEAST_S), latency_s


def _filled(values: Floats) -> Floats:
    """The values, with the median of those that are known for the others."""
    return np.where(np.isnan(values), np.nanmedian(values), values)


def _jitter(works: _Works, step_s: Floats) -> float:
    """Spread of log(step_s of one work / the client's), by the median deviation."""
    seconds = np.where(works.work > 0, works.work, works.took) / works.steps
    counts = np.bincount(works.client)[works.client]
    is_enough = (counts >= ENOUGH) & (seconds > 0)
    if not is_enough.any():
        return 0.0
    usual = step_s[works.client[is_enough]]
    deviations = np.abs(np.log(seconds[is_enough] / usual))
    # The median of |z| of a normal z is 0.6745.
    return round(float(np.median(deviations)) / 0.6745, 4)


def _server_s(arrivals: pa.Table) -> float:
    """Seconds from the last answer of an update to the first work on its model."""
    update, version = arrivals["update"].to_numpy(), arrivals["version"].to_numpy()
    sent, back = arrivals["sent_us"].to_numpy(), arrivals["back_us"].to_numpy()
    is_usable = arrivals["outcome"].to_numpy() == ""
    first = np.full(int(update.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, version, sent)
    last = np.full(len(first), NEVER)
    np.maximum.at(last, update[is_usable], back[is_usable])
    is_known = (last != NEVER) & (first != np.iinfo(np.int64).max)
    if not is_known.any():
        return 0.0
    gaps = np.maximum(first[is_known] - last[is_known], 0)
    return round(float(np.median(gaps)) / SECOND, 6)


def _errors(works: _Works, population: int) -> tuple[float, float, float]:
    """How well the earlier half of each client's works predicts the later one."""
    starts = np.searchsorted(works.client, works.client, "left")
    counts = np.bincount(works.client)[works.client]
    is_early = np.arange(len(works.client)) - starts < (counts + 1) // 2
    early, late = works.at(is_early), works.at(~is_early)
    if len(late.client) == 0 or late.took.sum() == 0:
        return float("nan"), float("nan"), float("nan")
    step_s, latency_s = _medians(early, population)
    predicted = 2 * latency_s[late.client] + step_s[late.client] * late.steps
    took = np.maximum(late.took, LEAST_S)
    errors = np.abs(predicted - took) / took
    bias = float(predicted.sum() / took.sum()) - 1
    return float(np.median(errors)), float(np.quantile(errors, 0.9)), bias
