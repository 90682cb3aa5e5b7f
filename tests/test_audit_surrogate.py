"""The objective of the surrogate attack against its equations."""

from __future__ import annotations

import itertools
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
    flat,
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
    expected = by_hand(o, dummies, y, alpha, 0.07)
    found = objective(o, dummies, y, alpha, tv=0.07)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
def test_the_true_images_match_one_step_exactly(
    dtype: torch.dtype, tolerance: float
) -> None:
    model, (x, y) = cnn().to(dtype), data(4, 2, dtype=dtype)
    o = see(model, x, y, lr=0.1)
    assert abs(objective(o, x, y, alpha=1.0)) <= tolerance
    step = trees.scale(gradient_of(model, o.w0, x, y), 0.1)
    back = trees.scale(o.delta, -1.0)
    assert_close(back, step, tolerance, "w0 - wT = eta g(w0)")


def test_the_derivative_of_alpha_is_that_of_the_chain_rule() -> None:
    model, (x, y) = mlp().double(), data(3, 3, dtype=torch.float64)
    o = see(model, x, y, lr=0.5, epochs=5)
    dummies, _ = data(3, 4, dtype=torch.float64)
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    variables = {"x": dummies, "alpha": alpha}
    value, _ = cosine_match(o.public, 0.0)(model)(variables, lane(o, y))
    (found,) = torch.autograd.grad(value, alpha)

    w = surrogate(alpha.detach(), lane(o, y))
    for parameter in w.values():
        parameter.requires_grad_()  # as free leaves
    outputs = torch.func.functional_call(model, w, (dummies,))
    loss = functional.cross_entropy(outputs, y)
    leaves = list(w.values())
    slopes = torch.autograd.grad(loss, leaves, create_graph=True)
    g, D = flat(dict(zip(w, slopes, strict=True))), -flat(o.delta)
    match = 1 - torch.dot(D / D.norm(), g / g.norm())
    slopes = torch.autograd.grad(match, leaves)
    # <dL/dw, w0 - wT>
    chain = torch.dot(flat(dict(zip(w, slopes, strict=True))), D)
    assert found.item() == pytest.approx(chain.item(), rel=1e-9)

    h = 1e-5
    above = objective(o, dummies, y, 0.4 + h)
    below = objective(o, dummies, y, 0.4 - h)
    assert found.item() == pytest.approx((above - below) / (2 * h), rel=1e-6)


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
    shared = list(o.w0)[:2]
    part = replace(o, delta={name: o.delta[name] for name in shared})
    w = surrogate(torch.tensor(0.0), lane(part, y))
    assert list(w) == list(o.w0)
    for name in list(o.w0)[2:]:
        assert torch.equal(w[name], o.w0[name]), name
    g = gradient_of(o.public.model, {**o.w0, **part.wT}, x, y)
    of_shared, back = {name: g[name] for name in shared}, trees.scale(part.delta, -1.0)
    expected = 1 - cosine(back, of_shared, trees.dot(back, back)).item()
    assert objective(part, x, y, 0.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_scale_is_irrelevant_at_the_start_and_made_up_for_by_the_path(
    factor: float,
) -> None:
    model, (x, y) = cnn().double(), data(3, 7, dtype=torch.float64)
    o, (dummies, _) = see(model, x, y, epochs=5), data(3, 8, dtype=torch.float64)
    scaled = replace(o, delta=trees.scale(o.delta, factor))
    at_start = objective(o, dummies, y, 1.0)
    assert objective(scaled, dummies, y, 1.0) == pytest.approx(at_start, abs=1e-12)
    for alpha in (0.0, 0.5):
        value = objective(o, dummies, y, alpha)
        same_path = objective(scaled, dummies, y, alpha)
        assert same_path != pytest.approx(value, abs=1e-9)
        longer_path = objective(scaled, dummies, y, alpha, rho=1 / factor)
        assert longer_path == pytest.approx(value, abs=1e-12)


def test_an_update_turned_round_turns_the_cosine_round() -> None:
    x, y = data(3, 9)
    o, (dummies, _) = see(cnn(), x, y), data(3, 10)
    value = objective(o, dummies, y, 1.0)
    turned = objective(o.flipped(), dummies, y, 1.0)
    assert turned == pytest.approx(2 - value, abs=1e-6)


def test_the_match_is_between_zero_and_two() -> None:
    x, y = data(3, 11)
    o = see(cnn(), x, y, epochs=3)
    values = [objective(o.flipped(), x, y, 1.0), objective(o, x, y, 1.0)]
    for seed, alpha in itertools.product(range(5), (0.0, 0.5, 1.0)):
        values.append(objective(o, data(3, seed)[0], y, alpha))
    assert min(values) >= -1e-6
    assert max(values) <= 2 + 1e-6


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
        one = objective(o, dummies, y, 0.6, tv)
        other = objective(o, dummies[order], y[order], 0.6, tv)
        assert one == pytest.approx(other, abs=1e-6)


def test_the_norm_is_one_over_all_layers() -> None:
    (x, y), (dummies, _) = data(3, 15), data(3, 16)
    o = see(cnn(), x, y, epochs=2)
    first = next(iter(o.delta))
    uneven = replace(o, delta={**o.delta, first: 3 * o.delta[first]})
    difference = objective(uneven, dummies, y, 1.0) - objective(o, dummies, y, 1.0)
    assert abs(difference) > 1e-4


def test_the_cosine_is_that_of_one_long_vector() -> None:
    a = {"u": torch.randn(3, 2), "v": torch.randn(4)}
    b = {"u": torch.randn(3, 2), "v": torch.randn(4)}
    expected = functional.cosine_similarity(flat(a), flat(b), dim=0).item()
    assert cosine(a, b, trees.dot(a, a)).item() == pytest.approx(expected, abs=1e-6)


def quadratic(
    curvature: Sequence[float],
    w0: Sequence[float],
    shrink: Sequence[float],
    alpha: float,
) -> float:
    """1 - cosine at w(alpha), for the loss sum lambda_i w_i^2 / 2.

    Training shrank w_i by these factors.
    """
    start = torch.tensor(w0, dtype=torch.float64)
    D = {"w": start - torch.tensor(shrink, dtype=torch.float64) * start}
    lane = Lane({"w": start}, D, trees.dot(D, D), {}, torch.tensor(1.0), D["w"], D["w"])
    w = surrogate(torch.tensor(alpha, dtype=torch.float64), lane)
    g = {"w": torch.tensor(curvature, dtype=torch.float64) * w["w"]}
    return 1 - cosine(D, g, lane.square).item()


@pytest.mark.parametrize("seed", range(20))
def test_on_a_plane_one_point_of_the_segment_has_exactly_the_updates_direction(
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    curvatures = torch.rand(2, generator=draw, dtype=torch.float64) * 3 + 0.01
    small, large = sorted(curvatures.tolist())
    w0 = (torch.randn(2, generator=draw, dtype=torch.float64) + 0.1).tolist()
    tau = 0.1 + 3 * torch.rand(1, generator=draw).item()

    def h(x: float) -> float:
        return x / math.expm1(x * tau)

    # Gradient flow for a time tau.
    alpha = (h(small) - h(large)) / (large - small)
    assert 0 < alpha < 0.5
    shrink = [math.exp(-small * tau), math.exp(-large * tau)]
    assert quadratic([small, large], w0, shrink, alpha) < 1e-12
    # Gradient descent.
    eta, steps = 0.9 / large, 1 + seed % 7
    shrink = [(1 - eta * small) ** steps, (1 - eta * large) ** steps]
    alpha = surrogate_of_descent(small, large, shrink)
    assert quadratic([small, large], w0, shrink, alpha) < 1e-12
    if steps == 1:
        assert alpha == pytest.approx(1.0, abs=1e-9)


def surrogate_of_descent(small: float, large: float, shrink: Sequence[float]) -> float:
    """alpha* of section 3 for gradient descent, from the curvatures."""
    r1, r2 = shrink
    return (small * r1 / (1 - r1) - large * r2 / (1 - r2)) / (large - small)


def test_many_small_steps_have_their_surrogate_in_the_middle() -> None:
    small, large, steps, eta = 0.5, 2.0, 4, 1e-5
    shrink = [(1 - eta * small) ** steps, (1 - eta * large) ** steps]
    alpha = surrogate_of_descent(small, large, shrink)
    assert alpha == pytest.approx((steps + 1) / (2 * steps), abs=1e-3)


def test_total_variation_is_half_the_sum_of_two_means() -> None:
    assert total_variation(torch.full((2, 3, 6, 6), 0.7)).item() == 0.0
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    assert total_variation(board[None, None].float()).item() == 1.0
    x = torch.randn(3, 2, 5, 7)
    across = (x[..., :, 1:] - x[..., :, :-1]).abs().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    expected = 0.5 * (across + down).item()
    assert total_variation(x).item() == pytest.approx(expected, abs=1e-6)
    padded = torch.cat([x, torch.randn(2, 2, 5, 7)])
    masked = total_variation(padded, torch.tensor([1.0, 1, 1, 0, 0]))
    assert masked.item() == pytest.approx(expected, abs=1e-6)
