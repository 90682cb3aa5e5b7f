"""Devices take the local steps that the run asks for, and keep their moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid
from tests.flower.test_grid import over_flower, preset_of
from tests.helpers import assert_close, small

STEPS: dict[str, Any] = {
    "local__optimizer": "adamw",
    "local__clip": 0.5,
    "local__schedule": "linear",
    "local__warmup": 2,
    "local__micro": 2,
}


@pytest.mark.parametrize("moments", ["fresh", "kept"])
@pytest.mark.parametrize("name", ["fedavg", "admm"])
def test_devices_take_the_steps_of_sequential(
    name: str, moments: str, tmp_path: Path
) -> None:
    e = small(name, **STEPS, local__moments=moments)
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 5))
    assert_close(other.params, one.params, 1e-6, f"{name} with {moments} moments")
    assert other.dropped == {}
    has_states = moments == "kept" or name == "admm"
    assert any((tmp_path / "kept").glob("*/client-*")) == has_states
