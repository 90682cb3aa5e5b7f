"""`fedcore.run`: a run from Python, with its progress and its report."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcore.config import Experiment
from fedcore.engines.base import Engine
from fedcore.errors import SettingsError
from fedcore.rounds import loop
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result
from fedcore.rounds.observer import Observer, Quiet
from fedcore.rounds.time_summary import clock_kind
from fedcore.task import Task
from fedcore.views.terminal import Terminal
from fedcore.views.text import time_text

__all__ = ["NotebookBar", "run"]

DRAWN = 0.2  # seconds between two updates of the bar


def run(
    experiment: Experiment,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    *,
    back_to: int | None = None,
    task: Callable[[Experiment], Task] | str | None = None,
    progress: bool = True,
) -> Result:
    """Run an experiment to its last round, and write its report.

    `out` is the run directory (default: a new one in runs/), `resume` an existing one
    to go on with, from its newest checkpoint or from that of round `back_to`. `task`
    makes the task instead of the one that `experiment` names. Progress is shown on
    stderr as on the command line, in a notebook as a bar, and with `progress=False`
    not at all. Raises SettingsError, RunError, and Interrupted (after a checkpoint) on
    SIGINT.

    >>> from tempfile import TemporaryDirectory
    >>> experiment = Experiment.load("fedavg", {"task": "least-squares", "rounds": 1})
    >>> with TemporaryDirectory() as folder:
    ...     result = run(experiment, folder, progress=False)
    ...     (Path(result.run_dir) / "report.html").is_file()
    True
    """
    if not isinstance(experiment, Experiment):
        raise SettingsError(
            f"{type(experiment).__name__} is no Experiment: expected "
            'run(Experiment.load("fedavg")), or run(Experiment(method="fedavg"))'
        )
    if task is not None:
        experiment = experiment.model_copy(update={"task": task})
    observer = _observer(progress)
    try:
        result = loop.run(experiment, out, resume, observer, back_to=back_to)
    finally:
        if isinstance(observer, Terminal):
            observer.close()
    # Its import takes half a second, with the plots: not before the first round.
    from fedcore.views.run_report import write_or_note

    write_or_note(result.run_dir)
    return result


def _observer(progress: bool) -> Observer:
    if not progress:
        return Quiet()
    display = _notebook_display()
    return Terminal() if display is None else NotebookBar(display)


def _notebook_display() -> Callable[..., Any] | None:
    """The function that shows HTML in a notebook; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Callable[..., Any] = sys.modules["IPython.display"].display
    return display


class _Html:
    """HTML that a notebook shows, and the text for where it cannot."""

    def __init__(self, content: str, text: str) -> None:
        self.content, self.text = content, text

    def _repr_html_(self) -> str:
        return self.content

    def __repr__(self) -> str:
        return self.text


class NotebookBar(Quiet):
    """An observer of the round loop that shows one bar in a notebook.

    `display` is IPython's.
    """

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display
        self._handle: Any = None
        self._rounds, self._title = 0, ""
        self._clock = ""  # the kind of the run's own clock
        self._history = History()
        self._drawn = 0.0

    def started(
        self, experiment: Experiment, engine: Engine, population: int, history: History
    ) -> None:
        self._rounds, self._history = experiment.rounds, history
        self._clock = clock_kind(experiment.model_dump(include={"engine", "schedule"}))
        self._title = (
            f"{experiment.method.name} on {experiment.task}, {population} clients, "
            f"seed {experiment.seed}"
        )
        self._show(len(history), "")

    def round_done(self, row: dict[str, Any]) -> None:
        number = int(row["round"])
        if number < self._rounds and time.monotonic() - self._drawn < DRAWN:
            return
        facts, loss, time_s = [], row.get("train_loss"), row.get("time_s")
        if time_s is not None:
            facts.append(f"{time_text(time_s)} {self._clock}")
        if loss is not None:
            facts.append(f"loss {loss:.4f}")
        self._show(number, ", ".join(facts))

    def note(self, message: str) -> None:
        self._display(_Html(f"<p>note: {html.escape(message)}</p>", message))

    def _show(self, number: int, facts: str) -> None:
        text = f"{self._title}: round {number}/{self._rounds} {facts}".strip()
        bar = f'<progress value="{number}" max="{self._rounds}"></progress>'
        content = _Html(f"{bar} {html.escape(text)}", text)
        if self._handle is None:
            self._handle = self._display(content, display_id=True)
        else:
            self._handle.update(content)
        self._drawn = time.monotonic()
