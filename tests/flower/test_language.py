"""Frozen parameters: the same on the server and on every device, or no round."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import fedcore.client.app
import fedcore.server.nodes
import numpy as np
import pytest
import torch
from fedcore.server.bundle import bundle_of
from fedcore.server.grid import GridEngine
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.torch import load_file, save_file
from torch import nn

from fedcore import Examples, Experiment, FederatedData, Task, __version__
from fedcore.audit.cells import prepare_captured
from fedcore.audit.plan import Plan
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.loop import Loop, Quiet, run
from tests.flower.fake import FakeGrid
from tests.helpers import small

CLIENTS = 4


class OnFrozen(nn.Module):
    """A head that is trained, on features that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.head = nn.Linear(3, 2)
        self.features.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.features(x).tanh() * self.scale)
        return hidden


def frozen(e: Experiment) -> Task:
    """Features from the file that the options name, the same everywhere by default."""
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.standard_normal((24, 5), dtype=np.float32))
    rows = Examples(x, (x.sum(1) > 0).long())
    offsets = np.arange(CLIENTS + 1) * 6
    data = FederatedData(rows, rows, np.arange(24), offsets, e.holdout, e.seed)
    model = OnFrozen()
    if "weights" in e.options:
        model.features.load_state_dict(load_file(e.options["weights"]))
    return Task(model, data)


def settings(**more: Any) -> Experiment:
    return small(
        "fedavg",
        task=f"{__name__}:frozen",
        population=CLIENTS,
        participation__cohort=CLIENTS,
        **{"options": {}, "rounds": 2, **more},
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.safetensors"
    save_file(nn.Linear(5, 3).state_dict(), file)
    return file


def with_one_byte_changed(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    other = file.with_name(f"other-{file.name}")
    other.write_bytes(content)
    return other


def test_the_base_is_what_is_frozen_and_nothing_else() -> None:
    task = frozen(settings())
    base = task.base_sha256
    assert len(base) == 64
    with torch.no_grad():
        task.model.head.weight += 1
        task.model.get_buffer("passing").add_(1)
    assert task.with_model(task.model).base_sha256 == base
    with torch.no_grad():
        task.model.get_buffer("scale")[0] += 2**-20
    assert task.with_model(task.model).base_sha256 != base
    assert task.with_model(nn.Linear(5, 2)).base_sha256 == ""


def test_a_run_says_its_base_and_does_not_go_on_with_another(
    tmp_path: Path, weights: Path
) -> None:
    options = {"weights": str(weights)}
    run(settings(options=options), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert said["base_sha256"] == frozen(settings(options=options)).base_sha256
    before = weights.read_bytes()
    with_one_byte_changed(weights).replace(weights)
    longer = settings(options=options, rounds=3)
    with pytest.raises(SettingsError, match=r"another base \(sha256 \w{12}\) than"):
        run(longer, resume=tmp_path / "run")
    with pytest.raises(SettingsError, match="was made on another base"):
        prepare_captured(longer, tmp_path / "run", Plan(), 1)
    after = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert after == said, "a refused start writes nothing"
    weights.write_bytes(before)
    assert len(run(longer, resume=tmp_path / "run").history) == 3


def test_a_run_without_frozen_parameters_has_no_base(tmp_path: Path) -> None:
    run(small("fedavg", rounds=1), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert said["base_sha256"] is None


def grid_of(e: Experiment, folder: Path) -> FakeGrid:
    preset = folder / "preset.toml"
    preset.write_text(e.to_toml())
    return FakeGrid(str(preset), CLIENTS)


def loop_over(e: Experiment, grid: FakeGrid, folder: Path) -> Loop:
    (folder / "run").mkdir()

    def engine(work: Any) -> GridEngine:
        return GridEngine(grid, work, 60)  # type: ignore[arg-type]

    return Loop(e, folder / "run", Quiet(), engine, False)


def place(grid: FakeGrid, node: int, **more: Any) -> None:
    """Give a node entries of a device's node config."""
    grid.contexts[node].node_config.update(more)


def test_a_device_with_one_byte_changed_is_refused_by_name_before_a_round(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.0)
    e = settings(options={"weights": str(weights)})
    grid = grid_of(e, tmp_path)
    other = with_one_byte_changed(weights)
    place(grid, 102, set=f"options.weights={other}", state=str(tmp_path / "state"))
    told: list[str] = []
    hear = grid.push_messages

    def push(messages: Any) -> list[str]:
        messages = list(messages)
        for message in messages:
            if "refused" in message.content.get("server", {}):
                told.append(str(message.content["server"]["refused"]))
        return hear(messages)

    monkeypatch.setattr(grid, "push_messages", push)
    loop = loop_over(e, grid, tmp_path)
    assert loop.round()["dropped"] == {"disconnected": 1}
    ours = frozen(e).base_sha256[:12]
    theirs = frozen(settings(options={"weights": str(other)})).base_sha256[:12]
    reason = (
        f"its base (sha256 {theirs}) is another than the server's (sha256 {ours}): "
        "give it a copy of the server's"
    )
    said = f"Flower node 102 (client 2) is left out: {reason}"
    assert said in caplog.messages
    assert told == [reason], "the device hears it, and says it in its own log"


def test_a_device_that_lacks_its_base_hears_what_is_missing_and_not_of_another(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.0)
    e = settings(options={"weights": str(weights)})
    grid = grid_of(e, tmp_path)
    place(grid, 102, base=str(tmp_path / "nowhere"))
    assert loop_over(e, grid, tmp_path).round()["dropped"] == {"disconnected": 1}
    (said,) = [text for text in caplog.messages if "is left out" in text]
    assert f"it is not ready: SettingsError: base = {tmp_path}/nowhere: " in said


def test_a_run_on_bases_none_of_which_is_the_servers_ends_with_the_reason(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.0)
    grid = grid_of(settings(), tmp_path)
    e = settings(options={"weights": str(weights)})
    with pytest.raises(RunError, match=r"no Flower node can take part: its base"):
        loop_over(e, grid, tmp_path).round()


def test_clients_on_flower_nodes_that_hold_the_base_take_part(tmp_path: Path) -> None:
    e = settings()
    row = loop_over(e, grid_of(e, tmp_path), tmp_path).round()
    assert row["dropped"] == {}
    head, loss = 3 * 2 + 2, 1
    assert row["bytes_down"] == CLIENTS * 4 * head, "the frozen part never travels"
    assert row["bytes_up"] == CLIENTS * 4 * (head + loss)


def introduction(preset: str, **node: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"preset": preset, "set": f"population={CLIENTS}"}
    context = Context(1, 100, {"partition-id": 1, **node}, RecordDict(), config)
    content = RecordDict({"server": ConfigRecord({"fedcore": __version__})})
    question = Message(content, dst_node_id=100, message_type="query")
    record = fedcore.client.app.app(question, context).content["node"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def test_a_device_without_the_base_is_not_ready_and_says_how_to_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "preset.toml"
    preset.write_text(settings(base="bases/none").to_toml())
    said = introduction(str(preset))
    assert "base = bases/none: this device has no such folder" in said["not-ready"]
    assert "--base DIR" in said["not-ready"]
    said = introduction(str(preset), base=str(tmp_path / "mine"))
    assert f"base = {tmp_path}/mine: this device has no" in said["not-ready"]


def test_a_device_without_the_pretrained_model_says_which_setting_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "preset.toml"
    e = settings(model={"name": "hf", "path": "models/none"})
    preset.write_text(e.to_toml())
    said = introduction(str(preset))
    assert "model.path = models/none: this device has no" in said["not-ready"]
    assert "--set model.path=DIR" in said["not-ready"]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_a_node_gets_the_plays_with_the_app_where_the_task_needs_them() -> None:
    text = "fedcore/data/text/shakespeare.json"
    for task, expected in (("shakespeare", True), ("digits", False)):
        bundle = bundle_of(small("fedavg", task=task, options={}))
        with zipfile.ZipFile(io.BytesIO(bundle.content)) as files:
            assert (text in files.namelist()) is expected
        assert len(bundle.content) < 10e6, "Flower's limit"


TEXTS = """
method.name = "fedavg"
task = "texts"
data_folder = "all.jsonl"
base = "base-of-server"
population = 2
holdout = 0.25
text.length = 8
text.base = 0.5
model = {name = "gpt", width = 8, layers = 1, heads = 2}
lora.rank = 2
local = {steps = 2, batch_size = 2}
"""


def test_a_device_trains_on_its_own_text_with_its_copy_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = []
    for client in "abcd":
        text = f"to be or not to be, said {client}; " * 9
        lines.append(json.dumps({"client": client, "text": text}))
    Path("all.jsonl").write_text("\n".join(lines))
    Path("preset.toml").write_text(TEXTS)
    status, _, err = cli("pretrain", "preset.toml", "--steps", "1")
    assert status == 0, err
    Path("base-of-server").rename("copy")
    Path("all.jsonl").rename("elsewhere.jsonl")
    Path("own").mkdir()
    Path("own/letter.txt").write_text("that is the question of 41 characters\n\n\n\n")
    node = {"data": "own", "base": "copy", "state": "state"}
    said = introduction("preset.toml", **node)
    assert "not-ready" not in said
    assert len(said["base"]) == 64
    tokenizer = Path("copy/tokenizer.json")
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(whole.replace(b"b", b"x", 1))
    fedcore.client.app.work_of.cache_clear()
    reason = introduction("preset.toml", **node)["not-ready"]
    assert "base = copy: tokenizer.json: its sha256 is" in reason
    tokenizer.write_bytes(whole)
    context = Context(
        1,
        100,
        {"partition-id": 1, **node},
        RecordDict(),
        {"preset": "preset.toml", "set": f"population={CLIENTS}"},
    )
    task = fedcore.client.app._work_for(context).task
    assert task.base_sha256 == said["base"]
    rows = task.data.rows(1, "train")
    assert len(rows) == 4, "of six windows, in order"
    assert task.num_examples(np.array([1]), "train").tolist() == [4 * 8]
