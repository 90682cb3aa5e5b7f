"""Several presets on the same seeds: a table with mean and standard deviation, and plots."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore import __version__
from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.loop import Interrupted, Observer, Quiet, run
from fedcore.rounds.rundir import stored
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.memory import byte_unit, size_text
from fedcore.views.page import THEME, render
from fedcore.views.run_report import (
    LABEL_ROOM,
    SERIES,
    STYLE,
    Plot,
    new_figure,
    plot,
    read_rows,
    shape_axes,
    svg,
    thin,
)

CLIENTS = ("mean", "std", "lowest_tenth", "p10", "p90")
MEASURES = {  # as the table names them; "" = in compare.json only
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "test_distance": "distance",
    "nmsd_db": "NMSD, dB",
    "client_mean": "client mean",
    "client_std": "client std",
    "client_lowest_tenth": "worst tenth",
    "client_p10": "",
    "client_p90": "",
    "finetuned_mean": "fine-tuned",
    "finetuned_lowest_tenth": "",
    "bytes": "sent",
    "seconds": "seconds",
    "clients_per_second": "clients/s",
}
STYLES = ("-", "--", ":", "-.")  # after ten labels the colours begin again


class Run(NamedTuple):
    """One finished run of a comparison."""

    seed: int
    folder: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl

    def values(self) -> dict[str, float | None]:
        """Every measure at the end; None where the task has no such measure."""
        last: dict[str, Any] = next(
            (row for row in reversed(self.rows) if "test_loss" in row), {}
        )
        clients, tuned = (
            last.get("client_accuracy") or {},
            last.get("finetuned_accuracy") or {},
        )
        seconds = sum(row["seconds"] for row in self.rows)
        return {
            "test_accuracy": last.get("test_accuracy"),
            "test_loss": last.get("test_loss"),
            "test_distance": last.get("test_distance"),
            "nmsd_db": last.get("nmsd_db"),
            **{f"client_{part}": clients.get(part) for part in CLIENTS},
            **{
                f"finetuned_{part}": tuned.get(part)
                for part in ("mean", "lowest_tenth")
            },
            "bytes": float(
                sum(row["bytes_down"] + row["bytes_up"] for row in self.rows)
            ),
            "seconds": round(seconds, 4),
            "clients_per_second": round(
                sum(row["reports"] for row in self.rows) / max(seconds, 1e-9), 2
            ),
        }


class Stat(NamedTuple):
    mean: float
    std: float | None  # n - 1 in the denominator; None for one seed
    values: list[float]  # a seed


@dataclass(frozen=True)
class Comparison:
    """What each preset came to, over its seeds."""

    folder: Path
    seeds: int
    experiments: dict[str, Experiment]
    runs: dict[str, list[Run]]  # label -> one run a seed, less those that failed
    failed: dict[str, str] = field(default_factory=dict)  # "label, seed s" -> why

    def stat(self, label: str, measure: str) -> Stat | None:
        """Over the seeds; None where the task has no such measure."""
        values = [
            value
            for run in self.runs[label]
            if (value := run.values()[measure]) is not None
        ]
        if not values:
            return None
        return Stat(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            values,
        )

    @property
    def measure(self) -> str:
        """What the runs are judged by."""
        return (
            "accuracy"
            if any(self.stat(label, "test_accuracy") for label in self.runs)
            else "loss"
        )

    @property
    def personal(self) -> bool:
        """Whether some clients have models of their own, and the runs are judged by what clients get."""
        return self.measure == "accuracy" and any(
            e.build_method().personalises() for e in self.experiments.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Mean, standard deviation and single values of every measure, by label; ready for JSON."""
        table: dict[str, Any] = {}
        for label, runs in self.runs.items():
            stats = {measure: self.stat(label, measure) for measure in MEASURES}
            table[label] = {
                "method": self.experiments[label].method.name,
                "rounds": self.experiments[label].rounds,
                "seeds": [run.seed for run in runs],
                "runs": [str(run.folder) for run in runs],
                **{measure: stat and stat._asdict() for measure, stat in stats.items()},
            }
        return {
            "folder": str(self.folder),
            "seeds": self.seeds,
            "methods": table,
            "failed": self.failed,
        }


def compare(
    experiments: Sequence[tuple[str, Experiment]],
    seeds: int,
    out: Path | str,
    observer: Observer | None = None,
) -> Comparison:
    """Run every (label, experiment) with seeds s, s + 1, ..., each in a directory of its own below `out`.

    What is there already is read, or gone on with: the same command again costs nothing. A run that fails is left out, noted
    and named in `failed`. Writes compare.json, compare.svg and compare.html. Raises SettingsError when `out` holds runs with
    other settings, RunError when every run failed, and Interrupted.
    """
    out, observer = Path(out), observer or Quiet()
    if not experiments or seeds < 1:
        raise SettingsError(
            f"{len(experiments)} presets and {seeds} seeds: expected at least one of each"
        )
    labelled = distinct(experiments)
    c = Comparison(out, seeds, labelled, {label: [] for label in labelled})
    for label, experiment in labelled.items():
        for seed in range(experiment.seed, experiment.seed + seeds):
            one, folder = (
                experiment.model_copy(update={"seed": seed}),
                out / f"{slug(label)}-seed{seed}",
            )
            try:
                c.runs[label].append(Run(seed, folder, finish(one, folder, observer)))
            except Interrupted as e:
                raise Interrupted(
                    f"interrupted in {folder}; go on with the same command and --out {out}"
                ) from e
            except RunError as e:
                c.failed[f"{label}, seed {seed}"] = str(e)
                observer.note(f"{label}, seed {seed}, failed and is left out: {e}")
            except SettingsError as e:
                raise SettingsError(f"{label}, seed {seed}: {e}") from e
    if not any(c.runs.values()):
        raise RunError(
            "every run failed; "
            + "; ".join(f"{name}: {why}" for name, why in c.failed.items())
        )
    write(c)
    return c


def finish(e: Experiment, folder: Path, observer: Observer) -> list[dict[str, Any]]:
    """The rows of this experiment's run in `folder`: read where it is complete, else run to the end first."""
    if (folder / "config.toml").exists():
        before = Experiment.parse(stored(folder), source=str(folder / "config.toml"))
        if before.rounds > e.rounds:
            raise SettingsError(
                f"{folder} holds a run of {before.rounds} rounds, and {e.rounds} are wanted: choose another --out"
            )
        rows = read_rows(folder / "metrics.jsonl") if before == e else []
        if len(rows) == e.rounds:
            return rows
        run(e, resume=folder, observer=observer)
    else:
        run(e, out=folder, observer=observer)
    return read_rows(folder / "metrics.jsonl")


def distinct(experiments: Sequence[tuple[str, Experiment]]) -> dict[str, Experiment]:
    """By label; a label whose directory another has taken gets a number."""
    found: dict[str, Experiment] = {}
    taken: set[str] = set()
    for label, experiment in experiments:
        name, number = label, 1
        while slug(name) in taken:
            number += 1
            name = f"{label}-{number}"
        taken.add(slug(name))
        found[name] = experiment
    return found


def slug(label: str) -> str:
    """The label as the name of a directory."""
    return re.sub(r"[^\w.+=-]+", "-", label).strip(".-") or "run"


def show(c: Comparison) -> None:
    """The table, on stdout."""
    table = rows(c)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for first, *others in table:
        print(
            "  ".join(
                [
                    first.ljust(widths[0]),
                    *(
                        text.rjust(w)
                        for text, w in zip(others, widths[1:], strict=True)
                    ),
                ]
            )
        )
    print(f"{explained(c)} Plots: {c.folder / 'compare.html'}")


def rows(c: Comparison) -> list[list[str]]:
    """The table, its head first; a measure that no run has is left out."""
    measures = [
        m
        for m, name in MEASURES.items()
        if name and any(c.stat(label, m) for label in c.runs)
    ]
    body = [
        [label, *(stat_text(m, c.stat(label, m)) for m in measures)] for label in c.runs
    ]
    return [["", *(MEASURES[m] for m in measures)], *body]


def stat_text(measure: str, stat: Stat | None) -> str:
    if stat is None:
        return "-"
    if measure == "bytes":
        return size_text(stat.mean)
    if measure in ("seconds", "clients_per_second"):
        return f"{stat.mean:,.0f}" if stat.mean >= 100 else f"{stat.mean:.3g}"
    if measure in ("test_loss", "test_distance", "nmsd_db"):
        return f"{stat.mean:.4g}" + (
            f" ± {stat.std:.2g}" if stat.std is not None else ""
        )
    return f"{stat.mean:.2%}" + (f" ± {stat.std:.2%}" if stat.std is not None else "")


def explained(c: Comparison) -> str:
    what = (
        f"Mean ± standard deviation over {c.seeds} seeds."
        if c.seeds > 1
        else "One seed: nothing is known of the spread."
    )
    told = (
        " The test set is measured with the model of a client that never took part."
        if c.personal
        else ""
    )
    return f"{what} Clients are measured on their own examples.{told}"


# Files


def write(c: Comparison) -> None:
    """compare.json, compare.svg and compare.html."""
    with rc_context(STYLE):
        files = {
            "compare.json": json.dumps(c.to_dict(), indent=1),
            "compare.svg": _picture(c),
            "compare.html": _page(c),
        }
    for name, content in files.items():
        write_atomically(c.folder / name, content.encode())


def _page(c: Comparison) -> str:
    judged = "client_mean" if c.personal else f"test_{c.measure}"
    ranked = sorted(
        ((stat, label) for label in c.runs if (stat := c.stat(label, judged))),
        reverse=c.measure == "accuracy",
        key=lambda pair: pair[0].mean,
    )
    summary = f"{len(c.runs)} experiment{'s' if len(c.runs) > 1 else ''} on {c.seeds} seed{'s' if c.seeds > 1 else ''} each."
    if ranked:
        named = [f"{label} {stat_text(judged, stat)}" for stat, label in ranked]
        what = "Mean accuracy of the clients" if c.personal else f"Test {c.measure}"
        summary += f" {what} at the end, best first: {'; '.join(named)}."
    runs = [
        (f"{label}, seed {run.seed}", run.folder)
        for label, runs in c.runs.items()
        for run in runs
    ]
    return render(
        "compare",
        title=", ".join(c.runs),
        summary=summary,
        notes=[f"Left out: {name}: {why}" for name, why in c.failed.items()],
        results=rows(c),
        explained=explained(c),
        plots=_plots(c),
        differences=_differences(c),
        runs=runs,
        version=__version__,
        folder=c.folder,
    )


def _plots(c: Comparison) -> list[Plot]:
    plots = []
    keys = [
        f"test_{measure}" for measure in dict.fromkeys((c.measure, "loss", "distance"))
    ]
    for key in ["client_accuracy", *keys] if c.personal else keys:
        for against in ("round", "bytes"):
            figure, axes = new_figure(height=3.2)
            if not _draw(axes, c, key, against):
                continue
            if len(c.runs) > 1:
                figure.legend(loc="outside upper left", ncols=min(len(c.runs), 3))
            band = (
                "The line is the mean over seeds, the band goes from the lowest to the highest."
                if c.seeds > 1
                else "One seed."
            )
            plots.append(plot(figure, f"{_title(key)} by {axes.get_xlabel()}", band))
    return plots


def _picture(c: Comparison) -> str:
    """Both curves side by side, for a paper or a README: on white, whatever the reader's mode."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    key = "client_accuracy" if c.personal else f"test_{c.measure}"
    drawn = [_draw(left, c, key, "round"), _draw(right, c, key, "bytes")]
    if all(drawn):
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=min(len(labels), 5)
        )
    right.set_ylabel("")
    return svg(figure, transparent=False, facecolor=THEME["card"][0])


def _title(key: str) -> str:
    return (
        "Accuracy of single clients, their mean,"
        if key == "client_accuracy"
        else key.replace("_", " ").capitalize()
    )


def _draw(axes: Axes, c: Comparison, key: str, against: str) -> bool:
    """A line and a band for each label; False when there is nothing to draw."""
    curves = {label: curve(runs, key) for label, runs in c.runs.items()}
    curves = {label: found for label, found in curves.items() if len(found[0])}
    if not curves:
        return False
    size, name = byte_unit(max(float(sent[-1]) for _, sent, _ in curves.values()))
    for number, (label, (rounds, sent, values)) in enumerate(curves.items()):
        x = rounds if against == "round" else sent / size
        index = thin(range(len(x)))
        x, y = x[index], values[:, index]
        style: dict[str, Any] = {
            "color": SERIES[number % 9],
            "linestyle": STYLES[number // 9 % 4],
        }
        axes.plot(x, y.mean(0), label=label, marker="o" if len(x) == 1 else "", **style)
        if len(y) > 1:
            axes.fill_between(
                x, y.min(0), y.max(0), alpha=0.18, linewidth=0, color=style["color"]
            )
    axes.set(
        xlabel="round" if against == "round" else f"{name} sent",
        ylabel=key.replace("_", " "),
    )
    everything = np.concatenate(
        [values.ravel() for _, _, values in curves.values()]
    ).tolist()
    right = max(
        float((rounds if against == "round" else sent / size)[-1])
        for rounds, sent, _ in curves.values()
    )
    shape_axes(
        axes,
        key.partition("_")[2],
        everything,
        (1.02 if len(curves) > 1 else LABEL_ROOM) * right or 1,
    )
    return True


def curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rounds [points], mean bytes sent [points], values [seeds, points]), at the rounds in which every seed was evaluated.

    Of a spread over clients it is the mean.
    """
    found: list[dict[int, tuple[float, float]]] = []
    for one in runs:
        sent = np.cumsum([row["bytes_down"] + row["bytes_up"] for row in one.rows])
        pairs = zip(one.rows, sent.tolist(), strict=True)
        points = {
            row["round"]: (total, row[key])
            for row, total in pairs
            if row.get(key) is not None
        }
        found.append(
            {
                t: (total, v["mean"] if isinstance(v, dict) else v)
                for t, (total, v) in points.items()
            }
        )
    rounds = (
        sorted(set.intersection(*(set(points) for points in found))) if found else []
    )
    sent = np.array([np.mean([points[t][0] for points in found]) for t in rounds])
    return (
        np.array(rounds),
        sent,
        np.array([[points[t][1] for t in rounds] for points in found]),
    )


def _differences(c: Comparison) -> list[list[str]]:
    """Settings that are not the same in all experiments, the head first."""
    flat: dict[str, dict[str, Any]] = {}
    for label, e in c.experiments.items():
        flat[label] = {}
        for key, value in e.model_dump(mode="json").items():
            flat[label] |= (
                {f"{key}.{k}": v for k, v in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    table = [
        [key, *(str(settings.get(key, "-")) for settings in flat.values())]
        for key in keys
    ]
    return [["setting", *flat], *(row for row in table if len(set(row[1:])) > 1)]
