"""Server and clients as users start them: real processes, TLS, node authentication, and what breaks."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower.federation import Federation, fedcore, federation, free_port, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
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
    result = run(
        Experiment.load(preset, [*settings, "engine.name=sequential"]),
        folder / "sequential",
    )
    return result.final | {"sha256": result.params_sha256}


def assert_as(result: dict[str, Any], expected: dict[str, Any], f: Federation) -> None:
    assert result["dropped"] == {}, f.everything()
    assert result["final"]["test_loss"] == pytest.approx(
        expected["test_loss"], abs=1e-4
    )
    assert result["final"]["client_loss"]["mean"] == pytest.approx(
        expected["client_loss"]["mean"], abs=1e-4
    )


@pytest.mark.parametrize("method", ["fedavg", "fedau", "scaffold", "fedalt"])
def test_devices_over_tls_compute_what_sequential_computes(
    method: str, tmp_path: Path
) -> None:
    settings = [
        *SMALL,
        "rounds=4",
        "participation.cohort=3",
    ]  # two of them in another round each: state and counters count
    expected = sequential(method, tmp_path, *settings)
    with federation(tmp_path, 4) as f:
        f.server(method, *settings, ALL)
        for i in range(3):
            f.client(i)
        if method != "scaffold":
            f.client(3)
        else:  # a stock SuperNode joins the same federation, and keeps its state in a directory, too
            where = f"partition-id=3 state='{tmp_path / 'stock'}'"
            tls = ["--root-certificates", str(f.certs / "client-3" / "ca.crt")]
            key = [
                "--auth-supernode-private-key",
                str(f.certs / "client-3" / "client.key"),
            ]
            command = [
                str(Path(sys.executable).parent / "flower-supernode"),
                "--superlink",
                f.address,
                *tls,
                *key,
                "--port",
                str(free_port()),
            ]
            f.start(
                "stock",
                [*command, "--node-config", where],
                FLWR_HOME=str(tmp_path / "home"),
                PATH=path(),
            )
        result = f.finished(150)
    assert_as(result, expected, f)
    assert result["method"] == method


def path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_whatever_is_killed_the_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    settings = [*SMALL, "rounds=24"]
    expected = sequential("scaffold", tmp_path, *settings)
    with federation(tmp_path, 4) as f:
        f.server("scaffold", *settings, ALL)
        f.all_clients()
        f.reached(3)
        os.kill(f.serverapp(), signal.SIGKILL)
        f.said("server", "the ServerApp ended by signal 9 .*; starting it again")
        f.reached(8)
        os.kill(f.facts()["superlink"], signal.SIGKILL)
        f.said("server", "the SuperLink ended by signal 9 .*; starting it again")
        f.reached(13)
        for name in list(f.processes):
            f.kill(name)
        f.all_clients()
        f.server("scaffold", *settings, ALL)
        result = f.finished(120)
    assert_as(result, expected, f)
    assert [row["round"] for row in f.rows()] == list(range(1, 25))
    assert result["params_sha256"] == expected["sha256"], "not the same bits"


@pytest.mark.parametrize("to", ["the server", "all its processes"])
def test_a_server_that_is_told_to_end_leaves_a_checkpoint_and_no_process(
    to: str, tmp_path: Path
) -> None:
    settings = [
        *SMALL,
        "rounds=12",
        "checkpoint.seconds=1000",
    ]  # none but the one that it writes when it is told
    expected = sequential("scaffold", tmp_path, *settings)
    with federation(tmp_path, 4) as f:
        f.server("scaffold", *settings, ALL)
        f.all_clients()
        f.reached(3)
        own = [f.serverapp(), f.facts()["superlink"]]
        server = f.processes["server"]
        for number in [
            server.pid,
            *(own if to != "the server" else []),
        ]:  # systemd and terminals signal all of them
            os.kill(number, signal.SIGTERM)
        assert server.wait(30) == 130, f.everything()
        assert not [number for number in own if Path(f"/proc/{number}").exists()], (
            "it left a process behind"
        )
        log = f.log("server")
        assert "fedcore: interrupted; go on with the same command and --out" in log
        assert "Traceback" not in log
        if to == "the server":
            done = json.loads((f.run / "checkpoint" / "state.json").read_text())[
                "round"
            ]
            assert done == len(f.rows()) >= 3
        f.server("scaffold", *settings, ALL)
        result = f.finished(120)
    assert_as(result, expected, f)
    assert [row["round"] for row in f.rows()] == list(range(1, 13))
    assert result["params_sha256"] == expected["sha256"], "not the same bits"


def test_a_server_that_waits_for_clients_ends_when_it_is_told_to(
    tmp_path: Path,
) -> None:
    with federation(tmp_path, 4) as f:
        server = f.server("fedavg", *SMALL, "rounds=2", ALL)
        f.client(0)
        f.said("server", "waiting for clients: 1 of 4 are there", 90)
        begin = time.monotonic()
        server.terminate()
        assert server.wait(30) == 130, f.everything()
        assert time.monotonic() - begin < 8, "docker stop gives it ten seconds"
        assert "Traceback" not in f.log("server")


def test_four_random_faults_in_a_row_leave_no_trace() -> None:
    from benchmarks.deployment import faults

    seed = random.SystemRandom().randrange(10**6)
    assert faults(4, seed), f"seed {seed}"


def test_a_client_killed_in_a_round_costs_that_round_itself_alone_and_comes_back(
    tmp_path: Path,
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with federation(tmp_path, 4) as f:
        f.server(
            "fedavg",
            *SMALL,
            "rounds=5",
            ALL,
            "task=slow:make_task",
            PYTHONPATH=str(tmp_path),
        )
        for i in range(4):
            f.client(i, PYTHONPATH=str(tmp_path), SLOW="3" if i == 2 else "0.3")
        waiting = f.run / "waiting.json"
        until(
            lambda: (
                len(f.rows()) >= 1
                and waiting.exists()
                and '"waiting_for": [2]' in waiting.read_text()
            ),
            60,
            f.everything,
        )
        f.kill("client-2")
        f.client(2, PYTHONPATH=str(tmp_path))
        f.finished(100)
    dropped = [row["dropped"] for row in f.rows()]
    assert dropped.count({}) == 4, dropped
    assert {"disconnected": 1} in dropped, dropped
    assert "connected to" in f.log("client-2")


SLOW = """
import os, time
from fedcore import Experiment
from fedcore.tasks import images
from fedcore.data.federated import FederatedData

class Slow(FederatedData):
    def batches(self, clients, data, *rest):
        if data == "train":
            time.sleep(float(os.environ.get("SLOW", "0")))
        return super().batches(clients, data, *rest)

def make_task(e):
    task = images(e, "digits")
    task.data.__class__ = Slow
    return task
"""


def test_a_late_client_is_left_out_at_the_deadline_and_the_goal_ends_a_round_early(
    tmp_path: Path,
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with federation(tmp_path, 4) as f:
        limits = [
            "engine.round_timeout=8",
            "min_reports=2",
            "rounds=4",
            "evaluation.clients=0",
        ]
        f.server(
            "fedavg",
            *SMALL,
            *limits,
            ALL,
            "task=slow:make_task",
            PYTHONPATH=str(tmp_path),
        )
        for i in range(4):
            f.client(i, PYTHONPATH=str(tmp_path), SLOW="12" if i == 1 else "0")
        result = f.finished(100)
    assert {"timeout": 1} in [row["dropped"] for row in f.rows()], f.rows()
    assert sum(row.get("late_answers", 0) for row in f.rows()) >= 1, (
        f.rows()
    )  # it did answer, after the deadline
    assert result["late_answers"] == sum(row.get("late_answers", 0) for row in f.rows())
    assert all(row["reports"] >= 3 for row in f.rows()), f.rows()


def test_over_sampling_ends_a_round_at_its_goal(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with federation(tmp_path, 4) as f:
        goal = ["engine.report_goal=3", "rounds=3", "evaluation.clients=0"]
        f.server(
            "fedavg",
            *SMALL,
            *goal,
            ALL,
            "task=slow:make_task",
            PYTHONPATH=str(tmp_path),
        )
        for i in range(4):
            f.client(i, PYTHONPATH=str(tmp_path), SLOW="30" if i == 1 else "0")
        f.finished(100)
    assert [row["reports"] for row in f.rows()] == [3, 3, 3]
    assert [row["dropped"] for row in f.rows()] == [{"not needed": 1}] * 3


def test_a_network_that_is_cut_for_half_a_minute_heals_by_itself(
    tmp_path: Path,
) -> None:
    with federation(tmp_path, 4) as f:
        f.server("scaffold", *SMALL, "rounds=12", ALL)
        proxy = f.proxy(3)
        f.all_clients()
        f.reached(3)
        proxy.cut_for(30)
        cut_at = len(f.rows())
        assert cut_at < 12, "the run did not notice"
        f.finished(100)
    rows = f.rows()
    assert [row["round"] for row in rows] == list(range(1, 13))
    assert sum(sum(row["dropped"].values()) for row in rows) <= 2, (
        rows
    )  # it was asked, or about to be, when it was cut
    assert rows[-1]["reports"] == 4
    assert "connected again after" in f.log("client-3") or "connected to" in f.log(
        "client-3"
    )


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
        client, rows = int((e.data_folder / "id").read_text()), np.arange(int((e.data_folder / "rows").read_text()))
        sizes[client] = len(rows)
    data = FederatedData(Examples(x, y), Examples(x[:9], y[:9]), rows, np.append(0, np.cumsum(sizes)), 0.0, e.seed)
    return Task(nn.Linear(3, 2), data)
"""


def test_clients_train_on_their_own_data(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with federation(tmp_path, 2) as f:
        given = [
            "task=own:make_task",
            "population=2",
            "participation.cohort=2",
            "engine.min_clients=2",
            "rounds=1",
        ]
        f.server("fedavg", *given, PYTHONPATH=str(tmp_path))
        for i, rows in enumerate((7, 31)):
            folder = tmp_path / f"data-{i}"
            folder.mkdir()
            (folder / "id").write_text(str(i))
            (folder / "rows").write_text(str(rows))
            f.client(i, "--data", folder, PYTHONPATH=str(tmp_path))
        f.finished(60)
        table = pyarrow.parquet.read_table(f.run / "clients.parquet").to_pylist()
    assert {
        row["client"]: row["num_examples"]
        for row in table
        if row["function"] == "train"
    } == {0: 7, 1: 31}


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
            60,
        )

        # those who see to it: all is well from a device's side, and who is there
        place = ["--certs", str(f.certs / "client-2"), "--server", f.address]
        doctor = subprocess.run(
            fedcore("doctor", *place, "--json"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
        assert {"this client's signature", "the server's fedcore"} <= {
            check["check"] for check in json.loads(doctor.stdout)["checks"]
        }
        status = json.loads(
            subprocess.run(
                fedcore("status", f.run, "--json"), capture_output=True, check=True
            ).stdout
        )
        assert [(node["name"], node["status"]) for node in status["nodes"]][:2] == [
            ("client-0", "online"),
            ("client-1", "online"),
        ]
        assert status["nodes"][2]["last_seen_s"] is None
        assert status["nodes"][0]["last_seen_s"] < 25

        # another process of the device, and another device with a copy of the key
        twin = f.start(
            "twin",
            fedcore(
                "client",
                "--id",
                0,
                "--server",
                f.address,
                "--certs",
                f.certs / "client-0",
                "--state",
                tmp_path / "state-0",
            ),
        )
        assert "another client runs in it" in f.said("twin", "fedcore: --state")
        assert twin.wait(20) == 2
        f.start(
            "copy",
            fedcore(
                "client",
                "--id",
                0,
                "--server",
                f.address,
                "--certs",
                f.certs / "client-0",
                "--state",
                tmp_path / "copy",
            ),
        )
        f.said("server", "refused client-0: a client with its key is connected already")
        f.said(
            "copy",
            "the server refuses this client: a client with its key is connected already",
        )

        # a key that nobody registered, an id that is not the key's, another version, no TLS
        from fedcore.deploy import certs

        certs.make(tmp_path / "others", ["localhost"], 1)
        (tmp_path / "others" / "client-0" / "ca.crt").write_bytes(
            (f.certs / "ca.crt").read_bytes()
        )
        start = fedcore("client", "--server", f.address)
        f.start(
            "stranger",
            [
                *start,
                "--id",
                "2",
                "--certs",
                str(tmp_path / "others" / "client-0"),
                "--state",
                str(tmp_path / "s1"),
            ],
        )
        f.start(
            "impostor",
            [
                *start,
                "--id",
                "3",
                "--certs",
                str(f.certs / "client-2"),
                "--state",
                str(tmp_path / "s2"),
            ],
        )
        f.start(
            "plain",
            [*start, "--id", "3", "--insecure", "--state", str(tmp_path / "s3")],
        )
        f.said(
            "server",
            "refused a client with the key .*: its key is not one of those that may join",
        )
        f.said(
            "stranger",
            "the server refuses this client: its key is not one of those that may join",
        )
        f.said(
            "server",
            "is left out: it says that it is client 3 and has the key of client 2",
        )
        f.said(
            "impostor",
            "the server refuses this client: it says that it is client 3 and has the key of client 2",
        )
        f.said("plain", "speaks TLS and this client does not")
        f.said(
            "server",
            r"refused a caller that does not speak TLS: .*--certs.* \(from 127.0.0.1:\d+\)",
        )
        assert len(re.findall("does not speak TLS", f.log("server"))) == 1, (
            "it is said once, however often it tries"
        )
        assert f.processes["impostor"].wait(20) == f.processes["plain"].wait(20) == 1

        pretend = "import fedcore, client.app; fedcore.__version__ = client.app.__version__ = '0.0.9'"
        old = f"{pretend}; from fedcore.cli import main; main()"
        words = [
            "client",
            "--server",
            f.address,
            "--id",
            "2",
            "--certs",
            str(f.certs / "client-2"),
            "--state",
            str(tmp_path / "s4"),
        ]
        f.start("old", [sys.executable, "-c", old, *words])
        f.said(
            "server",
            "is left out: it runs fedcore 0.0.9, the server 0.1.0: install the same on both",
        )
        f.said("old", "the server refuses this client: it runs fedcore 0.0.9")
        assert f.processes["old"].wait(20) == 1

        # a key that is revoked while its client is connected
        (f.certs / "server" / "clients" / "client-1.pub").unlink()
        f.said("server", "client-1 may not take part any more")
        f.said("server", "refused .*: its key is not one of those that may join")
        f.said(
            "client-1",
            "the server refuses this client: its key is not one of those that may join",
        )
        assert f.processes["client-1"].wait(40) == 1
        assert f.processes["copy"].wait(40) == f.processes["stranger"].wait(40) == 1
        assert f.processes["client-0"].poll() is None, (
            "the one that belongs here is still here"
        )


def test_replays_and_too_large_answers_are_refused_by_the_running_server(
    tmp_path: Path,
) -> None:
    import grpc
    from flwr.proto import fleet_pb2, message_pb2
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    from fedcore.deploy import certs

    with federation(tmp_path, 1) as f:
        f.server("fedavg", *SMALL, ALL, "engine.message_limit_mb=1")
        f.said("server", "listening on")
        key = certs.load_private(f.certs / "client-0" / "client.key")
        credentials = grpc.ssl_channel_credentials((f.certs / "ca.crt").read_bytes())
        with grpc.secure_channel(f.address, credentials) as channel:
            stub = FleetStub(
                grpc.intercept_channel(
                    channel, RuntimeVersionClientInterceptor("SuperNode")
                )
            )

            def signed(seconds: float = 0) -> list[tuple[str, Any]]:
                from datetime import UTC, datetime, timedelta

                now = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
                public = public_key_to_bytes(key.public_key())
                names = "flwr-public-key-bin", "flwr-timestamp", "flwr-signature-bin"
                return list(
                    zip(
                        names,
                        (public, now, sign_message(key, now.encode())),
                        strict=True,
                    )
                )

            def refused(call: Any, request: Any, metadata: Any) -> str:
                with pytest.raises(grpc.RpcError) as error:
                    call(request, metadata=metadata, timeout=10)
                return str(error.value.details())

            public = public_key_to_bytes(key.public_key())
            once = signed()
            hello = fleet_pb2.ActivateNodeRequest(
                public_key=public, heartbeat_interval=10
            )
            node = stub.ActivateNode(hello, metadata=once, timeout=10)
            pull = fleet_pb2.PullMessagesRequest()
            pull.node.node_id = node.node_id
            assert "is a replay" in refused(stub.PullMessages, pull, once)
            f.said("server", "refused client-0: a signature was used a second time")
            assert "Invalid timestamp" in refused(stub.PullMessages, pull, signed(-400))
            f.said("server", "refused client-0: Invalid timestamp")
            assert "authentication" in refused(stub.PullMessages, pull, [])
            f.said(
                "server",
                "refused a caller without a key: Missing authentication metadata",
            )
            large = message_pb2.PushObjectRequest(
                run_id=1, session_id="s", object_id="o", object_content=bytes(3_000_000)
            )
            large.node.node_id = node.node_id
            assert "over the limit of" in refused(stub.PushObject, large, signed())
            f.said(
                "server",
                r"refused client-0: its message is over the limit of .* MB \(engine.message_limit_mb\)",
            )
