"""A server and devices whose disks are full: a line each, and on with room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flower.federation import Gate, federation
from tests.helpers import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

SETTINGS = ["population=2", "participation.cohort=2", "engine.min_clients=2"]
SETTINGS += ["partition.name=iid"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path) -> Path:
    facts = os.statvfs(folder)
    file = folder / "filling"
    file.write_bytes(bytes(facts.f_bavail * facts.f_frsize))
    return file


def test_a_server_on_a_full_disk_ends_with_a_line_and_goes_on_with_room(
    tmp_path: Path, disk: Path
) -> None:
    gate = Gate(tmp_path, t=3)
    with federation(tmp_path, 2) as f:
        f.run = disk / "run"
        settings = [*SETTINGS, "rounds=6", gate.TASK]
        server = f.server("scaffold", *settings, **gate.path)
        f.client(0, **gate.environment)
        f.client(1, **gate.environment)
        f.reached(3)
        filling = fill(disk)
        gate.open()
        assert server.wait(PATIENCE) == 1, f.everything()
        log = f.log("server")
        assert "Traceback" not in log
        assert " is full: " in log.splitlines()[-1]
        assert list(disk.rglob("*.part")) == []
        filling.unlink()
        f.server("scaffold", *settings, **gate.path)
        f.finished()
        assert [row["round"] for row in f.rows()] == list(range(1, 7))


def test_a_device_on_a_full_disk_fails_with_a_line_and_takes_part_with_room(
    tmp_path: Path, disk: Path
) -> None:
    gate = Gate(tmp_path, t=2)
    with federation(tmp_path, 2) as f:
        more = ["rounds=9", "min_reports=1", "evaluation.clients=0", gate.TASK]
        f.server("scaffold", *SETTINGS, *more, **gate.path)
        f.client(0, **gate.environment)
        words = f.client_command(1, f.certs / "client-1", disk / "state")
        f.start("client-1", words, **gate.environment)
        f.reached(2)
        filling = fill(disk)
        gate.open_to(4)
        f.reached(4)
        f.said("client-1", "client 1 failed in round 3: .* is full: ")
        filling.unlink()
        gate.open()
        f.finished()
        dropped = [row["dropped"] for row in f.rows()]
        assert dropped[2:4] == [{"error": 1}, {"error": 1}]
        assert dropped[-1] == {}
        assert "Traceback" not in f.log("client-1")
