"""Transformers of Hugging Face on Flower nodes, in process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid
from tests.flower.test_grid import over_flower, preset_of
from tests.helpers import assert_close
from tests.test_huggingface_runs import METHODS, experiment, losses


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_nodes_compute_what_sequential_computes(
    kind: str, method: str, tmp_path: Path
) -> None:
    e = experiment(kind, method, "sequential")
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 3))
    assert_close(other.params, one.params, 1e-6, f"{kind}, {method}")
    assert losses(other) == pytest.approx(losses(one), abs=1e-6)
    assert other.dropped == {}
    assert other.bytes_up == one.bytes_up
