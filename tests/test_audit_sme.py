"""SME and IG against the specification: the objective, the surrogate and the loop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedcore import trees
from fedcore.audit.attacks.base import noise, total_variation
from fedcore.audit.attacks.inverting_gradients import IG
from fedcore.audit.attacks.inverting_gradients import Settings as IGSettings
from fedcore.audit.attacks.sme import (
    SCALES,
    SME,
    Lane,
    SurrogateSettings,
    cosine,
    cosine_match,
    lane_of,
    scales,
    surrogate,
)
from fedcore.audit.observe import Observation, Subject, Truth, aggregate
from tests.audits import (
    PIXELS,
    audited,
    cnn,
    data,
    exact,
    flat,
    gradient_of,
    mlp,
    see,
    with_public,
    without_output_layer,
)
from tests.helpers import assert_close, equal


def lane(seen: Observation, y: Tensor, rho: float = 1.0) -> Lane:
    return lane_of(seen, y, rho, len(y))


def objective(
    seen: Observation,
    x: Tensor,
    y: Tensor,
    alpha: float,
    tv: float = 0.0,
    rho: float = 1.0,
) -> float:
    value = cosine_match(seen.public, tv)(seen.public.model)
    variables = {"x": x, "alpha": torch.tensor(alpha, dtype=x.dtype)}
    return value(variables, lane(seen, y, rho))[0].item()


def by_hand(seen: Observation, x: Tensor, y: Tensor, alpha: float, tv: float) -> float:
    """L(x, alpha) of the specification, section 4, with plain autograd."""
    w = {}
    for name, change in seen.delta.items():
        start = seen.w0[name]
        w[name] = alpha * start + (1 - alpha) * (start + change)
    g, D = flat(gradient_of(seen.public.model, w, x, y)), -flat(seen.delta)
    across = (x[..., 1:] - x[..., :-1]).abs().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    match = torch.dot(D / D.norm(), g / g.norm())
    return float(1 - match + tv * 0.5 * (across + down))


# The objective


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_objective_is_the_specifications(alpha: float) -> None:
    x, y = exact(3, 0)
    seen = see(cnn().double(), x, y, epochs=3)
    dummies, _ = exact(3, 1)
    expected = by_hand(seen, dummies, y, alpha, 0.07)
    assert objective(seen, dummies, y, alpha, tv=0.07) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
def test_the_true_images_match_one_step_exactly(
    dtype: torch.dtype, tolerance: float
) -> None:
    model, (x, y) = cnn().to(dtype), data(4, 2, dtype)
    seen = see(model, x, y, lr=0.1)
    assert abs(objective(seen, x, y, alpha=1.0)) <= tolerance
    step = trees.scale(gradient_of(model, seen.w0, x, y), 0.1)
    back = trees.scale(seen.delta, -1.0)
    assert_close(back, step, tolerance, "w0 - wT = eta g(w0)")


def test_the_derivative_of_alpha_is_that_of_the_chain_rule() -> None:
    model, (x, y) = mlp().double(), exact(3, 3)
    seen = see(model, x, y, lr=0.5, epochs=5)
    dummies, _ = exact(3, 4)
    value = cosine_match(seen.public, 0.0)(model)
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    match, _ = value({"x": dummies, "alpha": alpha}, lane(seen, y))
    (slope,) = torch.autograd.grad(match, alpha)

    w = surrogate(alpha.detach(), lane(seen, y))
    leaves = {name: p.requires_grad_() for name, p in w.items()}
    outputs = torch.func.functional_call(model, leaves, (dummies,))
    loss = functional.cross_entropy(outputs, y)
    along = list(leaves.values())
    g = torch.cat(
        [v.flatten() for v in torch.autograd.grad(loss, along, create_graph=True)]
    )
    D = -flat(seen.delta)
    slopes = torch.autograd.grad(1 - torch.dot(D / D.norm(), g / g.norm()), along)
    chain = 0.0  # <dL/dw, w0 - wT>
    for by_w, change in zip(slopes, seen.delta.values(), strict=True):
        chain -= float((by_w * change).sum())
    assert slope.item() == pytest.approx(chain, rel=1e-9)

    h = 1e-5
    above, below = (objective(seen, dummies, y, 0.4 + d) for d in (h, -h))
    assert slope.item() == pytest.approx((above - below) / (2 * h), rel=1e-6)


def test_the_surrogate_leads_from_one_end_to_the_other() -> None:
    x, y = data(3, 5)
    seen = see(cnn(), x, y, epochs=4)
    assert equal(surrogate(torch.tensor(1.0), lane(seen, y)), seen.w0)
    end = surrogate(torch.tensor(0.0), lane(seen, y))
    assert_close(end, seen.wT, 1e-6, "alpha = 0")
    middle = {name: 0.25 * seen.w0[name] + 0.75 * w for name, w in seen.wT.items()}
    found = surrogate(torch.tensor(0.25), lane(seen, y))
    assert_close(found, middle, 1e-6, "alpha = 1/4")


def test_personal_layers_stay_where_they_were_published() -> None:
    x, y = data(3, 6)
    seen = without_output_layer(see(mlp(), x, y, epochs=2))
    w = surrogate(torch.tensor(0.0), lane(seen, y))
    assert list(w) == list(seen.w0)
    for name in list(w)[2:]:
        assert torch.equal(w[name], seen.w0[name]), name
    g = gradient_of(seen.public.model, seen.wT, x, y)
    back = trees.scale(seen.delta, -1.0)
    expected = cosine(back, {name: g[name] for name in back}, trees.dot(back, back))
    found = objective(seen, x, y, 0.0)
    assert found == pytest.approx(1 - expected.item(), abs=1e-6)


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_scale_is_irrelevant_at_the_start_and_made_up_for_by_the_path(
    factor: float,
) -> None:
    x, y = exact(3, 7)
    seen, (dummies, _) = see(cnn().double(), x, y, epochs=5), exact(3, 8)
    scaled = replace(seen, delta=trees.scale(seen.delta, factor))
    at_start = objective(seen, dummies, y, 1.0)
    assert objective(scaled, dummies, y, 1.0) == pytest.approx(at_start, abs=1e-12)
    for alpha in (0.0, 0.5):
        expected = objective(seen, dummies, y, alpha)
        shorter = objective(scaled, dummies, y, alpha)
        assert shorter != pytest.approx(expected, abs=1e-9)
        longer = objective(scaled, dummies, y, alpha, rho=1 / factor)
        assert longer == pytest.approx(expected, abs=1e-12)


def test_an_update_turned_round_turns_the_cosine_round() -> None:
    x, y = data(3, 9)
    seen, (dummies, _) = see(cnn(), x, y), data(3, 10)
    value = objective(seen, dummies, y, 1.0)
    turned = objective(seen.flipped(), dummies, y, 1.0)
    assert turned == pytest.approx(2 - value, abs=1e-6)


def test_the_match_is_between_zero_and_two() -> None:
    x, y = data(3, 11)
    seen = see(cnn(), x, y, epochs=3)
    values = [objective(seen.flipped(), x, y, 1.0), objective(seen, x, y, 1.0)]
    for seed in range(5):
        for alpha in (0.0, 0.5, 1.0):
            values.append(objective(seen, data(3, seed).x, y, alpha))
    assert all(-1e-6 <= value <= 2 + 1e-6 for value in values)


def test_an_update_of_nothing_has_no_direction_and_no_nan() -> None:
    x, y = data(2, 12)
    seen = see(cnn(), x, y)
    nothing = replace(seen, delta=trees.zeros_like(seen.delta))
    (found,) = SME(SurrogateSettings(iterations=3)).reconstruct([nothing], [y], 0)
    assert found.objective == pytest.approx(1.0)
    assert bool(found.x.isfinite().all())


def test_the_order_of_dummies_with_their_labels_does_not_matter() -> None:
    (x, y), (dummies, _) = data(4, 13), data(4, 14)
    seen, order = see(cnn(), x, y, epochs=2), torch.tensor([2, 0, 3, 1])
    for tv in (0.0, 0.1):
        one = objective(seen, dummies, y, 0.6, tv)
        other = objective(seen, dummies[order], y[order], 0.6, tv)
        assert one == pytest.approx(other, abs=1e-6)


def test_the_norm_is_one_over_all_layers() -> None:
    (x, y), (dummies, _) = data(3, 15), data(3, 16)
    seen = see(cnn(), x, y, epochs=2)
    first = next(iter(seen.delta))
    uneven = replace(seen, delta=seen.delta | {first: 3 * seen.delta[first]})
    even = objective(seen, dummies, y, 1.0)
    assert abs(objective(uneven, dummies, y, 1.0) - even) > 1e-4


def test_the_cosine_is_that_of_one_long_vector() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (
        {"u": torch.randn(3, 2, generator=draw), "v": torch.randn(4, generator=draw)}
        for _ in range(2)
    )
    expected = functional.cosine_similarity(flat(a), flat(b), dim=0).item()
    assert cosine(a, b, trees.dot(a, a)).item() == pytest.approx(expected, abs=1e-6)


def test_total_variation_is_half_the_sum_of_two_means() -> None:
    assert total_variation(torch.full((2, 3, 6, 6), 0.7)).item() == 0.0
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    assert total_variation(board[None, None].float()).item() == 1.0
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    across = (x[..., :, 1:] - x[..., :, :-1]).abs()
    down = (x[..., 1:, :] - x[..., :-1, :]).abs()
    expected = (0.5 * (across.mean() + down.mean())).item()
    assert total_variation(x).item() == pytest.approx(expected, abs=1e-6)
    padded, mask = torch.cat([x, 9 * x[:2]]), torch.tensor([1.0, 1, 1, 0, 0])
    masked = total_variation(padded, mask).item()
    assert masked == pytest.approx(expected, abs=1e-6)


# The theorem: a quadratic loss on a plane


def quadratic(
    curvature: Sequence[float],
    w0: Sequence[float],
    shrink: Sequence[float],
    alpha: float,
) -> float:
    """1 - cosine at w(alpha), where training shrank w0 by these factors.

    The loss is sum lambda_i w_i^2 / 2.
    """
    start, kept, H = (
        torch.tensor(v, dtype=torch.float64) for v in (w0, shrink, curvature)
    )
    D = {"w": start - kept * start}
    unused, square = D["w"], trees.dot(D, D)
    fixed = Lane({"w": start}, D, square, {}, torch.tensor(1.0), unused, unused)
    w = surrogate(torch.tensor(alpha, dtype=torch.float64), fixed)
    return 1 - cosine(D, {"w": H * w["w"]}, square).item()


@pytest.mark.parametrize("seed", range(20))
def test_on_a_plane_one_point_of_the_segment_has_exactly_the_updates_direction(
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    curvature = torch.rand(2, generator=draw, dtype=torch.float64) * 3 + 0.01
    small, large = sorted(curvature.tolist())
    w0 = (torch.randn(2, generator=draw, dtype=torch.float64) + 0.1).tolist()
    tau = 0.1 + 3 * torch.rand(1, generator=draw).item()

    def h(x: float) -> float:
        return x / math.expm1(x * tau)

    alpha = (h(small) - h(large)) / (large - small)  # gradient flow for a time tau
    assert 0 < alpha < 0.5
    shrink = [math.exp(-small * tau), math.exp(-large * tau)]
    assert quadratic([small, large], w0, shrink, alpha) < 1e-12

    eta, steps = 0.9 / large, 1 + seed % 7  # gradient descent
    r = [(1 - eta * x) ** steps for x in (small, large)]
    alpha = _of_descent(small, large, r)
    assert quadratic([small, large], w0, r, alpha) < 1e-12
    if steps == 1:
        assert alpha == pytest.approx(1.0, abs=1e-9)


def _of_descent(small: float, large: float, r: Sequence[float]) -> float:
    """alpha of gradient descent that shrank the two coordinates by r."""
    slow, fast = small * r[0] / (1 - r[0]), large * r[1] / (1 - r[1])
    return (slow - fast) / (large - small)


def test_many_small_steps_have_their_surrogate_in_the_middle() -> None:
    small, large, steps, eta = 0.5, 2.0, 4, 1e-5
    r = [(1 - eta * x) ** steps for x in (small, large)]
    expected = (steps + 1) / (2 * steps)
    assert _of_descent(small, large, r) == pytest.approx(expected, abs=1e-3)


# The loop


def test_one_image_of_one_step_comes_back() -> None:
    clients = audited(2, 1)
    for attack in (
        SME(SurrogateSettings(iterations=200, tv=1e-4)),
        IG(IGSettings(iterations=200, tv=1e-4, lr=1.0)),
    ):
        found = attack.reconstruct(clients.seen, clients.labels, 0)
        value = clients.decibel(found)
        assert value > 25, f"{type(attack).__name__}: {value:.1f} dB"


def test_with_alpha_held_at_one_it_is_gradient_inversion_bit_for_bit() -> None:
    seen, y = see(cnn(), *data(3, 17), epochs=2), data(3, 17).y
    held = SurrogateSettings(iterations=20, alpha=1.0, learn_alpha=False)
    (one,) = SME(held).reconstruct([seen], [y], 7)
    inversion = IG(IGSettings(iterations=20, tv=0.01, lr=1.0))
    (other,) = inversion.reconstruct([seen], [y], 7)
    assert torch.equal(one.x, other.x)
    assert (one.objective, one.curve) == (other.objective, other.curve)
    assert one.facts["alpha"] == other.facts["alpha"] == 1.0


def test_gradient_inversion_starts_as_its_paper_has_it() -> None:
    s = IGSettings()
    assert (s.iterations, s.lr, s.decay, s.signed) == (4800, 0.1, True, False)
    assert s.tv == 2 * 0.1  # its total variation is twice ours


def test_the_surrogate_attack_starts_as_its_paper_has_it() -> None:
    s = SurrogateSettings()
    assert (s.iterations, s.lr, s.tv) == (1000, 1.0, 0.01)
    assert (s.alpha, s.alpha_lr, s.learn_alpha) == (0.5, None, True)
    assert (s.restarts, s.decay, s.signed) == (1, True, False)


def reference_loop(
    seen: Observation, y: Tensor, settings: SurrogateSettings, seed: int
) -> tuple[Tensor, float]:
    """Section 4 step by step, with torch's own scheduler, in plain autograd."""
    n, D = settings.iterations, -flat(seen.delta)
    start = noise(seen, seed, 0, (len(y), *seen.public.shape))
    least, greatest = (PIXELS.inputs(torch.full((1, 1, 1), e)) for e in (0.0, 1.0))
    x = start.clamp(least, greatest).requires_grad_()
    alpha = torch.tensor(0.5, dtype=x.dtype, requires_grad=True)
    optimisers = torch.optim.Adam([x], lr=1.0), torch.optim.Adam([alpha], lr=1 / n)
    marks = [3 * n // 8, 5 * n // 8, 7 * n // 8]
    multistep = torch.optim.lr_scheduler.MultiStepLR
    schedules = [multistep(optimiser, marks) for optimiser in optimisers]
    for _ in range(n):
        w = {}
        for name, p in seen.w0.items():
            w[name] = alpha * p + (1 - alpha) * (p + seen.delta[name])
        outputs = torch.func.functional_call(seen.public.model, w, (x,))
        loss = functional.cross_entropy(outputs, y)
        slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        g = torch.cat([v.flatten() for v in slopes])
        value = 1 - torch.dot(D / D.norm(), g / g.norm())
        value = value + settings.tv * total_variation(x)
        x.grad, alpha.grad = torch.autograd.grad(value, [x, alpha])
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            x.clamp_(least, greatest)
            alpha.clamp_(0, 1)
    return x.detach(), alpha.item()


def test_the_loop_is_the_specifications() -> None:
    x, y = exact(3, 20)
    seen = see(mlp().double(), x, y, lr=0.2, epochs=4)
    settings = SurrogateSettings(iterations=24, tv=0.02)
    (found,) = SME(settings).reconstruct([seen], [y], 5)
    expected, alpha = reference_loop(seen, y, settings, 5)
    assert_close(found.x, expected, 1e-9, "images")
    assert found.facts["alpha"] == pytest.approx(alpha, abs=1e-12)


def test_adam_gets_the_sign_of_the_gradient_where_that_is_asked_for() -> None:
    x, y = exact(2, 29)
    seen = see(mlp().double(), x, y, epochs=2)
    start = noise(seen, 0, 0, tuple(x.shape))

    def moved_by(signed: bool) -> Tensor:
        # Two small steps: in the first, Adam goes as far for a sign as for any number.
        settings = SurrogateSettings(
            iterations=2, lr=1e-3, tv=0.0, decay=False, signed=signed
        )
        (found,) = SME(settings).reconstruct([seen], [y], 0)
        inside = (start == start.clamp(*_box(start))).double()
        return (found.x - start) * inside

    def by_hand(signed: bool) -> Tensor:
        """Two steps of Adam, in the box, on L(x, 1/2) of the specification."""
        box = _box(start)
        dummies = start.clamp(*box).requires_grad_()
        alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        steps = torch.optim.Adam([dummies], lr=1e-3), torch.optim.Adam([alpha], lr=0.5)
        value = cosine_match(seen.public, 0.0)(seen.public.model)
        for _ in range(2):
            match, _ = value({"x": dummies, "alpha": alpha}, lane(seen, y))
            slope, alpha.grad = torch.autograd.grad(match, [dummies, alpha])
            dummies.grad = slope.sign() if signed else slope
            for step in steps:
                step.step()
            with torch.no_grad():
                dummies.clamp_(*box)
                alpha.clamp_(0, 1)
        inside = (start == start.clamp(*box)).double()
        return (dummies.detach() - start) * inside

    for signed in (False, True):
        assert_close(moved_by(signed), by_hand(signed), 1e-9, f"signed = {signed}")
    assert not torch.allclose(moved_by(True), moved_by(False), atol=1e-5)


def _box(like: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.zeros((1, 1, 1), dtype=like.dtype)
    return PIXELS.inputs(ends), PIXELS.inputs(ends + 1)


def test_images_stay_in_the_box_and_alpha_between_its_ends() -> None:
    x, y = data(3, 21)
    seen = see(cnn(), x, y, epochs=3)
    least, greatest = _box(x)
    for iterations in (1, 2, 3, 5, 9):
        wild = SurrogateSettings(iterations=iterations, lr=30.0, alpha_lr=0.7)
        (found,) = SME(wild).reconstruct([seen], [y], 0)
        assert bool(((found.x >= least) & (found.x <= greatest)).all())
        assert 0 <= found.facts["alpha"] <= 1
        assert all(-1e-6 <= value <= 2 + 1e-6 for value in found.curve)
        assert found.iterations == iterations


def test_the_same_seed_finds_the_same_and_leaves_the_model_as_it_was() -> None:
    x, y = data(3, 22)
    seen = see(cnn(), x, y, epochs=3)

    def digest() -> str:
        parameters = seen.public.model.parameters()
        held = [*seen.w0.values(), *seen.delta.values(), *parameters]
        content = b"".join(v.detach().numpy().tobytes() for v in held)
        return hashlib.sha256(content).hexdigest()

    before, attack = digest(), SME(SurrogateSettings(iterations=15))
    one, same, other = (attack.reconstruct([seen], [y], s)[0] for s in (3, 3, 4))
    assert torch.equal(one.x, same.x)
    assert one.facts == same.facts
    assert not torch.equal(one.x, other.x)
    assert digest() == before
    assert all(p.grad is None for p in seen.public.model.parameters())


def test_global_random_state_is_neither_used_nor_moved() -> None:
    x, y = data(2, 23)
    seen, found = see(cnn(), x, y), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        attack = SME(SurrogateSettings(iterations=5))
        found.append(attack.reconstruct([seen], [y], 0)[0].x)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)


def test_the_best_of_several_starts_is_kept_and_the_others_told() -> None:
    x, y = data(2, 24)
    seen = see(cnn(), x, y, epochs=2)
    several = SurrogateSettings(iterations=12, restarts=3)
    (found,) = SME(several).reconstruct([seen], [y], 0)
    (alone,) = SME(SurrogateSettings(iterations=12)).reconstruct([seen], [y], 0)
    assert len(found.others) == 2
    assert found.objective <= alone.objective + 1e-6
    away = [(alone.x - x).abs().max().item() for x in (found.x, *found.others)]
    assert min(away) < 1e-3, "the first start is one of the three"


def test_restarts_start_from_noise_of_their_own() -> None:
    x, y = data(2, 24)
    seen = see(cnn(), x, y)
    still = SurrogateSettings(iterations=1, restarts=3, lr=1e-9)
    (found,) = SME(still).reconstruct([seen], [y], 0)
    ends = [found.x, *found.others]
    starts = []
    for restart in range(3):
        start = noise(seen, 0, restart, tuple(x.shape))
        starts.append(start.clamp(*_box(start)))
        near = [torch.allclose(end, starts[restart], atol=1e-6) for end in ends]
        assert sum(near) == 1, f"restart {restart} starts from its own noise"


def test_a_stop_gives_what_there_is() -> None:
    x, y = data(2, 25)
    heard: list[tuple[float, float | None]] = []

    def progress(done: float, value: float | None) -> bool:
        heard.append((done, value))
        return len(heard) < 4

    attack = SME(SurrogateSettings(iterations=100))
    (found,) = attack.reconstruct([see(cnn(), x, y)], [y], 0, progress)
    assert found.iterations == 4
    shares = [done for done, _ in heard]
    assert shares == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert all(value is not None and 0 <= value <= 2 for _, value in heard)


def test_without_labels_they_are_found_with_the_images() -> None:
    clients = audited(4, 1)
    attack = SME(SurrogateSettings(iterations=60, tv=1e-4))
    found = attack.reconstruct(clients.seen, [None] * 4, 0)
    labels = [r.y.tolist() for r in found if r.y is not None]
    assert labels == [y.tolist() for y in clients.labels]


def test_clipped_and_averaged_updates_are_sought_along_longer_paths() -> None:
    seen, plain = see(cnn(), *data(2, 26)), SurrogateSettings()
    clipped = with_public(seen, clipped=True)
    assert SCALES == (1.0, 3.0, 10.0, 30.0)
    assert scales(seen, plain) == (1.0,)
    assert scales(clipped, plain) == SCALES
    assert scales(replace(seen, clients=4, together=8), plain) == SCALES
    assert scales(clipped, SurrogateSettings(path_scale=5.0)) == (5.0,)
    assert scales(clipped, SurrogateSettings(learn_alpha=False)) == (1.0,)


def test_clipping_changes_nothing_of_gradient_inversion() -> None:
    x, y = data(2, 27)
    seen = see(cnn(), x, y, epochs=2)
    short = replace(seen, delta=trees.scale(seen.delta, 0.25))  # exact in binary
    attack = IG(IGSettings(iterations=10))
    (one,) = attack.reconstruct([seen], [y], 0)
    (other,) = attack.reconstruct([with_public(short, clipped=True)], [y], 0)
    assert_close(one.x, other.x, 1e-4, "images")
    assert other.facts["path_scale"] == 1.0


def test_entries_that_were_not_sent_do_not_count_against_a_match() -> None:
    x, y = exact(3, 28)
    seen = see(mlp().double(), x, y)
    sizes = flat(seen.delta).abs().sort(descending=True).values
    least = sizes[len(sizes) // 10]
    delta = trees.map(lambda v: v * (v.abs() > least), seen.delta)
    thin = replace(seen, delta=delta)
    sparse = with_public(thin, sparse=True)
    assert objective(sparse, x, y, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert objective(thin, x, y, 1.0) > 0.01
    (found,) = SME(SurrogateSettings(iterations=3)).reconstruct([sparse], [y], 0)
    assert found.objective < 2


def test_secure_aggregation_is_attacked_with_the_dummies_of_all() -> None:
    model, attack = cnn(), SME(SurrogateSettings(iterations=5))
    subjects = []
    for client in range(3):
        x, y = data(2, 70 + client)
        subjects.append(Subject(see(model, x, y, client=client), Truth(x, y)))
    both = aggregate(subjects)
    assert both.truth is not None
    y = both.truth.y.sort().values
    (found,) = attack.reconstruct([both.seen], [y], 0)
    assert found.x.shape == (6, 1, 8, 8)
    assert found.facts["path_scale"] in SCALES
    assert aggregate(subjects[:1]) is subjects[0]
