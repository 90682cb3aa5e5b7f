"""The progress of runs and audits on stderr, and the result of a run on stdout.

Progress is a bar in a terminal, and a line now and then elsewhere.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedcore import privacy
from fedcore.config import Experiment
from fedcore.engines.base import Engine
from fedcore.escapes import escaped
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result
from fedcore.storage.memory import size_text

__all__ = ["AuditTerminal", "Terminal", "show_result"]

EVERY = 10.0  # seconds between lines where there is no terminal


class Terminal:
    """An observer of the round loop (`fedcore.rounds.loop.Observer`)."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("round", total=None, facts="")
        self._rounds = 0
        self._engine: Engine | None = None  # until it has been described
        self._printed = time.monotonic()
        self._test = ""  # the last test measures

    def started(
        self, experiment: Experiment, engine: Engine, population: int, first: int
    ) -> None:
        self._engine, self._rounds, self._test = engine, experiment.rounds, ""
        line = (
            f"{experiment.method.name} on {experiment.task}, {population} clients, "
            f"seed {experiment.seed}, {experiment.rounds} rounds"
        )
        if first:
            line += f" from round {first + 1}"
        self.console.print(escaped(line), highlight=False, markup=False)
        rounds = experiment.rounds
        self._bar.reset(
            self._task, total=rounds, completed=first, description="round", facts=""
        )
        self._bar.start()

    def client_done(self, t: int, n: int, cohort: int) -> None:
        self._bar.update(self._task, description=f"round {t + 1}, client {n}/{cohort}")

    def round_done(self, row: dict[str, Any]) -> None:
        if self._engine is not None:
            # Only now do engines that measure know how they work.
            described = escaped(self._engine.describe())
            self.console.print(described, highlight=False, markup=False)
            self._engine = None
        facts = self._facts(row)
        number, is_last = row["round"], row["round"] == self._rounds
        self._bar.update(self._task, description="round", completed=number, facts=facts)
        is_due = is_last or time.monotonic() - self._printed > EVERY
        if is_due and not self.console.is_terminal:
            self._printed = time.monotonic()
            line = f"round {number}/{self._rounds}: {facts}"
            self.console.print(
                escaped(line), highlight=False, soft_wrap=True, markup=False
            )
        if is_last:
            self._bar.stop()

    def _facts(self, row: dict[str, Any]) -> str:
        """Speed and losses of a round, and the last test measures."""
        loss, accuracy = row.get("test_loss"), row.get("test_accuracy")
        if accuracy is not None and loss is not None:
            self._test = f", test loss {loss:.4f}, test accuracy {accuracy:.1%}"
        elif loss is not None:
            self._test = f", test loss {loss:.4f}"
        facts = f"{History([row]).clients_per_second:,.0f} clients/s"
        if row.get("train_loss") is not None:
            facts += f", loss {row['train_loss']:.4f}"
        return facts + self._test

    def note(self, message: str) -> None:
        _note(self.console, message)

    def close(self) -> None:
        """Stop the bar; what is printed then stays."""
        self._bar.stop()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AuditTerminal:
    """An observer of an audit (`fedcore.audit.examine.Observer`).

    It shows the objective, which an attacker has too, and never a distance to the
    truth.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("audit", total=1, facts="", left="-")
        self._begin = self._printed = time.monotonic()
        # Cells done when the first attack began: those before are read from files.
        self._first: float | None = None
        self._number, self._cells, self._name = 0, 1, ""
        self._training: Terminal | None = None

    def cell(self, number: int, cells: int, name: str) -> None:
        self._end_training()
        self._number, self._cells, self._name = number, cells, name
        if number == 0:
            line = f"audit of {cells} cell{'s' if cells > 1 else ''}"
            self.console.print(line, highlight=False)
        self._bar.update(
            self._task,
            description=f"cell {number + 1}/{cells}",
            total=cells,
            completed=number,
            facts=escaped(name),
        )

    def progress(self, share: float, what: str, objective: float | None) -> None:
        self._end_training()
        self._bar.start()
        done = self._number + share
        if self._first is None:
            self._first = done
        left = self._time_left(done - self._first, done)
        facts = what if objective is None else f"{what}, objective {objective:.4f}"
        cell = f"cell {self._number + 1}/{self._cells}"
        self._bar.update(
            self._task, description=cell, completed=done, facts=facts, left=left
        )
        if self.console.is_terminal or time.monotonic() - self._printed <= EVERY:
            return
        self._printed = time.monotonic()
        elapsed = timedelta(seconds=round(time.monotonic() - self._begin))
        line = (
            f"{cell} ({self._name}), {share:.0%}: {facts}; "
            f"{elapsed} so far, {left} left"
        )
        self.console.print(escaped(line), highlight=False, soft_wrap=True, markup=False)

    def _time_left(self, attacked: float, done: float) -> str:
        """The time for the other cells, by that of the cells attacked until now.

        The training in between counts.
        """
        if attacked <= 0:
            return "-"
        elapsed = time.monotonic() - self._begin
        seconds = elapsed * (self._cells - done) / attacked
        return str(timedelta(seconds=round(seconds)))

    def note(self, message: str) -> None:
        _note(self.console, message)

    def training(self) -> Terminal:
        """The observer of a run that the audit trains."""
        self._bar.stop()  # two bars do not share a terminal
        self._end_training()
        self._training = Terminal()
        return self._training

    def _end_training(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None

    def __enter__(self) -> AuditTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_training()
        self._bar.stop()


def _note(console: Console, message: str) -> None:
    # Escaped, as it may quote a client, and markup that does not close ends the run.
    line = f"[yellow]note[/yellow] {escape(escaped(message))}"
    console.print(line, highlight=False, soft_wrap=True)


def show_result(result: Result, report: Path | None) -> None:
    """Print the final table on stdout; `report` is the page's file."""
    final = result.final
    lines = {"method": f"{result.method}, {result.engine} engine, seed {result.seed}"}
    if final["test_accuracy"] is not None:
        lines["test accuracy"] = _percent(final["test_accuracy"])
    loss = final["test_loss"]
    lines["test loss"] = "-" if loss is None else f"{loss:.4f}"
    if final["test_accuracy"] is not None:
        lines["accuracy per client"] = _spread_text(final["client_accuracy"] or {})
    tuned = final.get("finetuned_accuracy")
    if tuned:
        mean, worst = _percent(tuned.get("mean")), _percent(tuned.get("lowest_tenth"))
        lines["after fine-tuning"] = f"mean {mean}, worst tenth {worst}"
    cohort = f"{result.cohort:.4g} of {result.population} clients each"
    lines["rounds"] = f"{result.rounds}, {cohort}"
    speed = f"{result.clients_per_second:,.0f} clients/s"
    lines["speed"] = f"{speed}, first round done after {result.first_round_s:.1f} s"
    down, up = size_text(result.bytes_down), size_text(result.bytes_up)
    lines["sent"] = f"{down} down, {up} up"
    reasons = [f"{reason} {n}" for reason, n in result.dropped.items()]
    lines["left out"] = ", ".join(reasons) or "none"
    if result.late_answers:
        lines["late answers"] = str(result.late_answers)
    if "privacy" in final:
        lines["privacy"] = ", ".join(privacy.describe(final["privacy"]))
    lines["parameters"] = f"sha256 {result.params_sha256[:16]}"
    lines["report"] = str(report or "-")
    for name, text in lines.items():
        print(escaped(f"{name:<21}{text}"))


def _spread_text(clients: dict[str, float | None]) -> str:
    """An accuracy over clients in words."""
    mean, low, high, worst = (
        _percent(clients.get(part)) for part in ("mean", "p10", "p90", "lowest_tenth")
    )
    return f"mean {mean}, 10th percentile {low}, 90th {high}, worst tenth {worst}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
