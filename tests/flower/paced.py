"""Devices of which some are slow, by a task whose examples take a moment to be read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from fedcore.rounds.rundir import stored
from tests.flower.federation import Federation

NAME = "paced"  # of the task's module
SOURCE = """
import os, time
from fedcore.tasks import images
from fedcore.data.federated import FederatedData

class Paced(FederatedData):
    def batches(self, clients, data, *rest):
        if data == "train":
            time.sleep(float(os.environ.get("PACE", 0)))
        return super().batches(clients, data, *rest)

def make_task(e):
    task = images(e, "digits")
    task.data.__class__ = Paced
    return task
"""

USUAL = [
    f"task={NAME}:make_task",
    "participation.name=uniform",
    "partition.name=iid",
    "local.steps=2",
    "local.batch_size=20",
    "evaluation.every=100",
    "checkpoint.seconds=0",
    "engine.rejoin_timeout=60",
]


class PacedTask:
    """Makes the task importable, for this process within the block, and for others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> PacedTask:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{NAME}.py").write_text(SOURCE)
        sys.path.insert(0, str(self.folder))
        return self

    def __exit__(self, *error: object) -> None:
        sys.path.remove(str(self.folder))
        sys.modules.pop(NAME, None)


class Fleet:
    """Devices of which some are slow, and their server."""

    def __init__(self, f: Federation, pace: dict[int, float]) -> None:
        """`pace[i]` is the number of seconds that client i's examples take."""
        self.f, self.pace = f, pace
        (f.folder / f"{NAME}.py").write_text(SOURCE)
        self.path = {"PYTHONPATH": str(f.folder)}
        self.words: list[str] = []

    def serve(self, method: str, *settings: str) -> None:
        n = self.f.clients
        self.words = [method, *USUAL, f"population={n}", f"participation.cohort={n}"]
        self.words += [f"engine.min_clients={n}", *settings]
        self.serve_again()

    def serve_again(self) -> None:
        self.f.server(*self.words, **self.path)

    def client(self, i: int) -> None:
        pace = str(self.pace.get(i, 0.0))
        self.f.client(i, "--poll", "0.05", PACE=pace, **self.path)

    def start(self, method: str, *settings: str) -> None:
        self.serve(method, *settings)
        for i in range(self.f.clients):
            self.client(i)


def replayed(recording: Path, out: Path) -> str:
    """SHA-256 of the model of a simulation that follows the arrivals of a run."""
    before = Experiment.parse(stored(recording), source=str(recording))
    settings: dict[str, Any] = before.model_dump(mode="json")
    schedule = {"name": "trace", "file": str(recording), "of": settings["schedule"]}
    settings |= {"schedule": schedule, "engine": {"name": "sequential"}}
    return str(run(Experiment.parse(settings), out).params_sha256)
