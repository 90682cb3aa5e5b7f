"""Recordings that would compute something else than their step: noticed, and left."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fedcore import trees
from fedcore.local import local_sgd, steps_run_by
from fedcore.metrics import cross_entropy, squared_error
from fedcore.models import Logistic, Mlp
from fedcore.rounds.loop import run
from fedcore.speed import cuda_graphs, forks
from fedcore.speed.comparison import deviation, tolerance
from fedcore.speed.cuda_graphs import EAGER, Graph, Graphs, _is_alike
from fedcore.speed.kernels.softmax import log_softmax_backward
from fedcore.speed.recording import Call, Recorder
from fedcore.speed.rewriting import layers
from fedcore.types import Batches, Tree
from tests.helpers import loop_of, small
from tests.test_recording import BATCH, CLIENTS, SHAPE, STEPS, batches, task_of


def uphill(g: Tensor, y: Tensor, *more: Any) -> Tensor:
    return -3 * log_softmax_backward(g, y, *more)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [1e-1, 1e-3, 1e-5])
def test_a_wrong_rule_is_noticed_however_small_the_step(
    lr: float, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "log_softmax_backward", uphill)
    task = task_of(Mlp(hidden=(9,)).build(SHAPE, 10))
    params, b = task.init_params(), batches(torch.float32)

    def client(b: Batches) -> Tree:
        return local_sgd(task.loss, params, b, lr, momentum=momentum)

    expected, recorder = vmap(client)(b), Recorder("the loss")
    with steps_run_by(recorder):
        for _ in range(2):
            found = vmap(client)(b)
            for name, value in expected.params.items():
                moved = (value - params[name]).abs().max()
                assert (found.params[name] - value).abs().max() <= 0.01 * moved
    assert recorder.reason is None  # it is not the loss that is wrong
    assert all(r.code is None for r in recorder._recordings.values())


def test_rounding_at_an_optimum_is_no_difference() -> None:
    """The residual is what rounding left of a sum: its order decides."""
    torch.manual_seed(0)
    numbers = 100 * torch.randn(1000)
    target = numbers.double().sum().float()
    y, recorder = torch.zeros(1), Recorder("the loss")
    inputs = (y, numbers, target)

    def step(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y, numbers, target = inputs
        return y + numbers.sum() - target

    call = Call(step, inputs, list(inputs), (None, None, None), ())
    expected = step(inputs)
    assert expected.abs() < 0.1
    otherwise = expected + 1e-3 * torch.randn(1).sign()
    assert recorder._is_alike([otherwise], [expected], call)
    assert not recorder._is_alike([expected + 10], [expected], call)
    assert recorder.reason is None


def test_movement_is_from_the_nearest_input_and_each_clients_own() -> None:
    before = torch.tensor([[100.0, 100.0], [100.0, 100.0]])
    right = before + torch.tensor([[1.0, 2.0], [0.01, 0.02]])
    wrong = right + torch.tensor([[0.0, 0.0], [0.0, 0.01]])
    assert deviation([right], [right], [before], by_client=True) == 0
    apart = deviation([wrong], [right], [before], by_client=True)
    assert apart == pytest.approx(0.5, rel=0.05)
    assert deviation([wrong], [right], [before], by_client=False) < 0.01
    assert deviation([wrong], [right], [], by_client=True) < tolerance([right])


def test_graphs_are_compared_by_what_is_sent_and_by_how_states_moved() -> None:
    sent, state = 5 * torch.randn(3, 40), torch.randn(3, 40).double()
    step = 1e-6 * torch.randn(3, 40)
    inputs = ({"params": sent[0]}, state)
    expected = ({"params": sent[0] + 100 * step}, state + step)
    assert _is_alike(expected, expected, inputs)
    opposite = ({"params": sent[0] - 100 * step}, state + step)
    assert not _is_alike(opposite, expected, inputs)
    opposite = ({"params": sent[0] + 100 * step}, state - step)
    assert not _is_alike(opposite, expected, inputs)


def test_a_graph_that_would_keep_an_old_value_is_noticed_and_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: a graph is something that goes on as it was when captured."""
    factor, x = [2.0], torch.ones(4)

    def captured(work: Any, inputs: Tensor) -> Graph:
        place, outputs, then = inputs.clone(), inputs.clone(), factor[0]
        frozen: Any = SimpleNamespace(replay=lambda: outputs.copy_(then * place))
        return Graph(frozen, [place], outputs)

    monkeypatch.setattr(cuda_graphs, "_captured", captured)
    monkeypatch.setattr(cuda_graphs, "waiting_refused", nullcontext)
    graphs, values = Graphs(Recorder("the loss")), []
    for use in range(20):
        if use == EAGER + 5:
            factor[0] = 3.0
        values.append(float(graphs.run("f", lambda x: factor[0] * x, x)[0]))
        assert len(graphs._graphs) == (EAGER <= use < EAGER + 10)
    assert values[EAGER + 9 :] == [2.0] + [3.0] * (20 - EAGER - 10)


def test_what_is_not_finite_on_one_side_alone_is_a_difference() -> None:
    right = torch.tensor([1.0, torch.inf, torch.nan])
    assert deviation([right.clone()], [right], [], by_client=False) == 0
    for i, value in ((0, torch.nan), (1, 3e38), (2, 1.0)):
        wrong = right.clone()
        wrong[i] = value
        assert deviation([wrong], [right], [], by_client=False) == torch.inf


class Fading:
    """A loss with a weight that somebody else changes."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.calls = 0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * squared_error(outputs, y)


def squared_norms(engine: str, folder: Path, rounds: int) -> list[float]:
    """The parameters' squared norm after each round; the weight is halved each time."""
    settings: dict[str, Any] = {"engine__name": engine, "participation__cohort": 12}
    if engine == "vectorised":
        settings["engine__chunk"] = 2
    loop = loop_of(small("fedavg", rounds=rounds, **settings), folder)
    fading = loop.task.metrics["loss"] = Fading()
    norms = []
    for _ in range(rounds):
        fading.calls = 0
        loop.round()
        params = loop.state.server.params
        norms.append(float(trees.dot(params, params)))
        fading.weight /= 2
    loop.close()
    assert fading.calls >= 6 * 3  # all batches of the last round, in this process
    return norms


@pytest.mark.parametrize("processes", [1, 3])
def test_a_loss_that_changes_each_round_trains_as_it_is_written(
    processes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if processes > 1 and not forks.possible():
        pytest.skip("no forks on this system")
    expected = squared_norms("sequential", tmp_path / "sequential", 4)
    torch.set_num_threads(processes)
    with caplog.at_level(logging.WARNING, "fedcore"):
        found = squared_norms("vectorised", tmp_path / "vectorised", 4)
    assert found == pytest.approx(expected, rel=1e-5)
    (warning,) = [r.getMessage() for r in caplog.records if "depends on" in r.message]
    assert 'the loss "tests.test_recording_checks.Fading"' in warning
    assert '"weight" was 1.0 and is 0.5' in warning
    assert "docs/your-own-task.md" in warning


def test_a_loss_is_asked_again_after_1_2_4_8_rounds() -> None:
    task, recorder = task_of(Logistic().build(SHAPE, 10)), Recorder("the loss")
    fading = task.metrics["loss"] = Fading()
    b = batches(torch.float32)._replace(y=torch.ones(CLIENTS, STEPS, BATCH, 10))
    recorder.begin_round(0)
    with steps_run_by(recorder):
        local_sgd(task.loss, task.init_params(), trees.at(b, 0), 0.1)
    asked = []
    for t in range(1, 20):
        before = fading.calls
        for _ in range(2):  # client functions
            recorder.begin_round(t)
        if fading.calls > before:
            asked.append(t)
    assert asked == [1, 2, 4, 8, 16]
    fading.weight = 0.999
    recorder.begin_round(20)
    assert recorder.reason is None
    for t in range(21, 33):
        recorder.begin_round(t)
    assert "0.1 % of their movement" in str(recorder.reason)


class Counting:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(outputs, y) / self.calls


def test_a_loss_that_counts_is_noticed_at_its_second_use(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, recorder = task_of(Logistic().build(SHAPE, 10)), Recorder("the loss")
    task.metrics["loss"] = Counting()
    with steps_run_by(recorder):
        vmap(lambda b: local_sgd(task.loss, task.init_params(), b, 0.1))(
            batches(torch.float32)
        )
    assert recorder.reason is not None
    assert "two steps in a row" in caplog.text


@pytest.mark.skipif(not forks.possible(), reason="no forks on this system")
def test_a_change_that_only_forks_see_is_told_once_and_ends_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(3)
    settings = {"engine__name": "vectorised", "engine__chunk": 2}
    settings["participation__cohort"] = 12
    loop = loop_of(small("fedavg", **settings), tmp_path)
    parent, calls = os.getpid(), [0]

    def in_forks(outputs: Tensor, y: Tensor) -> Tensor:
        calls[0] += os.getpid() != parent
        return squared_error(outputs, y) / (1 + calls[0])

    loop.task.metrics["loss"] = in_forks
    terminal = logging.StreamHandler(sys.stderr)
    logging.getLogger("fedcore").addHandler(terminal)
    for _ in range(3):
        loop.round()
    logging.getLogger("fedcore").removeHandler(terminal)
    engine: Any = loop.engine
    assert engine._forks is None
    loop.close()
    warnings = [r for r in caplog.records if "depends on" in r.message]
    assert len(warnings) == 1
    assert "in_forks" in warnings[0].getMessage()
    assert capfd.readouterr().err.count("depends on") == 1  # forks share the terminal


def test_a_pure_loss_runs_from_recordings_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    e = small("fedavg", engine__name="vectorised", engine__chunk=4, rounds=20)
    loop = loop_of(e, tmp_path)
    loop.run()
    recordings = loop.engine._chunks.recorder._recordings  # type: ignore[attr-defined]
    assert recordings
    assert all(r.code is not None for r in recordings.values())
    assert max(r.uses for r in recordings.values()) > 10
    loop.close()
    assert not caplog.records
    assert run(e, tmp_path / "again").history
