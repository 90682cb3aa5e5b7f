"""What a person sees while a run goes on: on stderr, a bar in a terminal, a line now and then elsewhere."""

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
from fedcore.rounds.loop import Result
from fedcore.storage.memory import size_text

EVERY = 10.0  # seconds between lines where there is no terminal


class Terminal:
    """An observer of the round loop (`fedcore.rounds.loop.Observer`)."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._printed = time.monotonic()
        self._test = ""

    def started(
        self, experiment: Experiment, engine: Engine, population: int, first: int
    ) -> None:
        self._engine = engine
        where = f" from round {first + 1}" if first else ""
        facts = f"{experiment.method.name} on {experiment.task}, {population} clients, seed {experiment.seed}"
        self.console.print(
            f"{facts}, {experiment.rounds} rounds{where}", highlight=False
        )
        self._rounds, self._seen, self._announced = experiment.rounds, 0, False
        self._task = self._bar.add_task(
            "round", total=experiment.rounds, completed=first, facts=""
        )
        self._bar.start()

    def client_done(self, t: int, n: int, cohort: int) -> None:
        self._bar.update(self._task, description=f"round {t + 1}, client {n}/{cohort}")

    def round_done(self, row: dict[str, Any]) -> None:
        if not self._announced:  # engines that measure know what they do only now
            self.console.print(self._engine.describe(), highlight=False)
            self._announced = True
        if row.get("test_loss") is not None:
            self._test = f", test loss {row['test_loss']:.4f}"
            if row.get("test_accuracy") is not None:
                self._test = f", test accuracy {row['test_accuracy']:.1%}"
        speed = row["reports"] / max(row["seconds"], 1e-9)
        loss = (
            f", loss {row['train_loss']:.4f}"
            if row.get("train_loss") is not None
            else ""
        )
        facts = f"{speed:,.0f} clients/s{loss}{self._test}"
        self._bar.update(
            self._task, description="round", completed=row["round"], facts=facts
        )
        last = row["round"] == self._rounds
        if not self.console.is_terminal and (
            last or time.monotonic() - self._printed > EVERY
        ):
            self._printed = time.monotonic()
            self.console.print(
                f"round {row['round']}/{self._rounds}: {facts}",
                highlight=False,
                soft_wrap=True,
            )
        if last:
            self._bar.stop()

    def note(self, message: str) -> None:
        # Escaped, for it may quote what a client sent, and markup that does not close would end the run.
        self.console.print(
            f"[yellow]note[/yellow] {escape(message)}", highlight=False, soft_wrap=True
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class AuditTerminal:
    """An observer of an audit (`fedcore.audit.examine.Observer`). It shows the objective, which an attacker has too, and
    never a distance to the truth."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("audit", total=1, facts="", left="-")
        self._begin = self._printed = time.monotonic()
        self._first: float | None = (
            None  # cells done when the first attack began: those before are read from files
        )
        self._number, self._cells, self._name = 0, 1, ""
        self._runs: list[Terminal] = []

    def cell(self, number: int, cells: int, name: str) -> None:
        self._end_training()
        self._number, self._cells, self._name = number, cells, name
        if number == 0:
            self.console.print(
                f"audit of {cells} cell{'s' if cells > 1 else ''}", highlight=False
            )
        self._bar.update(
            self._task,
            description=f"cell {number + 1}/{cells}",
            total=cells,
            completed=number,
            facts=escape(name),
        )

    def progress(self, share: float, what: str, objective: float | None) -> None:
        self._end_training()
        self._bar.start()
        done = self._number + share
        self._first = done if self._first is None else self._first
        left = self._left(done)
        facts = f"{what}" + (
            f", objective {objective:.4f}" if objective is not None else ""
        )
        self._bar.update(
            self._task,
            description=f"cell {self._number + 1}/{self._cells}",
            completed=done,
            facts=facts,
            left=left,
        )
        if not self.console.is_terminal and time.monotonic() - self._printed > EVERY:
            self._printed = time.monotonic()
            line = f"cell {self._number + 1}/{self._cells} ({self._name}), {share:.0%}: {facts}"
            elapsed = timedelta(seconds=round(time.monotonic() - self._begin))
            self.console.print(
                f"{line}; {elapsed} so far, {left} left",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )

    def _left(self, done: float) -> str:
        """By what has been done since the first attack began, training included."""
        assert self._first is not None
        if done <= self._first:
            return "-"
        elapsed = time.monotonic() - self._begin
        return str(
            timedelta(
                seconds=round(elapsed * (self._cells - done) / (done - self._first))
            )
        )

    def note(self, message: str) -> None:
        self.console.print(
            f"[yellow]note[/yellow] {escape(message)}", highlight=False, soft_wrap=True
        )

    def training(self) -> Terminal:
        """The observer of a run that the audit trains; two bars do not share a terminal."""
        self._bar.stop()
        self._runs.append(Terminal())
        return self._runs[-1]

    def _end_training(self) -> None:
        while self._runs:
            self._runs.pop().__exit__()

    def __enter__(self) -> AuditTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_training()
        self._bar.stop()


def show_result(result: Result, report: Path | None) -> None:
    """The final table, on stdout."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    final = result.final
    clients, tuned = (
        final["client_accuracy"] or {},
        final.get("finetuned_accuracy") or {},
    )
    facts: dict[str, Any] = {
        "method": f"{result.method}, {result.engine} engine, seed {result.seed}",
        "test accuracy": percent(final["test_accuracy"]),
        "test loss": "-" if final["test_loss"] is None else f"{final['test_loss']:.4f}",
        "accuracy per client": f"mean {percent(clients.get('mean'))}, 10th percentile {percent(clients.get('p10'))}, "
        f"90th {percent(clients.get('p90'))}, worst tenth {percent(clients.get('lowest_tenth'))}",
        "after fine-tuning": f"mean {percent(tuned.get('mean'))}, worst tenth {percent(tuned.get('lowest_tenth'))}",
        "rounds": f"{result.rounds}, {result.cohort:.4g} of {result.population} clients each",
        "speed": f"{result.clients_per_second:,.0f} clients/s, first round done after {result.first_round_s:.1f} s",
        "sent": f"{size_text(result.bytes_down)} down, {size_text(result.bytes_up)} up",
        "left out": ", ".join(f"{reason} {n}" for reason, n in result.dropped.items())
        or "nobody",
        "late answers": result.late_answers,
        "privacy": ", ".join(privacy.describe(final["privacy"]))
        if "privacy" in final
        else "",
        "parameters": f"sha256 {result.params_sha256[:16]}",
        "report": str(report or "-"),
    }
    if final["test_accuracy"] is None:
        del facts["test accuracy"], facts["accuracy per client"]
    if not facts["privacy"]:
        del facts["privacy"]
    if not result.late_answers:
        del facts["late answers"]
    if not tuned:
        del facts["after fine-tuning"]
    for name, value in facts.items():
        print(f"{name:<21}{value}")
