"""Many reconstructions in one batch, or in several processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedcore import trees
from fedcore.audit.attacks import lane_gradients, lanes
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
    seen = [see(model, *data(3, 30 + i), epochs=2, client=i) for i in range(4)]
    y = [data(3, 30 + i)[1] for i in range(4)]
    fixed = trees.stack([lane(o, t) for o, t in zip(seen, y, strict=True)])
    start = {
        "x": torch.stack([data(3, 40 + i)[0] for i in range(4)]),
        "alpha": torch.full((4,), 0.5),
    }
    ends = [
        lanes.optimise(
            cosine_match(seen[0].public, 0.01),
            model,
            start,
            fixed,
            lanes.Descent({"x": 0.1, "alpha": 0.05}, 8, lambda v: None),
            batched=batched,
        )
        for batched in (True, False)
    ]
    assert_close(ends[0].variables, ends[1].variables, 1e-4, "variables")
    assert_close(ends[0].match, ends[1].match, 1e-6, "match")
    assert ends[0].variables["x"].shape == (4, 3, 1, 8, 8)


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
    changed, x = lane_gradients.convolutions_as_products(layer), torch.randn(2, 3, 9, 8)
    assert list(dict(changed.named_parameters())) == list(
        dict(layer.named_parameters())
    )
    assert_close(changed(x), layer(x), 1e-5, "outputs")
    own = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    one, other = (
        torch.func.functional_call(each, own, (x,)) for each in (changed, layer)
    )
    assert_close(one, other, 1e-4, "outputs with other parameters")


def test_a_model_as_products_is_the_model() -> None:
    for name in ("cnn", "lenet", "mlp"):
        e = (
            digits(model__name=name)
            if name == "mlp"
            else digits(task="fashion-mnist", model__name=name)
        )
        model = e.model.build((1, 8, 8) if name == "mlp" else (1, 28, 28), 10).eval()
        x = torch.randn(2, 1, 8, 8) if name == "mlp" else torch.randn(2, 1, 28, 28)
        assert_close(
            lane_gradients.convolutions_as_products(model)(x), model(x), 1e-5, name
        )


def test_clients_of_other_sizes_beside_one_change_nothing() -> None:
    model = cnn()
    examples = [data(n, 50 + n) for n in (2, 4, 3)]
    seen = [
        see(model, x, y, epochs=2, batch=2, client=i)
        for i, (x, y) in enumerate(examples)
    ]
    seen = [replace(o, public=seen[0].public) for o in seen]
    s = SurrogateSettings(iterations=10, lr=0.1)
    y = [t for _, t in examples]
    together = SME(s).reconstruct(seen, y, 0)
    for i, r in enumerate(together):
        (alone,) = SME(s).reconstruct([seen[i]], [y[i]], 0)
        assert r.x.shape == alone.x.shape == examples[i][0].shape
        assert_close(r.x, alone.x, 1e-4, f"client {i}")
        assert r.objective == pytest.approx(alone.objective, abs=1e-5)


def test_clients_whose_messages_differ_are_attacked_apart() -> None:
    model = mlp()
    seen = [see(model, *data(2, 60 + i), epochs=2, client=i) for i in range(3)]
    seen = [replace(o, public=seen[0].public) for o in seen]
    seen[1] = replace(seen[1], delta=dict(list(seen[1].delta.items())[:2]))
    found = SME(SurrogateSettings(iterations=5, lr=0.1)).reconstruct(
        seen, [data(2, 60 + i)[1] for i in range(3)], 0
    )
    for i, r in enumerate(found):
        (alone,) = SME(SurrogateSettings(iterations=5, lr=0.1)).reconstruct(
            [seen[i]], [data(2, 60 + i)[1]], 0
        )
        assert_close(r.x, alone.x, 1e-4, f"client {i}")


def test_step_sizes_fall_at_three_five_and_seven_eighths() -> None:
    rates: list[float] = []

    class Watched(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    def on(model: nn.Module) -> lanes.Objective:
        return lambda v, fixed: (v["x"].square().sum(),) * 2

    whole = torch.optim.Adam
    torch.optim.Adam = Watched  # type: ignore[misc]
    try:
        lanes.optimise(
            on,
            nn.Identity(),
            {"x": torch.ones(1, 2)},
            {},
            lanes.Descent({"x": 1.0}, 16, lambda v: None),
        )
    finally:
        torch.optim.Adam = whole  # type: ignore[misc]
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
    heard: dict[int, list[tuple[float, float]]] = {1: [], 3: []}

    def progress(processes: int) -> Any:
        return lambda done, match: heard[processes].append((done, match)) or True

    one, three = (
        shared_out(n, towards, batched=batched, progress=progress(n)) for n in (1, 3)
    )
    assert_close(one.variables, three.variables, 1e-6, "variables")
    assert torch.allclose(one.match, three.match)
    assert one.curve == [pytest.approx(curve) for curve in three.curve]
    assert one.iterations == three.iterations == 16
    assert heard[1] == [pytest.approx(pair) for pair in heard[3]]
    assert [done for done, _ in heard[3]] == [(i + 1) / 16 for i in range(16)]


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
