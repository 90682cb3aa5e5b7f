"""Inputs that are trees of tensors, on Flower nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid
from tests.flower.test_grid import over_flower, preset_of
from tests.helpers import assert_close, small
from tests.test_inputs import SIZES


@pytest.mark.parametrize("kind", ["Whole", "HuggingFace"])
def test_clients_on_flower_nodes_take_trees_of_inputs(
    kind: str, tmp_path: Path
) -> None:
    e = small(
        "fedavg",
        task="tests.test_inputs:make",
        population=len(SIZES),
        options={"kind": kind},
        rounds=2,
        participation__cohort=len(SIZES),
        finetune__epochs=1,
    )
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 4))
    assert_close(other.params, one.params, 1e-6, f"{kind} over 4 nodes")
    assert other.dropped == {}
