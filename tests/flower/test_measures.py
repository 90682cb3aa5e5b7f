"""Metrics of whole sets over Flower nodes, which send states instead of values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fedcore.server.grid import GridEngine

from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.messages import wire
from fedcore.rounds.loop import run
from fedcore.types import Metrics, Model
from tests.flower.fake import FakeGrid
from tests.measured import assert_same_measures, experiment


def test_devices_send_states_and_the_same_is_measured(tmp_path: Path) -> None:
    e = experiment("classes")
    (tmp_path / "preset.toml").write_text(e.to_toml())
    grid = FakeGrid(str(tmp_path / "preset.toml"), nodes=3)
    one = run(e, tmp_path / "sequential")
    other = run(
        e,
        tmp_path / "grid",
        engine=lambda work: GridEngine(grid, work, 60.0),  # type: ignore[arg-type]
    )
    assert other.dropped == {}
    assert_same_measures(one, other)


def test_a_state_of_another_shape_is_refused_by_name() -> None:
    e = experiment("classes")
    work = Work(e.build_task(), e.build_method(), e.local, e.seed)
    fn = work.method.evaluate
    down = Model(work.task.init_params())
    like = message_shape(work, fn, down, 0)
    sent = {**like.metrics, "f1/tp": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(wire.WireError, match=r'"metrics/f1/tp" of shape \(2,\)'):
        wire.decode(wire.encode(Metrics(sent)), wire.schemas(fn)[1], like)
