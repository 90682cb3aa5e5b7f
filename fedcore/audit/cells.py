"""Cells: one setting under audit each, and the clients that are attacked in it.

A cell is a combination of a sweep (local epochs, batch size, examples), a captured
round of a run, or a defence with the run that it was switched on in (`remedies.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fedcore.audit.observe import (
    CPU,
    Observation,
    Subject,
    aggregate,
    held_out,
    observation,
    public_of,
    truth_of,
)
from fedcore.audit.plan import Plan
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.method import Method
from fedcore.rounds import loop
from fedcore.rounds.captures import captured
from fedcore.rounds.history import History
from fedcore.rounds.rundir import refuse_other_base, stored
from fedcore.task import Task
from fedcore.tasks import build_task


class Observer(Protocol):
    """Is told how the audit goes on, and gives each run that it trains an observer."""

    def cell(self, number: int, cells: int, name: str) -> None: ...
    def progress(self, share: float, what: str, objective: float | None) -> None: ...
    def note(self, message: str) -> None: ...
    def training(self) -> loop.Observer: ...


class Prepared(NamedTuple):
    """The clients of a cell, ready to be attacked, and the state of their run."""

    subjects: list[Subject]
    task: Task
    accuracy: float | None = None  # of the run's model on the test set, as last seen
    client_accuracy: float | None = None  # mean over clients, of the model each uses
    personal: bool = False  # whether clients have models of their own
    privacy: dict[str, Any] | None = None  # an accountant's word on the run
    device: torch.device = CPU  # where attacks run


@dataclass(frozen=True)
class Cell:
    """One setting under audit."""

    name: str
    factors: dict[str, Any]
    prepare: Callable[[Observer], Prepared]
    identity: Any  # everything else that its result depends on (JSON)


def sweep(
    experiment: Experiment,
    plan: Plan,
    epochs: Sequence[int],
    batch_sizes: Sequence[int],
    examples: Sequence[int],
) -> list[Cell]:
    """Synthetic first rounds of the experiment, for every combination of the three."""
    combinations = itertools.product(epochs, batch_sizes, examples)
    return [_synthetic(experiment, plan, *values) for values in combinations]


def _synthetic(
    experiment: Experiment, plan: Plan, epochs: int, batch_size: int, examples: int
) -> Cell:
    values = {"epochs": epochs, "batch_size": batch_size, "steps": None}
    local = experiment.local.model_copy(update=values)
    changed = experiment.model_copy(update={"local": local})

    def prepare(observer: Observer) -> Prepared:
        task = build_task(changed)
        task.check()
        subjects = simulate(changed, task, plan.clients, examples)
        return Prepared(subjects, task, device=device_of(changed))

    factors = {
        "epochs": epochs,
        "batch_size": batch_size,
        "examples": examples,
        "local_steps": epochs * math.ceil(examples / batch_size),
    }
    name = (
        f"{epochs} epoch{'s' * (epochs > 1)}, batches of {batch_size}, "
        f"{examples} example{'s' * (examples > 1)}"
    )
    return Cell(name, factors, prepare, changed.model_dump(mode="json"))


def rounds_of(run_dir: Path, plan: Plan) -> tuple[Experiment, list[Cell]]:
    """The settings and the captured rounds of a run, finished or running.

    Raises SettingsError where nothing was captured.
    """
    source = str(run_dir / "config.toml")
    experiment = Experiment.parse(stored(run_dir), source=source)
    clients: dict[int, list[int]] = {}
    for kept in captured(run_dir):
        clients.setdefault(kept.round, []).append(kept.client)

    def cell(t: int) -> Cell:
        def prepare(observer: Observer) -> Prepared:
            return prepare_captured(experiment, run_dir, plan, t)

        identity = [experiment.model_dump(mode="json"), clients[t]]
        return Cell(f"round {t}", {"round": t}, prepare, identity)

    return experiment, [cell(t) for t in sorted(clients)]


def prepare_captured(
    experiment: Experiment, run_dir: Path, plan: Plan, t: int, together: int = 1
) -> Prepared:
    """The clients captured in round t of a run, from 1 on.

    With `together` > 1 only the mean of so many clients is seen. Raises SettingsError
    where fewer were captured.
    """
    task, method = build_task(experiment), experiment.build_method()
    refuse_other_base(run_dir, task.base_sha256)
    subjects = _captured_subjects(experiment, task, method, run_dir, t)
    subjects = subjects[: plan.clients * together]
    if together > max(len(subjects), 1):
        raise SettingsError(
            f"secagg={together}: round {t} has {len(subjects)} captured clients, "
            f"expected at least {together}"
        )
    groups = range(0, len(subjects) - together + 1, together)
    history = History.read(run_dir / "metrics.jsonl", _rounds_done(run_dir))
    clients = history.last("client_accuracy")
    audited = []
    for start in groups:
        audited.append(aggregate(subjects[start : start + together], experiment))
    return Prepared(
        audited,
        task,
        history.last("test_accuracy"),
        clients["mean"] if clients else None,
        method.personalises(),
        history.last("privacy"),
        device_of(experiment),
    )


def _captured_subjects(
    experiment: Experiment, task: Task, method: Method[Any], run_dir: Path, t: int
) -> list[Subject]:
    """Every client captured in round t, with its earlier exchanges for membership."""
    public = public_of(experiment, task)
    seen: dict[int, list[Observation]] = {}
    for kept in captured(run_dir):
        if kept.round <= t and kept.num_examples > 0:
            seen.setdefault(kept.client, []).append(observation(method, public, kept))
    subjects = []
    for client, (*before, last) in sorted(seen.items()):
        if last.round == t:
            truth, others = truth_of(task, client), held_out(task, client)
            subjects.append(Subject(last, truth, tuple(before), others))
    return subjects


def _rounds_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def device_of(experiment: Experiment) -> torch.device:
    """Where attacks run: a run that was trained on a GPU can be audited without one."""
    wanted = experiment.engine.device != "cpu"
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")
