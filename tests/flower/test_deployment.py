"""Server and clients as users start them.

Real processes, with TLS and node authentication, in good weather and bad.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet
import pytest
from fedcore.server.status import status
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedcore.config import Experiment
from fedcore.deploy import certs
from fedcore.rounds.loop import run
from tests.flower.federation import (
    Federation,
    Gate,
    Process,
    fedcore,
    federation,
    free_port,
    until,
)
from tests.helpers import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]

SMALL = [
    "population=4",
    "participation.cohort=4",
    "participation.name=uniform",
    "partition.name=iid",
    "local.steps=2",
    "evaluation.every=100",
]
ALL = "engine.min_clients=4"


def sequential(preset: str, folder: Path, *settings: str) -> dict[str, Any]:
    """Metrics and SHA-256 of the same run in this process."""
    experiment = Experiment.load(preset, [*settings, "engine.name=sequential"])
    result = run(experiment, folder / "sequential")
    return result.final | {"sha256": result.params_sha256}


def assert_as(result: dict[str, Any], expected: dict[str, Any], f: Federation) -> None:
    """The same losses, and no client left out."""
    assert result["dropped"] == {}, f.everything()
    final = result["final"]
    assert final["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-4)
    mean = expected["client_loss"]["mean"]
    assert final["client_loss"]["mean"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("method", ["fedavg", "fedau", "scaffold", "fedalt"])
def test_devices_over_tls_compute_what_sequential_computes(
    method: str, tmp_path: Path
) -> None:
    # Two clients are in another round each: state and counters count.
    settings = [*SMALL, "rounds=4", "participation.cohort=3"]
    expected = sequential(method, tmp_path, *settings)
    with federation(tmp_path, 4) as f:
        f.server(method, *settings, ALL)
        for i in range(3):
            f.client(i)
        if method == "scaffold":
            stock_client(f, 3)
        else:
            f.client(3)
        result = f.finished()
    assert_as(result, expected, f)
    assert result["method"] == method


def stock_client(f: Federation, i: int) -> Process:
    """A SuperNode of Flower's own, which keeps its state in a directory, too."""
    keys, programs = f.certs / f"client-{i}", Path(sys.executable).parent
    command = [str(programs / "flower-supernode"), "--superlink", f.address]
    command += ["--root-certificates", str(keys / "ca.crt")]
    command += ["--auth-supernode-private-key", str(keys / "client.key")]
    command += ["--port", str(free_port())]
    command += ["--node-config", f"partition-id={i} state='{f.folder / 'stock'}'"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return f.start("stock", command, FLWR_HOME=str(f.folder / "home"), PATH=path)


def gated_clients(f: Federation, gate: Gate) -> None:
    for i in range(f.clients):
        f.client(i, **gate.environment)


def test_whatever_is_killed_the_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    settings = [*SMALL, "rounds=24"]
    expected = sequential("scaffold", tmp_path, *settings)
    gate = Gate(tmp_path, t=20)
    with federation(tmp_path, 4) as f:
        f.server("scaffold", *settings, ALL, gate.TASK, **gate.path)
        gated_clients(f, gate)
        f.reached(3)
        os.kill(f.serverapp(), signal.SIGKILL)
        f.said("server", "the ServerApp ended by signal 9 .*; starting it again")
        f.reached(8)
        os.kill(f.facts()["superlink"], signal.SIGKILL)
        f.said("server", "the SuperLink ended by signal 9 .*; starting it again")
        f.reached(13)
        for name in list(f.processes):
            f.kill(name)
        gate.open()
        gated_clients(f, gate)
        f.server("scaffold", *settings, ALL, gate.TASK, **gate.path)
        result = f.finished()
    assert_as(result, expected, f)
    assert [row["round"] for row in f.rows()] == list(range(1, 25))
    assert result["params_sha256"] == expected["sha256"], "not the same bits"


@pytest.mark.parametrize("to", ["the server", "all its processes"])
def test_a_server_that_is_told_to_end_leaves_a_checkpoint_and_no_process(
    to: str, tmp_path: Path
) -> None:
    # No checkpoint but the one that it writes when it is told to end.
    settings = [*SMALL, "rounds=12", "checkpoint.seconds=100000"]
    expected = sequential("scaffold", tmp_path, *settings)
    gate = Gate(tmp_path, t=9)
    with federation(tmp_path, 4) as f:
        server = f.server("scaffold", *settings, ALL, gate.TASK, **gate.path)
        gated_clients(f, gate)
        f.reached(3)
        children = [f.serverapp(), f.facts()["superlink"]]
        told = [server.pid]
        if to == "all its processes":  # as systemd and terminals do
            told += children
        for number in told:
            os.kill(number, signal.SIGTERM)
        assert server.wait(PATIENCE) == 130, f.everything()
        left = [number for number in children if Path(f"/proc/{number}").exists()]
        assert not left, "it left a process behind"
        log = f.log("server")
        assert "fedcore: interrupted; go on with the same command and --out" in log
        assert "Traceback" not in log
        if to == "the server":
            state = json.loads((f.run / "checkpoint" / "state.json").read_text())
            assert state["round"] == len(f.rows()) >= 3
        gate.open()
        f.server("scaffold", *settings, ALL, gate.TASK, **gate.path)
        result = f.finished()
    assert_as(result, expected, f)
    assert [row["round"] for row in f.rows()] == list(range(1, 13))
    assert result["params_sha256"] == expected["sha256"], "not the same bits"


def test_a_server_that_waits_for_clients_ends_when_it_is_told_to(
    tmp_path: Path,
) -> None:
    with federation(tmp_path, 4) as f:
        server = f.server("fedavg", *SMALL, "rounds=2", ALL)
        f.client(0)
        f.said("server", "waiting for clients: 1 of 4 are there")
        server.terminate()
        assert server.wait(PATIENCE) == 130, f.everything()
        # One SIGTERM was enough: the second would have interrupted it, with another
        # status; and without an end of its own it would have been killed.
        outcome = json.loads((f.run / "outcome.json").read_text())
        assert outcome["exit_status"] == 130
        assert "Traceback" not in f.log("server")


def test_four_faults_in_a_row_leave_no_trace() -> None:
    from benchmarks.deployment import faults

    assert faults(4, seed=20261128)


@pytest.mark.soak
@pytest.mark.timeout(12 * PATIENCE)
def test_twenty_random_faults_in_a_row_leave_no_trace() -> None:
    from benchmarks.deployment import faults

    seed = random.SystemRandom().randrange(10**6)
    assert faults(20, seed), f"seed {seed}"


def test_a_client_killed_in_a_round_costs_that_round_itself_alone_and_comes_back(
    tmp_path: Path,
) -> None:
    gate = Gate(tmp_path, t=1)
    with federation(tmp_path, 4) as f:
        f.server("fedavg", *SMALL, "rounds=5", ALL, gate.TASK, **gate.path)
        for i in range(4):
            f.client(i, **(gate.environment if i == 2 else gate.path))
        waiting = f.run / "waiting.json"
        f.reached(1)
        until(lambda: '"waiting_for": [2]' in waiting.read_text(), f.everything)
        f.kill("client-2")
        f.client(2, **gate.path)
        f.finished()
    dropped = [row["dropped"] for row in f.rows()]
    assert dropped.count({}) == 4, dropped
    assert {"disconnected": 1} in dropped, dropped
    assert "connected to" in f.log("client-2")


def test_a_late_client_is_left_out_at_the_deadline_and_its_answer_is_counted(
    tmp_path: Path,
) -> None:
    gate = Gate(tmp_path)
    with federation(tmp_path, 4) as f:
        limits = ["schedule.deadline_s=30", "min_reports=2", "rounds=4"]
        limits += ["evaluation.clients=0", ALL, gate.TASK]
        f.server("fedavg", *SMALL, *limits, **gate.path)
        for i in range(4):
            f.client(i, **(gate.environment if i == 1 else gate.path))
        f.reached(1)
        gate.open()
        result = f.finished()
    rows = f.rows()
    assert rows[0]["dropped"] == {"timeout": 1}, rows
    assert all(row["reports"] >= 3 for row in rows), rows
    late = sum(row.get("late_answers", 0) for row in rows)
    assert result["late_answers"] == late
    assert late >= 1, rows


def test_over_sampling_ends_a_round_at_its_goal(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with federation(tmp_path, 4) as f:
        goal = ["schedule.goal=3", "rounds=3", "evaluation.clients=0"]
        f.server("fedavg", *SMALL, *goal, ALL, gate.TASK, **gate.path)
        for i in range(4):
            f.client(i, **(gate.environment if i == 1 else gate.path))
        f.finished()
    assert [row["reports"] for row in f.rows()] == [3, 3, 3]
    assert [row["dropped"] for row in f.rows()] == [{"not needed": 1}] * 3


def test_a_network_that_is_cut_until_the_client_counts_as_gone_heals_by_itself(
    tmp_path: Path,
) -> None:
    gate = Gate(tmp_path, t=8)
    with federation(tmp_path, 4) as f:
        f.server("scaffold", *SMALL, "rounds=12", ALL, gate.TASK, **gate.path)
        proxy = f.proxy(3)
        gated_clients(f, gate)
        f.reached(3)
        with proxy.cut():
            f.said("client-3", "no connection to")
            until(lambda: status_of(f, "client-3") == "offline", f.everything)
        gate.open()
        f.finished()
    rows = f.rows()
    assert [row["round"] for row in rows] == list(range(1, 13))
    # It was asked, or about to be, when it was cut.
    assert sum(sum(row["dropped"].values()) for row in rows) <= 2, rows
    assert rows[-1]["reports"] == 4


def status_of(f: Federation, name: str) -> str:
    """Whether the server counts a client as there."""
    by_name = {node["name"]: node["status"] for node in status(f.run)["nodes"]}
    return str(by_name[name])


OWN = """
import numpy as np, torch
from fedcore import Examples, FederatedData, Task
from torch import nn

def make_task(e):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator), torch.arange(60) % 2
    rows = np.zeros(0, dtype=np.int64)
    sizes = np.zeros(e.population, dtype=np.int64)
    if e.data_folder is not None:  # a device: its own rows alone
        client = int((e.data_folder / "id").read_text())
        rows = np.arange(int((e.data_folder / "rows").read_text()))
        sizes[client] = len(rows)
    offsets = np.append(0, np.cumsum(sizes))
    train, test = Examples(x, y), Examples(x[:9], y[:9])
    data = FederatedData(train, test, rows, offsets, 0.0, e.seed)
    return Task(nn.Linear(3, 2), data)
"""


def test_clients_train_on_their_own_data(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with federation(tmp_path, 2) as f:
        settings = ["task=own:make_task", "population=2", "participation.cohort=2"]
        settings += ["engine.min_clients=2", "rounds=1"]
        f.server("fedavg", *settings, PYTHONPATH=str(tmp_path))
        for i, num_rows in enumerate((7, 31)):
            folder = tmp_path / f"data-{i}"
            folder.mkdir()
            (folder / "id").write_text(str(i))
            (folder / "rows").write_text(str(num_rows))
            f.client(i, "--data", folder, PYTHONPATH=str(tmp_path))
        f.finished()
        table = pyarrow.parquet.read_table(f.run / "clients.parquet").to_pylist()
    trained = [row for row in table if row["function"] == "train"]
    assert {row["client"]: row["num_examples"] for row in trained} == {0: 7, 1: 31}


def test_who_may_not_take_part_is_refused_with_a_line_on_both_ends(
    tmp_path: Path,
) -> None:
    with federation(tmp_path, 3) as f:
        f.server("fedavg", *SMALL, ALL)  # the fourth never comes, so the run waits
        f.client(0)
        f.client(1)
        f.said("client-0", "client 0 is connected to .*, federation")
        f.said(
            "server",
            "waiting for clients: . of 4 are there, and min_clients = 4; missing: ",
        )
        the_operator_sees_who_is_there(f)
        copies_of_a_client_are_refused(f)
        strangers_are_refused(f)
        another_version_is_refused(f)

        # A key is revoked while its client is connected.
        (f.certs / "server" / "clients" / "client-1.pub").unlink()
        unknown = "its key is not one of those that may join"
        f.said("server", "client-1 may not take part any more")
        f.said("server", f"refused .*: {unknown}")
        f.said("client-1", f"the server refuses this client: {unknown}")
        for name in ("client-1", "copy", "stranger"):
            assert f.processes[name].wait(PATIENCE) == 1, f.log(name)
        assert f.processes["client-0"].poll() is None, "it belongs here"


def output_of(*words: object) -> dict[str, Any]:
    """What a command prints with --json."""
    command = fedcore(*words, "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    output: dict[str, Any] = json.loads(done.stdout)
    return output


def the_operator_sees_who_is_there(f: Federation) -> None:
    keys = f.certs / "client-2"
    doctor = output_of("doctor", "--certs", keys, "--server", f.address)
    names = {check["check"] for check in doctor["checks"]}
    assert {"this client's signature", "the server's fedcore"} <= names
    nodes = output_of("status", f.run)["nodes"]
    assert [node["name"] for node in nodes] == ["client-0", "client-1", "client-2"]
    assert [node["status"] for node in nodes][:2] == ["online", "online"]
    assert nodes[0]["last_seen_s"] is not None
    assert nodes[2]["last_seen_s"] is None


def copies_of_a_client_are_refused(f: Federation) -> None:
    """Another process of the device, and another device with a copy of its key."""
    keys = f.certs / "client-0"
    twin = f.start("twin", f.client_command(0, keys, f.folder / "state-0"))
    assert "another client runs in it" in f.said("twin", "fedcore: --state")
    assert twin.wait(PATIENCE) == 2
    f.start("copy", f.client_command(0, keys, f.folder / "copy"))
    refusal = "a client with its key is connected already"
    f.said("server", f"refused client-0: {refusal}")
    f.said("copy", f"the server refuses this client: {refusal}")


def strangers_are_refused(f: Federation) -> None:
    """A key of another federation, an id that is not the key's, and no TLS."""
    others = f.folder / "others"
    certs.make(others, ["localhost"], 1)
    (others / "client-0" / "ca.crt").write_bytes((f.certs / "ca.crt").read_bytes())
    f.start("stranger", f.client_command(2, others / "client-0", f.folder / "s1"))
    f.start("impostor", f.client_command(3, f.certs / "client-2", f.folder / "s2"))
    words: list[object] = ["--id", 3, "--server", f.address, "--insecure"]
    f.start("plain", fedcore("client", *words, "--state", f.folder / "s3"))
    unknown = "its key is not one of those that may join"
    f.said("server", f"refused a client with the key .*: {unknown}")
    f.said("stranger", f"the server refuses this client: {unknown}")
    impostor = "it says that it is client 3 and has the key of client 2"
    f.said("server", f"is left out: {impostor}")
    f.said("impostor", f"the server refuses this client: {impostor}")
    f.said("plain", "speaks TLS and this client does not")
    no_tls = r"refused a caller that does not speak TLS: .*--certs.* "
    f.said("server", no_tls + r"\(from 127.0.0.1:\d+\)")
    times = len(re.findall("does not speak TLS", f.log("server")))
    assert times == 1, "it is said once, however often it tries"
    for name in ("impostor", "plain"):
        assert f.processes[name].wait(PATIENCE) == 1, f.log(name)


def another_version_is_refused(f: Federation) -> None:
    pretend = (
        "import fedcore, fedcore.client.app; "
        "fedcore.__version__ = fedcore.client.app.__version__ = '0.0.9'; "
        "from fedcore.cli import main; main()"
    )
    command = f.client_command(2, f.certs / "client-2", f.folder / "s4")
    words = command[command.index("client") :]
    old = f.start("old", [sys.executable, "-c", pretend, *words])
    f.said(
        "server",
        "is left out: it runs fedcore 0.0.9, the server 0.1.0: "
        "install the same on both",
    )
    f.said("old", "the server refuses this client: it runs fedcore 0.0.9")
    assert old.wait(PATIENCE) == 1


def signed(key: Any, seconds: float = 0) -> list[tuple[str, Any]]:
    """The metadata of a call that is signed at a time from now."""
    now = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    public = public_key_to_bytes(key.public_key())
    signature = sign_message(key, now.encode())
    return [
        ("flwr-public-key-bin", public),
        ("flwr-timestamp", now),
        ("flwr-signature-bin", signature),
    ]


def refused(call: Any, request: Any, metadata: Any) -> str:
    """The reason why the server does not take a call."""
    with pytest.raises(grpc.RpcError) as error:
        call(request, metadata=metadata, timeout=PATIENCE)
    return str(error.value.details())


def test_replays_and_too_large_answers_are_refused_by_the_running_server(
    tmp_path: Path,
) -> None:
    with federation(tmp_path, 1) as f:
        f.server("fedavg", *SMALL, ALL, "engine.message_limit_mb=1")
        f.said("server", "listening on")
        key = certs.load_private(f.certs / "client-0" / "client.key")
        credentials = grpc.ssl_channel_credentials((f.certs / "ca.crt").read_bytes())
        with grpc.secure_channel(f.address, credentials) as channel:
            version = RuntimeVersionClientInterceptor("SuperNode")
            stub = FleetStub(grpc.intercept_channel(channel, version))
            public, once = public_key_to_bytes(key.public_key()), signed(key)
            hello = fleet_pb2.ActivateNodeRequest(
                public_key=public, heartbeat_interval=10
            )
            node = stub.ActivateNode(hello, metadata=once, timeout=PATIENCE)
            pull = fleet_pb2.PullMessagesRequest()
            pull.node.node_id = node.node_id
            assert "is a replay" in refused(stub.PullMessages, pull, once)
            f.said("server", "refused client-0: a signature was used a second time")
            old = signed(key, -400)
            assert "Invalid timestamp" in refused(stub.PullMessages, pull, old)
            f.said("server", "refused client-0: Invalid timestamp")
            assert "authentication" in refused(stub.PullMessages, pull, [])
            missing = "Missing authentication metadata"
            f.said("server", f"refused a caller without a key: {missing}")
            large = message_pb2.PushObjectRequest(
                run_id=1, session_id="s", object_id="o", object_content=bytes(3_000_000)
            )
            large.node.node_id = node.node_id
            assert "over the limit of" in refused(stub.PushObject, large, signed(key))
            limit = r"its message is over the limit of .* MB "
            setting = r"\(engine.message_limit_mb\)"
            f.said("server", f"refused client-0: {limit}{setting}")
