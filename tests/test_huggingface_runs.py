"""Tiny transformers of Hugging Face in whole runs: the same in every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds.loop import Result, run
from fedcore.tasks import build_task
from tests.helpers import assert_close
from tests.pretrained import TARGETS, configuration

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", "local_lr": 0.5},
    "fedsa": {"name": "fedsim", "local_lr": 0.5, "personal": ["lora_B"]},
    "fedex": {"name": "exactlora", "form": "fedex", "local_lr": 0.5},
}
# Names of what the server has in the end.
KEPT = {
    "fedavg": {"lora_A", "lora_B"},
    "fedsa": {"lora_A"},
    "fedex": {"lora_A", "lora_B", "lora_change"},
}
ENGINES = ["vectorised", "ray"]


def experiment(kind: str, method: str, engine: str) -> Experiment:
    values: dict[str, Any] = {
        "task": f"tests.pretrained:{kind}",
        "method": METHODS[method],
        "rounds": 2,
        "lora": {"rank": 2, "targets": TARGETS[kind]},
        "local": {"steps": 3, "batch_size": 2},
        "participation": {"name": "uniform", "cohort": 4},
        "engine": {"name": engine, "workers": 1},
    }
    return Experiment.parse(values)


def losses(result: Result) -> list[float]:
    found = []
    for row in result.history:
        found += [row[name] for name in ("train_loss", "test_loss") if name in row]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_every_engine_comes_to_the_same(kind: str, method: str, tmp_path: Path) -> None:
    first = run(experiment(kind, method, "sequential"), tmp_path / "sequential")
    assert first.dropped == {}
    assert len(losses(first)) >= 3
    for engine in ENGINES:
        other = run(experiment(kind, method, engine), tmp_path / engine)
        assert losses(other) == pytest.approx(losses(first), abs=1e-5), engine
        assert_close(other.params, first.params, 2e-5, engine)
        if engine == "ray":
            assert other.params_sha256 == first.params_sha256
    names = {name.rpartition(".")[2] for name in first.params}
    assert names == KEPT[method]


def test_a_run_of_the_text_of_a_user(tmp_path: Path) -> None:
    """From a configuration; only factors travel."""
    lines = ["client,text"]
    for client in range(4):
        lines += [f"{client},{'ab ' * 10}{client}{'cd ' * 9}"] * 2
    (tmp_path / "texts.csv").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "task": "texts",
        "data_folder": tmp_path / "texts.csv",
        "text": {"length": 8, "tokens": "bytes"},
        "model": {"name": "hf", "config": configuration("llama")},
        "lora": {"rank": 2, "targets": ["q_proj"]},
        "method": {"name": "fedavg", "local_lr": 0.1},
        "rounds": 1,
        "holdout": 0.3,
        "local": {"steps": 1, "batch_size": 2},
        "participation": {"name": "uniform", "cohort": 2},
        "engine": {"name": "vectorised", "workers": 1},
    }
    result = run(Experiment.parse(values), tmp_path / "run")
    # Two clients, two layers, of A [2, 16] and B [16, 2] each, in four bytes.
    assert result.history[-1]["bytes_down"] == 2 * 2 * (2 * 16 + 16 * 2) * 4
    assert result.final["test_perplexity"] > 1


def test_a_model_of_text_is_refused_for_images() -> None:
    values = {
        "task": "digits",
        "method": {"name": "fedavg"},
        "model": {"name": "hf", "config": configuration("llama")},
    }
    with pytest.raises(SettingsError, match=r"model\.name"):
        build_task(Experiment.parse(values))


@pytest.mark.slow
def test_whole_models_train_without_adapters(tmp_path: Path) -> None:
    values = experiment("llama", "fedavg", "vectorised").model_dump()
    values["lora"] = {}
    other = {**values, "engine": {"name": "sequential"}}
    one = run(Experiment.parse(values), tmp_path / "one")
    two = run(Experiment.parse(other), tmp_path / "two")
    assert_close(one.params, two.params, 2e-5, "whole")
    assert "model.embed_tokens.weight" in one.params
    assert not torch.equal(
        one.params["lm_head.weight"],
        build_task(Experiment.parse(values)).init_params()["lm_head.weight"],
    )
