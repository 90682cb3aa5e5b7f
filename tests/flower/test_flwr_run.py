"""`flwr run .` as a user types it, in a copy of the sources and a Flower home."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower.federation import until
from tests.helpers import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(
        not Path("/proc/self/environ").exists(),
        reason="finds what Flower started through /proc",
    ),
]

ROOT = Path(__file__).parent.parent.parent
SETTINGS = ["rounds=3", "population=8", "participation.cohort=5", "local.epochs=1"]

Flwr = Callable[..., str]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "fedcore"
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("fedcore", "strategies", "server", "client"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder.parent / "tasks").mkdir()
    shutil.copy(ROOT / "tests" / "crowd.py", folder.parent / "tasks")
    return folder


@pytest.fixture(scope="module")
def flwr(clone: Path) -> Iterator[Flwr]:
    """Call `flwr` in the clone; whatever it started is gone afterwards."""
    home = clone.parent / "flwr-home"
    environment = {
        **os.environ,
        # Where flwr looks for flower-superlink.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
        "HTTPS_PROXY": "http://127.0.0.1:9",  # nothing may be fetched
        "HTTP_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(clone.parent / "tasks"),
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # else glibc keeps what was freed
    }

    def call(*arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "flwr"), *arguments]
        done = subprocess.run(
            command,
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    try:
        yield call
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(50):
                if not (left := started_with(f"FLWR_HOME={home}")):
                    break
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(0.1)
        assert not started_with(f"FLWR_HOME={home}"), "Flower left processes behind"


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def started_with(variable: str) -> list[int]:
    """Running processes that have this variable in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def run_config(settings: list[str]) -> list[str]:
    return [
        "--run-config",
        f'preset="strategies/fedavg.toml" set="{" ".join(settings)}"',
    ]


NODES = ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
TWO_NODES = ["--federation-config", "num-supernodes=2 client-resources-num-cpus=1"]


def test_flwr_run_computes_what_sequential_computes(
    clone: Path, flwr: Flwr, tmp_path: Path
) -> None:
    log = flwr("run", ".", "--stream", *run_config(SETTINGS), *NODES)
    files = list(clone.glob("runs/*/metrics.jsonl"))
    assert len(files) == 1, log
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    one = run(
        Experiment.load(
            "strategies/fedavg.toml", [*SETTINGS, "engine.name=sequential"]
        ),
        tmp_path / "run",
    )
    assert len(rows) == 3, log
    assert all(row["dropped"] == {} for row in rows), log
    assert rows[-1]["test_loss"] == pytest.approx(one.final["test_loss"], abs=1e-4)
    assert re.search(rf"test loss +{rows[-1]['test_loss']:.4f}", log), log
    assert "grid of 4 Flower nodes" in log


def test_secure_sums_go_on_in_whichever_worker_the_next_message_meets(
    clone: Path, flwr: Flwr, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "aggregation.secure=true", "engine.min_clients=4"]
    before = set(clone.glob("runs/*"))
    log = flwr("run", ".", "--stream", *run_config(settings), *NODES)
    (folder,) = set(clone.glob("runs/*")) - before
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    given = [*settings, "engine.name=sequential"]
    one = run(Experiment.load("strategies/fedavg.toml", given), tmp_path / "run")
    assert all(row["dropped"] == {} for row in rows), log
    assert rows[-1]["test_loss"] == one.final["test_loss"], log
    assert rows[-1]["client_loss"] == one.final["client_loss"], log


def test_a_setting_that_cannot_be_used_fails_the_run_with_one_clear_line(
    flwr: Flwr,
) -> None:
    # flwr itself exits with 0 whatever the run does.
    log = flwr("run", ".", "--stream", *run_config(["rounds=0"]), *NODES)
    started = re.search(r"started run (\d+)", log)
    assert started is not None, log
    fault = "fedcore: --set rounds=0: must be greater than or equal to 1"
    # The stream of a run that ends at once may end before its lines came.
    number = started[1]
    until(lambda: fault in log or fault in flwr("log", number, "--show"), log)
    runs = json.loads(flwr("ls", "--format", "json"))["runs"]
    assert [r["status"] for r in runs if "failed" in r["status"]] == ["finished:failed"]


@pytest.mark.soak
@pytest.mark.timeout(3 * PATIENCE)
def test_ten_thousand_clients_keep_their_state_out_of_the_memory_of_every_process(
    clone: Path, flwr: Flwr, tmp_path: Path
) -> None:
    """640 MB of state on two nodes, against the peaks of a run of 500 clients.

    The peaks are those of each process that Flower started.
    """

    def peak_of_a_run(population: int) -> int:
        cohorts = [range(start, start + 500) for start in range(0, population, 500)]
        (tmp_path / "trace").write_text(
            "".join(" ".join(map(str, ids)) + "\n" for ids in cohorts)
        )
        (tmp_path / "crowd.toml").write_text(
            f"""
            method.name = "fedsim"
            method.personal = ["own"]
            method.local_lr = 1e-9
            method.personal_lr = 16.0
            task = "crowd:wide"
            population = {population}
            rounds = {len(cohorts)}
            participation = {{name = "trace", file = "{tmp_path / "trace"}"}}
            evaluation = {{every = 1000, clients = 500}}
            schedule.deadline_s = {PATIENCE}
            """
        )
        peaks: dict[int, int] = {}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                for pid in started_with(f"FLWR_HOME={clone.parent / 'flwr-home'}"):
                    with contextlib.suppress(OSError, TypeError):
                        status = Path(f"/proc/{pid}/status").read_text()
                        peaks[pid] = (
                            int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
                        )  # type: ignore[index]

        before, watcher = set(clone.glob("runs/*")), threading.Thread(target=watch)
        watcher.start()
        log = flwr(
            "run",
            ".",
            "--stream",
            "--run-config",
            f'preset="{tmp_path / "crowd.toml"}"',
            *TWO_NODES,
        )
        done.set()
        watcher.join()
        folders = set(clone.glob("runs/*")) - before
        assert len(folders) == 1, log
        (folder,) = folders
        rows = [
            json.loads(line)
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert [row["dropped"] for row in rows] == [{}] * len(cohorts), log
        table = pyarrow.parquet.read_table(folder / "clients.parquet").to_pylist()
        found = {
            row["client"]: row["loss"] for row in table if row["function"] == "evaluate"
        }
        assert len(found) == 500
        # v <- v + 0.001 (id - v) from 0, and half the squared distance from id
        assert found == pytest.approx(
            {i: 0.5 * (0.999 * i) ** 2 for i in found}, rel=3e-4
        ), "every client kept its own"
        assert not (folder / "state").exists(), "states go with the run"
        return max(peaks.values())

    few, many = peak_of_a_run(500), peak_of_a_run(10_000)
    print(
        f"peak of the largest process: {few / 1e6:.0f} MB with 500 clients, "
        f"{many / 1e6:.0f} MB with 10 000"
    )
    assert many < few + 150_000_000, (few, many)
