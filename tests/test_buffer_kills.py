"""kill -9 at any moment of a buffered run, and its resumption: the same bits.

What is on its way is kept in the checkpoint: updates that wait for their arrival
(fedavg), with a memory of the clients at the server (fedvarp), or the messages of the
versions that clients with a state started from (ditto).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq
import pytest
import torch

from fedcore.config import Experiment
from fedcore.rounds import loop
from tests.helpers import PATIENCE
from tests.test_buffer import buffered, rows_of

MOST = 4  # updates before a kill
TABLES = ("clients.parquet", "arrivals.parquet")
KEPT = {
    "fedavg": {"flight"},
    "fedvarp": {"flight", "memory"},
    "ditto": {"ring", "clients"},
}


def experiment(method: str, engine: str, updates: int) -> Experiment:
    """Failures of every kind; a checkpoint after each update."""
    run: Experiment = buffered(
        method,
        3,
        8,
        engine={"name": engine},
        rounds=updates,
        schedule__max_staleness=6,
        participation__dropout=0.1,
        evaluation={"every": 20},
    )
    return run


def lines(folder: Path) -> int:
    """Updates in the run's metrics."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


class Started(Protocol):
    """A process that can be killed; `ended` is its exit status, None while it runs."""

    def kill(self) -> None: ...
    def ended(self) -> int | None: ...
    def wait(self) -> int | None: ...


class Command:
    """The command line, in a process of its own."""

    def __init__(self, run: Experiment, folder: Path) -> None:
        preset = folder.with_name("preset.toml")
        preset.write_text(run.to_toml())
        where = [str(preset), "--out", str(folder)]
        if (folder / "config.toml").exists():
            where = ["--resume", str(folder)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedcore", "run", *where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> int | None:
        return self._process.poll()

    def wait(self) -> int | None:
        return self._process.wait(timeout=PATIENCE)


def go_on(run: Experiment, folder: Path) -> None:
    """Begin a run, or go on with it, to its end."""
    torch.set_num_threads(1)
    is_old = (folder / "config.toml").exists()
    loop.run(run, None if is_old else folder, folder if is_old else None)


class Forked:
    """The same from Python, forked from a process that has imported everything."""

    def __init__(self, run: Experiment, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._process = context.Process(target=go_on, args=(run, folder))
        self._process.start()

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join(PATIENCE)
        return self._process.exitcode


def killed(process: Started, folder: Path, updates: int, seconds: float) -> None:
    """Kill it so long after it did some updates."""
    before, deadline = lines(folder), time.monotonic() + PATIENCE
    try:
        # Lines after the checkpoint go first, so that there may be fewer at times.
        while lines(folder) < before + updates:
            assert process.ended() is None, "the run has ended"
            assert time.monotonic() < deadline, "the run does not go on"
            time.sleep(0.002)
        time.sleep(seconds)  # a moment within an update, or between two
    finally:
        process.kill()
        status = process.wait()
    assert status == -signal.SIGKILL, "the run was over before"


def check(
    method: str,
    engine: str,
    kills: int,
    start: Callable[[Experiment, Path], Started],
    folder: Path,
) -> None:
    """The run with so many kills ends as the one that was left alone."""
    run = experiment(method, engine, 30 + 2 * MOST * kills)
    whole, broken = folder / "whole", folder / "broken"
    expected = loop.run(run, whole)
    moments = random.Random(f"{method} {engine} {kills}")
    for _ in range(kills):
        updates, seconds = moments.randint(1, MOST), moments.uniform(0, 0.1)
        killed(start(run, broken), broken, updates, seconds)
    parts = {file.name.split("-")[0] for file in broken.glob("checkpoint/*")}
    assert {"timing", *KEPT[method]} <= parts
    assert 0 < lines(broken) < run.rounds
    found = loop.run(run, resume=broken)
    assert found.params_sha256 == expected.params_sha256
    assert rows_of(broken) == rows_of(whole)
    assert max(row["staleness"]["max"] for row in rows_of(broken)) > 1
    for name in TABLES:
        tables = [pq.read_table(run_dir / name) for run_dir in (broken, whole)]
        # As text: what has not come is NaN, which equals nothing.
        found_text, expected_text = [str(table.to_pydict()) for table in tables]
        assert found_text == expected_text, name


@pytest.mark.slow
@pytest.mark.timeout(5 * PATIENCE)
@pytest.mark.parametrize(
    ("method", "engine"),
    [("fedavg", "vectorised"), ("fedvarp", "sequential"), ("ditto", "sequential")],
)
def test_three_kills_cost_nothing(method: str, engine: str, tmp_path: Path) -> None:
    check(method, engine, 3, Command, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(22 * PATIENCE)
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
@pytest.mark.parametrize("method", KEPT)
def test_twenty_kills_cost_nothing(method: str, engine: str, tmp_path: Path) -> None:
    check(method, engine, 20, Forked, tmp_path)
