"""The settings of a run that follows a recorded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.clock.settings import Replay
from fedcore.rounds.rundir import changed_settings

if TYPE_CHECKING:
    from fedcore.config import Experiment

FREE = ("schedule", "engine", "evaluation", "checkpoint", "rounds", "clock", "audit")
"""Settings that a run may have of its own, and still end with the same model."""


def folder_of(recording: Path) -> Path:
    """The directory of a recorded run, given itself or by its arrivals.parquet.

    >>> folder_of(Path("runs/a/arrivals.parquet"))
    PosixPath('runs/a')
    """
    return recording.parent if recording.suffix == ".parquet" else recording


def following(
    experiment: Experiment, recording: Path
) -> tuple[Experiment, dict[str, str]]:
    """(the experiment, with the recording as its schedule; what the user should know).

    A replay is a simulation, whatever computed the recorded run.
    """
    notes: dict[str, str] = {}
    schedule = experiment.schedule
    of = schedule.of if isinstance(schedule, Replay) else schedule
    engine = experiment.engine
    if engine.name == "grid":
        notes["engine.name"] = (
            "the recorded run was one of devices; it is followed with engine.name = "
            '"sequential", which computes as they do'
        )
        engine = engine.model_copy(update={"name": "sequential"})
    folder = folder_of(recording)
    if (folder / "config.toml").is_file():
        for key, (old, new) in changed_settings(experiment, folder).items():
            if key.split(".")[0] not in FREE:
                notes[key] = (
                    f"{key} was {old!r} in {folder} and is {new!r}: the model will be "
                    "another"
                )
    schedule = Replay(file=recording, of=of)
    update = {"schedule": schedule, "engine": engine}
    return experiment.model_copy(update=update), notes
