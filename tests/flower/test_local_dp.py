"""DP-SGD on Flower nodes: the steps of a simulation, with draws that are their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fedcore.server.grid import GridEngine

from fedcore import privacy
from fedcore.config import Experiment
from fedcore.rounds.loop import Result, run
from tests.flower.fake import FakeGrid
from tests.helpers import assert_close, small


@pytest.fixture(autouse=True)
def _without_the_slower_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "epsilon_prv", lambda *_: (None, "not asked for"))


def over_flower(e: Experiment, folder: Path) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preset.toml").write_text(e.to_toml())
    grid: Any = FakeGrid(str(folder / "preset.toml"), 5)

    def engine(work: Any) -> Any:
        return GridEngine(grid, work, 60, state=folder / "kept")

    return run(e, folder / "run", engine=engine)


def test_nodes_take_the_steps_of_a_simulation(tmp_path: Path) -> None:
    everything = {"clip": 0.5, "rate": 1.0}
    e = small("fedavg", local__dp=everything, local__epochs=3)
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path)
    assert other.dropped == {}
    assert_close(other.params, one.params, 1e-6, "DP-SGD over 5 nodes")
    assert other.final["privacy_examples"] == one.final["privacy_examples"]


def test_no_seed_tells_the_noise_of_a_node(tmp_path: Path) -> None:
    noised = {"clip": 0.5, "noise": 1.0, "rate": 1.0}
    e = small("fedavg", local__dp=noised, engine__name="grid")
    runs = [over_flower(e, tmp_path / name) for name in "ab"]
    simulated = small("fedavg", local__dp=noised)
    runs.append(run(simulated, tmp_path / "sequential"))
    first, second, third = runs
    for a, b in ((first, second), (first, third)):
        for name, value in a.params.items():
            assert not (value == b.params[name]).any()
        assert a.final["privacy_examples"] == b.final["privacy_examples"]
