"""Several presets on the same seeds: a table with mean and standard deviation, and a plot."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedcore.checkpoint import write_atomically
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.loop import Observer, Quiet, Result, run
from fedcore.report import STYLE, svg
from fedcore.report_page import PAGE

MEASURES = ("test_accuracy", "test_loss", "client_mean", "client_p10", "client_p90", "mb_sent", "clients_per_second")


@dataclass(frozen=True)
class Comparison:
    """What each preset came to, over its seeds."""

    folder: Path
    results: dict[str, list[Result]]  # label -> one result a seed

    def values(self, label: str, measure: str) -> list[float]:
        """One value a seed; empty where the task has no such measure."""
        found = [_measure(result, measure) for result in self.results[label]]
        return [value for value in found if value is not None]

    def to_dict(self) -> dict[str, Any]:
        """Mean, standard deviation (n - 1) and single values of every measure, by label."""
        table: dict[str, Any] = {}
        for label, results in self.results.items():
            row: dict[str, Any] = {"seeds": [r.seed for r in results], "runs": [r.run_dir for r in results]}
            for measure in MEASURES:
                values = self.values(label, measure)
                spread = statistics.stdev(values) if len(values) > 1 else None
                row[measure] = {"mean": statistics.fmean(values), "std": spread, "values": values} if values else None
            table[label] = row
        return {"folder": str(self.folder), "methods": table}


def compare(experiments: list[tuple[str, Experiment]], seeds: int, out: Path, observer: Observer | None = None) -> Comparison:
    """Run every (label, experiment) with seeds s, s + 1, ..., each in a directory of its own below `out`.

    What is there already is gone on with, or read: the same command again costs nothing. Writes compare.json and compare.html.
    """
    results: dict[str, list[Result]] = {}
    for label, experiment in experiments:
        name, number = label, 1
        while name in results:
            number += 1
            name = f"{label}-{number}"
        results[name] = []
        for seed in range(experiment.seed, experiment.seed + seeds):
            one = experiment.model_copy(update={"seed": seed})
            folder = out / f"{name}-seed{seed}"
            begun = (folder / "config.toml").exists()
            try:
                result = run(one, None if begun else folder, folder if begun else None, observer or Quiet())
            except SettingsError as e:
                raise SettingsError(f"{name}, seed {seed}: {e}") from e
            results[name].append(result)
    comparison = Comparison(out, results)
    write_atomically(out / "compare.json", json.dumps(comparison.to_dict(), indent=1).encode())
    write_atomically(out / "compare.html", _page(comparison).encode())
    return comparison


def show(comparison: Comparison) -> None:
    """The table, on stdout."""
    names = ["", "test accuracy", "test loss", "client mean", "client p10", "client p90", "MB sent", "clients/s"]
    table = [names, *rows(comparison)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    for row in table:
        first, *others = (f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join([first, *others]))
    seeds = len(next(iter(comparison.results.values())))
    print(f"mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}; plot: {comparison.folder / 'compare.html'}")


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's rows: label, then one text a measure."""
    return [[label, *(_text(m, comparison.values(label, m)) for m in MEASURES)] for label in comparison.results]


def _text(measure: str, values: list[float]) -> str:
    if not values:
        return "-"
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    if measure in ("test_accuracy", "client_mean", "client_p10", "client_p90"):
        return f"{mean:.2%}" + (f" ± {spread:.2%}" if spread is not None else "")
    digits = 4 if measure == "test_loss" else 1
    return f"{mean:,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None and measure == "test_loss" else "")


def _measure(r: Result, measure: str) -> float | None:
    if measure.startswith("client_") and measure != "clients_per_second":
        spread = r.final["client_accuracy"]
        return None if spread is None else float(spread[measure.removeprefix("client_")])
    if measure == "mb_sent":
        return (r.bytes_down + r.bytes_up) / 1e6
    value = r.clients_per_second if measure == "clients_per_second" else r.final[measure]
    return None if value is None else float(value)


def _page(c: Comparison) -> str:
    plots = []
    key = "test_accuracy" if any(c.values(label, "test_accuracy") for label in c.results) else "test_loss"
    name = key.replace("_", " ")
    for title, against in (
        (f"{name.capitalize()} by round", "round"),
        (f"{name.capitalize()} for what it costs", "MB sent"),
    ):
        with rc_context(STYLE):
            figure = Figure(figsize=(6.4, 4), layout="constrained")
            axes = figure.add_subplot()
            for label, results in c.results.items():
                x, values = _curves(results, key, against)
                if len(x):
                    (line,) = axes.plot(x, values.mean(0), label=label)
                    axes.fill_between(x, values.min(0), values.max(0), alpha=0.2, linewidth=0, color=line.get_color())
            axes.set(xlabel=against, ylabel=name)
            axes.legend(frameon=False)
            plots.append((title, "Mean over seeds; the band is from the lowest to the highest.", svg(figure)))
    seeds = len(next(iter(c.results.values())))
    facts = [(label, _text(key, c.values(label, key))) for label in c.results]
    first = next(iter(c.results.values()))[0]
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=", ".join(c.results),
            summary=f"{name.capitalize()} after {first.rounds} rounds, mean ± standard deviation over {seeds} seeds.",
            facts=facts,
            plots=plots,
            dropped=[],
            command=None,
            config=json.dumps(c.to_dict(), indent=1),
            environment={},
        )
    )


def _curves(results: list[Result], key: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """x [points], values [seeds, points], at the rounds in which every seed was evaluated."""
    by_seed = []
    for r in results:
        sent, found = 0.0, {}
        for row in r.history:
            sent += (row["bytes_down"] + row["bytes_up"]) / 1e6
            if row.get(key) is not None:
                found[row["round"]] = (row["round"] if against == "round" else sent, row[key])
        by_seed.append(found)
    rounds = sorted(set.intersection(*(set(found) for found in by_seed)))
    x = np.array([np.mean([found[t][0] for found in by_seed]) for t in rounds])
    return x, np.array([[found[t][1] for t in rounds] for found in by_seed])
