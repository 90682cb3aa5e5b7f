"""The results of a comparison: every measure of each experiment over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedcore.config import Experiment
from fedcore.rounds.history import History
from fedcore.storage.json import without_nan

__all__ = ["Comparison", "Curve", "Run", "Stat", "curve"]

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
    "bytes": "sent",
    "seconds": "seconds",
    "clients_per_second": "clients/s",
}


class Run(NamedTuple):
    """One finished run of a comparison."""

    seed: int
    folder: Path
    history: History

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


@dataclass(frozen=True)
class Comparison:
    """The runs of each experiment, by label."""

    folder: Path
    seeds: int
    experiments: dict[str, Experiment]
    runs: dict[str, list[Run]]  # one a seed, without those that failed
    failed: dict[str, str] = field(default_factory=dict)  # "label, seed s" -> why

    def stat(self, label: str, measure: str) -> Stat | None:
        """A measure over the seeds; None where the task has no such measure."""
        values = []
        for run in self.runs[label]:
            value = run.values(self.measure).get(measure)
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
    def columns(self) -> dict[str, str]:
        """Every measure, and its name in the table; "" = in compare.json only."""
        kinds = ["test"]
        for runs in self.runs.values():
            for run in runs:
                kinds += run.history.extra_tests
        tests = {}
        for kind in dict.fromkeys(kinds):
            for name in self.measures:
                tests[f"{kind}_{name}"] = f"{kind} {name}"
        return tests | REST

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
            methods[label] = entry
        content = {
            "folder": str(self.folder),
            "seeds": self.seeds,
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
