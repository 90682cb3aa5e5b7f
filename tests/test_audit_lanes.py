"""Many reconstructions in one batch, or in several processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedcore import trees
from fedcore.audit.attacks import lanes
from fedcore.audit.attacks.lane_gradients import convolutions_as_products
from fedcore.audit.attacks.sme import (
    SME,
    SurrogateSettings,
    cosine_match,
)
from fedcore.errors import RunError
from fedcore.speed import forks
from tests.attacks import (
    cnn,
    data,
    digits,
    lane,
    mlp,
    see,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("same_models")


@pytest.mark.parametrize("build", [cnn, mlp])
def test_lanes_side_by_side_are_lanes_one_after_another(build: Any) -> None:
    model = build()
    seen, fixed, images = [], [], []
    for i in range(4):
        x, y = data(3, 30 + i)
        seen.append(see(model, x, y, epochs=2, client=i))
        fixed.append(lane(seen[i], y))
        images.append(data(3, 40 + i)[0])
    start = {"x": torch.stack(images), "alpha": torch.full((4,), 0.5)}
    descent = lanes.Descent({"x": 0.1, "alpha": 0.05}, 8, lambda v: None)
    objective = cosine_match(seen[0].public, 0.01)

    def optimised(batched: bool) -> lanes.Trace:
        constants = trees.stack(fixed)
        return lanes.optimise(
            objective, model, start, constants, descent, batched=batched
        )

    together, apart = optimised(True), optimised(False)
    assert_close(together.variables, apart.variables, 1e-4, "variables")
    assert_close(together.match, apart.match, 1e-6, "match")
    assert together.variables["x"].shape == (4, 3, 1, 8, 8)


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
    changed, x = convolutions_as_products(layer), torch.randn(2, 3, 9, 8)
    parameters = dict(layer.named_parameters())
    assert list(dict(changed.named_parameters())) == list(parameters)
    assert_close(changed(x), layer(x), 1e-5, "outputs")
    others = trees.map(torch.randn_like, parameters)
    one = torch.func.functional_call(changed, others, (x,))
    other = torch.func.functional_call(layer, others, (x,))
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
    model = digits(task=task, model__name=name).model.build((1, side, side), 10).eval()
    x = torch.randn(2, 1, side, side)
    assert_close(convolutions_as_products(model)(x), model(x), 1e-5, name)


def test_clients_of_other_sizes_beside_one_change_nothing() -> None:
    model, seen, labels = cnn(), [], []
    for i, n in enumerate((2, 4, 3)):
        x, y = data(n, 50 + n)
        o = see(model, x, y, epochs=2, batch=2, client=i)
        seen.append(replace(o, public=seen[0].public) if seen else o)
        labels.append(y)
    attack = SME(SurrogateSettings(iterations=10, lr=0.1))
    together = attack.reconstruct(seen, labels, 0)
    for i, one in enumerate(together):
        (alone,) = attack.reconstruct([seen[i]], [labels[i]], 0)
        assert one.x.shape == alone.x.shape == (len(labels[i]), 1, 8, 8)
        assert_close(one.x, alone.x, 1e-4, f"client {i}")
        assert one.objective == pytest.approx(alone.objective, abs=1e-5)


def test_clients_whose_messages_differ_are_attacked_apart() -> None:
    model, seen, labels = mlp(), [], []
    for i in range(3):
        x, y = data(2, 60 + i)
        o = see(model, x, y, epochs=2, client=i)
        seen.append(replace(o, public=seen[0].public) if seen else o)
        labels.append(y)
    seen[1] = replace(seen[1], delta=dict(list(seen[1].delta.items())[:2]))
    attack = SME(SurrogateSettings(iterations=5, lr=0.1))
    found = attack.reconstruct(seen, labels, 0)
    for i, one in enumerate(found):
        (alone,) = attack.reconstruct([seen[i]], [labels[i]], 0)
        assert_close(one.x, alone.x, 1e-4, f"client {i}")


def test_step_sizes_fall_at_three_five_and_seven_eighths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []

    class Watched(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    start, to = {"x": torch.ones(1, 2)}, {"to": torch.zeros(1, 2)}
    descent = lanes.Descent({"x": 1.0}, 16, lambda v: None)
    lanes.optimise(towards, nn.Identity(), start, to, descent)
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 4 + [0.01] * 4 + [0.001] * 2)


def towards(model: nn.Module) -> lanes.Objective:
    return lambda v, fixed: ((v["x"] - fixed["to"]).square().sum(),) * 2


def shared_out(processes: int, objective: Any, **more: Any) -> lanes.Trace:
    torch.set_num_threads(processes)
    try:
        start, to = torch.zeros(5, 3), torch.arange(15.0).view(5, 3)
        return lanes.optimise(
            objective,
            nn.Identity(),
            {"x": start},
            {"to": to},
            lanes.Descent({"x": 0.5}, 16, lambda v: None),
            **more,
        )
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not forks.possible(), reason="no forks on this system")
@pytest.mark.parametrize("batched", [True, False])
def test_lanes_of_several_processes_are_those_of_one(batched: bool) -> None:
    reports: dict[int, list[tuple[float, float]]] = {1: [], 3: []}

    def optimised(processes: int) -> lanes.Trace:
        def progress(done: float, match: float | None) -> bool:
            assert match is not None
            reports[processes].append((done, match))
            return True

        return shared_out(processes, towards, batched=batched, progress=progress)

    one, three = optimised(1), optimised(3)
    assert_close(one.variables, three.variables, 1e-6, "variables")
    assert torch.allclose(one.match, three.match)
    assert torch.allclose(torch.tensor(one.curve), torch.tensor(three.curve))
    assert one.iterations == three.iterations == 16
    assert torch.allclose(torch.tensor(reports[1]), torch.tensor(reports[3]))
    assert [done for done, _ in reports[3]] == [(i + 1) / 16 for i in range(16)]


@pytest.mark.skipif(not forks.possible(), reason="no forks on this system")
@pytest.mark.parametrize("processes", [1, 3])
def test_lanes_stop_everywhere_when_they_are_told(processes: int) -> None:
    trace = shared_out(processes, towards, progress=lambda done, match: done < 0.5)
    assert trace.iterations == 8
    assert trace.variables["x"].shape == (5, 3)


@pytest.mark.skipif(not forks.possible(), reason="no forks on this system")
def test_what_a_lane_raises_in_a_process_of_its_own_is_told() -> None:
    def fails(model: nn.Module) -> lanes.Objective:
        def objective(v: Any, fixed: Any) -> Any:
            raise ZeroDivisionError("nothing to divide by")

        return objective

    with pytest.raises(RunError, match="ZeroDivisionError: nothing to divide by"):
        shared_out(3, fails, batched=False)
