"""The contents of a run directory, read for its report, with notes on what is amiss."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedcore import methods
from fedcore.clock.settings import ClockSettings
from fedcore.config import Experiment
from fedcore.errors import FedcoreError, SettingsError
from fedcore.privacy import covers
from fedcore.rounds import example_privacy
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.history import History
from fedcore.rounds.result import params_sha256
from fedcore.rounds.rundir import stored
from fedcore.rounds.slow_clients import Heard, Speeds, heard_clients
from fedcore.rounds.time_summary import clock_kind
from fedcore.rounds.trouble import Trouble, troubles
from fedcore.rounds.watch import clients_text
from fedcore.storage.checkpoint import Checkpoint
from fedcore.tasks import TASKS, build_task
from fedcore.views.text import shortened

__all__ = ["RunRecord", "read_run"]

JUMPS = 5  # jumps of the test loss that have a note each
# Columns of the table of clients that measure no client.
NO_MEASURE = {"function", "left_out", "clipped", "capped", "weight", "norm_ratio"}
PARTITION_LIMIT = 20_000  # clients; a larger partition is not drawn
EXPECTED = {"task": str, "rounds": int, "seed": int, "method": dict}  # in config.toml
WITHOUT_DATA = ("digits", "least-squares", "weighted-least-squares", "shakespeare")
WITH_IMAGES = ("fashion-mnist", "cifar10")
SHARED_DATA = Path("/usr/share/datasets")

Measured = dict[str, np.ndarray]  # by metric, and "round"; [clients]


class Federation(NamedTuple):
    """The method and the clients of a run, as far as they are at hand."""

    reference: str  # the first line of the method's docstring
    is_personal: bool  # whether clients have models of their own
    population: int | None
    label_counts: np.ndarray | None  # [population, classes]


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory; `notes` name what should be there and is not."""

    folder: Path
    settings: dict[str, Any]
    history: History
    environment: dict[str, Any]
    clients: Measured  # at the last evaluation
    tuned: Measured  # at the last evaluation after fine-tuning
    troubles: list[Trouble]  # clients that were left out, clipped, hardly weighted
    federation: Federation
    heard: Heard | None  # clients by speed; None without a clock, or where all are same
    notes: list[str]

    @property
    def is_done(self) -> bool:
        return _is_done(self.history, self.settings)

    @property
    def measure(self) -> str:
        """The measure that judges the run: the first metric of its task, or "loss"."""
        return self.history.measure

    @property
    def is_higher_better(self) -> bool:
        """Whether a higher value of `measure` is better."""
        return self.history.measures[self.measure]

    def params_sha256(self) -> str | None:
        """The hash of the final parameters, as `fedcore run --json` prints it.

        None for an unfinished run, and where the checkpoint is gone or older.
        """
        checkpoint = Checkpoint(self.folder / "checkpoint")
        if not self.is_done or not checkpoint.exists():
            return None
        try:
            if checkpoint.read()["round"] != len(self.history):
                return None
            server = checkpoint.part("server")
        except FedcoreError:
            return None
        params = {}
        for path, value in server.items():
            if path.startswith("params/"):
                params[path.removeprefix("params/")] = value
        return params_sha256(params) if params else None


def read_run(folder: Path) -> RunRecord:
    """Read a run directory for its report.

    Raises SettingsError when it is none, or its settings or metrics are damaged.
    """
    settings = _settings(folder)
    history = History.read(folder / "metrics.jsonl")
    notes: list[str] = []
    if not _is_done(history, settings):
        command = f"fedcore run --resume {shlex.quote(str(folder))}"
        notes.append(f"This run is not finished. Go on with: {command}")
    environment = _environment(folder, notes)
    if (spent := history.last("privacy")) is not None:
        notes.append(covers(spent))
    if history.last("privacy_examples") is not None:
        notes.append(example_privacy.COVERS)
    clients = _last_evaluation(folder, len(history), "evaluate", notes)
    tuned = _last_evaluation(folder, len(history), "finetune", notes)
    notes += _events(history)
    federation = _federation(folder, settings, notes)
    return RunRecord(
        folder=folder,
        settings=settings,
        history=history,
        environment=environment,
        clients=clients,
        tuned=tuned,
        troubles=_troubles(folder, len(history), notes),
        federation=federation,
        heard=_heard(folder, settings, history, federation.population, notes),
        notes=notes,
    )


def _is_done(history: History, settings: dict[str, Any]) -> bool:
    return len(history) >= int(settings["rounds"])


def _settings(folder: Path) -> dict[str, Any]:
    settings = stored(folder)
    missing = [
        key for key, kind in EXPECTED.items() if not isinstance(settings.get(key), kind)
    ]
    if not missing and "name" not in settings["method"]:
        missing = ["method.name"]
    if missing:
        raise SettingsError(
            f"{folder / 'config.toml'}: {missing[0]} is missing or damaged; "
            "expected the settings of a run"
        )
    return settings


def _environment(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "environment.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        notes.append(
            f"environment.json cannot be read ({_brief(error)}): "
            "versions and machine of this run are not known."
        )
        return {}


def _events(history: History) -> list[str]:
    """Notes on jumps of the test loss, and on rules that were changed on the way."""
    notes = []
    jumps = [row for row in history if "jump" in row]
    for row in jumps[:JUMPS]:
        jump, after = row["jump"], row.get("test_loss")
        reached = "a number that is not finite" if after is None else f"{after:.4g}"
        who = clients_text(jump["clients"], jump["num_clients"])
        notes.append(
            f"The test loss jumped from {jump['from']:.4g} in round {jump['since']} to "
            f"{reached} in round {row['round']}. Reports came from {who}."
        )
    if len(jumps) > JUMPS:
        notes.append(f"The test loss jumped {len(jumps)} times in all.")
    for row in history:
        for key, (before, now) in row.get("changed", {}).items():
            changed = f"{key} is {now}, before it was {before}."
            notes.append(f"From round {row['round']} on {changed}")
    return notes


def _troubles(folder: Path, rounds: int, notes: list[str]) -> list[Trouble]:
    """The clients that gave trouble, where the table of clients can be read."""
    import pyarrow as pa

    try:
        return troubles(folder, up_to=rounds)
    except (OSError, KeyError, pa.ArrowException) as error:
        _note_unreadable(notes, error)
        return []


def _note_unreadable(notes: list[str], error: Exception) -> None:
    """Say once that the table cannot be read, whichever reader met it first."""
    start = "clients.parquet cannot be read"
    if not any(note.startswith(start) for note in notes):
        notes.append(
            f"{start} ({_brief(error)}): the spread over clients is not drawn."
        )


def _last_evaluation(
    folder: Path, rounds: int, function: str, notes: list[str]
) -> Measured:
    """Measures of each client with examples, the last time that `function` ran."""
    import pyarrow as pa

    try:
        table = read_clients(folder, function, up_to=rounds)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        if len(table) == 0:
            return {}
        is_last = columns["round"] == columns["round"].max()
        kept = is_last & (columns["num_examples"] > 0)
    except (OSError, KeyError, pa.ArrowException) as error:
        _note_unreadable(notes, error)
        return {}
    for name in NO_MEASURE & columns.keys():
        del columns[name]
    return {name: values[kept] for name, values in columns.items()}


def _heard(
    folder: Path,
    settings: dict[str, Any],
    history: History,
    population: int | None,
    notes: list[str],
) -> Heard | None:
    """The clients by speed, where the run has a clock and its arrivals can be read."""
    import pyarrow as pa

    if history.times is None:
        return None
    speeds = None
    clock = ClockSettings.model_validate(settings.get("clock", {}))
    if clock.is_on and population is not None and clock_kind(settings) == "simulated":
        batch_size = settings.get("local", {}).get("batch_size")
        speeds = Speeds(clock, settings["seed"], batch_size, population)
    try:
        return heard_clients(folder, speeds, len(history))
    except (OSError, KeyError, FedcoreError, pa.ArrowException) as error:
        notes.append(
            f"arrivals.parquet cannot be read ({_brief(error)}): who was heard, by "
            "speed, is not drawn."
        )
        return None


def _federation(folder: Path, settings: dict[str, Any], notes: list[str]) -> Federation:
    """The method's reference, and the clients' labels where the data is at hand.

    Method or data may be elsewhere than when the run was made; that is a note.
    """
    # A task of the user's may have another number of clients than its settings.
    population = settings.get("population") if settings.get("task") in TASKS else None
    federation = Federation("", False, population, None)
    try:
        experiment = Experiment.parse(settings, source=str(folder / "config.toml"))
        module = sys.modules[methods.load(experiment.method.name).__module__]
        first_line = (module.__doc__ or "").strip().partition("\n")[0]
        federation = federation._replace(
            reference=first_line.rstrip("."),
            is_personal=experiment.build_method().personalises(),
        )
        if not _is_at_hand(experiment.task, experiment.data_folder):
            return federation
        data = build_task(experiment).data
    except FedcoreError as error:
        notes.append(f"Not drawn: how the data is spread over clients. {error}")
        return federation
    federation = federation._replace(population=data.population)
    classes = data.num_classes()
    if classes is not None and data.population <= PARTITION_LIMIT:
        counts = data.label_counts(classes)
        federation = federation._replace(label_counts=counts)
    return federation


def _is_at_hand(task: str, data_folder: Path | None) -> bool:
    """Whether a bundled task is built in a moment; a report downloads nothing."""
    if task in WITHOUT_DATA:
        return True
    has_folder = data_folder is not None or "FEDCORE_DATA" in os.environ
    return task in WITH_IMAGES and (has_folder or (SHARED_DATA / task).exists())


def _brief(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    return shortened(first_line or type(error).__name__, 80)
