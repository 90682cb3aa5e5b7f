"""The figures of an audit's page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from fedcore.audit.results import Audit, CellResult, Interval, Summary
from fedcore.audit.tables import ACCURACY, attacks_of, mean, results_of
from fedcore.views.figures import (
    INK,
    SERIES,
    SOFT,
    Plot,
    log_scale,
    new_figure,
    plot,
    ticks,
)

FACTORS = {
    "epochs": "local epochs",
    "batch_size": "batch size",
    "examples": "examples of a client",
    "round": "round",
}
DASHED = ("class means", "mean image", "blank", "start noise")  # of the levels

Groups = dict[int, list[Summary]]
"""Summaries of the cells that share a value of a factor, by this value."""


def plots(audit: Audit) -> list[Plot]:
    """The figures that the cells allow."""
    drawn: list[Plot] = []
    if audit.mode == "defences":
        trade_off = _trade_off(audit)
        drawn += [] if trade_off is None else [trade_off]
    else:
        for factor in _varied(audit):
            drawn += _against(audit, factor)
    narrow = [figure for figure in drawn if not figure.wide]
    last = _along(audit, wide=len(narrow) % 2 == 0)
    return drawn if last is None else [*drawn, last]


def _varied(audit: Audit) -> list[str]:
    """The factors that are not the same in all cells."""
    varied = []
    for factor in FACTORS:
        values = {cell["factors"].get(factor) for cell in audit.cells}
        if len(values) > 1:
            varied.append(factor)
    return varied


def _against(audit: Audit, factor: str) -> list[Plot]:
    """PSNR of each attack, and labels and membership, against one factor.

    Means over the cells that share its value.
    """
    key, name = factor, FACTORS[factor]
    if _varied(audit) == ["epochs"]:
        key, name = "local_steps", "local steps"
    groups: Groups = {}
    for cell in sorted(audit.cells, key=lambda cell: int(cell["factors"][key])):
        groups.setdefault(cell["factors"][key], []).append(cell["summary"])
    is_alone = all(len(summaries) == 1 for summaries in groups.values())
    others = "" if is_alone else " Means over the other factors of the sweep."
    drawn = [_images(groups, name, others), _beside(groups, name, others)]
    return [figure for figure in drawn if figure is not None]


def _images(groups: Groups, by: str, others: str) -> Plot | None:
    """PSNR of each attack beside the reference levels."""
    attacks: dict[str, None] = {}
    for summaries in groups.values():
        for summary in summaries:
            attacks |= dict.fromkeys(summary["attacks"])
    if not attacks:
        return None
    figure, axes = new_figure(height=3.5)
    for number, attack in enumerate(attacks):
        _curve(axes, _psnr_of(groups, attack), attack, number)
    for number, level in enumerate(DASHED):
        values = []
        for summaries in groups.values():
            psnr = _mean_level(summaries, level)
            values.append(math.nan if psnr is None else psnr)
        color, style = (INK, SOFT)[number % 2], ("--", ":")[number // 2]
        axes.plot(
            list(groups), values, color=color, linestyle=style, linewidth=1.1,
            label=level,
        )  # fmt: skip
    axes.set(xlabel=by, ylabel="PSNR, dB")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
    _scale(axes, list(groups))
    figure.legend(loc="outside upper left", ncols=3)
    caption = (
        "Dashed: what anybody comes to without the update. The bands are 95 % over "
        f"clients.{others}"
    )
    return plot(figure, f"What comes back, by {by}", caption)


def _psnr_of(groups: Groups, attack: str) -> dict[int, list[Interval]]:
    """PSNR of one attack, by the value of the factor."""
    points: dict[int, list[Interval]] = {}
    for x, summaries in groups.items():
        for summary in summaries:
            if attack in summary["attacks"]:
                points.setdefault(x, []).append(summary["attacks"][attack]["psnr"])
    return points


def _mean_level(summaries: Sequence[Summary], level: str) -> float | None:
    """PSNR of a reference level, mean over cells."""
    found = [summary["references"].get(level) for summary in summaries]
    return mean([each["psnr"] if each else None for each in found])


def _beside(groups: Groups, by: str, others: str) -> Plot | None:
    """Labels and membership."""
    labels: dict[int, list[Interval]] = {}
    members: dict[int, list[Interval]] = {}
    for x, summaries in groups.items():
        for summary in summaries:
            if summary["labels"] is not None:
                labels.setdefault(x, []).append(summary["labels"])
            if summary["membership"] is not None:
                members.setdefault(x, []).append(summary["membership"])
    if not labels and not members:
        return None
    figure, axes = new_figure(height=3.5)
    _curve(axes, labels, "label counts recovered", 5)
    _curve(axes, members, "membership AUC", 6)
    text = "membership, guessing"
    axes.axhline(0.5, color=SOFT, linestyle="--", linewidth=1.1, label=text)
    axes.set(xlabel=by, ylabel="share", ylim=(0, 1.04))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _scale(axes, list(groups))
    figure.legend(loc="outside upper left", ncols=2)
    caption = f"They can leak where no image does.{others}"
    return plot(figure, f"Labels and membership, by {by}", caption)


def _curve(
    axes: Axes, points: Mapping[int, Sequence[Interval]], label: str, number: int
) -> None:
    """A line of means, with the 95 % band over clients where a point is one cell."""
    if not points:
        return
    x, color = list(points), SERIES[number]
    values, bands = [], []
    for intervals in points.values():
        values.append(sum(each["mean"] for each in intervals) / len(intervals))
        low, high = intervals[0]["low"], intervals[0]["high"]
        if len(intervals) == 1 and low is not None and high is not None:
            bands.append((low, high))
    axes.plot(x, values, color=color, marker="o", label=label)
    if len(bands) == len(points):
        lows, highs = zip(*bands, strict=True)
        axes.fill_between(x, lows, highs, color=color, alpha=0.13, linewidth=0)


def _scale(axes: Axes, values: Sequence[int]) -> None:
    """x with a tick at every value, on a log scale where they span much."""
    if max(values) >= 8 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _trade_off(audit: Audit) -> Plot | None:
    """Privacy against accuracy: one point a defence."""
    points = _points(audit)
    if not points:
        return None
    figure, axes = new_figure(5.4, 3.8)
    for number, point in enumerate(points):
        axes.plot(
            point.accuracy,
            point.psnr,
            "os^Dv"[number // 10 % 5],
            color=SERIES[number % 10],
            markersize=9,
            label=point.name,
        )
    summaries = [point.summary for point in points]
    for level, color in (("class means", INK), ("mean image", SOFT)):
        value = _mean_level(summaries, level)
        if value is not None:
            axes.axhline(value, color=color, linestyle="--", linewidth=1.1, label=level)
    accuracy = ACCURACY[audit.judged_by]
    axes.set(xlabel=accuracy, ylabel="PSNR of the best attack, dB")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(ticks(integer=False))
    axes.margins(0.12, 0.15)
    figure.legend(loc="outside lower left", ncols=2)
    caption = (
        "Right is a better model, down is less of the clients' images. Under the "
        "dashed lines attacks know less than anybody does without the update."
    )
    return plot(figure, "Privacy against accuracy", caption, wide=True)


class Point(NamedTuple):
    """One defence."""

    name: str
    accuracy: float
    psnr: float  # of the best attack, dB
    summary: Summary


def _points(audit: Audit) -> list[Point]:
    """The defences with both an attack on images and an accuracy."""
    points = []
    for cell in audit.cells:
        summary, accuracy = cell["summary"], cell[audit.judged_by]
        if summary["best"] is not None and accuracy is not None:
            psnr = summary["attacks"][summary["best"]]["psnr"]["mean"]
            points.append(Point(cell["name"], accuracy, psnr, summary))
    return points


def _along(audit: Audit, wide: bool) -> Plot | None:
    """The objective along the way, in the worst cell."""
    names = [cell["name"] for cell in audit.cells]
    if not names:
        return None
    worst = audit.worst
    cell = audit.cells[0 if worst is None else names.index(worst.cell)]
    curves = _curves(cell)
    if not curves:
        return None
    figure, axes = new_figure(5.4 if wide else 4.7, 3.5)
    for number, (attack, rows) in enumerate(curves.items()):
        x, color = np.linspace(0, 1, rows.shape[1]), SERIES[number]
        axes.plot(x, rows.mean(0), color=color, label=attack)
        low, high = rows.min(0), rows.max(0)
        axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
    axes.set(xlabel="share of the iterations", ylabel="objective", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    if all((rows[np.isfinite(rows)] > 0).all() for rows in curves.values()):
        log_scale(axes)
    figure.legend(loc="outside upper left", ncols=3)
    caption = (
        f'Mean and range over the clients of "{cell["name"]}". A low objective is a '
        "good match of the update, which need not be a good image."
    )
    return plot(figure, "Objective along the way", caption, wide)


def _curves(cell: CellResult) -> dict[str, np.ndarray]:
    """The objective along the way by attack, [clients, points]."""
    curves = {}
    for attack in attacks_of(cell):
        rows = [r["curve"] for r in results_of(cell, attack) if r["curve"]]
        alike = [row for row in rows if len(row) == len(rows[0])]
        if alike:
            # None, which stands for NaN in JSON, is NaN again.
            curves[attack] = np.array(alike, dtype=np.float64)
    return curves
