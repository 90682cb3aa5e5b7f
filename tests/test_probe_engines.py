"""Draws, kept values and values that change between rounds, on every engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore import Experiment, Task
from fedcore.engines.calibration import Calibration, Choice
from fedcore.metrics import squared_error
from fedcore.rounds.loop import run
from fedcore.speed import forks
from fedcore.types import Params
from tests.helpers import assert_close, equal, loop_of, small

SCHEDULE = {"weight": 1.0}


def scheduled(outputs: Tensor, y: Tensor) -> Tensor:
    return SCHEDULE["weight"] * squared_error(outputs, y)


def make_scheduled(e: Experiment) -> Task:
    """Least squares, whose loss reads a weight from outside."""
    plain = e.model_copy(update={"task": "least-squares"}).build_task()
    return Task(plain.model, plain.data, scheduled, {})


class Keeping(nn.Linear):
    """Keeps its last outputs, and counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = super().forward(x)
        return self.last


class Hazy(nn.Linear):
    """Draws in training and in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.rand_like(x))


def make_keeping(e: Experiment) -> Task:
    plain = e.model_copy(update={"task": "least-squares"}).build_task()
    model = Keeping(5, 1).to(plain.data.x.dtype)
    return Task(model, plain.data, squared_error, {})


def make_hazy(e: Experiment) -> Task:
    plain = e.model_copy(update={"task": "least-squares"}).build_task()
    model = Hazy(5, 1).to(plain.data.x.dtype)
    return Task(model, plain.data, squared_error, {})


def experiment(name: str, **settings: Any) -> Experiment:
    return small("fedavg", task=f"tests.test_probe_engines:{name}", **settings)


def after_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **engine: Any
) -> Params:
    """The parameters after five rounds, of which the last two have another weight."""
    settings = {f"engine__{name}": value for name, value in engine.items()}
    e = experiment("make_scheduled", rounds=5, participation__cohort=12, **settings)
    monkeypatch.setitem(SCHEDULE, "weight", 1.0)
    loop = loop_of(e, folder)
    for _ in range(3):
        loop.round()
    SCHEDULE["weight"] = 0.25
    for _ in range(2):
        loop.round()
    params: Params = loop.state.server.params
    loop.close()
    return params


@pytest.mark.parametrize("processes", [1, 3])
def test_a_value_from_outside_counts_from_the_round_in_which_it_changes(
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if processes > 1 and not forks.possible():
        pytest.skip("no forks on this system")
    expected = after_a_change(tmp_path / "a", monkeypatch, name="sequential")
    torch.set_num_threads(processes)
    found = after_a_change(tmp_path / "b", monkeypatch, name="vectorised", chunk=2)
    assert_close(found, expected, 1e-6, "vectorised")
    (warning,) = [r.getMessage() for r in caplog.records if "depends on" in r.message]
    assert "scheduled\"'s \"SCHEDULE['weight']\" was 1.0 and is 0.25" in warning


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4])
def test_rays_workers_get_a_value_that_changes(
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = after_a_change(tmp_path / "a", monkeypatch, name="sequential")
    found = after_a_change(
        tmp_path / "b", monkeypatch, name="ray", workers=2, chunk=chunk
    )
    assert_close(found, expected, 1e-6 * (chunk > 1), "ray")
    assert "\"SCHEDULE['weight']\" was 1.0 and is 0.25" in caplog.text


def test_values_that_a_model_keeps_change_nothing_and_cost_no_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(1)
    loop = loop_of(
        experiment("make_keeping", engine__name="vectorised", engine__chunk=4), tmp_path
    )
    loop.run()
    recordings = loop.engine._chunks.recorder._recordings  # type: ignore[attr-defined]
    loop.close()
    assert recordings
    assert all(recording.code is not None for recording in recordings.values())
    assert not caplog.records


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_draws_in_training_and_evaluation_are_repeated_and_resumed(
    engine: str, tmp_path: Path
) -> None:
    e = experiment("make_hazy", engine__name=engine, evaluation__every=1)
    torch.manual_seed(1)
    whole = run(e, tmp_path / "a")
    torch.manual_seed(2)
    again = run(e, tmp_path / "b")
    run(e.model_copy(update={"rounds": 2}), tmp_path / "c")
    torch.manual_seed(3)
    resumed = run(e, resume=tmp_path / "c")
    assert whole.params_sha256 == again.params_sha256 == resumed.params_sha256
    losses = [row["test_loss"] for row in whole.history]
    assert losses == [row["test_loss"] for row in again.history]
    assert losses == [row["test_loss"] for row in resumed.history]
    assert len(set(losses)) == e.rounds


def test_clients_of_a_model_that_draws_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def four(*_: Any) -> Choice:
        return Choice(4, is_measured=False)

    monkeypatch.setattr(Calibration, "_best", four)
    results = []
    for name in ("sequential", "vectorised"):
        # Batches of a size of their own: no chunk size is remembered for them.
        e = experiment("make_hazy", engine__name=name, local__batch_size=3)
        loop = loop_of(e, tmp_path / name)
        loop.round()
        results.append(loop.state.server.params)
        loop.close()
    assert_close(*results, 1e-7, "vectorised draws otherwise")
    assert "Hazy draws for each client on its own" in caplog.text


def test_chunks_of_a_model_that_draws_come_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for name in ("a", "b"):
        e = experiment("make_hazy", engine__name="vectorised", engine__chunk=4)
        with caplog.at_level(logging.WARNING, "fedcore"):
            loop = loop_of(e, tmp_path / name)
        loop.round()
        results.append(loop.state.server.params)
        loop.close()
    assert equal(*results)
    assert "engine.chunk = 4: Hazy draws for the clients of a chunk together" in (
        caplog.text
    )
