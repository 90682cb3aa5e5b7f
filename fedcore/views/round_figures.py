"""The figures of a run's rounds: who took part, and the seconds of the computer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedcore.rounds.history import History
from fedcore.views.figures import (
    INK,
    SERIES,
    Plot,
    log_scale,
    mark_of,
    new_figure,
    plot,
    thin,
    ticks,
)
from fedcore.views.text import shortened, time_text

__all__ = ["round_plots"]

BARS = 60  # of one plot; more rounds are averaged in groups
REASONS = 5  # told apart in the plot


class Layer(NamedTuple):
    """One colour of the bars of `_who_took_part`."""

    label: str
    counts: list[int]  # of each round


def round_plots(history: History) -> list[Plot]:
    """The clients of each round, and the time it took."""
    if len(history) == 0:
        return []
    return [_who_took_part(history), _seconds(history)]


def _who_took_part(history: History) -> Plot:
    rounds = len(history)
    layers = _layers(history)
    num_bars = min(rounds, BARS)
    x = _grouped([row["round"] for row in history], num_bars)
    asked = _grouped([row["cohort"] for row in history], num_bars)
    width = 0.86 * rounds / num_bars
    # Without usable updates and other reasons.
    figure, axes = new_figure(height=2.9 + 0.12 * (len(layers) - 2))
    bottom = np.zeros(num_bars)
    for number, layer in enumerate(layers):
        heights = _grouped(layer.counts, num_bars)
        if number == 0 or heights.any():
            color, label = SERIES[number], shortened(layer.label)
            axes.bar(x, heights, width, bottom, color=color, linewidth=0, label=label)
            bottom += heights
    edges = np.append(x - width / 1.72, x[-1] + width / 1.72)
    axes.stairs(asked, edges, color=INK, linewidth=1.2, label="asked", baseline=None)
    skipped = [row["round"] for row in history if row.get("skipped")]
    if skipped:
        zeros = np.zeros(len(skipped))
        cross: dict[str, Any] = {"color": SERIES[5], "clip_on": False, "zorder": 4}
        axes.plot(skipped, zeros, "x", label="skipped", **cross)
    top = max(asked.max(), bottom.max(), 1) * 1.05
    axes.set(xlabel="round", ylabel="clients", xlim=(0, rounds + 1), ylim=(0, top))
    axes.xaxis.set_major_locator(ticks(integer=True))
    axes.yaxis.set_major_locator(ticks(integer=True))
    figure.legend(loc="outside upper left", ncols=2)
    caption = (
        "Each round: clients asked, clients whose update was used, "
        "and the others by reason."
    )
    if num_bars < rounds:
        caption += f" Means over {rounds // num_bars} or so rounds."
    return plot(figure, "Who took part", caption)


def _layers(history: History) -> list[Layer]:
    """Counts of every round: usable updates, frequent reasons, all other reasons."""
    frequent = [reason for reason, _ in history.dropped().most_common(REASONS)]
    layers = [Layer("usable update", [row["reports"] for row in history])]
    for reason in frequent:
        counts = [row["dropped"].get(reason, 0) for row in history]
        layers.append(Layer(reason, counts))
    others = []
    for row in history:
        rare = row["dropped"].keys() - set(frequent)
        others.append(sum(row["dropped"][reason] for reason in rare))
    return [*layers, Layer("other reasons", others)]


def _grouped(values: Sequence[float], num_groups: int) -> np.ndarray:
    """Means of consecutive values. [num_groups]"""
    return np.array([np.mean(group) for group in np.array_split(values, num_groups)])


def _seconds(history: History) -> Plot:
    points = thin(history.points("seconds"))
    figure, axes = new_figure()
    axes.set(xlabel="round", ylabel="seconds")
    axes.plot(*zip(*points, strict=True), color=SERIES[2], marker=mark_of(points))
    seconds = np.array([row["seconds"] for row in history])
    median = float(np.median(seconds))
    if seconds.min() > 0 and seconds.max() > 8 * median:
        log_scale(axes)
    else:
        axes.set_ylim(0, float(seconds.max()) * 1.1 or 1)
    axes.set_xlim(0, len(history) + 1)
    axes.xaxis.set_major_locator(ticks(integer=True))
    caption = f"Median {time_text(median)}, without evaluation."
    first_round = history.rows[0].get("first_round_s")
    if first_round:
        caption += (
            " From start to the end of the first round, with everything loaded: "
            f"{time_text(first_round)}."
        )
    return plot(figure, "Seconds a round", caption)
