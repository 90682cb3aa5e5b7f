"""Buffered rounds of devices as users start them: real processes, killed at any time.

Some devices are slow: a task of theirs, whose examples take a moment to be read.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedcore.server.status import status, text

from fedcore.clock.arrivals import read_arrivals
from tests.flower.federation import Federation, federation, until
from tests.flower.paced import Fleet, PacedTask, replayed
from tests.helpers import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]


def rows(f: Federation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_arrivals(f.run).to_pylist()
    return found


@pytest.mark.parametrize("method", ["fedavg", "fedvarp", "ditto"])
def test_a_replay_of_devices_has_their_model(method: str, tmp_path: Path) -> None:
    settings = [
        "schedule.name=buffered",
        "schedule.buffer=2",
        "schedule.concurrency=4",
        "rounds=12",
    ]
    if method == "fedvarp":
        settings.append("schedule.staleness=constant")
    with federation(tmp_path, 4) as f:
        fleet = Fleet(f, {3: 0.6})
        fleet.start(method, *settings)
        result = f.finished()
        arrivals = rows(f)
        assert result["dropped"] == {}, f.everything()
        assert len(arrivals) == 24
        assert max(row["update"] - row["version"] for row in arrivals) > 1
        for row in arrivals:
            assert 0 <= row["sent_us"] < row["back_us"]
            assert row["steps"] == (4 if method == "ditto" else 2)  # two passes
            assert row["client"] != 3 or row["work_us"] > 600_000
            assert row["work_us"] <= row["back_us"] - row["sent_us"]
    with PacedTask(tmp_path):
        assert replayed(f.run, tmp_path / "replayed") == result["params_sha256"]


def kill_app(fleet: Fleet) -> None:
    os.kill(fleet.f.serverapp(), signal.SIGKILL)


def kill_link(fleet: Fleet) -> None:
    link = until(lambda: superlink(fleet.f), fleet.f.everything)
    os.kill(link, signal.SIGKILL)


def kill_server(fleet: Fleet) -> None:
    fleet.f.kill("server")
    fleet.serve_again()


def kill_device(fleet: Fleet) -> None:
    fleet.f.kill("client-1")
    fleet.client(1)


def superlink(f: Federation) -> int | None:
    """The process id of the SuperLink, None where there is none now."""
    server = f.processes["server"].pid
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        is_child = int(stat[1]) == server
        if is_child and b"superlink" in command and b"serverapp" not in command:
            return int(folder.name)
    return None


KILLS: dict[str, Callable[[Fleet], None]] = {
    "the program of the server": kill_app,
    "the SuperLink": kill_link,
    "the server": kill_server,
    "a device": kill_device,
}


def test_whatever_is_killed_nothing_is_lost(
    tmp_path: Path,
) -> None:
    """The states of clients count: they are those of work that was done again."""
    settings = [
        "schedule.name=buffered",
        "schedule.buffer=2",
        "schedule.concurrency=4",
        "rounds=20",
    ]
    settings.append("engine.min_clients=3")  # the others go on without one
    with federation(tmp_path, 4) as f:
        fleet = Fleet(f, {2: 0.3, 3: 1.0})
        fleet.start("ditto", *settings)
        for number, (name, kill) in enumerate(KILLS.items()):
            f.reached(3 * number + 3)
            kill(fleet)
            assert f.processes["server"].poll() is None, name
        result = f.finished()
        arrivals = rows(f)
        usable = [row for row in arrivals if not row["outcome"]]
        assert len(usable) == 40, f.everything()
        works = {(row["client"], row["version"]) for row in usable}
        assert len(works) == 40
        assert {row["client"] for row in usable} == {0, 1, 2, 3}
    with PacedTask(tmp_path):
        assert replayed(f.run, tmp_path / "replayed") == result["params_sha256"]


def outcomes_of(f: Federation, client: int, after: int = 0) -> set[str]:
    """Outcomes of a client's works in the updates after that one."""
    found = set()
    for row in rows(f):
        if row["client"] == client and row["update"] > after:
            found.add(row["outcome"])
    return found


def test_a_device_that_goes_and_returns_is_heard_again_and_status_names_the_work(
    tmp_path: Path,
) -> None:
    settings = [
        "schedule.name=buffered",
        "schedule.buffer=2",
        "schedule.concurrency=4",
        "rounds=100000",
    ]
    with federation(tmp_path, 4) as f:
        fleet = Fleet(f, {0: 0.3, 1: 0.3, 2: 0.3, 3: 1.0})
        fleet.start(
            "fedavg", *settings, "engine.rejoin_timeout=0", "engine.min_clients=3"
        )
        f.reached(2)
        f.kill("client-1")
        until(lambda: outcomes_of(f, 1) & {"disconnected"}, f.everything)
        gone = len(f.rows())
        fleet.client(1)
        until(lambda: "" in outcomes_of(f, 1, after=gone), f.everything)
        facts = until(lambda: (s := status(f.run))["in_flight"] and s, f.everything)
        for work in facts["in_flight"]:
            assert 0 <= work["client"] < 4
            assert 0 <= work["version"] <= facts["round"]
            assert work["seconds"] >= 0
        assert "works on version" in text(facts)
