"""`fedcore.run`: a run from Python, with its progress and its report."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcore.config import Experiment
from fedcore.engines.base import Engine
from fedcore.rounds import loop
from fedcore.rounds.loop import Result
from fedcore.rounds.observer import Observer, Quiet
from fedcore.task import Task
from fedcore.views.terminal import Terminal, lines_of

__all__ = ["is_notebook", "run"]


def run(
    experiment: Experiment,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    *,
    task: Callable[[Experiment], Task] | None = None,
    progress: bool = True,
) -> Result:
    """Run an experiment to its last round, and write its report.

    `out` is the run directory (default: a new one in runs/), `resume` an existing one
    to go on with. `task` makes the task instead of the one that `experiment` names.
    Progress is shown as on the command line, on stderr, and in a notebook as a bar;
    without `progress` nothing but warnings is. Raises SettingsError, RunError, and
    Interrupted (after a checkpoint) on SIGINT.

    >>> experiment = Experiment.load("fedavg", {"task": "least-squares", "rounds": 1})
    >>> result = run(experiment, progress=False)  # doctest: +SKIP
    """
    if task is not None:
        experiment = experiment.model_copy(update={"task": task})
    if not progress:
        result = loop.run(experiment, out, resume, Quiet())
    elif is_notebook():
        result = loop.run(experiment, out, resume, NotebookBar())
    else:
        with Terminal() as terminal:
            result = loop.run(experiment, out, resume, terminal)
    # Its import takes half a second, with the plots: not before the first round.
    from fedcore.views.run_report import write_or_note

    report = write_or_note(result.run_dir)
    if is_notebook():
        _show_results(report)
    return result


def is_notebook() -> bool:
    """Whether this is a notebook, which shows HTML."""
    shell = sys.modules.get("IPython")
    current = shell.get_ipython() if shell is not None else None
    return current is not None and hasattr(current, "kernel")


def result_html(result: Result, report: Path | None = None) -> str:
    """The table of a result, as a notebook shows it, with a link to the report."""
    rows = []
    for name, text in lines_of(result, report).items():
        value = html.escape(text)
        if name == "report" and report is not None:
            value = f'<a href="{html.escape(str(report))}">{value}</a>'
        rows.append(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _show_results(report: Path | None) -> None:
    """Let the notebook show results, in this session, as a table."""
    formatters = sys.modules["IPython"].get_ipython().display_formatter.formatters

    def shown(result: Result) -> str:
        page = Path(result.run_dir) / "report.html"
        return result_html(result, page if page.exists() else None)

    formatters["text/html"].for_type(Result, shown)


class NotebookBar:
    """An observer of the round loop: one bar in the notebook's output."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._rounds, self._title = 0, ""

    def started(
        self, experiment: Experiment, engine: Engine, population: int, *_: Any
    ) -> None:
        """The run begins."""
        self._rounds = experiment.rounds
        self._title = (
            f"{experiment.method.name} on {experiment.task}, {population} clients, "
            f"seed {experiment.seed}"
        )
        self._show(0, "")
