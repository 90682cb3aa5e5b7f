"""Engines beyond conformance: Ray, fallbacks, failures, calibration, memory."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedcore import trees
from fedcore.engines.base import failure
from fedcore.engines.calibration import Calibration
from fedcore.engines.chunks import Chunks
from fedcore.engines.ray import _pieces
from fedcore.engines.vectorised import Call, Vectorised
from fedcore.errors import RunError
from fedcore.models.lstm import Lstm
from fedcore.rounds.loop import Interrupted, run
from fedcore.storage import cache
from fedcore.storage.checkpoint import Checkpoint
from tests.helpers import NOISY, TOYS, answers, assert_close, loop_of, small

DIGITS = {
    "task": "digits",
    "population": 20,
    "partition__alpha": 0.5,
    "model__name": "mlp",
    "model__hidden": [16],
    "participation__cohort": 7,
    "rounds": 3,
    "options": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", TOYS[0]])
def test_ray_has_the_bits_of_sequential_whatever_the_number_of_workers(
    name: str, tmp_path: Path
) -> None:
    expected = run(small(name, **DIGITS, **NOISY), tmp_path / "s")
    for workers in (1, 2, 3):
        e = small(name, **DIGITS, **NOISY, engine__name="ray", engine__workers=workers)
        found = run(e, tmp_path / f"r{workers}")
        assert found.params_sha256 == expected.params_sha256, f"{workers} workers"
        assert found.final == expected.final
        assert found.dropped == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_ray_in_chunks_has_the_same_bits_on_any_number_of_workers(
    name: str, tmp_path: Path
) -> None:
    expected = run(small(name, **DIGITS, **NOISY), tmp_path / "s")
    found = []
    for workers in (1, 2):
        e = small(
            name,
            **DIGITS,
            **NOISY,
            engine__name="ray",
            engine__workers=workers,
            engine__chunk=3,
        )
        found.append(run(e, tmp_path / f"r{workers}"))
        assert found[-1].bytes_up == expected.bytes_up
    assert found[0].params_sha256 == found[1].params_sha256
    assert_close(found[0].params, expected.params, 1e-4, name)


@pytest.mark.slow
def test_ray_leaves_out_a_client_that_fails(tmp_path: Path) -> None:
    e = small(
        "tests.methods:BadWeather",
        rounds=1,
        participation__cohort=12,
        engine__name="ray",
        engine__workers=2,
    )
    loop = loop_of(e, tmp_path)
    try:
        data = loop.task.data
        data.x[data.rows(4, "train")] = 666.0
        row = loop.round()
    finally:
        loop.close()
    assert row["dropped"] == {"error": 1}
    assert row["reports"] == 11


def test_pieces_hold_every_client_once_and_the_heaviest_come_first() -> None:
    pieces = _pieces(np.array([1, 9, 1, 1, 5, 1, 1, 1, 1, 1]), 4)
    assert sorted(i for piece in pieces for i in piece) == list(range(10))
    assert pieces[0][0] == 1
    assert len(pieces) <= 4


def test_there_are_no_pieces_of_no_work() -> None:
    assert _pieces(np.empty(0), 4) == []


def test_ray_packs_by_what_clients_took_when_they_were_last_there(
    tmp_path: Path,
) -> None:
    loop = loop_of(small("fedavg", engine__name="ray"), tmp_path)
    engine: Any = loop.engine
    clients, steps = torch.arange(4), np.array([1, 2, 3, 4])
    seconds = engine._expected_seconds
    assert seconds("train", clients, steps).tolist() == [1, 2, 3, 4]
    engine._seconds |= {("train", 0): 9.0, ("train", 1): 1.0, ("evaluate", 3): 50.0}
    expected = seconds("train", clients, steps)
    assert expected.tolist() == pytest.approx([9.0, 1.0, 3 * 10 / 3, 4 * 10 / 3])
    assert _pieces(expected, 2) == [[3, 2], [0, 1]]


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_failing_clients_are_named_with_their_reason(
    engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    e = small(
        "tests.methods:BadWeather",
        rounds=1,
        participation__cohort=12,
        engine__name=engine,
        engine__chunk=1,
    )
    loop = loop_of(e, tmp_path)
    data = loop.task.data
    data.x[data.rows(4, "train")] = 666.0
    data.x[data.rows(7, "train")] = 667.0
    with caplog.at_level(logging.WARNING):
        row = loop.round()
    assert row["dropped"] == {"error": 1, "not finite": 1}
    assert row["reports"] == 10
    assert "client 4 left out: error: ValueError: this client is broken" in caplog.text
    assert bool(trees.finite(loop.state.server))


def test_a_model_that_vmap_cannot_take_falls_back_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = run(
            small("tests.methods:NoBatching", engine__name="vectorised"), tmp_path / "v"
        )
    lines = [r.message for r in caplog.records if "cannot be batched" in r.message]
    assert len(lines) == 1
    expected = run(small("tests.methods:NoBatching"), tmp_path / "s")
    assert found.final["test_loss"] == pytest.approx(
        expected.final["test_loss"], abs=1e-6
    )


def test_the_measured_chunk_is_remembered_and_goes_into_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = small("fedavg", engine__name="vectorised", rounds=1)
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "cache"))
    run(e, tmp_path / "a")
    chosen = loop_of(e, tmp_path / "a", resume=True).engine.choices["train"]
    monkeypatch.setattr(
        "fedcore.engines.calibration.Calibration._measure",
        lambda *_: pytest.fail("measured again"),
    )
    again = loop_of(e, tmp_path / "b")
    again.round()
    assert again.engine.choices["train"] == chosen
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "empty"))
    resumed = loop_of(e, tmp_path / "a", resume=True)
    resumed.round()
    assert resumed.engine.choices["train"] == chosen


def test_ragged_clients_are_batched_with_clients_of_their_length(
    tmp_path: Path,
) -> None:
    digits = {key: value for key, value in DIGITS.items() if key != "partition__alpha"}
    loop = loop_of(
        small(
            "fedavg", **digits, partition__name="size_skew", engine__name="vectorised"
        ),
        tmp_path,
    )
    loop.engine.chunk = 4  # type: ignore[attr-defined]
    seen: list[list[int]] = []
    data = loop.task.data
    train = loop.method.train  # type: ignore[attr-defined]
    for r in answers(loop.engine, train, range(20), loop.state.server, 0):
        steps = data.steps(r.clients.numpy(), "train", loop.experiment.local)
        seen.append(sorted(steps.tolist()))
    longest = [max(chunk) for chunk in seen]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_models_own_noise_is_drawn_from_the_seed_and_off_in_evaluation(
    engine: str, tmp_path: Path
) -> None:
    def params(folder: str) -> tuple[str, float]:
        loop = loop_of(
            small("fedavg", **DIGITS, engine__name=engine, engine__chunk=3),
            tmp_path / folder,
        )
        loop.task.model.insert(1, torch.nn.Dropout(0.5))  # type: ignore[operator]
        loop.state = loop.state._replace(
            server=loop.method.init_server(loop.task.init_params(), 20)
        )
        result = loop.run()
        assert loop.task.test(result.params) == loop.task.test(result.params)
        return result.params_sha256, result.final["client_loss"]["mean"]

    torch.manual_seed(1)
    first = params("a")
    torch.manual_seed(2)
    assert params("b") == first


def test_dropout_counts_and_min_reports_skips(tmp_path: Path) -> None:
    found = run(small("fedavg", rounds=12, participation__dropout=0.5), tmp_path / "a")
    lost = found.dropped["dropout"]
    assert 10 < lost < 50
    assert found.clients_trained == 60 - lost
    skipped = run(
        small("fedavg", rounds=12, participation__dropout=0.5, min_reports=4),
        tmp_path / "b",
    )
    rows = skipped.history
    assert all(row["skipped"] == (row["reports"] < 4) for row in rows)
    assert 0 < sum(row["skipped"] for row in rows) < 12


def test_a_run_whose_every_client_fails_stops_with_the_reason(tmp_path: Path) -> None:
    loop = loop_of(
        small("tests.methods:BadWeather", rounds=30, engine__chunk=1), tmp_path
    )
    loop.task.data.x[:] = 666.0
    with pytest.raises(
        RunError, match=r"round 3: no usable update in 3 round.*error \(5\)"
    ):
        loop.run()


def test_a_lost_last_round_does_not_lose_the_run(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("0\n1\n2\n")
    e = small(
        "tests.methods:BadWeather",
        rounds=3,
        participation={"name": "trace", "file": str(tmp_path / "trace")},
    )
    loop = loop_of(e, tmp_path / "r")
    loop.task.data.x[loop.task.data.rows(2, "train")] = 667.0
    result = loop.run()
    assert [row["reports"] for row in result.history] == [1, 1, 0]
    assert (
        result.history[2]["bytes_up"] == result.history[1]["bytes_up"]
    )  # sent, if of no use
    assert Checkpoint(loop.folder / "checkpoint").read()["round"] == 3


def test_a_client_that_fails_while_chunks_are_measured_spoils_no_measurement(
    tmp_path: Path,
) -> None:
    e = small(
        "tests.methods:BadWeather",
        rounds=1,
        participation__cohort=12,
        engine__name="vectorised",
    )
    loop = loop_of(e, tmp_path)
    data = loop.task.data
    data.x[data.rows(0, "train")] = 666.0
    batches = data.batches

    def broken(clients: np.ndarray, *more: Any) -> Any:
        if 0 in clients:
            raise OSError("disk on fire")
        return batches(clients, *more)

    data.batches = broken  # type: ignore[method-assign]
    row = loop.round()
    assert row["reports"] == 11
    assert row["dropped"] == {"error": 1}
    engine: Any = loop.engine
    calibration = Calibration(engine._chunks, engine._gathered)
    key = calibration._key(loop.method.train, np.arange(12), loop.state.server)
    assert cache.load(key) is None


def test_a_model_with_dropout_is_trained_client_by_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    for engine in ("sequential", "vectorised"):
        loop = loop_of(
            small("fedavg", **DIGITS, engine__name=engine), tmp_path / engine
        )
        loop.task.model.insert(1, torch.nn.Dropout(0.5))  # type: ignore[operator]
        loop.state = loop.state._replace(
            server=loop.method.init_server(loop.task.init_params(), 20)
        )
        losses.append(loop.run().final["test_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert "clients run one after another" in caplog.text


def test_an_evaluation_in_which_clients_fail_counts_them(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg", rounds=1), tmp_path)
    rows = loop.task.data.rows

    def broken(client: int, data: str) -> np.ndarray:
        if client in (3, 4) and data == "test":
            raise OSError("disk on fire")
        return rows(client, data)

    loop.task.data.rows = broken  # type: ignore[method-assign]
    assert loop.run().history[0]["evaluation_failed"] == 2


def test_clients_without_an_example_are_no_reason_to_fail_an_evaluation(
    tmp_path: Path,
) -> None:
    loop = loop_of(small("fedavg", rounds=1), tmp_path)
    loop.task.data.held[:] = 0
    loop.task.data.evaluated_on = "test"
    assert "client_loss" not in loop.run().history[0]


def test_a_stop_is_heeded_where_nobody_takes_part(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("\n" * 50)
    e = small(
        "fedavg",
        rounds=50,
        participation={"name": "trace", "file": str(tmp_path / "trace")},
    )
    loop = loop_of(e, tmp_path / "r")
    loop._stop.set()
    with pytest.raises(Interrupted, match="after round 0 of 50"):
        loop.run()


@pytest.mark.parametrize("name", ["fedavg", "fedvarp", "scaffold"])
def test_a_finished_run_gives_its_memory_back_at_once(
    name: str, tmp_path: Path
) -> None:
    loop_of(
        small(name), tmp_path / "first"
    ).run()  # imports and caches of the first time are no leak
    gc.collect()
    # The collector does not know how large tensors are: what only it finds stays long.
    gc.disable()
    try:
        loop = loop_of(small(name), tmp_path / "second")
        loop.run()
        loop.close()
        data = weakref.ref(loop.task.data)
        del loop
        assert data() is None
    finally:
        gc.enable()


def test_a_chunk_for_which_there_is_no_room_is_cut_into_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = small(
        "scaffold",
        engine__name="vectorised",
        engine__chunk=12,
        participation__cohort=12,
        evaluation__every=100,
    )
    expected, loop = loop_of(e, tmp_path / "whole"), loop_of(e, tmp_path / "cut")
    sizes, batched = [], Chunks.batched

    def small_gpu(
        self: Chunks,
        fn: Any,
        down: Any,
        states: Any,
        batches: Any,
        t: int,
        chunk: Any = None,
    ) -> Any:
        sizes.append(len(batches.mask))
        if len(batches.mask) > 6:
            raise torch.OutOfMemoryError("no room")
        return batched(self, fn, down, states, batches, t, chunk)

    for _ in range(2):
        expected.round()
    monkeypatch.setattr(Chunks, "batched", small_gpu)
    for _ in range(2):
        assert loop.round()["dropped"] == {}
    assert sizes == [12, 6, 6, 6, 6]  # what is too much is tried once
    assert_close(loop.state.server, expected.state.server, 1e-6, "server")
    loop.close()
    expected.close()


@pytest.mark.parametrize(("chunk", "heard"), [(1, 1), (4, 1), (4, 3)])
def test_what_clients_keep_is_stored_once_even_if_the_method_stops_listening(
    chunk: int, heard: int, tmp_path: Path
) -> None:
    loop = loop_of(
        small("scaffold", engine__name="vectorised", engine__chunk=chunk), tmp_path
    )
    engine, fn = loop.engine, loop.method.train  # type: ignore[attr-defined]
    assert isinstance(engine, Vectorised)
    put, stored = engine.states.put, list[int]()  # type: ignore[union-attr]
    engine.states.put = lambda clients, rows: (
        stored.extend(clients.tolist()),
        put(clients, rows),
    )[1]  # type: ignore[method-assign,union-attr]
    call = Call(fn, loop.state.server, 0, chunk, None)
    done = engine._on_gpu(call, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    told = []
    for _ in range(heard):
        told += next(done).reports.clients.tolist()
    if chunk == 1:
        assert stored[: len(told)] == told  # before anybody hears of them
    done.close()
    assert set(told) <= set(stored)
    assert len(stored) == len(set(stored))
    loop.close()


def test_a_failure_says_what_and_why() -> None:
    r = failure([3, 4], ValueError("no"))
    assert dict(r.failed) == {3: "error: ValueError: no", 4: "error: ValueError: no"}
    assert len(r.clients) == 0


@pytest.mark.slow
def test_every_engine_learns_fashion_mnist_the_same(tmp_path: Path) -> None:
    """20 rounds: 1 000 clients, Dirichlet 0.3, cohort 100, MLP 784-200-10."""
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip(
            "Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
        )
    from fedcore import Experiment

    def main_job(engine: str, *more: str):  # type: ignore[no-untyped-def]
        settings = [
            "rounds=20",
            "evaluation.every=20",
            "evaluation.clients=50",
            f"engine.name={engine}",
            *more,
        ]
        return run(
            Experiment.load("benchmarks/fashion.toml", settings),
            tmp_path / f"{engine}{len(more)}",
        )

    sequential = main_job("sequential")
    vectorised, ray = main_job("vectorised"), main_job("ray", "engine.workers=2")
    assert ray.params_sha256 == sequential.params_sha256
    assert vectorised.final["test_loss"] == pytest.approx(
        sequential.final["test_loss"], abs=1e-4
    )
    assert vectorised.final["test_accuracy"] > 0.75


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), Lstm(3, 4, 1)])
def test_a_recurrent_kernel_is_not_tried_in_batches(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU: PyTorch's way around it takes gigabytes, and several times as long."""
    loop = loop_of(small("fedavg", engine={"name": "vectorised"}), tmp_path)
    loop.task.model.add_module("recurrent", layer)
    monkeypatch.setattr(Calibration, "_measure", None)
    monkeypatch.setattr(Calibration, "_trial", None)
    calibration = Calibration(Chunks(loop.engine.work), lambda clients: ())
    method = loop.method
    assert calibration.chunk_size(method.train, np.arange(8), loop.state.server, 0) == 1
