"""The plays under `flwr run .`: nodes have them of the app, and hash the same base."""

from __future__ import annotations

import json
from pathlib import Path

from tests.flower.test_flwr_run import (
    TWO_NODES,
    Flwr,
    clone,
    flwr,
    pytestmark,
    run_config,
)

__all__ = ["clone", "flwr", "pytestmark"]

SETTINGS = [
    "task=shakespeare",
    "population=2",
    "participation.cohort=2",
    "rounds=1",
    "holdout=0.2",
    "text.base=0.8",
    "text.least=15000",
    "text.length=16",
    "model.name=gpt",
    "model.width=16",
    "model.layers=1",
    "lora.rank=2",
    "local.steps=1",
    "local.batch_size=2",
]


def test_nodes_of_flower_train_factors_on_the_plays(flwr: Flwr, clone: Path) -> None:
    log = flwr("run", ".", "--stream", *run_config(SETTINGS), *TWO_NODES)
    files = list(clone.glob("runs/*/metrics.jsonl"))
    assert len(files) == 1, log
    row = json.loads(files[0].read_text())
    assert (row["reports"], row["dropped"]) == (2, {}), log
