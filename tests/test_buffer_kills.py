"""kill -9 at any moment of a buffered run, and its resumption: the same bits.

What is on its way is kept in the checkpoint: updates that wait for their arrival
(fedavg), with a memory of the clients at the server (fedvarp), or the messages of the
versions that clients with a state started from (ditto).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

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


def killed(preset: Path, folder: Path, updates: int, seconds: float) -> None:
    """Begin or go on with a run, and kill it so long after it did some updates."""
    where = ["run", str(preset), "--out", str(folder)]
    if (folder / "config.toml").exists():
        where = ["run", "--resume", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcore", *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before, deadline = lines(folder), time.monotonic() + PATIENCE
    try:
        # Lines after the checkpoint go first, so that there may be fewer at times.
        while lines(folder) < before + updates:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run does not go on"
            time.sleep(0.002)
        time.sleep(seconds)  # a moment within an update, or between two
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, "the run was over before"


def check(method: str, engine: str, kills: int, seed: int, folder: Path) -> None:
    """The run with so many kills ends as the one that was left alone."""
    run = experiment(method, engine, 30 + 2 * MOST * kills)
    (folder / "preset.toml").write_text(run.to_toml())
    whole, broken = folder / "whole", folder / "broken"
    expected = loop.run(run, whole)
    moments = random.Random(f"{method} {engine} {seed}")
    for _ in range(kills):
        updates, seconds = moments.randint(1, MOST), moments.uniform(0, 0.1)
        killed(folder / "preset.toml", broken, updates, seconds)
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
    check(method, engine, 3, seed=0, folder=tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(22 * PATIENCE)
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
@pytest.mark.parametrize("method", KEPT)
def test_twenty_kills_cost_nothing(method: str, engine: str, tmp_path: Path) -> None:
    check(method, engine, 20, seed=1, folder=tmp_path)
