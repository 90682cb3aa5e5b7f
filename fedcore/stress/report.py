"""stress.json for scripts, stress.html for people, and both in short on stdout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context

from fedcore import __version__
from fedcore.escapes import escaped, printable
from fedcore.storage.checkpoint import write_atomically
from fedcore.stress.figures import plots
from fedcore.stress.page import TEMPLATE
from fedcore.stress.results import Stress
from fedcore.stress.tables import (
    HeatRow,
    cost_table,
    damage_table,
    heat_rows,
    table,
    worst_text,
)
from fedcore.stress.words import advice, badge, facts, measured, reading, summary
from fedcore.views.figures import STYLE
from fedcore.views.page import render_source
from fedcore.views.text import table_text

__all__ = ["page", "show", "too_low", "write"]


def write(stress: Stress, command: Sequence[str]) -> Path:
    """Write both files: the path of stress.html.

    Raises Unwritable where they cannot be written.
    """
    content = json.dumps(stress.to_dict(), indent=1, allow_nan=False)
    write_atomically(stress.folder / "stress.json", content.encode())
    file = stress.folder / "stress.html"
    write_atomically(file, page(stress, command).encode())
    return file


def too_low(stress: Stress, percent: float) -> str | None:
    """Why --fail-below fails; None where it does not.

    At every share of malicious clients, some rule must hold.
    """
    for fraction in stress.plan.fractions:
        ranked = stress.ranked(fraction)
        if not ranked:
            return f"--fail-below {percent:g}: no rule was tried with every attack"
        rule, worst = ranked[0]
        if worst.value is None or 100 * worst.value < percent:
            best = "the best rule" if len(stress.plan.rules) > 1 else "the rule"
            return (
                f"{best} at {fraction:.0%} malicious, {rule}, comes down to "
                f"{worst_text(stress.judge, worst)}: below --fail-below {percent:g}"
            )
    return None


def show(stress: Stress, file: Path) -> None:
    """Print the tables, and what follows from them, on stdout."""
    for fraction in stress.plan.fractions:
        print(printable(table_text(table(stress, fraction))))
        print()
    for line in measured(stress):
        print(escaped(line))
    for line in stress.notes:
        print(escaped(f"Note: {line}."))
    print(escaped(f"Report: {file}"))


class Map(NamedTuple):
    """The heat map of one share of malicious clients, and the cost of its rules."""

    name: str
    head: list[str]
    rows: list[HeatRow]
    plain: int  # columns before the sums
    costs: list[list[str]]
    damages: list[list[str]]


def page(stress: Stress, command: Sequence[str]) -> str:
    """stress.html. The same results give the same page."""
    text, tone = badge(stress)
    with rc_context(STYLE):
        figures = plots(stress)
    maps = []
    for fraction in stress.plan.fractions:
        head = table(stress, fraction)[0][1:]
        costs = cost_table(stress, fraction)
        name = f"{fraction:.0%} of the clients are malicious"
        plain = len(stress.plan.columns)
        damages = damage_table(stress, fraction)
        rows = heat_rows(stress, fraction)
        maps.append(Map(name, head, rows, plain, costs, damages))
    return render_source(
        TEMPLATE,
        title=f"{stress.experiment.method.name} on {stress.experiment.task}",
        badge=text,
        tone=tone,
        summary=summary(stress),
        notes=_notes(stress),
        facts=facts(stress),
        maps=maps,
        reading=reading(stress),
        unit=", in points" if stress.judge.measure == "accuracy" else "",
        measured=measured(stress),
        advice=advice(stress),
        plots=figures,
        seed=stress.experiment.seed,
        command=shlex.join(command),
        commands=_commands(stress),
        config=stress.experiment.to_toml(),
        version=__version__,
        folder=stress.folder,
    )


def _notes(stress: Stress) -> list[str]:
    notes = []
    if stress.is_interrupted:
        notes.append(
            "This test was interrupted: what is missing is filled in by the same "
            "command with --out."
        )
    for line in stress.notes:
        notes.append(f"{line[0].upper()}{line[1:]}.")
    ruined: dict[str, None] = {}
    for result in stress.cells.values():
        for run in result.runs:
            if run.ruined is not None:
                cell = result.cell
                where = f"{cell.rule}, {cell.column}, seed {run.seed}"
                ruined[f"Ruined: {where}: {run.ruined}"] = None
    return [*notes, *ruined]


def _commands(stress: Stress) -> list[tuple[str, str]]:
    """The command that runs each cell alone, on its first seed."""
    pairs: dict[str, str] = {}
    for result in stress.cells.values():
        words = ["fedcore", "run", stress.preset]
        for key, value in result.cell.settings.items():
            words += ["--set", f"{key}={value}"]
        pairs[result.cell.label] = shlex.join(words)
    return list(pairs.items())
