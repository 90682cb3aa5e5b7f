"""The table of a comparison, and its files: compare.json, .svg and .html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore import __version__
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.memory import byte_unit, size_text
from fedcore.views.comparison import (
    AT_HORIZON,
    Comparison,
    Run,
    Stat,
    Target,
    TimedCurve,
    curve,
    timed_curve,
)
from fedcore.views.figures import (
    LABEL_ROOM,
    SERIES,
    STYLE,
    Plot,
    new_figure,
    plot,
    shape_axes,
    svg,
    thin,
    time_unit,
)
from fedcore.views.page import THEME, render
from fedcore.views.text import (
    PERCENT,
    direction_text,
    rate_text,
    share_text,
    value_text,
)
from fedcore.views.time_to import reached_text, seconds_text

__all__ = ["explanation", "stat_text", "table", "write"]

LINES = ("-", "--", ":", "-.")  # after nine labels the colours begin again
COLOURS = 9
SHARES = ("idle", "slowest_fifth_arrivals", "slowest_tenth_arrivals")


def write(comparison: Comparison) -> None:
    """Write compare.json, compare.svg and compare.html."""
    with rc_context(STYLE):
        files = {
            "compare.json": json.dumps(comparison.to_dict(), indent=1),
            "compare.svg": _picture(comparison),
            "compare.html": _page(comparison),
        }
    for name, content in files.items():
        write_atomically(comparison.folder / name, content.encode())


# Tables and words


def table(comparison: Comparison) -> list[list[str]]:
    """A row for each label, the head first; a measure that no run has is left out."""
    rows: list[list[str]] = [["", *map(str, comparison.runs)]]
    last = 1  # the place of what is about time, beside the measure that judges
    for measure, name in comparison.columns.items():
        stats = [comparison.stat(label, measure) for label in comparison.runs]
        if name and any(stats):
            cells = [stat_text(measure, stat, comparison.measure) for stat in stats]
            rows.append([name, *cells])
            if measure in (comparison.judging_column, AT_HORIZON):
                last = len(rows)
    if comparison.target is not None:
        rows[last:last] = _times_to(comparison, comparison.target)
    return [list(row) for row in zip(*rows, strict=True)]


def _times_to(comparison: Comparison, target: Target) -> list[list[str]]:
    """The row of times to the target, and one without a common horizon."""
    reached = value_text(comparison.measure, target.value, 0)
    rows = []
    for is_equal in (True,) if comparison.has_equal_ends else (True, False):
        name = f"time to {reached}" if is_equal else "in all its time"
        cells = [name]
        for label in comparison.runs:
            found = comparison.time_to(label, is_equal)
            cells.append("-" if found is None else reached_text(found))
        rows.append(cells)
    return rows


def stat_text(measure: str, stat: Stat | None, judge: str = "accuracy") -> str:
    """Mean and standard deviation in the measure's unit.

    `judge` is the measure of single clients.

    >>> stat_text("test_accuracy", Stat(0.8123, 0.012, [0.80, 0.82]))
    '81.23% ± 1.20%'
    >>> stat_text("client_mean", Stat(0.8123, 0.012, [0.80, 0.82]), "f1")
    '0.8123 ± 0.012'
    """
    if stat is None:
        return "-"
    if measure == "bytes":
        return size_text(stat.mean)
    if measure == "clients_per_second":
        return rate_text(stat.mean)
    if measure == "time_s":
        return seconds_text(stat.mean)
    if measure in SHARES:
        return share_text(stat.mean)
    if measure == "seconds":
        return f"{stat.mean:,.0f}" if stat.mean >= 100 else f"{stat.mean:.3g}"
    of_clients = ("client_", "finetuned_", "slowest_", AT_HORIZON)
    is_of_clients = measure.startswith(of_clients)
    name = judge if is_of_clients else measure.partition("_")[2]
    if name in PERCENT:
        mean, std = f"{stat.mean:.2%}", f"{stat.std or 0:.2%}"
    else:
        mean, std = f"{stat.mean:.4g}", f"{stat.std or 0:.2g}"
    return mean if stat.std is None else f"{mean} ± {std}"


def explanation(comparison: Comparison) -> str:
    """The sentences below the table."""
    sentences = ["One seed: nothing is known of the spread."]
    if comparison.seeds > 1:
        sentences = [f"Mean ± standard deviation over {comparison.seeds} seeds."]
    measure = comparison.measure
    by = ""
    if measure != "accuracy":
        by = f" by {direction_text(measure, comparison.measures[measure])}"
    sentences.append(f"Clients are measured on their own examples{by}.")
    sentences.append("clients/s: clients trained a second, without evaluation.")
    if comparison.is_personal:
        sentences.append(
            "The test set is measured with the model of a client that never took part."
        )
    return " ".join([*sentences, *_time_sentences(comparison)])


def _time_sentences(comparison: Comparison) -> list[str]:
    """What is to be known of the columns of the runs' clocks."""
    target = comparison.target
    if target is None:
        return []
    measure = comparison.measure
    value, horizon = value_text(measure, target.value, 0), target.horizon_s
    of = f"mean {measure} of clients" if comparison.is_personal else f"test {measure}"
    text = (
        f"time to {value}: by a run's own clock, the first evaluation whose {of}, in "
        "the mean with the two before, is as good"
    )
    if target.is_default:
        text += (
            "; it is nine tenths of the way from the worst start to the best run, "
            "another one is set with --target"
        )
    sentences = [
        f"{text}.",
        f'"> {seconds_text(horizon)}": not reached when the shortest run ends, by so '
        "many of the seeds; they are in no mean.",
    ]
    if comparison.seeds > 1:
        sentences.append("In brackets: 95% interval of the mean over seeds.")
    if not comparison.has_equal_ends:
        sentences.append(
            "Runs end at other times, and are compared up to the first end: choose "
            "rounds so that all take about as long."
        )
    if any(run.time.get("slowest_fifth") for run in _all_runs(comparison)):
        sentences.append(
            f"slowest fifth: {measure} of the slowest fifth of the clients, and their "
            "share of the updates that were used; 20% where speed decides nothing."
        )
    return sentences


def _all_runs(comparison: Comparison) -> list[Run]:
    return [run for runs in comparison.runs.values() for run in runs]


def _summary(comparison: Comparison) -> str:
    experiments, seeds = len(comparison.runs), comparison.seeds
    text = (
        f"{experiments} experiment{'s' if experiments > 1 else ''} "
        f"on {seeds} seed{'s' if seeds > 1 else ''} each."
    )
    what, measure = f"Test {comparison.measure}", f"test_{comparison.measure}"
    if comparison.is_personal:
        what, measure = f"Mean {comparison.measure} of the clients", "client_mean"
    ranked = []
    for label in comparison.runs:
        stat = comparison.stat(label, measure)
        if stat is not None:
            ranked.append((stat, label))
    largest_first = comparison.measures[comparison.measure]
    ranked.sort(key=lambda pair: pair[0].mean, reverse=largest_first)
    if ranked:
        judge = comparison.measure
        named = []
        for stat, label in ranked:
            named.append(f"{label} {stat_text(measure, stat, judge)}")
        text += f" {what} at the end, best first: {'; '.join(named)}."
    return text


def _differences(comparison: Comparison) -> list[list[str]]:
    """Settings that are not the same in all experiments, the head first."""
    flat: dict[str, dict[str, Any]] = {}
    keys: dict[str, None] = {}  # in the order in which they appear
    for label, experiment in comparison.experiments.items():
        settings = _flat(experiment.model_dump(mode="json"))
        flat[label] = settings
        keys |= dict.fromkeys(settings)
    rows = [["setting", *flat]]
    for key in keys:
        values = [str(settings.get(key, "-")) for settings in flat.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of sections by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


# Page and pictures


def _page(comparison: Comparison) -> str:
    folders = []
    for label, runs in comparison.runs.items():
        folders += [(f"{label}, seed {run.seed}", run.folder) for run in runs]
    failed = comparison.failed.items()
    return render(
        "compare",
        title=", ".join(comparison.runs),
        summary=_summary(comparison),
        notes=[f"Left out: {name}: {why}" for name, why in failed],
        results=table(comparison),
        explained=explanation(comparison),
        plots=_plots(comparison),
        differences=_differences(comparison),
        runs=folders,
        version=__version__,
        folder=comparison.folder,
    )


def _plots(comparison: Comparison) -> list[Plot]:
    """Every measure by round and by bytes; and by time, where all have a clock."""
    keys = [f"test_{measure}" for measure in (*comparison.measures, "distance")]
    of_clients = f"client_{comparison.measure}"
    if comparison.is_personal:
        keys = [of_clients, *keys]
    caption = "One seed."
    if comparison.seeds > 1:
        caption = (
            "The line is the mean over seeds, "
            "the band goes from the lowest to the highest."
        )
    plots = []
    for key in keys:
        name = key.replace("_", " ").capitalize()
        if key == of_clients:
            measure = comparison.measure
            name = f"{measure[0].upper()}{measure[1:]} of single clients, their mean,"
        for against in _against(comparison):
            figure, axes = new_figure(height=3.2)
            if not _draw(axes, comparison, key, against):
                continue
            labels = len(comparison.runs)
            if labels > 1:
                figure.legend(loc="outside upper left", ncols=min(labels, 3))
            plots.append(plot(figure, f"{name} by {axes.get_xlabel()}", caption))
    return plots


def _against(comparison: Comparison) -> tuple[str, ...]:
    """The costs against which measures are drawn."""
    return ("round", "bytes") if comparison.horizon is None else ("time", "bytes")


def _picture(comparison: Comparison) -> str:
    """Both curves side by side on white, for a paper or a README."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    key = f"test_{comparison.measure}"
    if comparison.is_personal:
        key = f"client_{comparison.measure}"
    costs = _against(comparison)
    has_left = _draw(left, comparison, key, costs[0])
    has_right = _draw(right, comparison, key, costs[1])
    if has_left and has_right:
        handles, labels = left.get_legend_handles_labels()
        columns = min(len(labels), 5)
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)
    right.set_ylabel("")
    return svg(figure, transparent=False, facecolor=THEME["card"][0])


def _draw(axes: Axes, comparison: Comparison, key: str, against: str) -> bool:
    """Draw a line and a band for each label; False where there is nothing to draw."""
    curves = {}
    for label, runs in comparison.runs.items():
        drawn = _drawn(runs, key, against, comparison.horizon is not None)
        if len(drawn.x):
            curves[label] = drawn
    if not curves:
        return False
    furthest = max(float(one.x[-1]) for one in curves.values())
    size, xlabel = 1.0, "round"
    if against == "bytes":
        size, unit = byte_unit(furthest)
        xlabel = f"{unit} sent"
    elif against == "time":
        size, unit = time_unit(furthest)
        xlabel = f"simulated time, {unit}"
    everything: list[float] = []
    for number, (label, one) in enumerate(curves.items()):
        everything += one.values.ravel().tolist()
        index = thin(range(len(one.x)))
        x = one.x[index] / size
        _line_and_band(axes, number, label, x, one.values[:, index])
    axes.set(xlabel=xlabel, ylabel=key.replace("_", " "))
    room = 1.02 if len(curves) > 1 else LABEL_ROOM
    shape_axes(axes, key.partition("_")[2], everything, room * furthest / size or 1)
    return True


def _drawn(runs: Sequence[Run], key: str, against: str, has_clock: bool) -> TimedCurve:
    """The curve of an experiment's seeds against a cost."""
    if has_clock and against != "round":
        return timed_curve(runs, key, against)
    by_round = curve(runs, key)
    x = by_round.rounds if against == "round" else by_round.sent
    return TimedCurve(x, by_round.values)


def _line_and_band(
    axes: Axes, number: int, label: str, x: np.ndarray, y: np.ndarray
) -> None:
    """The mean of y [seeds, points] at x [points], and its range."""
    colour = SERIES[number % COLOURS]
    style = LINES[number // COLOURS % len(LINES)]
    marker = "o" if len(x) == 1 else ""
    axes.plot(x, y.mean(0), label=label, marker=marker, color=colour, linestyle=style)
    if len(y) > 1:
        band: dict[str, Any] = {"alpha": 0.18, "linewidth": 0, "color": colour}
        axes.fill_between(x, y.min(0), y.max(0), **band)
