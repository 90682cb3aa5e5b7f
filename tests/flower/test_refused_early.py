"""Faults that are found before anything listens, connects, or takes a directory."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fedcore.client.supernode
import fedcore.server.link
import fedcore.server.serve
import pytest

import fedcore.storage.memory
from fedcore.config import Experiment
from fedcore.deploy import certs
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.loop import run
from tests.helpers import small

Cli = Callable[..., tuple[int, str, str]]

SMALL = ["population=6", "participation.cohort=3", "rounds=1"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    certs.make(folder, ["localhost"], 1)
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """A port that something else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        yield s.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that would listen, and a client that would connect, say so instead."""

    def listens(self: Any) -> Any:
        raise RunError("it went on to listen")

    def connects(self: Any, *arguments: Any) -> None:
        raise RunError("it went on to connect")

    monkeypatch.setattr(fedcore.server.serve.Server, "run", listens)
    monkeypatch.setattr(fedcore.client.supernode.SuperNode, "__init__", connects)


def words(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def serve(cli: Cli, out: Path, *settings: str) -> tuple[int, str]:
    status, _, err = cli("server", "fedavg", "--insecure", "--listen", "127.0.0.1:9",
                         "--out", out, *words([*SMALL, *settings]))  # fmt: skip
    return status, err


REFUSED = {
    "a cohort that the population has not": (
        ["participation.cohort=7"],
        "participation.cohort = 7",
    ),
    "a population that the data cannot feed": (["population=5000"], "population"),
    "a task that is not there": (["task=nowhere:make"], "cannot import nowhere"),
    "a folder that the task would not read": (["data_folder=/tmp"], "data_folder"),
    "more reports than clients": (["min_reports=5"], "min_reports = 5"),
    "parameters that are not there": (["initial=/nowhere"], "initial = /nowhere"),
    "a proxy set that takes all": (["proxy=1400"], "proxy = 1400"),
    "a defence that the method cannot have": (
        ['method.name="admm"', "defence.clip=1.0"],
        "defence.clip",
    ),
    "clients that are told to lie": (
        ["adversary.clients=[1]", "adversary.attack=sign_flip"],
        "devices are real: they would be told to lie",
    ),
    "a model over the limit of messages": (
        ["engine.message_limit_mb=0.01"],
        "engine.message_limit_mb = 0.01, but the model that every client gets has",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_refuses_what_its_rounds_would_and_leaves_nothing(
    name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, expected = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    status, err = serve(cli, tmp_path / "run", *settings)
    assert status == 2, err
    assert expected in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == []


def test_the_corrected_command_takes_the_same_directory(
    cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert serve(cli, out, "participation.cohort=7")[0] == 2
    status, err = serve(cli, out, "participation.cohort=2")
    assert (status, err) == (1, "fedcore: it went on to listen\n")
    before = json.loads((out / "series.json").read_text())
    assert serve(cli, out, "participation.cohort=2")[0] == 1
    assert json.loads((out / "series.json").read_text()) == before, (
        "the same run has the same name"
    )
    assert serve(cli, out, "participation.cohort=4")[0] == 1, "no round was done"
    assert Experiment.load(out / "config.toml").participation.cohort == 4
    assert json.loads((out / "series.json").read_text()) != before, (
        "clients would take another run's states for this one's"
    )


def test_a_directory_with_a_round_is_kept_for_the_run_that_did_it(
    cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(small("fedavg", rounds=1), out)
    before = (out / "metrics.jsonl").read_bytes()
    status, err = serve(cli, out)
    assert status == 2
    assert "cannot be resumed with other settings" in err
    with pytest.raises(SettingsError, match="already holds a run"):
        run(small("fedavg", rounds=1), out)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_directory_of_other_files_is_not_taken(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    status, err = serve(cli, tmp_path)
    assert status == 2
    assert "is not empty and holds no run" in err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_port_in_use_is_refused_and_leaves_nothing(
    cli: Cli, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = fedcore.server.link.wait_for_port
    monkeypatch.setattr(
        fedcore.server.serve, "wait_for_port", lambda listen: wait(listen, 0)
    )
    status, _, err = cli("server", "fedavg", "--insecure", "--out", tmp_path / "run",
                         "--listen", f"127.0.0.1:{port}", *words(SMALL))  # fmt: skip
    assert status == 2
    assert f"--listen 127.0.0.1:{port}" in err
    assert not (tmp_path / "run").exists()


def test_the_directory_of_the_other_side_is_refused(
    cli: Cli, tmp_path: Path, keys: Path
) -> None:
    out = tmp_path / "run"
    status, _, err = cli("server", "fedavg", "--certs", keys / "client-0", "--out", out)
    assert status == 2
    assert "is a client's directory: expected the server's" in err
    assert not out.exists()
    status, err = connect(cli, tmp_path, "--certs", keys / "server")
    assert status == 2
    assert "is the server's directory: expected the client's own" in err


def connect(cli: Cli, tmp_path: Path, *more: object) -> tuple[int, str]:
    state = tmp_path / "state"
    status, _, err = cli("client", "--id", "0", "--server", "127.0.0.1:9", "--state",
                         state, *more)  # fmt: skip
    assert "Traceback" not in err
    return status, err


OF_A_CLIENT = {
    "an address that is none": (["--server", "127.0.0.1"], "expected HOST:PORT"),
    "a port that is no number": (["--server", "h:²"], "expected HOST:PORT"),
    "settings of all": (["--set", "rounds=3"], "a client may set data_folder"),
    "a device that is none": (["--set", "engine.device=tpu"], "engine.device"),
    "half a setting": (["--set", "options.a"], "options.a"),
    "data that are not there": (["--data", "nowhere"], "--data nowhere: there is no"),
    "data that have not come": (
        ["--data", "empty"],
        "--data empty: an empty directory",
    ),
    "a base that is not there": (["--base", "nowhere"], "--base nowhere: there is no"),
}


@pytest.mark.parametrize("name", OF_A_CLIENT)
def test_a_client_refuses_before_it_connects(
    name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, expected = OF_A_CLIENT[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, err = connect(cli, tmp_path, "--insecure", *more)
    assert status == 2, err
    assert expected in err
    assert not (tmp_path / "state").exists()


def test_a_run_that_came_to_no_round_leaves_its_directory_to_the_corrected_one(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="out of luck"):
        run(small("fedavg"), out, engine=_fails)
    assert (out / "config.toml").exists()
    result = run(small("fedavg", rounds=2), out)
    assert result.rounds == 2
    assert (
        result.params_sha256
        == run(small("fedavg", rounds=2), tmp_path / "b").params_sha256
    )


def _fails(work: Any) -> Any:
    from fedcore.engines.sequential import Sequential
    from fedcore.storage.rows import StateStore

    class Unlucky(Sequential):
        def each(self, *arguments: Any) -> Any:
            raise RuntimeError("out of luck")

        mean = each

    return Unlucky(work, StateStore((), 0, Path))


def test_work_in_flight_that_would_not_fit_in_memory_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SMALL, "schedule.name=buffered", "schedule.buffer=2"]
    settings += ["schedule.concurrency=6", "participation.name=uniform"]
    assert "it went on to listen" in serve(cli, tmp_path / "a", *settings)[1]
    monkeypatch.setattr(fedcore.storage.memory, "available", lambda device: 100_000)
    status, err = serve(cli, tmp_path / "b", *settings)
    assert status == 2
    assert "schedule.concurrency = 6: messages, answers and models: " in err
    assert "100 kB are free" in err
    assert not (tmp_path / "b").exists()
