"""The figures of a run's own clock: who waits, who is late, who is heard."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from fedcore.rounds.history import History
from fedcore.rounds.slow_clients import Heard, group
from fedcore.rounds.time_summary import clock_kind, time_summary
from fedcore.views.figures import (
    SERIES,
    Plot,
    log_scale,
    new_figure,
    plot,
    ticks,
    time_unit,
)
from fedcore.views.run_record import RunRecord
from fedcore.views.text import share_text, time_text, value_text

__all__ = ["heard_table", "time_plots"]

GROUPS = 80  # points of one curve; more rounds are averaged in groups
DOTS = 400  # clients that are drawn one by one; more are drawn in groups
PARTS = 20  # groups of clients by speed
FIFTHS = {
    "fastest fifth": (0, 2),
    "second fifth": (2, 4),
    "third fifth": (4, 6),
    "fourth fifth": (6, 8),
    "slowest fifth": (8, 10),
    "slowest tenth": (9, 10),
}
SHARES = {
    "idle": "idle time of clients asked",
    "late_share": "late clients",
    "wasted_share": "wasted work",
}


def time_plots(run: RunRecord) -> list[Plot]:
    """The plots of the run's clock; none without one."""
    times = run.history.times
    if times is None:
        return []
    plots = [_seconds_each(run, times)]
    for drawn in (_shares(run, times), _staleness(run.history)):
        if drawn is not None:
            plots.append(drawn)
    # It has a row of its own where it would stand alone in one.
    arrivals = _arrivals(run, is_wide=len(plots) % 2 == 0)
    return plots if arrivals is None else [*plots, arrivals]


def heard_table(run: RunRecord) -> list[list[str]]:
    """A row for each fifth of the clients by speed, the head first; else empty."""
    if run.heard is None:
        return []
    groups = {}
    for name, tenths in FIFTHS.items():
        found = group(run.heard, tenths, run.clients, run.measure)
        if found.clients:
            groups[name] = found
    head = ["clients by speed", "clients", "seconds of a piece of work"]
    head += ["share of the updates used", run.measure]
    table = [head]
    for name, found in groups.items():
        bounds = []
        for bound in (found.from_s, found.to_s):
            bounds.append("never back" if bound is None else f"{bound:.3g}")
        table.append(
            [
                name,
                f"{found.clients:,}",
                " to ".join(dict.fromkeys(bounds)),
                share_text(found.arrivals),
                value_text(run.measure, found.measure),
            ]
        )
    return table


def _seconds_each(run: RunRecord, times: np.ndarray) -> Plot:
    """Time of every round by the run's own clock."""
    took = np.diff(times)
    x, y = _grouped(np.arange(1, len(times)), took)
    kind = clock_kind(run.settings)
    figure, axes = new_figure()
    axes.set(xlabel="round", ylabel=f"seconds of {kind} time")
    axes.plot(x, y, color=SERIES[2], marker="o" if len(x) == 1 else "")
    median = float(np.median(took))
    if y.min() > 0 and y.max() > 8 * median:
        log_scale(axes)
    else:
        axes.set_ylim(0, float(y.max()) * 1.1 or 1)
    axes.set_xlim(0, len(times))
    axes.xaxis.set_major_locator(ticks(integer=True))
    caption = (
        f"Median {time_text(median)}, {time_text(float(times[-1]))} in all, "
        "by the run's own clock."
    )
    return plot(
        figure, f"{kind.capitalize()} seconds a round", _means(caption, len(took))
    )


def _shares(run: RunRecord, times: np.ndarray) -> Plot | None:
    """Idle time, late clients and wasted work, by the run's own clock."""
    figure, axes = new_figure()
    size, unit = time_unit(float(times[-1]))
    summary, spoken = time_summary(run.history), []
    for number, (key, label) in enumerate(SHARES.items()):
        points = run.history.points(key)
        if not any(value for _, value in points):
            continue
        x, y = _grouped(*np.array(points).T)
        at = np.interp(x, np.arange(len(times)), times) / size
        marker = "o" if len(at) == 1 else ""
        axes.plot(at, y, color=SERIES[number], label=label, marker=marker)
        spoken.append(f"{label} {share_text(summary[key])}")
    if not spoken:  # nobody waits, is late or works for nothing
        return None
    axes.set(xlabel=f"{clock_kind(run.settings)} time, {unit}", ylabel="share")
    axes.set_xlim(0, float(times[-1]) / size * 1.02 or 1)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=2)
    caption = f"Over the whole run: {', '.join(spoken)}."
    title = "Waiting, lateness and waste"
    return plot(figure, title, _means(caption, len(times) - 1))


def _staleness(history: History) -> Plot | None:
    """Versions that updates were behind when they were applied."""
    points = history.points("staleness")
    if not points:
        return None
    rounds = np.array([number for number, _ in points])
    mean = np.array([age["mean"] for _, age in points])
    most = np.array([age["max"] for _, age in points])
    figure, axes = new_figure()
    x, largest = _grouped(rounds, most, np.max)
    marker = "o" if len(x) == 1 else ""
    axes.plot(x, largest, color=SERIES[9], label="largest", marker=marker)
    axes.plot(*_grouped(rounds, mean), color=SERIES[0], label="mean", marker=marker)
    axes.set(xlabel="round", ylabel="versions behind")
    axes.set_xlim(0, len(history) + 1)
    axes.set_ylim(0, float(largest.max()) * 1.08 or 1)
    axes.xaxis.set_major_locator(ticks(integer=True))
    figure.legend(loc="outside upper left", ncols=2)
    summary = time_summary(history)
    caption = (
        "Server updates between the model that a client got and the one that its "
        f"update was added to: mean {summary['staleness']['mean']:.3g}, largest "
        f"{summary['staleness']['max']}."
    )
    if "discount" in summary:
        caption += f" Their mean weight by age is {summary['discount']:.3g}."
    return plot(figure, "Staleness by round", _means(caption, len(rounds)))


def _arrivals(run: RunRecord, is_wide: bool) -> Plot | None:
    """Updates of each client, or of groups of them, against how fast they are."""
    heard = run.heard
    if heard is None:
        return None
    figure, axes = new_figure(width=6.4 if is_wide else 4.7)
    if len(heard.clients) <= DOTS:
        each, ylabel = _dots(axes, heard), "pieces of work"
    else:
        each, ylabel = _bars(axes, heard), "pieces of work a client"
    axes.set(ylabel=ylabel)
    figure.legend(loc="outside upper left", ncols=2)
    slow = group(heard, (8, 10), run.clients, run.measure)
    caption = (
        f"{each} The slowest fifth of the clients sent {share_text(slow.arrivals)} of "
        "the updates that were used; where speed decided nothing it would be 20%."
    )
    return plot(figure, "Arrivals by speed", caption, is_wide)


def _dots(axes: Any, heard: Heard) -> str:
    """A dot for each client."""
    is_back = np.isfinite(heard.seconds)
    seconds = heard.seconds.copy()
    # Those that were never back stand at the right end, beyond all others.
    seconds[~is_back] = 2 * (seconds[is_back].max() if is_back.any() else 1.0)
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 3.5}
    is_unused = heard.unused > 0
    if is_unused.any():
        lost = {"color": SERIES[1], "alpha": 0.6, "label": "came to nothing"}
        axes.plot(seconds[is_unused], heard.unused[is_unused], **dot, **lost)
    axes.plot(seconds, heard.usable, color=SERIES[0], alpha=0.8, label="used", **dot)
    axes.set(xlabel="seconds of a piece of work")
    if seconds.min() > 0:
        log_scale(axes, "x")
    axes.set_ylim(bottom=-0.5)
    axes.yaxis.set_major_locator(ticks(integer=True))
    text = "A dot is a client."
    if not is_back.all():
        text += " Those at the right end were never back."
    return text


def _bars(axes: Any, heard: Heard) -> str:
    """A bar for each of PARTS groups of clients."""
    usable, unused = [], []
    for part in np.array_split(np.arange(len(heard.clients)), PARTS):
        usable.append(heard.usable[part].mean())
        unused.append(heard.unused[part].mean())
    x = (np.arange(PARTS) + 0.5) / PARTS
    bar: dict[str, Any] = {"width": 0.86 / PARTS, "linewidth": 0}
    axes.bar(x, usable, color=SERIES[0], label="used", **bar)
    if any(unused):
        axes.bar(
            x, unused, bottom=usable, color=SERIES[1], label="came to nothing", **bar
        )
    axes.set(xlabel="clients, from the fastest to the slowest", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return f"A bar is a twentieth of the {len(heard.clients):,} clients."


def _grouped(
    x: np.ndarray, y: np.ndarray, combine: Any = np.mean
) -> tuple[np.ndarray, np.ndarray]:
    """At most GROUPS points: the last x, and the mean of y, of neighbours."""
    edges = np.arange(_size(len(x)), len(x), _size(len(x)))
    ends = [part[-1] for part in np.split(x, edges)]
    means = [combine(part) for part in np.split(y, edges)]
    return np.array(ends, dtype=float), np.array(means, dtype=float)


def _size(num_rounds: int) -> int:
    """The number of rounds that one point stands for."""
    return -(-num_rounds // GROUPS)


def _means(caption: str, num_rounds: int) -> str:
    """The caption; it says so where a point stands for several rounds."""
    size = _size(num_rounds)
    return caption if size <= 1 else f"{caption} A point stands for {size} rounds."
