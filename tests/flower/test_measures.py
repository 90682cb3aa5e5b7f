"""Metrics of whole sets over Flower nodes, which send states instead of values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fedcore.server.grid import GridEngine

from fedcore import Experiment, Task
from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.messages import wire
from fedcore.rounds.loop import Loop, Quiet, run
from fedcore.token_metrics import num_targets
from fedcore.types import Metrics, Model
from tests.flower.fake import FakeGrid
from tests.measured import assert_same_measures, experiment
from tests.tokens import language, settings


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


def test_devices_count_tokens_and_a_trained_model_is_measured_first(
    tmp_path: Path,
) -> None:
    start = run(settings(rounds=1), tmp_path / "start")
    e = settings(initial=start.run_dir)
    (tmp_path / "preset.toml").write_text(e.to_toml())
    grid = FakeGrid(str(tmp_path / "preset.toml"), nodes=2)
    one = run(e, tmp_path / "sequential")
    other = run(
        e,
        tmp_path / "grid",
        engine=lambda work: GridEngine(grid, work, 60.0),  # type: ignore[arg-type]
    )
    assert other.dropped == {}
    assert_same_measures(one, other)
    for name, value in one.params.items():
        assert torch.allclose(value, other.params[name], atol=1e-6)
    before, same = (result.history[0]["baseline"] for result in (other, one))
    assert before["unseen_perplexity"] == pytest.approx(same["unseen_perplexity"])
    spread = before["client_perplexity"]
    assert spread == pytest.approx(same["client_perplexity"])


def half(e: Experiment) -> Task:
    task = language(e)
    task.size = halves
    return task


def halves(y: torch.Tensor) -> torch.Tensor:
    return num_targets(y) / 2


def test_sizes_of_devices_that_are_no_whole_numbers_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    e = settings(task=f"{__name__}:half", rounds=1)
    (tmp_path / "preset.toml").write_text(e.to_toml())
    grid = FakeGrid(str(tmp_path / "preset.toml"), nodes=2)
    loop = Loop(
        e,
        tmp_path / "grid",
        Quiet(),
        lambda work: GridEngine(grid, work, 60.0),  # type: ignore[arg-type]
        False,
    )
    row = loop.round()
    loop.close()
    assert row["dropped"] == {"error": 1}
    assert "add up to 8.5: devices count in whole numbers" in caplog.text
