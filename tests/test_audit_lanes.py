"""Lanes: many reconstructions at once are the same as one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedcore import trees
from fedcore.audit.attacks import lanes
from fedcore.audit.attacks.sme import SME, SurrogateSettings, cosine_match, lane_of
from fedcore.errors import RunError
from fedcore.speed import forks
from tests.audits import cnn, data, digits, mlp, see, without_output_layer
from tests.helpers import assert_close

FORKS = pytest.mark.skipif(not forks.possible(), reason="no forks on this system")


@pytest.mark.parametrize("build", [cnn, mlp])
def test_lanes_side_by_side_are_lanes_one_after_another(
    build: Callable[[], nn.Module],
) -> None:
    model, fixed, images = build(), [], []
    for client in range(4):
        x, y = data(3, 30 + client)
        fixed.append(lane_of(see(model, x, y, epochs=2), y, 1.0, 3))
        images.append(data(3, 40 + client).x)
    public = see(model, *data(3, 30)).public
    start = {"x": torch.stack(images), "alpha": torch.full((4,), 0.5)}
    batched, alone = (
        lanes.optimise(
            cosine_match(public, 0.01),
            model,
            start,
            trees.stack(fixed),
            {"x": 0.1, "alpha": 0.05},
            8,
            lambda v: None,
            batched=batched,
        )
        for batched in (True, False)
    )
    assert_close(batched.variables, alone.variables, 1e-4, "variables")
    assert_close(batched.match, alone.match, 1e-6, "match")
    assert batched.variables["x"].shape == (4, 3, 1, 8, 8)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
        nn.Conv2d(3, 6, 2, dilation=2),
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 1)),
        nn.Conv2d(3, 6, 3, groups=3),  # left as they are
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    ],
)
def test_convolutions_as_products_are_the_same_function_of_the_same_parameters(
    layer: nn.Module,
) -> None:
    changed, x = lanes.products(layer), torch.randn(2, 3, 9, 8)
    names = [name for name, _ in layer.named_parameters()]
    assert [name for name, _ in changed.named_parameters()] == names
    assert_close(changed(x), layer(x), 1e-5, "outputs")
    others = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    one, other = (
        torch.func.functional_call(module, others, (x,)) for module in (changed, layer)
    )
    assert_close(one, other, 1e-4, "outputs with other parameters")


@pytest.mark.parametrize(
    ("name", "task", "side"),
    [
        ("cnn", "fashion-mnist", 28),
        ("lenet", "fashion-mnist", 28),
        ("mlp", "digits", 8),
    ],
)
def test_a_model_as_products_is_the_model(name: str, task: str, side: int) -> None:
    experiment = digits(task=task, model__name=name)
    model = experiment.model.build((1, side, side), 10).eval()
    x = torch.randn(2, 1, side, side)
    assert_close(lanes.products(model)(x), model(x), 1e-5, name)


def test_clients_of_other_sizes_beside_one_change_nothing() -> None:
    model, attack = cnn(), SME(SurrogateSettings(iterations=10, lr=0.1))
    clients = [data(n, 50 + n) for n in (2, 4, 3)]
    seen, labels = [], []
    for i, (x, y) in enumerate(clients):
        observation = see(model, x, y, epochs=2, batch=2, client=i)
        public = seen[0].public if seen else observation.public
        seen.append(replace(observation, public=public))
        labels.append(y)
    together = attack.reconstruct(seen, labels, 0)
    for i, found in enumerate(together):
        (alone,) = attack.reconstruct([seen[i]], [labels[i]], 0)
        assert found.x.shape == alone.x.shape == clients[i].x.shape
        assert_close(found.x, alone.x, 1e-4, f"client {i}")
        assert found.objective == pytest.approx(alone.objective, abs=1e-5)


def test_clients_whose_messages_differ_are_attacked_apart() -> None:
    model, attack = mlp(), SME(SurrogateSettings(iterations=5, lr=0.1))
    seen, labels = [], []
    for i in range(3):
        x, y = data(2, 60 + i)
        observation = see(model, x, y, epochs=2, client=i)
        public = seen[0].public if seen else observation.public
        seen.append(replace(observation, public=public))
        labels.append(y)
    seen[1] = without_output_layer(seen[1])
    for i, found in enumerate(attack.reconstruct(seen, labels, 0)):
        (alone,) = attack.reconstruct([seen[i]], [labels[i]], 0)
        assert_close(found.x, alone.x, 1e-4, f"client {i}")


def test_step_sizes_fall_at_three_five_and_seven_eighths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []

    class Watched(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    def objective(model: nn.Module) -> lanes.Objective:
        return lambda v, fixed: (v["x"].square().sum(),) * 2

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    start, step = {"x": torch.ones(1, 2)}, {"x": 1.0}
    lanes.optimise(objective, nn.Identity(), start, {}, step, 16, lambda v: None)
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 4 + [0.01] * 4 + [0.001] * 2)


# Shared out among processes


def towards(model: nn.Module) -> lanes.Objective:
    return lambda v, fixed: ((v["x"] - fixed["to"]).square().sum(),) * 2


def shared_out(processes: int, objective: Any, **more: Any) -> lanes.Trace:
    """Five lanes; conftest.py sets one thread before the next test."""
    torch.set_num_threads(processes)
    start, to = {"x": torch.zeros(5, 3)}, {"to": torch.arange(15.0).view(5, 3)}
    return lanes.optimise(
        objective, nn.Identity(), start, to, {"x": 0.5}, 16, lambda v: None, **more
    )


@FORKS
@pytest.mark.parametrize("batched", [True, False])
def test_lanes_of_several_processes_are_those_of_one(batched: bool) -> None:
    heard: dict[int, list[tuple[float, float]]] = {1: [], 3: []}

    def run(processes: int) -> lanes.Trace:
        def progress(done: float, match: float) -> bool:
            heard[processes].append((done, match))
            return True

        return shared_out(processes, towards, batched=batched, progress=progress)

    one, three = run(1), run(3)
    assert_close(one.variables, three.variables, 1e-6, "variables")
    assert torch.allclose(one.match, three.match)
    for curve, other in zip(one.curve, three.curve, strict=True):
        assert curve == pytest.approx(other)
    assert one.iterations == three.iterations == 16
    assert torch.allclose(torch.tensor(heard[1]), torch.tensor(heard[3]))
    assert [done for done, _ in heard[3]] == [(i + 1) / 16 for i in range(16)]


@FORKS
@pytest.mark.parametrize("processes", [1, 3])
def test_lanes_stop_everywhere_when_they_are_told(processes: int) -> None:
    trace = shared_out(processes, towards, progress=lambda done, match: done < 0.5)
    assert trace.iterations == 8
    assert trace.variables["x"].shape == (5, 3)


@FORKS
def test_an_error_of_a_lane_in_another_process_is_told() -> None:
    def fails(model: nn.Module) -> lanes.Objective:
        def objective(v: Any, fixed: Any) -> Any:
            raise ZeroDivisionError("nothing to divide by")

        return objective

    with pytest.raises(RunError, match="ZeroDivisionError: nothing to divide by"):
        shared_out(3, fails, batched=False)
