"""audit.json for scripts, audit.html for people, and both in short on stdout."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context

from fedcore import __version__
from fedcore.audit.advice import REMEDIES, advice, measured, remedies_for
from fedcore.audit.figures import plots
from fedcore.audit.results import Audit, CellResult, ClientResult, Pictures
from fedcore.audit.tables import grouped_table, table, worst_grade
from fedcore.audit.words import (
    ADVERSARY,
    EPSILON,
    EXPLAINED,
    GRADES,
    PICTURED,
    TONES,
    UNPICTURED,
    Mark,
    attacks_in_words,
    badge,
    client_name,
    facts,
    grade_text,
    marks,
    summary,
    threat,
    verdict,
)
from fedcore.config import Experiment
from fedcore.escapes import escaped, printable
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.json import without_nan
from fedcore.views.figures import STYLE
from fedcore.views.page import render
from fedcore.views.text import table_text, time_text

UNFOLDED = 3  # cells; of more than that only the worst is unfolded


def write(audit: Audit, folder: Path, command: Sequence[str]) -> Path:
    """Write both files, for the owner alone; the path of audit.html.

    Raises Unwritable where they cannot be written.
    """
    files: dict[str, Callable[[], str]] = {
        "audit.json": lambda: json.dumps(ready(audit), indent=1, allow_nan=False),
        "audit.html": lambda: page(audit, command),
    }
    for name, content in files.items():
        write_atomically(folder / name, content().encode(), mode=0o600)
    return folder / "audit.html"


def ready(audit: Audit) -> dict[str, Any]:
    """The audit as standard JSON: null stands for what is not finite."""
    values: dict[str, Any] = without_nan(audit.to_dict())
    return values


def too_high(audit: Audit, limit: float) -> str | None:
    """Why --fail-above fails; None where it does not."""
    worst = audit.worst
    if worst is None:
        return (
            f"--fail-above {limit:g}: nothing was scored, so nothing can be said of "
            "input leakage"
        )
    if worst.input_leakage <= limit:
        return None
    return (
        f"input leakage {worst.input_leakage:.1f} of client {worst.client} "
        f"({worst.cell}) is above --fail-above {limit:g}"
    )


def show(audit: Audit, file: Path) -> None:
    """Print the table, the verdict and the advice on stdout."""
    print(printable(table_text(table(audit), left=2)))
    grade = badge(audit)
    print(f"\n{grade[0].upper()}{grade[1:]}. {summary(audit)}")
    for line in measured(audit):
        print(line)
    remedies = advice(audit)
    if remedies:
        names = ", ".join(remedy.short for remedy in remedies)
        print(f"To switch on: {names}.")
    for name, why in audit.failed.items():
        print(escaped(f"Left out: {name}: {why}"))
    for warning in audit.warnings:
        print(escaped(f"Note: {warning}."))
    print(escaped(f"Report: {file}"))


def page(audit: Audit, command: Sequence[str]) -> str:
    """audit.html. The same audit gives the same page."""
    experiment = Experiment.parse(audit.experiment)
    is_pictured = any(cell["pictures"] for cell in audit.cells)
    with rc_context(STYLE):
        figures = plots(audit)
    return render(
        "audit",
        title=f"{experiment.method.name} on {experiment.task}",
        badge=badge(audit),
        tone=TONES[worst_grade(audit.clients)],
        summary=summary(audit),
        personal=PICTURED if is_pictured else UNPICTURED,
        notes=_notes(audit),
        facts=facts(audit),
        adversary=ADVERSARY,
        threat=threat(audit),
        attacks=attacks_in_words(audit),
        advice=advice(audit),
        measured=measured(audit),
        grades=GRADES,
        cells=[_shown_cell(audit, cell) for cell in audit.cells],
        plots=figures,
        results=grouped_table(audit),
        explained=EXPLAINED + (EPSILON if audit.mode == "defences" else ""),
        seed=audit.plan["seed"],
        command=shlex.join(command),
        settings=_settings(audit),
        config=experiment.to_toml(),
        environment=_environment(audit),
        version=__version__,
    )


def _notes(audit: Audit) -> list[str]:
    notes = []
    if audit.interrupted:
        notes.append(
            "This audit was interrupted: what is missing, or attacked with fewer "
            "iterations than asked, is filled in by the same command with --out."
        )
    for name, why in audit.failed.items():
        notes.append(f"Left out: {name}: {why}")
    for warning in audit.warnings:
        notes.append(f"{warning[0].upper()}{warning[1:]}.")
    return notes


def _settings(audit: Audit) -> list[tuple[str, Any]]:
    """Settings of the attacks, as pairs."""
    pairs = [
        ("labels", audit.plan["labels"]),
        ("clients in a cell", audit.plan["clients"]),
    ]
    for name, settings in audit.plan["settings"].items():
        texts = [f"{key} = {value}" for key, value in settings.items()]
        pairs.append((name, ", ".join(texts)))
    return pairs


def _environment(audit: Audit) -> list[tuple[str, str]]:
    """Versions and times, as pairs."""
    pairs = [
        ("fedcore", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("numpy", np.__version__),
        ("finished", audit.created),
        ("this call took", time_text(audit.seconds)),
    ]
    for cell in audit.cells:
        times = [time_text(cell["seconds"])]
        for name, seconds in cell["attack_seconds"].items():
            times.append(f"{name} {time_text(seconds)}")
        pairs.append((cell["name"], ", ".join(times)))
    return pairs


class ShownClient(NamedTuple):
    """A client on the page."""

    name: str
    marks: list[Mark]
    lines: list[str]
    advice: str
    pairs: list[tuple[str, str, str]]  # original, rebuilt, PSNR in dB
    attack: str  # that rebuilt them
    without: str  # why there are no pairs


class ShownCell(NamedTuple):
    """A cell on the page."""

    name: str
    open: bool
    tone: str
    badge: str
    clients: list[ShownClient]


def _shown_cell(audit: Audit, cell: CellResult) -> ShownCell:
    worst = audit.worst
    first = audit.cells[0]["name"] if worst is None else worst.cell
    is_open = len(audit.cells) <= UNFOLDED or cell["name"] == first
    grade = worst_grade(cell["clients"])
    pictures = {shown["client"]: shown for shown in cell["pictures"]}
    clients = []
    for client in cell["clients"]:
        shown = pictures.get(client["client"])
        clients.append(_shown_client(audit, cell, client, shown))
    return ShownCell(cell["name"], is_open, TONES[grade], grade_text(grade), clients)


def _shown_client(
    audit: Audit, cell: CellResult, client: ClientResult, shown: Pictures | None
) -> ShownClient:
    names = remedies_for(client, audit.experiment)
    pairs = []
    for original, rebuilt, psnr in shown["pairs"] if shown else []:
        pairs.append((original, rebuilt, f"{psnr:.1f}"))
    return ShownClient(
        client_name(client["client"], client["clients_aggregated"]),
        marks(client),
        verdict(client),
        ", ".join(REMEDIES[name].short for name in names),
        pairs,
        shown["attack"] if shown else "",
        f"No images: {_why_no_images(cell, client)}",
    )


def _why_no_images(cell: CellResult, client: ClientResult) -> str:
    if cell["pictures"]:
        return "those of the first clients of each cell are shown."
    if client["best"] is not None:
        return "they were switched off."
    return "nothing was compared with the client's data."
