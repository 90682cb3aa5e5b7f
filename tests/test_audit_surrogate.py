"""The objective of the surrogate attack against its equations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fedcore import trees
from fedcore.audit.attacks.base import total_variation
from fedcore.audit.attacks.sme import (
    SME,
    Lane,
    SurrogateSettings,
    cosine,
    cosine_match,
    surrogate,
)
from tests.attacks import (
    by_hand,
    cnn,
    data,
    gradient_of,
    lane,
    mlp,
    objective,
    see,
)
from tests.helpers import assert_close, equal

pytestmark = pytest.mark.usefixtures("same_models")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_objective_is_the_specifications(alpha: float) -> None:
    model, (x, y) = cnn().double(), data(3, 0, dtype=torch.float64)
    o = see(model, x, y, epochs=3)
    dummies, _ = data(3, 1, dtype=torch.float64)
    assert objective(o, dummies, y, alpha, tv=0.07).item() == pytest.approx(
        by_hand(o, dummies, y, alpha, 0.07), abs=1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
def test_the_true_images_match_one_step_exactly(
    dtype: torch.dtype, tolerance: float
) -> None:
    model, (x, y) = cnn().to(dtype), data(4, 2, dtype=dtype)
    o = see(model, x, y, lr=0.1)
    assert objective(o, x, y, alpha=1.0).abs().item() <= tolerance
    g = gradient_of(model, o.w0, x, y)
    assert_close(
        trees.scale(o.delta, -1.0),
        trees.scale(g, 0.1),
        tolerance,
        "w0 - wT = eta g(w0)",
    )


def test_the_derivative_of_alpha_is_that_of_the_chain_rule() -> None:
    model, (x, y) = mlp().double(), data(3, 3, dtype=torch.float64)
    o = see(model, x, y, lr=0.5, epochs=5)
    dummies, _ = data(3, 4, dtype=torch.float64)
    value = cosine_match(o.public, 0.0)(model)
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(
        value({"x": dummies, "alpha": alpha}, lane(o, y))[0], alpha
    )

    w = {
        name: p.requires_grad_()
        for name, p in surrogate(alpha.detach(), lane(o, y)).items()
    }  # as free leaves
    outputs = torch.func.functional_call(model, w, (dummies,))
    g = torch.autograd.grad(
        functional.cross_entropy(outputs, y), list(w.values()), create_graph=True
    )
    flat, D = (
        torch.cat([v.flatten() for v in g]),
        torch.cat([-v.flatten() for v in o.delta.values()]),
    )
    slopes = torch.autograd.grad(
        1 - torch.dot(D / D.norm(), flat / flat.norm()), list(w.values())
    )
    chain = sum(
        (s * -change).sum() for s, change in zip(slopes, o.delta.values(), strict=True)
    )  # <dL/dw, w0 - wT>
    assert found.item() == pytest.approx(float(chain), rel=1e-9)

    h = 1e-5
    difference = (
        objective(o, dummies, y, 0.4 + h) - objective(o, dummies, y, 0.4 - h)
    ) / (2 * h)
    assert found.item() == pytest.approx(difference.item(), rel=1e-6)


def test_the_surrogate_leads_from_one_end_to_the_other() -> None:
    x, y = data(3, 5)
    o = see(cnn(), x, y, epochs=4)
    assert equal(surrogate(torch.tensor(1.0), lane(o, y)), o.w0)
    assert_close(surrogate(torch.tensor(0.0), lane(o, y)), o.wT, 1e-6, "alpha = 0")
    middle = {name: 0.25 * o.w0[name] + 0.75 * w for name, w in o.wT.items()}
    assert_close(surrogate(torch.tensor(0.25), lane(o, y)), middle, 1e-6, "alpha = 1/4")


def test_personal_layers_stay_where_they_were_published() -> None:
    x, y = data(3, 6)
    o = see(mlp(), x, y, epochs=2)
    part = replace(o, delta=dict(list(o.delta.items())[:2]))
    w = surrogate(torch.tensor(0.0), lane(part, y))
    assert list(w) == list(o.w0)
    assert equal(
        {name: w[name] for name in list(w)[2:]},
        {name: o.w0[name] for name in list(w)[2:]},
    )
    g = gradient_of(o.public.model, {**o.w0, **part.wT}, x, y)
    mine, back = {name: g[name] for name in part.delta}, trees.scale(part.delta, -1.0)
    assert objective(part, x, y, 0.0).item() == pytest.approx(
        1 - cosine(back, mine, trees.dot(back, back)).item(), abs=1e-6
    )


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_scale_is_irrelevant_at_the_start_and_made_up_for_by_the_path(
    factor: float,
) -> None:
    model, (x, y) = cnn().double(), data(3, 7, dtype=torch.float64)
    o, (dummies, _) = see(model, x, y, epochs=5), data(3, 8, dtype=torch.float64)
    scaled = replace(o, delta=trees.scale(o.delta, factor))
    assert objective(scaled, dummies, y, 1.0).item() == pytest.approx(
        objective(o, dummies, y, 1.0).item(), abs=1e-12
    )
    for alpha in (0.0, 0.5):
        assert objective(scaled, dummies, y, alpha).item() != pytest.approx(
            objective(o, dummies, y, alpha).item(), abs=1e-9
        )
        longer = objective(scaled, dummies, y, alpha, rho=1 / factor)
        assert longer.item() == pytest.approx(
            objective(o, dummies, y, alpha).item(), abs=1e-12
        )


def test_an_update_turned_round_turns_the_cosine_round() -> None:
    x, y = data(3, 9)
    o, (dummies, _) = see(cnn(), x, y), data(3, 10)
    value = objective(o, dummies, y, 1.0).item()
    assert objective(o.flipped(), dummies, y, 1.0).item() == pytest.approx(
        2 - value, abs=1e-6
    )


def test_the_match_is_between_zero_and_two() -> None:
    x, y = data(3, 11)
    o = see(cnn(), x, y, epochs=3)
    values = [
        objective(o, data(3, seed)[0], y, alpha).item()
        for seed in range(5)
        for alpha in (0.0, 0.5, 1.0)
    ]
    values += [objective(o.flipped(), x, y, 1.0).item(), objective(o, x, y, 1.0).item()]
    assert all(-1e-6 <= value <= 2 + 1e-6 for value in values)


def test_an_update_of_nothing_has_no_direction_and_no_nan() -> None:
    x, y = data(2, 12)
    o = see(cnn(), x, y)
    nothing = replace(o, delta=trees.zeros_like(o.delta))
    (found,) = SME(SurrogateSettings(iterations=3)).reconstruct([nothing], [y], 0)
    assert found.objective == pytest.approx(1.0)
    assert bool(found.x.isfinite().all())


def test_the_order_of_dummies_and_their_labels_is_of_no_account() -> None:
    (x, y), (dummies, _) = data(4, 13), data(4, 14)
    o, order = see(cnn(), x, y, epochs=2), torch.tensor([2, 0, 3, 1])
    for tv in (0.0, 0.1):
        one, other = (
            objective(o, dummies, y, 0.6, tv),
            objective(o, dummies[order], y[order], 0.6, tv),
        )
        assert one.item() == pytest.approx(other.item(), abs=1e-6)


def test_the_norm_is_one_over_all_layers() -> None:
    (x, y), (dummies, _) = data(3, 15), data(3, 16)
    o = see(cnn(), x, y, epochs=2)
    first, *_ = o.delta
    uneven = replace(
        o,
        delta={
            name: change * (3 if name == first else 1)
            for name, change in o.delta.items()
        },
    )
    assert (
        abs(objective(uneven, dummies, y, 1.0) - objective(o, dummies, y, 1.0)).item()
        > 1e-4
    )


def test_the_cosine_is_that_of_one_long_vector() -> None:
    a, b = ({"u": torch.randn(3, 2), "v": torch.randn(4)} for _ in range(2))
    flat = [torch.cat([t.flatten() for t in tree.values()]) for tree in (a, b)]
    assert cosine(a, b, trees.dot(a, a)).item() == pytest.approx(
        functional.cosine_similarity(*flat, dim=0).item(), abs=1e-6
    )


def quadratic(
    curvature: Sequence[float],
    w0: Sequence[float],
    shrink: Sequence[float],
    alpha: float,
) -> float:
    """1 - cosine at w(alpha) where the loss is sum lambda_i w_i^2 / 2 and training shrank w_i by these factors."""
    start, kept, H = (
        torch.tensor(v, dtype=torch.float64) for v in (w0, shrink, curvature)
    )
    D = {"w": start - kept * start}
    lane = Lane({"w": start}, D, trees.dot(D, D), {}, torch.tensor(1.0), D["w"], D["w"])
    w = surrogate(torch.tensor(alpha, dtype=torch.float64), lane)
    return 1 - cosine(D, {"w": H * w["w"]}, lane.square).item()


@pytest.mark.parametrize("seed", range(20))
def test_on_a_plane_one_point_of_the_segment_has_exactly_the_updates_direction(
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    small, large = sorted(
        (torch.rand(2, generator=draw, dtype=torch.float64) * 3 + 0.01).tolist()
    )
    w0 = (torch.randn(2, generator=draw, dtype=torch.float64) + 0.1).tolist()
    tau = 0.1 + 3 * torch.rand(1, generator=draw).item()

    def h(x: float) -> float:
        return x / math.expm1(x * tau)

    alpha = (h(small) - h(large)) / (large - small)  # gradient flow for a time tau
    assert 0 < alpha < 0.5
    assert (
        quadratic(
            [small, large], w0, [math.exp(-small * tau), math.exp(-large * tau)], alpha
        )
        < 1e-12
    )
    eta, steps = 0.9 / large, 1 + seed % 7  # gradient descent
    r = [(1 - eta * x) ** steps for x in (small, large)]
    alpha = (small * r[0] / (1 - r[0]) - large * r[1] / (1 - r[1])) / (large - small)
    assert quadratic([small, large], w0, r, alpha) < 1e-12
    if steps == 1:
        assert alpha == pytest.approx(1.0, abs=1e-9)


def test_many_small_steps_have_their_surrogate_in_the_middle() -> None:
    small, large, steps, eta = 0.5, 2.0, 4, 1e-5
    r = [(1 - eta * x) ** steps for x in (small, large)]
    alpha = (small * r[0] / (1 - r[0]) - large * r[1] / (1 - r[1])) / (large - small)
    assert alpha == pytest.approx((steps + 1) / (2 * steps), abs=1e-3)


def test_total_variation_is_half_the_sum_of_two_means() -> None:
    assert total_variation(torch.full((2, 3, 6, 6), 0.7)).item() == 0.0
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    assert total_variation(board[None, None].float()).item() == 1.0
    x = torch.randn(3, 2, 5, 7)
    across, down = (
        (x[..., :, 1:] - x[..., :, :-1]).abs(),
        (x[..., 1:, :] - x[..., :-1, :]).abs(),
    )
    expected = 0.5 * (across.mean() + down.mean())
    assert total_variation(x).item() == pytest.approx(expected.item(), abs=1e-6)
    padded = torch.cat([x, torch.randn(2, 2, 5, 7)])
    assert total_variation(
        padded, torch.tensor([1.0, 1, 1, 0, 0])
    ).item() == pytest.approx(expected.item(), abs=1e-6)
