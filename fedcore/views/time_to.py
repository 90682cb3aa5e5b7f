"""Time to a target: when a run is as good as wanted, by its own clock.

A single evaluation may be lucky. So the target is reached with the first evaluation
whose mean with the two before it is at least as good. A run that has not reached it by
the horizon counts as one that has not: no time is made up for it, and none is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedcore.rounds.history import History

__all__ = [
    "TimeTo",
    "default_target",
    "end_of",
    "reached_text",
    "seconds_text",
    "smoothed",
    "time_to",
    "value_at",
    "values_of",
]

EVALUATIONS = 3  # whose mean counts
WAY = 0.9  # from the first evaluation to the best one: the target, where none is set
LEVEL = 0.95  # of the interval


class Curve(NamedTuple):
    """A measure by time; each [points], times ascending."""

    times: np.ndarray
    values: np.ndarray


class TimeTo(NamedTuple):
    """When the runs of one experiment reached a target."""

    horizon_s: float  # up to which it was looked for
    values: list[float | None]  # seconds, a seed; None: not by the horizon
    mean: float | None  # of those that reached it
    low: float | None  # interval of the mean; None unless two seeds and all reached it
    high: float | None

    @property
    def reached(self) -> int:
        """The number of seeds that reached the target."""
        return sum(value is not None for value in self.values)

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {**self._asdict(), "reached": self.reached}


def values_of(history: History, key: str) -> Curve:
    """A measure at every evaluation, NaN where it was not finite.

    Of a spread over clients it is their mean. Without a clock there is no point.
    """
    times = history.times
    if times is None:
        return Curve(np.array([]), np.array([]))
    at, values = [], []
    for row in history.evaluations:
        if key in row:
            value = row[key]
            value = value.get("mean") if isinstance(value, dict) else value
            at.append(times[row["round"]])
            values.append(math.nan if value is None else value)
    return Curve(np.array(at), np.array(values, dtype=np.float64))


def smoothed(curve: Curve) -> Curve:
    """Means of each evaluation and the two before it, from the third one on.

    >>> smoothed(Curve(np.array([1.0, 2, 3, 4]), np.array([0.0, 3, 3, 9]))).values
    array([2., 5.])
    """
    if len(curve.values) < EVALUATIONS:
        return Curve(np.array([]), np.array([]))
    windows = np.lib.stride_tricks.sliding_window_view(curve.values, EVALUATIONS)
    return Curve(curve.times[EVALUATIONS - 1 :], windows.mean(1))


def end_of(histories: Sequence[History]) -> float | None:
    """The time at which the first of the runs ends; None where one has no clock."""
    ends = []
    for history in histories:
        times = history.times
        if times is None:
            return None
        ends.append(float(times[-1]))
    return min(ends, default=None)


def value_at(history: History, key: str, horizon: float) -> float | None:
    """The measure at the last evaluation up to `horizon`; None without any."""
    curve = values_of(history, key)
    before = curve.values[curve.times <= horizon]
    if len(before) == 0 or math.isnan(before[-1]):
        return None
    return float(before[-1])


def time_to(
    histories: Sequence[History], key: str, target: float, is_higher: bool, by: float
) -> TimeTo:
    """When each run's measure reached the target, if it did by the time `by`."""
    values = [_reached(history, key, target, is_higher, by) for history in histories]
    found = [value for value in values if value is not None]
    mean = float(np.mean(found)) if found else None
    low = high = None
    if len(found) == len(values) > 1:
        from scipy import stats  # its import takes a moment

        error = float(np.std(found, ddof=1)) / math.sqrt(len(found))
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(found) - 1)) * error
        middle = float(np.mean(found))
        low, high = max(middle - half, 0.0), middle + half
    return TimeTo(by, values, mean, low, high)


def _reached(
    history: History, key: str, target: float, is_higher: bool, by: float
) -> float | None:
    """The time at which one run reached the target; None where not by `by`."""
    means = smoothed(values_of(history, key))
    is_good = means.values >= target if is_higher else means.values <= target
    times = means.times[is_good & (means.times <= by)]
    return float(times[0]) if len(times) else None


def default_target(
    experiments: Sequence[Sequence[History]], key: str, is_higher: bool, by: float
) -> float | None:
    """Nine tenths of the way from the worst start to the best of the experiments.

    The best is the mean over seeds of each seed's best mean of three evaluations up to
    the time `by`. Rounded to two digits, so that it is easier to reach. None where no
    run has three evaluations by then.
    """
    sign = 1.0 if is_higher else -1.0
    starts, reached = [], []
    for histories in experiments:
        best = []
        for history in histories:
            curve = values_of(history, key)
            starts += [sign * value for value in curve.values[:1] if value == value]
            means = smoothed(curve)
            found = sign * means.values[means.times <= by]
            found = found[~np.isnan(found)]
            if len(found):
                best.append(float(found.max()))
        if best:
            reached.append(float(np.mean(best)))
    if not reached or not starts:
        return None
    start, best_of_all = min(starts), max(reached)
    return _rounded(sign * (start + WAY * (best_of_all - start)), is_higher)


def _rounded(value: float, is_down: bool) -> float:
    """The number to two significant digits.

    >>> _rounded(0.8379, True), _rounded(0.8321, False), _rounded(1234.0, True)
    (0.83, 0.84, 1200.0)
    """
    if value == 0:
        return value
    digits = 1 - math.floor(math.log10(abs(value)))
    scaled = round(value * 10.0**digits, 6)
    whole = math.floor(scaled) if is_down else math.ceil(scaled)
    return round(whole / 10.0**digits, max(digits, 0))


def seconds_text(seconds: float) -> str:
    """Seconds as a table of times has them.

    >>> seconds_text(305.21), seconds_text(27618.4), seconds_text(0.0421)
    ('305 s', '27,618 s', '0.0421 s')
    """
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s"


def reached_text(found: TimeTo) -> str:
    """When the target was reached, in a cell of a table.

    >>> reached_text(TimeTo(500.0, [300.0, 310.0], 305.0, 241.5, 368.5))
    '305 s (242 to 368)'
    >>> reached_text(TimeTo(500.0, [300.0, None], 300.0, None, None))
    '> 500 s (1 of 2: 300 s)'
    >>> reached_text(TimeTo(500.0, [None], None, None, None))
    '> 500 s'
    """
    beyond = f"> {seconds_text(found.horizon_s)}"
    if found.mean is None:
        return beyond
    mean = seconds_text(found.mean)
    if found.reached < len(found.values):
        return f"{beyond} ({found.reached} of {len(found.values)}: {mean})"
    if found.low is None or found.high is None:
        return mean
    low, high = (seconds_text(bound)[:-2] for bound in (found.low, found.high))
    return f"{mean} ({low} to {high})"
