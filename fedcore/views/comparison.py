"""The results of a comparison: every measure of each experiment over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedcore.config import Experiment
from fedcore.rounds.history import History
from fedcore.storage.json import without_nan
from fedcore.views.time_to import (
    TimeTo,
    default_target,
    end_of,
    seconds_text,
    time_to,
    value_at,
)

__all__ = [
    "Comparison",
    "Curve",
    "Run",
    "Stat",
    "Target",
    "TimedCurve",
    "curve",
    "timed_curve",
]

AT_HORIZON = "at_horizon"  # the judging measure at the end of the shortest run
NEARLY = 0.02  # of time by which ends of runs may differ
CLIENT_PARTS = ("mean", "std", "worst_tenth", "p10", "p90")
TUNED_PARTS = ("mean", "worst_tenth")
OPTIMUM = {"test_distance": "distance", "nmsd_db": "NMSD, dB"}
REST = {  # after the test measures, as the table names them; "" = in compare.json only
    **OPTIMUM,
    "client_mean": "client mean",
    "client_std": "client std",
    "client_worst_tenth": "worst tenth",
    "client_p10": "",
    "client_p90": "",
    "finetuned_mean": "fine-tuned",
    "finetuned_worst_tenth": "",
    "slowest_fifth_measure": "slowest fifth",
    "slowest_tenth_measure": "",
    "slowest_fifth_arrivals": "their updates",
    "slowest_tenth_arrivals": "",
    "time_s": "own clock",
    "idle": "idle",
    "late_share": "",
    "wasted_share": "",
    "staleness_mean": "",
    "bytes": "sent",
    "seconds": "seconds",
    "clients_per_second": "clients/s",
}


class Run(NamedTuple):
    """One finished run of a comparison."""

    seed: int
    folder: Path
    history: History
    time: Mapping[str, Any] = MappingProxyType({})  # as of `Result.time`

    def values(self, judge: str) -> dict[str, float | None]:
        """Every measure at the end; None where the run has no such measure.

        `judge` is the measure that counts for single clients.
        """
        last = self.history.evaluated
        clients = last.get(f"client_{judge}") or {}
        tuned = last.get(f"finetuned_{judge}") or {}
        sent = self.history.total("bytes_down") + self.history.total("bytes_up")
        values: dict[str, float | None] = {
            "bytes": float(sent),
            "seconds": round(self.history.total("seconds"), 4),
            "clients_per_second": round(self.history.clients_per_second, 2),
        }
        tests = ("test_", *(f"{name}_" for name in self.history.extra_tests))
        for key, value in last.items():
            if key.startswith(tests) or key in OPTIMUM:
                values[key] = value
        for part in CLIENT_PARTS:
            values[f"client_{part}"] = clients.get(part)
        for part in TUNED_PARTS:
            values[f"finetuned_{part}"] = tuned.get(part)
        for name in ("time_s", "idle", "late_share", "wasted_share"):
            values[name] = self.time.get(name)
        values["staleness_mean"] = self.time.get("staleness", {}).get("mean")
        for name in ("slowest_fifth", "slowest_tenth"):
            for part in ("arrivals", "measure"):
                values[f"{name}_{part}"] = self.time.get(name, {}).get(part)
        return values


class Stat(NamedTuple):
    """A measure over seeds."""

    mean: float
    std: float | None  # n - 1 in the denominator; None for one seed
    values: list[float]  # a seed


class Curve(NamedTuple):
    """A measure by round, over seeds."""

    rounds: np.ndarray  # [points]
    sent: np.ndarray  # [points], mean bytes sent until then
    values: np.ndarray  # [seeds, points]


class TimedCurve(NamedTuple):
    """A measure by time or bytes, over seeds."""

    x: np.ndarray  # [points], ascending
    values: np.ndarray  # [seeds, points]


class Target(NamedTuple):
    """The value whose time is looked for, up to the end of the shortest run."""

    key: str  # of the measure in a row
    value: float
    is_default: bool  # whether it was chosen here
    horizon_s: float


@dataclass(frozen=True)
class Comparison:
    """The runs of each experiment, by label."""

    folder: Path
    seeds: int
    experiments: dict[str, Experiment]
    runs: dict[str, list[Run]]  # one a seed, without those that failed
    failed: dict[str, str] = field(default_factory=dict)  # "label, seed s" -> why
    wanted: float | None = None  # value of the measure whose time is looked for

    @cached_property
    def _values(self) -> dict[str, list[dict[str, float | None]]]:
        """Every measure of every run, by label: they are asked for one by one."""
        found: dict[str, list[dict[str, float | None]]] = {}
        for label, runs in self.runs.items():
            found[label] = [run.values(self.measure) for run in runs]
        return found

    def stat(self, label: str, measure: str) -> Stat | None:
        """A measure over the seeds; None where the task has no such measure."""
        values, horizon = [], self.horizon
        for run, of_run in zip(self.runs[label], self._values[label], strict=True):
            value = of_run.get(measure)
            if measure == AT_HORIZON and horizon is not None:
                value = value_at(run.history, self.judging_key, horizon)
            if value is not None:
                values.append(value)
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Stat(statistics.fmean(values), std, values)

    @property
    def measures(self) -> dict[str, bool]:
        """Whether higher is better, by measure of any run.

        That which judges them is first: that of the first run which has more than its
        loss.
        """
        measures: dict[str, bool] = {}
        for runs in self.runs.values():
            for run in runs:
                measures = {**measures, **run.history.measures}
        is_higher = measures.pop("loss", False)
        return {**measures, "loss": is_higher}

    @property
    def measure(self) -> str:
        """The measure that judges the runs."""
        return next(iter(self.measures))

    @property
    def judging_key(self) -> str:
        """The measure that judges the runs, as a row names it."""
        kind = "client" if self.is_personal else "test"
        return f"{kind}_{self.measure}"

    @property
    def judging_column(self) -> str:
        """The measure that judges the runs, as a column of the table."""
        return "client_mean" if self.is_personal else f"test_{self.measure}"

    @cached_property
    def horizon(self) -> float | None:
        """The end of the shortest run by its own clock; None where one has none."""
        return end_of([run.history for runs in self.runs.values() for run in runs])

    @cached_property
    def target(self) -> Target | None:
        """The value whose time is looked for; None without a clock."""
        if self.horizon is None:
            return None
        value, key = self.wanted, self.judging_key
        if value is None:
            is_higher = self.measures[self.measure]
            experiments = []
            for runs in self.runs.values():
                experiments.append([run.history for run in runs])
            value = default_target(experiments, key, is_higher, self.horizon)
        if value is None:
            return None
        return Target(key, value, self.wanted is None, self.horizon)

    def time_to(self, label: str, is_equal: bool = True) -> TimeTo | None:
        """When the runs of an experiment reached the target; None without a clock.

        By the end of the shortest run of all, or else of the shortest of its own.
        """
        target, runs = self.target, self.runs[label]
        histories = [run.history for run in runs]
        by = self.horizon if is_equal else end_of(histories)
        if target is None or by is None or not runs:
            return None
        is_higher = self.measures[self.measure]
        return time_to(histories, target.key, target.value, is_higher, by)

    @property
    def has_equal_ends(self) -> bool:
        """Whether all runs end at about the same time by their clocks."""
        ends = []
        for runs in self.runs.values():
            for run in runs:
                times = run.history.times
                if times is not None:
                    ends.append(float(times[-1]))
        return not ends or max(ends) <= (1 + NEARLY) * min(ends)

    @property
    def columns(self) -> dict[str, str]:
        """Every measure, and its name in the table; "" = in compare.json only."""
        kinds = ["test"]
        for runs in self.runs.values():
            for run in runs:
                kinds += run.history.extra_tests
        columns = {}
        for kind in dict.fromkeys(kinds):
            for name in self.measures:
                columns[f"{kind}_{name}"] = f"{kind} {name}"
        columns |= REST
        if self.horizon is None or self.has_equal_ends:
            return columns
        ordered = {}
        for key, name in columns.items():
            ordered[key] = name
            if key == self.judging_column:
                ordered[AT_HORIZON] = f"at {seconds_text(self.horizon)}"
        return ordered

    @property
    def is_personal(self) -> bool:
        """Whether some clients have models of their own.

        The runs are then judged by what clients get.
        """
        experiments = self.experiments.values()
        return any(one.build_method().personalises() for one in experiments)

    def to_dict(self) -> dict[str, Any]:
        """Mean, standard deviation and values of every measure, ready for JSON."""
        methods: dict[str, Any] = {}
        for label, runs in self.runs.items():
            experiment = self.experiments[label]
            entry: dict[str, Any] = {
                "method": experiment.method.name,
                "rounds": experiment.rounds,
                "seeds": [run.seed for run in runs],
                "runs": [str(run.folder) for run in runs],
            }
            for measure in {"test_accuracy": "", **self.columns}:
                stat = self.stat(label, measure)
                entry[measure] = None if stat is None else stat._asdict()
            for name, is_equal in (("time_to", True), ("time_to_in_all", False)):
                found = self.time_to(label, is_equal)
                entry[name] = None if found is None else found.to_dict()
            methods[label] = entry
        content = {
            "folder": str(self.folder),
            "seeds": self.seeds,
            "target": self.target._asdict() if self.target else None,
            "methods": methods,
            "failed": self.failed,
        }
        ready: dict[str, Any] = without_nan(content)
        return ready


def curve(runs: Sequence[Run], key: str) -> Curve:
    """A measure at the rounds in which every seed was evaluated.

    Where the measure is a spread over clients, the curve is that of their mean.
    """
    rounds: set[int] | None = None
    seeds: list[dict[int, float]] = []
    sent: list[np.ndarray] = []
    for run in runs:
        values: dict[int, float] = {}
        for number, value in run.history.points(key):
            values[number] = value["mean"] if isinstance(value, dict) else value
        seeds.append(values)
        sent.append(run.history.sent())
        rounds = values.keys() & (values.keys() if rounds is None else rounds)
    points = sorted(rounds or ())
    mean_sent = [np.mean([totals[number] for totals in sent]) for number in points]
    measured = [[values[number] for number in points] for values in seeds]
    return Curve(np.array(points), np.array(mean_sent), np.array(measured))


def timed_curve(runs: Sequence[Run], key: str, against: str) -> TimedCurve:
    """A measure by "time" or "bytes", over seeds that are evaluated at other moments.

    Values between two evaluations are those of the line between them, as it is drawn.
    Only where every seed has been evaluated, before and after.
    """
    seeds = []
    for run in runs:
        times, points = run.history.times, run.history.points(key)
        x = times if against == "time" else run.history.sent()
        if x is None or not points:
            return TimedCurve(np.array([]), np.array([]))
        at = np.array([x[number] for number, _ in points], dtype=np.float64)
        values = [v["mean"] if isinstance(v, dict) else v for _, v in points]
        seeds.append((at, np.array(values, dtype=np.float64)))
    if not seeds:
        return TimedCurve(np.array([]), np.array([]))
    first = max(at[0] for at, _ in seeds)
    last = min(at[-1] for at, _ in seeds)
    everything = np.unique(np.concatenate([at for at, _ in seeds]))
    grid = everything[(everything >= first) & (everything <= last)]
    measured = [np.interp(grid, at, values) for at, values in seeds]
    return TimedCurve(grid, np.array(measured))
