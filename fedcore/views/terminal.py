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
from fedcore.rounds import canary_bound
from fedcore.rounds.example_privacy import described
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result
from fedcore.rounds.time_summary import clock_kind
from fedcore.storage.memory import size_text
from fedcore.views.secret_text import secret_text
from fedcore.views.text import (
    PERCENT,
    rate_text,
    share_text,
    time_text,
    value_text,
)

__all__ = ["AuditTerminal", "Terminal", "show_result"]

EVERY = 10.0  # seconds between lines where there is no terminal
LONG = 10.0  # seconds of a run, from which on they are estimated
DRAWN = 0.2  # seconds between two numbers beside the bar
FEW = 5  # failing clients in the table at the end
# Of `Result.time`, and what is said of them.
TIME_SHARES = {
    "idle": "idle",
    "wasted_share": "of the work wasted",
    "late_share": "late",
}
SHOWN = 3  # test measures in a line of progress, that which judges the run first


def progress_bar(console: Console) -> Progress:
    """A bar over rounds, with `facts` beside it; nothing where nobody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class Terminal:
    """An observer of the round loop (`fedcore.rounds.loop.Observer`)."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = progress_bar(self.console)
        self._task = self._bar.add_task("round", total=None, facts="")
        self._rounds = 0
        self._engine: Engine | None = None  # until it has been described
        self._printed = time.monotonic()
        self._history = History()  # of the run, from its first round on
        self._test = ""  # the last test measures
        self._clock = ""  # the kind of the run's own clock
        self._planned = 0  # rounds of several runs, until they have been estimated
        self._is_estimated = False

    def planned(self, runs: int, rounds: int, of: str) -> None:
        """Say before the first of several runs how many rounds are to be done."""
        self._planned = rounds
        line = f"{of}: {runs} runs, {rounds:,} rounds to do"
        self.console.print(escaped(line), highlight=False, soft_wrap=True, markup=False)

    def started(
        self, experiment: Experiment, engine: Engine, population: int, history: History
    ) -> None:
        self._engine, self._rounds, self._test = engine, experiment.rounds, ""
        self._history, first = history, len(history)
        self._clock = clock_kind(experiment.model_dump(include={"engine", "schedule"}))
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
            self._estimate(row)
        self._note_measures(row)
        number, is_last = row["round"], row["round"] == self._rounds
        self._bar.update(self._task, description="round", completed=number)
        # Not in every round: the speed is that of all rounds until now.
        every = DRAWN if self.console.is_terminal else EVERY
        if is_last or time.monotonic() - self._printed > every:
            self._printed = time.monotonic()
            facts = self._facts(row)
            self._bar.update(self._task, facts=escape(facts))
            if not self.console.is_terminal:
                line = escaped(f"round {number}/{self._rounds}: {facts}")
                self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        if is_last:
            self._bar.stop()

    def _estimate(self, row: dict[str, Any]) -> None:
        """Say after the first round of all how long the others will take."""
        if self._is_estimated:
            return
        self._is_estimated = True
        rounds = (self._planned or self._rounds - row["round"] + 1) - 1
        seconds = rounds * float(row["seconds"])
        if rounds and (self._planned or seconds >= LONG):
            line = f"about {time_text(seconds)} for the other {rounds:,} rounds"
            self.console.print(f"{line}, by the first", highlight=False)

    def _note_measures(self, row: dict[str, Any]) -> None:
        """Keep the test measures of a round that has any."""
        measured = []
        for name in row.get("measures", ()):
            value = row.get(f"test_{name}")
            if value is not None:
                measured.append(f"test {name} {_number(name, value, 1)}")
        if measured:
            self._test = ", ".join(["", *measured[:SHOWN]])

    def _facts(self, row: dict[str, Any]) -> str:
        """Speed until now, loss of the round, and the last test measures.

        Before them the time by the run's own clock, where it has one.
        """
        facts = f"{rate_text(self._history.clients_per_second)} clients/s"
        if row.get("time_s") is not None:
            facts = f"{time_text(row['time_s'])} {self._clock}, {facts}"
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
    judge, *others = result.measures
    history = History(result.history)
    clients, tuned = (final.get(f"{of}_{judge}") for of in ("client", "finetuned"))
    start = history.baseline.get(f"client_{judge}")
    if clients and start:
        # First: where clients have models of their own, the test set is not theirs.
        now, then = (_number(judge, of["pooled"]) for of in (clients, start))
        lines[f"clients' {judge}"] = f"{now}, {then} before the first round"
    for kind in ("test", *history.extra_tests):
        for name in (judge, *others):
            text = _number(name, final.get(f"{kind}_{name}"))
            before = history.baseline.get(f"{kind}_{name}")
            if before is not None:
                text += f", {_number(name, before)} before the first round"
            lines[f"{kind} {name}"] = text
    if clients:
        lines[f"{judge} per client"] = _spread_text(judge, clients)
    if tuned:
        mean, worst = (_number(judge, tuned.get(p)) for p in ("mean", "worst_tenth"))
        lines["after fine-tuning"] = f"mean {mean}, worst tenth {worst}"
    cohort = f"{result.cohort:.4g} of {result.population} clients each"
    lines["rounds"] = f"{result.rounds}, {cohort}"
    speed = f"{rate_text(result.clients_per_second)} clients/s without evaluation"
    lines["speed"] = f"{speed}, first round done after {result.first_round_s:.1f} s"
    lines |= _time_lines(result, judge)
    down, up = size_text(result.bytes_down), size_text(result.bytes_up)
    lines["sent"] = f"{down} down, {up} up"
    reasons = [f"{reason} {n}" for reason, n in result.dropped.items()]
    lines["left out"] = ", ".join(reasons) or "none"
    failing = result.history[-1].get("failing", []) if result.history else []
    if failing:
        lines["failing"] = _failing_text(failing, result.history[-1]["num_failing"])
    if result.late_answers:
        lines["late answers"] = str(result.late_answers)
    readable = secret_text(history, result.engine)
    if readable:
        lines["the server reads"] = readable
    if "privacy" in final:
        lines["privacy"] = ", ".join(privacy.describe(final["privacy"]))
    if "privacy_examples" in final:
        spent = final["privacy_examples"]
        lines["privacy of examples"] = ", ".join(described(spent))
    if "canaries" in final:
        lines["measured"] = ", ".join(canary_bound.describe(final["canaries"]))
    lines["parameters"] = f"sha256 {result.params_sha256[:16]}"
    lines["report"] = str(report or "-")
    width = max(21, 2 + max(map(len, lines)))
    for name, text in lines.items():
        print(escaped(f"{name:<{width}}{text}"))


def _time_lines(result: Result, judge: str) -> dict[str, str]:
    """The time by the run's own clock, and who was heard; none without a clock."""
    time = result.time
    if not time:
        return {}
    each = time_text(time["time_s"] / max(result.rounds, 1))
    kind = f"{time['clock']} time"
    whole = time_text(time["time_s"])
    lines = {kind: f"{whole} ({time['time_s']:,.6g} s), {each} a round"}
    parts = []
    for name, what in TIME_SHARES.items():
        if time.get(name) is not None:
            parts.append(f"{share_text(time[name])} {what}")
    if parts:
        lines["clients' time"] = ", ".join(parts)
    staleness = time.get("staleness")
    if staleness:
        weight = f", weight by it {time['discount']:.3g}" if "discount" in time else ""
        mean, most = staleness["mean"], staleness["max"]
        lines["staleness"] = f"mean {mean:.3g}, largest {most}{weight}"
    slow = time.get("slowest_fifth")
    if slow:
        share, value = share_text(slow["arrivals"]), _number(judge, slow["measure"])
        lines["slowest fifth"] = f"{share} of the updates used, {judge} {value}"
    return lines


def _failing_text(failing: list[dict[str, Any]], num: int) -> str:
    """The clients that failed in many rounds in a row, the first FEW of them."""
    few = [
        f"client {entry['client']} ({entry['rounds']} rounds in a row: "
        f"{entry['reason']})"
        for entry in failing[:FEW]
    ]
    more = f" and {num - len(few):,} more" if num > len(few) else ""
    return ", ".join(few) + more


def _spread_text(measure: str, clients: dict[str, float | None]) -> str:
    """A measure over clients in words."""
    parts = [clients.get(part) for part in ("mean", "p10", "p90", "worst_tenth")]
    mean, low, high, worst = (_number(measure, part) for part in parts)
    return f"mean {mean}, 10th percentile {low}, 90th {high}, worst tenth {worst}"


def _number(measure: str, value: float | None, decimals: int = 2) -> str:
    """An accuracy in percent, any other measure with four decimals if it has them."""
    if value is not None and measure not in PERCENT and 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return value_text(measure, value, decimals)
