"""Models that had BatchNorm, on Flower nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid
from tests.flower.test_grid import over_flower, preset_of
from tests.helpers import assert_close
from tests.norms import EVEN, WAYS, experiment


@pytest.mark.parametrize("way", WAYS)
def test_devices_train_models_that_had_batch_norm(way: str, tmp_path: Path) -> None:
    """In the third round the shared parameters follow what each client kept."""
    options = {"way": way, "dtype": "float64"}
    e = experiment(way, options=options, rounds=3, participation__cohort=6)
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), len(EVEN)))
    assert_close(other.params, one.params, 1e-6, f"{way} over {len(EVEN)} nodes")
    assert other.dropped == {}
