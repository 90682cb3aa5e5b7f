"""Tables of a stress test, as lists of rows of text, the head first."""

from __future__ import annotations

from typing import NamedTuple

from fedcore.stress.plan import CLEAN
from fedcore.stress.results import CellResult, Judge, Stress, Worst
from fedcore.views.text import value_text

__all__ = [
    "HeatCell",
    "HeatRow",
    "cost_table",
    "damage_table",
    "heat_rows",
    "table",
    "worst_text",
]

RUINED, STUCK = "ruined", "stuck"
GOOD, POOR = 0.02, 0.30  # of an accuracy: lost to an attack, from green to red


def text_of(judge: Judge, cell: CellResult | None) -> str:
    """The mean over seeds at the end; "-" where the cell is not done."""
    if cell is None:
        return "-"
    if cell.is_stuck:
        return STUCK
    return RUINED if cell.is_ruined else value_text(judge.measure, cell.mean)


def worst_text(judge: Judge, worst: Worst | None) -> str:
    """The worst case and its attack.

    >>> worst_text(Judge("accuracy", True, "test_accuracy"), Worst("ipm:0.5", 0.617))
    '61.7% (ipm:0.5)'
    """
    if worst is None:
        return "-"
    value = worst.value
    text = RUINED if value is None else value_text(judge.measure, value)
    return f"{text} ({worst.attack})"


def share_text(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def table(stress: Stress, fraction: float) -> list[list[str]]:
    """A row for each rule: the references, the attacks, the worst case, the backdoor.

    The measure after the last round, mean over seeds.
    """
    head = [f"{fraction:.0%} malicious", *stress.plan.columns, "worst"]
    if stress.plan.backdoors:
        head.append("backdoor success")
    rows = [head]
    for rule in stress.rules():
        row = [rule]
        for column in stress.plan.columns:
            row.append(text_of(stress.judge, stress.cell(fraction, rule, column)))
        row.append(worst_text(stress.judge, stress.worst(fraction, rule)))
        if stress.plan.backdoors:
            row.append(share_text(stress.backdoor(fraction, rule)))
        rows.append(row)
    return rows


def cost_table(stress: Stress, fraction: float) -> list[list[str]]:
    """The price of each rule where nobody is malicious; the worst tenth of clients."""
    measure = stress.judge.measure
    rows = [["rule", f"{measure} without attack", "lost to the mean", "worst tenth"]]
    for rule in stress.rules():
        cell = stress.cell(fraction, rule, CLEAN)
        if cell is None:
            continue
        cost = stress.cost(fraction, rule)
        tenth = cell.last(f"client_{measure}", "worst_tenth")
        rows.append(
            [
                rule,
                text_of(stress.judge, cell),
                "-" if cost is None else points_text(measure, cost),
                value_text(measure, tenth),
            ]
        )
    return rows


def damage_table(stress: Stress, fraction: float) -> list[list[str]]:
    """The loss to each attack, beside malicious clients that stay away."""
    attacks = stress.attacks()
    rows = [["lost to the attack", *attacks]]
    for rule in stress.rules():
        row = [rule]
        for attack in attacks:
            damage = stress.damage(fraction, rule, attack)
            cell = stress.cell(fraction, rule, attack)
            if cell is not None and cell.is_ruined:
                row.append(RUINED)
            elif damage is None:
                row.append("-")
            else:
                row.append(points_text(stress.judge.measure, damage))
        rows.append(row)
    return rows


def points_text(measure: str, loss: float) -> str:
    """A loss in points of accuracy, or in the measure's own unit.

    >>> points_text("accuracy", 0.0731), points_text("loss", -0.5)
    ('7.3', '-0.5')
    """
    return f"{100 * loss:.1f}" if measure == "accuracy" else f"{loss:.3g}"


class HeatCell(NamedTuple):
    """A cell of the heat map."""

    text: str
    heat: int | None  # 0 = nothing lost, 100 = all; None without a colour
    title: str
    detail: str = ""


class HeatRow(NamedTuple):
    """A row of the heat map."""

    name: str
    cells: list[HeatCell]


def heat_rows(stress: Stress, fraction: float) -> list[HeatRow]:
    """The table with a colour for each cell, by how much it is below the best."""
    top = _top(stress, fraction)
    rows = []
    for rule in stress.rules():
        cells = []
        for column in stress.plan.columns:
            cells.append(_heat_cell(stress, fraction, rule, column, top))
        worst = stress.worst(fraction, rule)
        heat = None if worst is None else _heat(stress.judge, worst.value, top)
        text, attack = "-", ""
        if worst is not None:
            attack = worst.attack
            text = text_of(stress.judge, stress.cell(fraction, rule, attack))
        title = f"{rule}: the worst of all attacks"
        cells.append(HeatCell(text, heat, title, attack))
        if stress.plan.backdoors:
            success = stress.backdoor(fraction, rule)
            heat = None if success is None else round(100 * success)
            cells.append(HeatCell(share_text(success), heat, f"{rule}: the backdoor"))
        rows.append(HeatRow(rule, cells))
    return rows


def _top(stress: Stress, fraction: float) -> float | None:
    """The best value of any cell of a table."""
    values = []
    for rule in stress.rules():
        for column in stress.plan.columns:
            cell = stress.cell(fraction, rule, column)
            if cell is not None and cell.mean is not None:
                values.append(cell.mean)
    return stress.judge.best(values) if values else None


def _heat_cell(
    stress: Stress, fraction: float, rule: str, column: str, top: float | None
) -> HeatCell:
    cell = stress.cell(fraction, rule, column)
    text = text_of(stress.judge, cell)
    if cell is None:
        return HeatCell(text, None, f"{rule}, {column}: not done")
    title = f"{rule}, {column}: {text}"
    if cell.std is not None:
        title += f" ± {value_text(stress.judge.measure, cell.std)}"
    damage = stress.damage(fraction, rule, column)
    if damage is not None and column in stress.attacks():
        points = points_text(stress.judge.measure, damage)
        title += f"; {points} worse than without the malicious clients"
    best = cell.best_step
    if best is not None:
        value = value_text(stress.judge.measure, best.mean)
        title += f"; best round {best.round}: {value}"
    return HeatCell(text, _heat(stress.judge, cell.mean, top), title)


def _heat(judge: Judge, value: float | None, top: float | None) -> int | None:
    """0 where nothing is lost to the best value, 100 where much is, or all."""
    if value is None:
        return 100
    if top is None:
        return None
    lost = judge.loss(top, value)
    if judge.measure != "accuracy":
        lost /= max(abs(top), 1e-12)
    return round(100 * min(max((lost - GOOD) / (POOR - GOOD), 0), 1))
