"""Disks that are full, read-only or gone: one line, nothing half written, and on."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore.deploy import certs
from fedcore.errors import FedcoreError
from fedcore.rounds.loop import Loop, run
from fedcore.storage import cache
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import Lines, Unwritable, unwritable
from fedcore.storage.rows import StateStore
from tests.helpers import small

Cli = Callable[..., tuple[int, str, str]]
Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes an empty file system of so many kB, where this user may mount one."""
    places: list[Path] = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(words, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("this user may not mount a file system")
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill a file system up to `leave` bytes; the file that does it."""
    file = folder / "filling"
    facts = os.statvfs(folder)
    room = facts.f_bavail * facts.f_frsize - leave
    file.write_bytes(bytes(max(room, 0)))
    return file


def parts(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.name.endswith(".part")]


def one_line(err: str) -> str:
    """The line with which the command ended."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("fedcore: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0], err
    return lines[0]


# Enough for digits, and quick; a model of 2.4 kB.
SMALL = ["--set=population=20", "--set=participation.cohort=4", "--set=rounds=6",
         "--set=model.name=logistic", "--set=checkpoint.seconds=0",
         "--set=engine.name=sequential"]  # fmt: skip


def test_a_run_on_a_full_disk_says_so_in_one_line_and_resumes_with_room(
    cli: Cli, disk: Disk, tmp_path: Path
) -> None:
    assert cli("run", "fedavg", *SMALL, "--out", tmp_path / "whole")[0] == 0
    place = disk(256)
    out = place / "run"
    status, _, err = cli("run", "fedavg", *SMALL, "--set=rounds=2", "--out", out)
    assert status == 0, err
    filling = fill(place, leave=4096)
    status, _, err = cli("run", "--resume", out, "--set=rounds=6")
    assert status == 1
    line = one_line(err)
    assert re.search(
        r"fedcore: \S+/run(/\w+)? is full: \S+ k?B free, \S+ k?B needed for \S+; "
        r"make room, then resume the run, from its checkpoint of round \d$",
        line,
    ), line
    kept = json.loads((out / "checkpoint" / "state.json").read_text())
    assert str(kept["round"]) in line.rpartition("round ")[2]
    assert parts(place) == []
    filling.unlink()
    assert cli("run", "--resume", out, "--set=rounds=6")[0] == 0
    assert sha(out) == sha(tmp_path / "whole")


def sha(folder: Path) -> list[str]:
    """The digests of the parts of a run's checkpoint, and its losses."""
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [str(json.loads(row)["train_loss"]) for row in rows]
    return [*(entry["sha256"] for entry in state["files"].values()), *losses]


@pytest.mark.parametrize("room", [0, 1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48])
def test_wherever_the_room_ends_there_is_one_line_and_nothing_half_written(
    room: int, cli: Cli, disk: Disk
) -> None:
    """In pages of 4 kB; the run needs some more than forty of them to its end."""
    place = disk(4 * room or 4)
    if room == 0:
        fill(place)
    capture = ["--set=audit.capture=2", "--set=rounds=3"]
    status, out, err = cli("run", "scaffold", *SMALL, *capture, "--out", place / "run")
    assert parts(place) == []
    if status == 0:
        return  # the report may be missing, which is noted
    assert status == 1
    assert out == ""
    assert " is full: " in one_line(err)
    rows = place / "run" / "metrics.jsonl"
    for row in rows.read_text().splitlines() if rows.exists() else []:
        json.loads(row)
    # The corrected command: more room, and on, or anew where no round was kept.
    size = f"size={4096}k"
    subprocess.run(["mount", "-o", f"remount,{size}", str(place)], check=True)
    (place / "filling").unlink(missing_ok=True)
    state = place / "run" / "checkpoint" / "state.json"
    words = ["run", "--resume", place / "run"]
    if not state.exists() and not (rows.exists() and rows.read_text()):
        words = ["run", "scaffold", *SMALL, *capture, "--out", place / "run"]
    status, _, err = cli(*words)
    assert status == 0, err


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    from fedcore.rounds.loop import Quiet

    (tmp_path / "run").mkdir()
    return Loop(small("fedavg", rounds=9), tmp_path / "run", Quiet(), None, False)


def test_a_directory_that_is_deleted_in_the_middle_is_said_to_be_gone(
    loop: Loop, tmp_path: Path
) -> None:
    import shutil

    attempt = loop._attempt

    def delete(*arguments: Any) -> Any:
        if loop.state.t == 2:
            shutil.rmtree(tmp_path / "run")
        return attempt(*arguments)

    loop._attempt = delete  # type: ignore[method-assign]
    with pytest.raises(Unwritable, match="is not there: was it deleted, or unmounted"):
        loop.run()
    loop.close(is_writable=False)
    assert not (tmp_path / "run").exists(), "it was made again, with half a run in it"


def test_a_disk_that_becomes_read_only_is_named(cli: Cli, disk: Disk) -> None:
    place = disk(512)
    words = ["run", "fedavg", *SMALL, "--set=rounds=1", "--out", place / "run"]
    assert cli(*words)[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    status, _, err = cli("run", "--resume", place / "run", "--set=rounds=2")
    assert status == 2
    assert "is on a read-only file system" in one_line(err)
    status, _, err = cli("report", place / "run")
    assert status == 1
    assert "is on a read-only file system: report.html" in one_line(err)
    status, _, err = cli("certs", "--host=a.b", "--nodes=1", "--out", place / "keys")
    assert status == 1
    assert "is on a read-only file system: keys cannot be written" in one_line(err)


def test_what_comes_after_a_run_is_refused_in_one_line_too(
    cli: Cli, disk: Disk, tmp_path: Path
) -> None:
    place = disk(512)
    words = ["run", "fedavg", *SMALL, "--set=rounds=1", "--set=audit.capture=2"]
    assert cli(*words, "--out", place / "run")[0] == 0
    (place / "run" / "report.html").unlink()
    fill(place)
    for command in (
        ["report", place / "run"],
        ["audit", place / "run", "--attack=labels"],
        ["compare", "fedavg", *SMALL, "--seeds=1", "--out", place / "compare"],
        ["certs", "--host=a.b", "--nodes=1", "--out", place / "keys"],
    ):
        status, out, err = cli(*command)
        assert status == 1, command
        assert " is full: " in err, command
        assert "Traceback" not in err
        assert out == "", command
    assert parts(place) == []


def test_a_certificate_that_found_no_room_is_made_when_there_is_some(
    disk: Disk,
) -> None:
    place = disk(16)
    with pytest.raises(Unwritable, match="is full"):
        certs.make(place / "keys", ["a.b"], 9)
    subprocess.run(["mount", "-o", "remount,size=4096k", str(place)], check=True)
    certs.make(place / "keys", ["a.b"], 9)
    for role in ["server", *(f"client-{i}" for i in range(9))]:
        assert certs.check(place / "keys" / role) == [], role
    modes = {file.stat().st_mode & 0o077 for file in place.rglob("*.key")}
    assert modes == {0}


def test_a_full_cache_stops_no_run_and_is_noted_once(
    cli: Cli,
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = disk(8)
    fill(place)
    monkeypatch.setenv("FEDCORE_CACHE", str(place))
    monkeypatch.setattr(cache, "_noted", set())
    for number in (1, 2):
        out = tmp_path / f"run{number}"
        words = ["run", "fedavg", *SMALL, "--set=rounds=1", "--out", out]
        assert cli(*words, f"--seed={number}")[0] == 0
    cache.save("other", x=np.zeros(9000))
    said = [line for line in caplog.messages if "the cache is not written" in line]
    assert len(said) == 1
    assert f"{place} is full: 0 B free" in said[0]
    assert {file.name for file in place.iterdir()} == {"filling"}


def test_state_that_finds_no_room_is_an_error_and_no_signal(disk: Disk) -> None:
    """Mapped files that are larger than the disk would end the process by SIGBUS."""
    place = disk(64)
    store = StateStore({"w": torch.zeros(1000)}, 0, lambda: place)
    with pytest.raises(Unwritable, match=r"is full: .* needed for block-0-0\.bin"):
        store.put([0], {"w": torch.ones(1, 1000)})


FAULTS = {
    errno.ENOSPC: "is full: ",
    errno.EDQUOT: "quota there is used up, 5 B needed for file",
    errno.EFBIG: "a file may not be so large here, 5 B needed for file; see ulimit -f",
    errno.EROFS: "is on a read-only file system: file cannot be written",
    errno.EACCES: "may not be written to by this user: file",
    errno.ENOENT: "is not there: was it deleted",
    errno.EIO: "file cannot be written: Input/output error",
}


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
def test_every_fault_is_one_line_that_names_the_folder(
    code: int, tmp_path: Path
) -> None:
    fault = unwritable(tmp_path / "file", OSError(code, os.strerror(code)), 5)
    assert FAULTS[code] in str(fault)
    assert str(tmp_path) in str(fault)
    assert "\n" not in str(fault)
    assert isinstance(fault, FedcoreError)
    assert fault.exit_status == 1
    assert fault.errno == code


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.argv = ["fedcore", *sys.argv[1:]]
from fedcore.cli import main
main()
"""


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    words = ["run", "fedavg", *SMALL, "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", LIMITED, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a file may not be so large here" in one_line(done.stderr)
    assert parts(tmp_path) == []


def test_a_result_that_cannot_be_printed_is_said() -> None:
    command = [sys.executable, "-m", "fedcore.cli", "show", "fedavg"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "fedcore: the output cannot be written: No space left on device; make room\n"
    )


def test_a_file_keeps_what_it_held_and_lines_are_whole(disk: Disk) -> None:
    place = disk(12)
    file, lines = place / "file", place / "lines"
    write_atomically(file, b"before")
    sink = Lines(lines)
    sink.add("a" * 1000)
    with pytest.raises(Unwritable, match=r"is full: 4\.1 kB free, 9 kB needed"):
        write_atomically(file, bytes(9000))
    with pytest.raises(Unwritable, match=r"9 kB needed for lines"):
        sink.add("b" * 8999)
    sink.add("c")
    sink.close()
    assert file.read_bytes() == b"before"
    assert lines.read_text() == "a" * 1000 + "\nc\n"
    assert parts(place) == []


def test_a_run_begun_on_a_full_disk_leaves_its_directory_to_the_next(
    disk: Disk,
) -> None:
    place = disk(64)
    filling = fill(place)
    with pytest.raises(Unwritable, match="is full"):
        run(small("fedavg"), place / "run")
    filling.unlink()
    assert run(small("fedavg"), place / "run").rounds == 4
