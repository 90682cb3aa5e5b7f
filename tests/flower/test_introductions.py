"""Introductions of nodes: ready for their first round, or left out until they are."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import fedcore.client.app
import fedcore.server.nodes
import fedcore.server.post
import pytest
from fedcore.server.grid import GridEngine
from fedcore.server.post import one_line
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedcore import __version__
from fedcore.config import Experiment
from fedcore.errors import RunError
from fedcore.rounds.loop import Loop, Quiet
from tests.flower.fake import FakeGrid
from tests.helpers import small

FIRST_WORK = """
import sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
import fedcore.client.app
from fedcore import __version__
from fedcore.messages import wire
from fedcore.types import Model

TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
config = {"preset": "fedavg", "set": "population=4 task=digits"}
context = Context(1, 100, {"partition-id": 0}, RecordDict(), config)

def ask(kind, **records):
    message = Message(RecordDict(records), dst_node_id=100, message_type=kind)
    return fedcore.client.app.app(message, context).content

ask("query", server=ConfigRecord({"fedcore": __version__}))
assert fedcore.client.app.work_of.cache_info().misses == 1, "the task was not built"
imported = set(sys.modules)
task = fedcore.client.app.work_of("fedavg", "population=4\\ntask=digits").task
down = Model(task.init_params())
work = ConfigRecord({"function": "train", "t": 0, "clients": [0]})
about = ask("train", down=wire.encode(down), work=work)["about"]
assert list(about["clients"]) == [0], list(about["reasons"])
assert fedcore.client.app.work_of.cache_info().misses == 1, "the task was built again"
late = sorted(set(sys.modules) - imported)
assert not late, f"the first work imported {late[:20]}"
"""


def test_the_first_work_of_a_node_that_has_introduced_itself_imports_nothing() -> None:
    command = [sys.executable, "-c", FIRST_WORK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def preset_of(experiment: Experiment, file: Path) -> str:
    file.write_text(experiment.to_toml())
    return str(file)


def introduction(context: Context, **hello: Any) -> dict[str, Any]:
    content = RecordDict({"server": ConfigRecord(hello)})
    question = Message(content, dst_node_id=100, message_type="query")
    record = fedcore.client.app.app(question, context).content["node"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def test_a_node_without_its_data_introduces_itself_and_says_what_is_missing() -> None:
    config: dict[str, Any] = {"preset": "nowhere.toml", "set": ""}
    context = Context(1, 100, {"partition-id": 3}, RecordDict(), config)
    said = introduction(context, fedcore=__version__)
    assert said["partition-id"] == 3
    assert said["fedcore"] == __version__
    assert "nowhere.toml" in said["not-ready"]


def test_a_node_does_not_touch_the_settings_of_a_server_of_another_version() -> None:
    config: dict[str, Any] = {"preset": "nowhere.toml", "set": ""}
    context = Context(1, 100, {"partition-id": 3}, RecordDict(), config)
    assert "not-ready" not in introduction(context, fedcore="0.0.9")
    refused = introduction(context, fedcore=__version__, refused="a reason")
    assert "not-ready" not in refused


@pytest.fixture
def grid(tmp_path: Path) -> FakeGrid:
    """Four nodes, of which 102 finds no preset."""
    experiment = small("fedavg", participation__cohort=12)
    grid = FakeGrid(preset_of(experiment, tmp_path / "preset.toml"), 4)
    grid.contexts[102] = grid.context(str(tmp_path / "late.toml"), 2, 4)
    return grid


def loop_over(grid: FakeGrid, folder: Path) -> Loop:
    experiment = small("fedavg", participation__cohort=12)
    (folder / "run").mkdir()

    def engine(work: Any) -> GridEngine:
        return GridEngine(grid, work, 60)  # type: ignore[arg-type]

    return Loop(experiment, folder / "run", Quiet(), engine, False)


def test_a_node_that_is_not_ready_is_left_out_with_its_reason_until_it_is(
    grid: FakeGrid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "ASK_AGAIN", 0.0)
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.0)
    loop = loop_over(grid, tmp_path)
    assert loop.round()["dropped"] == {"disconnected": 3}
    assert loop.round()["dropped"] == {"disconnected": 3}
    said = [text for text in caplog.messages if "is left out: it is not ready" in text]
    assert len(said) == 1, "the same reason is said once"
    assert "Flower node 102 (client 2)" in said[0]
    assert "late.toml" in said[0]
    preset_of(small("fedavg", participation__cohort=12), tmp_path / "late.toml")
    assert loop.round()["dropped"] == {}


def test_it_is_not_asked_again_at_every_look(
    grid: FakeGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.0)
    loop = loop_over(grid, tmp_path)
    loop.round()
    sent = grid.sent
    loop.round()
    assert grid.sent == sent + 6, "training and evaluation, for each of three nodes"


def test_the_first_node_to_come_keeps_no_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.0)
    preset = preset_of(
        small("fedavg", participation__cohort=12), tmp_path / "preset.toml"
    )
    grid = FakeGrid(preset, 4)
    liar, *others = [grid.context(preset, 0, 10**12), *grid.contexts.values()]
    grid.contexts = {99: dataclasses.replace(liar, node_id=99)}
    loop = loop_over(grid, tmp_path)
    assert loop.round()["dropped"] == {"disconnected": 11}
    for other in others:
        grid.contexts[other.node_id] = other
    loop.round()
    assert loop.round()["dropped"] == {}
    said = "Flower node 99 (client 0) is left out: a node says that it is one of "
    assert f"{said}1000000000000 partitions, others say 4" in caplog.messages


def test_a_device_does_not_play_a_malicious_client(tmp_path: Path) -> None:
    adversary = {"attack": "sign_flip", "clients": [1]}
    preset = preset_of(small("fedavg", adversary=adversary), tmp_path / "preset.toml")
    config: dict[str, Any] = {"preset": preset, "set": ""}
    for more, expected in (({}, False), ({"state": str(tmp_path)}, True)):
        node: dict[str, Any] = {"partition-id": 3, **more}
        context = Context(1, 100, node, RecordDict(), config)
        said = introduction(context, fedcore=__version__)
        assert ("does not play a malicious client" in str(said)) is expected


def test_a_run_without_a_node_that_is_ready_ends_with_the_reason(
    tmp_path: Path,
) -> None:
    grid = FakeGrid(str(tmp_path / "late.toml"), 4)
    with pytest.raises(RunError, match=r"no Flower node can take part: .*late\.toml"):
        loop_over(grid, tmp_path).round()


def test_a_reason_cannot_steer_the_terminal_of_the_operator() -> None:
    said = one_line("\x1b[31mred\u202e\n" + "long " * 100)
    assert said.startswith("\\x1b[31mred\\u202e long long")
    assert len(said) == 200
    assert said.isprintable()
