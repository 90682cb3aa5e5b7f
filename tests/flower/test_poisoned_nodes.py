"""Malicious clients on Flower nodes, which poison their data themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fedcore.server.grid import GridEngine

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid

SETTINGS: dict[str, Any] = {
    "method": "fedavg",
    "population": 8,
    "rounds": 2,
    "local": {"batch_size": 8},
    "participation": {"name": "uniform", "cohort": 6},
    "engine": {"name": "sequential"},
}


@pytest.mark.parametrize("attack", ["label_flip", "backdoor"])
def test_nodes_poison_the_same_examples(attack: str, tmp_path: Path) -> None:
    honest = Experiment.parse(SETTINGS)
    hostile = {"adversary.attack": attack, "adversary.fraction": 0.3}
    e = honest.model_copy(update=hostile)
    (tmp_path / "preset.toml").write_text(e.to_toml())
    grid = FakeGrid(str(tmp_path / "preset.toml"), nodes=4)
    nodes = run(
        e,
        tmp_path / "grid",
        engine=lambda work: GridEngine(grid, work, 60.0),  # type: ignore[arg-type]
    )
    one = run(e, tmp_path / "sequential")
    assert nodes.dropped == one.dropped == {}
    assert nodes.params_sha256 == one.params_sha256
    assert one.params_sha256 != run(honest, tmp_path / "honest").params_sha256
