"""The time of a whole run, from the columns that its clock gave every round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedcore.rounds.history import History

__all__ = ["clock_kind", "time_summary"]


def time_summary(history: History) -> dict[str, Any]:
    """The clock's columns over all rounds; empty for a run without a clock.

    `time_s` is that of the last round. The idle share is the mean over time, the late
    share over clients asked, the wasted share over time at work, staleness and its
    discount over reports.

    >>> rows = [{"round": 1, "time_s": 2.0, "idle": 0.5, "cohort": 4, "reports": 4}]
    >>> rows.append({"round": 2, "time_s": 8.0, "idle": 0.1, "cohort": 4, "reports": 4})
    >>> time_summary(History(rows))
    {'time_s': 8.0, 'idle': 0.2}
    """
    times = history.times
    if times is None:
        return {}
    passed = np.diff(times)
    asked = _column(history, "cohort")
    reports = _column(history, "reports")
    idle = _column(history, "idle")
    summary: dict[str, Any] = {"time_s": float(times[-1])}
    weights = {
        "idle": passed,
        "late_share": asked,
        "wasted_share": passed * (1 - np.nan_to_num(idle)),
    }
    for name, weight in weights.items():
        mean = _mean(_column(history, name), weight)
        if mean is not None:
            summary[name] = mean
    ages = [row.get("staleness") or {} for row in history]
    mean_age = _mean(np.array([_number(age.get("mean")) for age in ages]), reports)
    if mean_age is not None:
        oldest = max(age["max"] for age in ages if age)
        summary["staleness"] = {"mean": mean_age, "max": oldest}
        discount = _mean(_column(history, "server_discount"), reports)
        if discount is not None:
            summary["discount"] = discount
    return summary


def clock_kind(settings: Mapping[str, Any]) -> str:
    """The kind of a run's own clock: that of devices, recorded, or simulated.

    >>> clock_kind({"engine": {"name": "grid"}}), clock_kind({})
    ('device', 'simulated')
    """
    if settings.get("engine", {}).get("name") == "grid":
        return "device"
    is_replay = settings.get("schedule", {}).get("name") == "trace"
    return "recorded" if is_replay else "simulated"


def _column(history: History, name: str) -> np.ndarray:
    """A number of every round, NaN where it has none. [rounds]"""
    return np.array([_number(row.get(name)) for row in history])


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    """The weighted mean of those that are numbers; None where none is.

    Where all weights are zero, each counts the same.
    """
    is_there = ~np.isnan(values) & ~np.isnan(weights)
    values, weights = values[is_there], weights[is_there]
    if len(values) == 0:
        return None
    if weights.sum() == 0:
        weights = np.ones_like(values)
    return float(np.round((values * weights).sum() / weights.sum(), 12))
