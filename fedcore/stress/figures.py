"""The figures of a stress test's page."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from fedcore.stress.plan import ABSENT, CLEAN
from fedcore.stress.results import CellResult, Stress
from fedcore.stress.treatment import Treatment
from fedcore.views.figures import (
    SERIES,
    SOFT,
    Plot,
    log_scale,
    new_figure,
    plot,
    shape_axes,
    thin,
)

__all__ = ["plots"]

HONEST, MALICIOUS = SERIES[0], SERIES[1]
LINES = ("-", "--", ":")
COLOURS = 9
SMALLEST = 1e-3  # of a distance or norm that is drawn


def plots(stress: Stress) -> list[Plot]:
    """The figures that the finished cells allow, by share of malicious clients."""
    drawn: list[Plot | None] = []
    for fraction in stress.plan.fractions:
        ranked = stress.ranked(fraction)
        drawn.append(_worst_curves(stress, fraction))
        if ranked:
            drawn.append(_attack_curves(stress, fraction, ranked[0][0]))
        for rule, _ in ranked:
            shown = _treatment(stress, fraction, rule)
            if shown is not None:
                drawn.append(shown)
                break
        drawn.append(_treatment(stress, fraction, "mean"))
    return [figure for figure in drawn if figure is not None]


def _worst_curves(stress: Stress, fraction: float) -> Plot | None:
    """Every rule under the attack that it stands worst."""
    curves = {}
    for rule in stress.rules():
        worst = stress.worst(fraction, rule)
        if worst is not None:
            cell = stress.cell(fraction, rule, worst.attack)
            curves[f"{rule}, {worst.attack}"] = cell
    caption = (
        f"{fraction:.0%} of the clients are malicious. The line is the mean over "
        "seeds, the band goes from the lowest to the highest."
    )
    return _curves(stress, curves, f"Each rule at its worst, {fraction:.0%}", caption)


def _attack_curves(stress: Stress, fraction: float, rule: str) -> Plot | None:
    """One rule under every attack."""
    curves = {}
    for column in stress.plan.columns:
        curves[column] = stress.cell(fraction, rule, column)
    caption = f"{fraction:.0%} of the clients are malicious; {rule} everywhere."
    return _curves(stress, curves, f"{rule} under each attack, {fraction:.0%}", caption)


def _curves(
    stress: Stress, cells: dict[str, CellResult | None], title: str, caption: str
) -> Plot | None:
    figure, axes = new_figure(height=4.4)
    everything: list[float] = []
    right = 1.0
    for number, (label, cell) in enumerate(cells.items()):
        if cell is None or not len(cell.curve.rounds):
            continue
        measured = cell.curve
        index = thin(range(len(measured.rounds)))
        x, y = measured.rounds[index], measured.values[:, index]
        if not np.isfinite(y).all():
            continue
        everything += y.ravel().tolist()
        right = max(right, float(x[-1]))
        colour = SERIES[number % COLOURS]
        style = LINES[number // COLOURS % len(LINES)]
        if label in (CLEAN, ABSENT):
            colour, style = SOFT, "-" if label == CLEAN else "--"
        marker = "o" if len(x) == 1 else ""
        axes.plot(
            x, y.mean(0), label=label, color=colour, linestyle=style, marker=marker
        )
        if len(y) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.13, lw=0)
    if not everything:
        return None
    judge = stress.judge
    axes.set(xlabel="round", ylabel=judge.key.replace("_", " "))
    shape_axes(axes, judge.measure, everything, 1.02 * right)
    figure.legend(loc="outside upper left", ncols=2)
    return plot(figure, title, caption)


def _treatment(stress: Stress, fraction: float, rule: str) -> Plot | None:
    """The weight of every client under each attack; its distance without weights."""
    shown: dict[str, Treatment] = {}
    for attack in stress.attacks():
        cell = stress.cell(fraction, rule, attack)
        runs = [] if cell is None else cell.runs
        if runs and runs[0].treatment is not None:
            shown[attack] = runs[0].treatment
    if not shown:
        return None
    has_weights = all(np.isfinite(each.weights).any() for each in shown.values())
    figure, axes = new_figure(5.4, 3.6)
    for number, treatment in enumerate(shown.values()):
        values = treatment.weights if has_weights else treatment.distances
        _dots(axes, number, values, treatment.is_malicious, number == 0)
    axes.set_xticks(range(len(shown)), list(shown), rotation=30, ha="right")
    axes.axhline(1, color=SOFT, linestyle="--", linewidth=1.1)
    first = stress.experiment.seed
    if has_weights:
        axes.set_ylabel("weight, 1 = an equal share")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        caption = "A dot is a client: its mean weight over the rounds that it reported"
    else:
        log_scale(axes)
        axes.set_ylabel("distance to the result, 1 = median")
        caption = (
            "The rule works entry by entry, and has no weights. A dot is a client: how "
            "far its messages were from the result"
        )
    figure.legend(loc="outside upper left", ncols=2)
    title = f"Clients under {rule}, {fraction:.0%}"
    return plot(figure, title, f"{caption} (seed {first}).", wide=True)


def _dots(
    axes: Axes, at: int, values: np.ndarray, is_malicious: np.ndarray, is_first: bool
) -> None:
    """Honest clients left of the tick, malicious ones right of it."""
    for who, shift, colour, marker, label in (
        (~is_malicious, -0.14, HONEST, "o", "honest"),
        (is_malicious, 0.14, MALICIOUS, "D", "malicious"),
    ):
        y = np.maximum(values[who], 0)
        y = y[np.isfinite(y)]
        spread = np.linspace(-0.08, 0.08, len(y)) if len(y) > 1 else np.zeros(len(y))
        axes.plot(
            at + shift + spread,
            y,
            marker,
            color=colour,
            markersize=3.5,
            label=label if is_first else None,
        )
