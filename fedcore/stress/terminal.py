"""The progress of a stress test on stderr: one bar for all of its rounds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fedcore.config import Experiment
from fedcore.engines.base import Engine
from fedcore.escapes import escaped
from fedcore.rounds.history import History
from fedcore.views.terminal import progress_bar
from fedcore.views.text import time_text

__all__ = ["StressTerminal"]

EVERY = 10.0  # seconds between lines where there is no terminal
ENOUGH = 30.0  # seconds from which the rest is estimated, or the end of the first run


class StressTerminal:
    """A watcher of a stress test, and the observer of its runs.

    Notes of attacked runs are left out: that the loss jumps there is the purpose.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = progress_bar(self.console)
        self._task = self._bar.add_task("rounds", total=None, facts="")
        self._rounds = self._done = 0
        self._name, self._is_clean = "", True
        self._begin: float | None = None  # of the first round that is run
        self._is_estimated = False
        self._printed = time.monotonic()
        self._noted: set[str] = set()

    def planned(self, cells: int, runs: int, rounds: int, folder: Path) -> None:
        """Say before the first run how many rounds are to be done."""
        self._rounds = rounds
        self._print(
            f"stress test of {cells} cells in {folder}: {runs} runs, "
            f"{rounds:,} rounds to do"
        )
        self._bar.update(self._task, total=rounds)

    def cell(self, number: int, runs: int, name: str, is_clean: bool) -> None:
        self._name, self._is_clean = f"run {number + 1}/{runs}, {name}", is_clean
        self._bar.update(self._task, facts=escape(escaped(self._name)))

    def training(self) -> StressTerminal:
        """The observer of the next run."""
        return self

    def started(
        self, experiment: Experiment, engine: Engine, population: int, history: History
    ) -> None:
        self._bar.start()
        if self._begin is None:
            self._begin = time.monotonic()
        else:
            self._estimate()

    def client_done(self, t: int, n: int, cohort: int) -> None:
        pass

    def round_done(self, row: dict[str, Any]) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if self._begin is not None and now - self._begin > ENOUGH:
            self._estimate()
        if not self.console.is_terminal and now - self._printed > EVERY:
            self._printed = now
            self._print(
                f"{self._name}, round {row['round']}: {self._done:,} of "
                f"{self._rounds:,} rounds done"
            )

    def _estimate(self) -> None:
        """Say once how long the other rounds will take."""
        left = self._rounds - self._done
        if self._is_estimated or self._begin is None or self._done == 0 or left <= 0:
            return
        self._is_estimated = True
        about = time_text((time.monotonic() - self._begin) / self._done * left)
        self._print(f"about {about} for the other {left:,} rounds, by the first")

    def note(self, message: str) -> None:
        """Pass on what concerns the test, or a run without an attack, once."""
        is_said = any(noted.startswith(message) for noted in self._noted)
        if self._is_clean and not is_said:
            self._noted.add(message)
            self._print(f"note: {message}")

    def _print(self, line: str) -> None:
        text = escaped(line)
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> StressTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
