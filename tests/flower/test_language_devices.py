"""Adapters on a pretrained base, trained on two devices over TLS that hold the base."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower.federation import environment, fedcore, federation
from tests.helpers import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]

RANK, WIDTH, LAYERS = 4, 16, 1
# Floats of the factors of qkv, proj, fc1 and fc2 in each block: r (m + n).
FACTORS = LAYERS * RANK * WIDTH * (4 + 2 + 5 + 5)
PRESET = f"""
method.name = "exactlora"
method.form = "fedex"
method.local_lr = 0.05
task = "shakespeare"
base = "base-of-server"
population = 2
rounds = 2
holdout = 0.2
text.length = 16
text.base = 0.8
text.least = 15000
model.name = "gpt"
model.width = {WIDTH}
model.layers = {LAYERS}
lora.rank = {RANK}
lora.targets = ["qkv", "proj", "fc1", "fc2"]
local.steps = 2
local.batch_size = 4
participation.cohort = 2
evaluation.every = 100
"""


LLAMA = """
method.name = "fedavg"
method.local_lr = 0.05
task = "shakespeare"
population = 2
rounds = 2
holdout = 0.2
text.length = 16
text.base = 0.8
text.least = 15000
model = {name = "hf", path = "llama-of-server"}
lora.rank = 2
lora.targets = ["q_proj", "v_proj"]
local.steps = 2
local.batch_size = 4
participation.cohort = 2
evaluation.every = 100
"""
SAVE_LLAMA = """
import torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=80, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
)
transformers.LlamaForCausalLM(config).save_pretrained("llama-of-server")
"""


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """The settings, beside a base of three steps and a copy for each device."""
    file = tmp_path / "adapters.toml"
    file.write_text(PRESET)
    words = fedcore("pretrain", file.name, "--steps", "3")
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    for i in range(2):
        shutil.copytree(tmp_path / "base-of-server", tmp_path / f"base-of-{i}")
    return file


def change_one_byte(folder: Path) -> None:
    """Of one weight; base.json knows of it, as that of another training does."""
    weights = folder / "base.safetensors"
    values = load_file(weights)
    values["blocks.0.fc1.weight"].view(torch.uint8)[0, 0] ^= 1
    save_file(values, weights)
    facts = json.loads((folder / "base.json").read_text())
    facts["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "base.json").write_text(json.dumps(facts))


def sequential(preset: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(preset.parent)
    experiment = Experiment.load(str(preset), ["engine.name=sequential"])
    result = run(experiment, preset.parent / "sequential")
    sent = [(row["bytes_down"], row["bytes_up"]) for row in result.history]
    return {**result.final, "sent": sent}


def test_devices_train_factors_on_their_copies_of_the_base_and_no_other_takes_part(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sequential(preset, monkeypatch)
    shutil.copytree(tmp_path / "base-of-1", tmp_path / "other-base")
    change_one_byte(tmp_path / "other-base")
    with federation(tmp_path, 2) as f:
        f.server(preset.name, "engine.min_clients=2")
        f.client(0, "--base", "base-of-0")
        refused = f.client(1, "--base", "other-base")
        f.said(
            "server", r"\(client 1\) is left out: its base \(sha256 \w+\) is another"
        )
        f.said("client-1", "the server refuses this client: its base")
        assert refused.wait(PATIENCE) != 0
        assert f.rows() == [], "before any round"
        f.client(1, "--base", "base-of-1")
        result = f.finished()
    assert result["dropped"] == {}, f.everything()
    for name, value in expected.items():
        if name.endswith("loss") and isinstance(value, float):
            assert result["final"][name] == pytest.approx(value, abs=1e-4), name
    sent = [(row["bytes_down"], row["bytes_up"]) for row in f.rows()]
    assert sent == expected["sent"]
    factors, loss = 2 * 4 * FACTORS, 2 * 4
    # Down comes what the means of the round before lost: R by its factors, of rank r.
    assert sent == [(factors, factors + loss), (2 * factors, factors + loss)]
    said = json.loads((f.run / "environment.json").read_text())
    assert len(said["base_sha256"]) == 64


def test_a_llama_that_each_device_has_in_a_folder_trains_on_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    words = [sys.executable, "-c", SAVE_LLAMA]
    subprocess.run(words, cwd=tmp_path, env=environment(), check=True)
    folders = [tmp_path / f"llama-of-{i}" for i in range(2)]
    for folder in (*folders, tmp_path / "other"):
        shutil.copytree(tmp_path / "llama-of-server", folder)
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    preset = tmp_path / "llama.toml"
    preset.write_text(LLAMA)
    expected = sequential(preset, monkeypatch)
    with federation(tmp_path, 2) as f:
        f.server(preset.name, "engine.min_clients=2")
        f.client(0, "--set", f"model.path={folders[0]}")
        refused = f.client(1, "--set", "model.path=other")
        f.said(
            "server", r"\(client 1\) is left out: its base \(sha256 \w+\) is another"
        )
        assert refused.wait(PATIENCE) != 0
        f.client(1, "--set", f"model.path={folders[1]}")
        result = f.finished()
    assert result["dropped"] == {}, f.everything()
    for name in ("test_loss", "unseen_loss"):
        assert result["final"][name] == pytest.approx(expected[name], abs=1e-4), name
    factors = 2 * 4 * 2 * 2 * (16 + 16)  # clients, bytes, layers, r, m + n
    for row in f.rows():
        assert (row["bytes_down"], row["bytes_up"]) == (factors, factors + 2 * 4)
