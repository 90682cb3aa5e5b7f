"""The figures of a run report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from fedcore.data.plot import partition_figure
from fedcore.rounds.history import History
from fedcore.rounds.rundir import PERCENTILES
from fedcore.rounds.time_summary import clock_kind
from fedcore.storage.memory import byte_unit
from fedcore.views.figures import (
    LABEL_ROOM,
    SERIES,
    Plot,
    mark_of,
    new_figure,
    plot,
    shape_axes,
    thin,
    ticks,
    time_unit,
)
from fedcore.views.round_figures import round_plots
from fedcore.views.run_record import Measured, RunRecord
from fedcore.views.secret_text import average_of_training
from fedcore.views.text import PERCENT, value_text
from fedcore.views.time_figures import time_plots

__all__ = ["partition_text", "sections"]

QUANTILES = (0, 0.1, 0.5, 0.9, 1)  # of a list that a method logged
Points = list[tuple[int, Any]]  # (round, value)


def sections(run: RunRecord) -> list[tuple[str, list[Plot]]]:
    """The plots of a report by the title of their section."""
    return [
        ("Learning", _learning(run)),
        ("Clients", _clients(run)),
        ("Method", _method(run.history)),
        ("Time", time_plots(run)),
        ("Rounds", round_plots(run.history)),
        ("Data", _partition(run)),
    ]


def partition_text(section: dict[str, Any]) -> str:
    """A section of settings in words.

    >>> partition_text({"name": "dirichlet", "alpha": 0.3, "min_size": 2})
    'dirichlet partition, alpha 0.3, min size 2'
    """
    words = [f"{section.get('name')} partition"]
    for key, value in section.items():
        if key != "name":
            words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)


# Learning


def _learning(run: RunRecord) -> list[Plot]:
    """Every test measure by round, time and bytes; that which judges the run first."""
    has_sent = run.history.total("bytes_down") + run.history.total("bytes_up") > 0
    measures = {"loss"}
    for row in run.history:
        for key in row:
            if key.startswith("test_"):
                measures.add(key.removeprefix("test_"))
    plots: list[Plot] = []
    by_bytes: list[Plot] = []
    average = average_of_training(run.history)
    order = list(dict.fromkeys([*run.history.measures, *sorted(measures)]))
    for measure in [name for name in order if name in measures]:
        test = thin(run.history.points(f"test_{measure}"))
        train = thin(run.history.points(f"train_{measure}"))
        others = {}
        for name in run.history.extra_tests:
            others[name] = thin(run.history.points(f"{name}_{measure}"))
        if test or train:
            plots.append(_by_round(measure, test, train, others, average))
        if test and run.history.times is not None:
            plots.append(_by_time(run, measure, test))
        if test and has_sent:
            drawn = _by_bytes(run.history, measure, test)
            # Two figures stand side by side: by round and by another cost.
            (plots if run.history.times is None else by_bytes).append(drawn)
    return [*plots, *by_bytes]


def _by_round(
    measure: str, test: Points, train: Points, others: dict[str, Points], average: str
) -> Plot:
    """The test set, the clients' `average` in training, and other test sets by name."""
    figure, axes = new_figure()
    axes.set(xlabel="round", ylabel=measure)
    if train:
        axes.plot(
            *zip(*train, strict=True),
            color=SERIES[9],
            linewidth=1.1,
            marker="o" if len(train) == 1 else "",
            label=f"training, {average} over the cohort",
        )
    drawn = {name: curve for name, curve in others.items() if curve}
    for number, (name, curve) in enumerate(drawn.items()):
        color = SERIES[1 + number % 8]
        axes.plot(
            *zip(*curve, strict=True), color=color, marker=mark_of(curve), label=name
        )
    points = sum(drawn.values(), test + train)
    last = max(number for number, _ in points)
    shape_axes(axes, measure, [value for _, value in points], LABEL_ROOM * last)
    sentences = []
    if test:
        _line(axes, test, measure)
        reached = value_text(measure, test[-1][1])
        sentences.append(f"On the test set, {reached} at the end.")
    if train:
        sentences.append(
            f"Training: the {average} of the cohort's clients while they train."
        )
    if drawn:
        names = ", ".join(f'"{name}"' for name in drawn)
        sentences.append(f"Other test sets: {names}.")
    if test and (train or drawn):
        figure.legend(loc="outside upper left", ncols=2)
    kind = "Test" if test else "Training"
    return plot(figure, f"{kind} {measure} by round", " ".join(sentences))


def _by_time(run: RunRecord, measure: str, test: Points) -> Plot:
    times = run.history.times
    assert times is not None
    size, unit = time_unit(times[-1])
    points = [(times[number] / size, value) for number, value in test]
    kind = clock_kind(run.settings)
    figure, axes = new_figure()
    axes.set(xlabel=f"{kind} time, {unit}", ylabel=measure)
    right = LABEL_ROOM * times[test[-1][0]] / size
    shape_axes(axes, measure, [value for _, value in test], right or 1)
    _line(axes, points, measure)
    captions = {
        "simulated": "On the simulated clock of the run ([clock]): not the computer's.",
        "recorded": "On the clock of the run that this one follows.",
        "device": "On the clock of the server, without what it evaluates and saves.",
    }
    return plot(figure, f"Test {measure} by {kind} time", captions[kind])


def _by_bytes(history: History, measure: str, test: Points) -> Plot:
    sent = history.sent()
    size, unit = byte_unit(sent[-1])
    points = [(sent[number] / size, value) for number, value in test]
    figure, axes = new_figure()
    axes.set(xlabel=f"{unit} sent", ylabel=measure)
    # Multiplied before it is divided: the last digit of the axis' limit depends on it.
    right = LABEL_ROOM * sent[test[-1][0]] / size
    shape_axes(axes, measure, [value for _, value in test], right)
    _line(axes, points, measure)
    caption = (
        "Models and updates of all clients, both directions, without protocol overhead."
    )
    return plot(figure, f"Test {measure} by {unit} sent", caption)


def _line(axes: Axes, points: Sequence[tuple[float, float]], measure: str) -> None:
    """The curve of the test set, with its last value beside it."""
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=SERIES[0], marker=mark_of(points), label="test set")
    axes.annotate(
        value_text(measure, y[-1]),
        (x[-1], y[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        annotation_clip=False,
    )


# Clients


def _clients(run: RunRecord) -> list[Plot]:
    """The measure on each client's own data: by round, and at the last evaluation."""
    examples = "held-out examples" if run.settings.get("holdout", 0) else "examples"
    plots = []
    band = _client_band(run, examples)
    if band is not None:
        plots.append(band)
    for measured, after in ((run.clients, ""), (run.tuned, " after fine-tuning")):
        spread = _client_spread(run, measured, examples, after)
        if spread is not None:
            plots.append(spread)
    return plots


def _client_band(run: RunRecord, examples: str) -> Plot | None:
    """Mean and 10th to 90th percentile over clients, by round."""
    points = []
    for number, clients in run.history.points(f"client_{run.measure}"):
        low, mean, high = (clients.get(part) for part in ("p10", "mean", "p90"))
        if None not in (low, mean, high):
            points.append((number, low, mean, high))
    if not points:
        return None
    x, low, mean, high = zip(*thin(points), strict=True)
    figure, axes = new_figure()
    axes.set(xlabel="round", ylabel=run.measure)
    band: dict[str, Any] = {"color": SERIES[0], "alpha": 0.2, "linewidth": 0}
    axes.fill_between(x, low, high, label="10th to 90th percentile", **band)
    axes.plot(x, mean, color=SERIES[0], marker=mark_of(x), label="mean over clients")
    if len(x) == 1:  # a band needs two points; one gets a bar
        axes.vlines(x, low, high, color=SERIES[0], alpha=0.4, linewidth=6)
    shape_axes(axes, run.measure, [*low, *high], 1.02 * x[-1])
    figure.legend(loc="outside upper left", ncols=2)
    caption = (
        f"The model on every client's own {examples}: what a client gets, "
        "which the mean over all test examples hides."
    )
    return plot(figure, f"{run.measure.capitalize()} of single clients", caption)


def _client_spread(
    run: RunRecord, measured: Measured, examples: str, after: str
) -> Plot | None:
    """A histogram over clients at the last evaluation."""
    measure = run.measure
    values = measured.get(measure, np.array([]))
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    is_percent = measure in PERCENT
    figure, axes = new_figure()
    bins = np.linspace(0, 1, 21).tolist() if is_percent else 30
    axes.hist(values, bins=bins, color=SERIES[0], alpha=0.85, rwidth=0.92)
    low, high = np.quantile(values, [0.1, 0.9])
    line: dict[str, Any] = {"color": SERIES[1], "linewidth": 1.6}
    axes.axvline(values.mean(), linestyle="-", label="mean", **line)
    axes.axvline(low, linestyle=":", label="10th and 90th percentile", **line)
    axes.axvline(high, linestyle=":", **line)
    axes.set(xlabel=f"{measure} on own {examples}", ylabel="clients")
    axes.yaxis.set_major_locator(ticks(integer=True))
    if is_percent:
        axes.set_xlim(-0.01, 1.01)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=2)
    number = int(measured["round"][0])
    tuned = " and fine-tuning" if after else ""
    caption = (
        f"After round {number}{tuned}, {len(values):,} clients, each counted once: "
        f"{_spread_text(measure, run.is_higher_better, values)}"
    )
    return plot(figure, f"Spread over clients{after}", caption)


def _spread_text(measure: str, is_higher_better: bool, values: np.ndarray) -> str:
    """Mean, deviation and percentiles in words. `values` [clients], not empty"""
    mean = value_text(measure, float(values.mean()))
    deviation = value_text(measure, float(values.std()))
    quantiles = np.quantile(values, [percent / 100 for percent in PERCENTILES])
    percentiles = []
    for percent, value in zip(PERCENTILES, quantiles.tolist(), strict=True):
        percentiles.append(f"{percent}: {value_text(measure, value)}")
    text = (
        f"mean {mean}, standard deviation {deviation}; "
        f"percentiles {', '.join(percentiles)}."
    )
    tenth = -(-len(values) // 10)  # rounded up
    ordered = np.sort(values)
    worst = float((ordered[:tenth] if is_higher_better else ordered[-tenth:]).mean())
    return f"{text} The worst tenth has {value_text(measure, worst)} on average."


# Method


def _method(history: History) -> list[Plot]:
    """A plot of each number, or list of them, that the method logged on the server.

    NMSD is the mean square deviation from a known optimum.
    """
    keys = set()
    for row in history:
        for key in row:
            is_of_time = key == "server_discount" and "staleness" in row
            if (key.startswith("server_") and not is_of_time) or key == "nmsd_db":
                keys.add(key)
    plots = []
    for key in sorted(keys):
        drawable = [
            (number, value)
            for number, value in history.points(key)
            if is_drawable(value)
        ]
        if drawable:
            plots.append(_logged(key, thin(drawable)))
    return plots


def is_drawable(value: float | list[float | None] | None) -> bool:
    """Whether every number is there; metrics.jsonl has null for NaN and infinity.

    >>> [is_drawable(value) for value in (0.5, None, [0.5, 1.0], [0.5, None], [])]
    [True, False, True, False, False]
    """
    values = value if isinstance(value, list) else [value]
    return bool(values) and None not in values


def _logged(key: str, points: Points) -> Plot:
    """The plot of a number or list that was logged; `points` not empty."""
    name = "NMSD in dB"
    if key != "nmsd_db":
        words = key.removeprefix("server_").replace("_", " ")
        name = words[0].upper() + words[1:]
    number, last = points[-1]
    figure, axes = new_figure()
    axes.set(xlabel="round", ylabel=name)
    if isinstance(last, list):
        bands = _band(axes, points)
        figure.legend(loc="outside upper left", ncols=2)
        shape_axes(axes, name, [*bands[0], *bands[-1]], 1.02 * number)
        least, largest = bands[0][-1], bands[-1][-1]
        caption = (
            "Logged by the method, of each client; "
            f"between {least:.3g} and {largest:.3g} at the end."
        )
    else:
        color, marker = SERIES[4], mark_of(points)
        axes.plot(*zip(*points, strict=True), color=color, marker=marker)
        shape_axes(axes, name, [value for _, value in points], 1.02 * number)
        caption = f"Logged by the method; {last:.4g} at the end."
        if key == "nmsd_db":
            caption = (
                "Mean square deviation of the clients' models from the optimum; "
                f"{last:.2f} dB at the end."
            )
    return plot(figure, f"{name} by round", caption)


def _band(axes: Axes, points: Points) -> np.ndarray:
    """Bands over the values of each round; returns [QUANTILES, points]."""
    rounds = [number for number, _ in points]
    quantiles = [np.quantile(values, QUANTILES) for _, values in points]
    least, low, median, high, largest = bands = np.array(quantiles).T
    wide: dict[str, Any] = {"color": SERIES[4], "alpha": 0.15, "linewidth": 0}
    narrow: dict[str, Any] = wide | {"alpha": 0.3}
    axes.fill_between(rounds, least, largest, label="least to largest", **wide)
    axes.fill_between(rounds, low, high, label="10th to 90th percentile", **narrow)
    marker = mark_of(points)
    axes.plot(rounds, median, color=SERIES[4], marker=marker, label="median")
    return bands


# Data


def _partition(run: RunRecord) -> list[Plot]:
    counts = run.federation.label_counts
    if counts is None:
        return []
    figure = partition_figure(counts, "")
    figure.set_size_inches(5.2, 3.9)
    sizes = counts.sum(1)
    caption = (
        f"{partition_text(run.settings.get('partition', {}))}; {sizes.min():,} to "
        f"{sizes.max():,} examples a client, median {np.median(sizes):,.0f}."
    )
    caption = caption[0].upper() + caption[1:]
    title = "How classes and examples are spread over clients"
    return [plot(figure, title, caption, wide=True)]
