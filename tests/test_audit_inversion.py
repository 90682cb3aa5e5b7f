"""The loop that SME and gradient inversion share."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks.base import noise, settings_of, total_variation
from fedcore.audit.attacks.dlfa import (
    DLFA,
)
from fedcore.audit.attacks.dlfa import Settings as DLFASettings
from fedcore.audit.attacks.inverting_gradients import IG
from fedcore.audit.attacks.inverting_gradients import Settings as IGSettings
from fedcore.audit.attacks.sme import (
    SCALES,
    SME,
    SurrogateSettings,
    cosine_match,
    scales,
)
from fedcore.audit.observe import Observation, Subject, Truth, aggregate
from fedcore.audit.plan import BUDGETS, IMAGE_ATTACKS
from fedcore.audit.simulate import simulate
from fedcore.tasks import build_task
from fedcore.types import Params
from tests.attacks import (
    cnn,
    data,
    decibel,
    digits,
    ends_of_the_box,
    flat,
    lane,
    mlp,
    objective,
    see,
    subjects,
)
from tests.helpers import assert_close, equal

pytestmark = pytest.mark.usefixtures("same_models")

QUICK = SurrogateSettings(iterations=120, tv=1e-4)
IN_SMES_SETTINGS = IGSettings(iterations=120, tv=1e-4, lr=1.0)


def test_one_image_of_one_step_comes_back() -> None:
    seen, y, truths, pixels = subjects(1, 1)
    for attack in (SME(QUICK), IG(IN_SMES_SETTINGS)):
        value = decibel(attack.reconstruct(seen, y, 0), truths, pixels)
        assert value > 25, f"{type(attack).__name__}: {value:.1f} dB"


def test_the_surrogate_with_alpha_held_at_one_is_gradient_inversion() -> None:
    seen, y, _, _ = subjects(2, 3, local__epochs=2)
    held = SurrogateSettings(
        iterations=20, tv=0.01, lr=1.0, alpha=1.0, learn_alpha=False
    )
    one = SME(held).reconstruct(seen, y, 7)
    other = IG(IGSettings(iterations=20, tv=0.01, lr=1.0)).reconstruct(seen, y, 7)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.x, b.x)
        assert (a.objective, a.curve) == (b.objective, b.curve)
        assert a.facts["alpha"] == b.facts["alpha"] == 1.0


def test_gradient_inversion_starts_as_its_paper_has_it() -> None:
    s = IGSettings()
    assert (s.iterations, s.lr, s.tv, s.decay, s.signed) == (
        4800,
        0.1,
        2 * 0.1,
        True,
        False,
    )  # its TV is twice ours


def test_the_surrogate_attack_starts_as_its_paper_has_it() -> None:
    s = SurrogateSettings()
    assert (s.iterations, s.lr, s.tv, s.alpha, s.restarts, s.decay, s.signed) == (
        1000,
        1.0,
        0.01,
        0.5,
        1,
        True,
        False,
    )
    assert s.learn_alpha
    assert s.alpha_lr is None


def reference_loop(
    o: Observation, x: Tensor, y: Tensor, settings: SurrogateSettings
) -> tuple[Tensor, float]:
    """Section 4 step by step, with torch's own scheduler, in plain autograd."""
    iterations = settings.iterations
    D = torch.cat([-v.flatten() for v in o.delta.values()])
    least, greatest = ends_of_the_box(x.dtype)
    x = x.clamp(least, greatest).requires_grad_()
    alpha = torch.tensor(0.5, dtype=x.dtype, requires_grad=True)
    optimisers = (
        torch.optim.Adam([x], lr=1.0),
        torch.optim.Adam([alpha], lr=1 / iterations),
    )
    marks = [3 * iterations // 8, 5 * iterations // 8, 7 * iterations // 8]
    falling = torch.optim.lr_scheduler.MultiStepLR
    schedules = [falling(optimiser, marks) for optimiser in optimisers]
    for _ in range(iterations):
        w = dict(o.w0)
        for name, change in o.delta.items():
            w[name] = alpha * w[name] + (1 - alpha) * (w[name] + change)
        outputs = torch.func.functional_call(o.public.model, w, (x,))
        loss = functional.cross_entropy(outputs, y)
        slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        g = torch.cat([v.flatten() for v in slopes])
        match = 1 - torch.dot(D / D.norm(), g / g.norm())
        value = match + settings.tv * total_variation(x)
        x.grad, alpha.grad = torch.autograd.grad(value, [x, alpha])
        if settings.signed:
            x.grad = x.grad.sign()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            x.clamp_(least, greatest)
            alpha.clamp_(0, 1)
    return x.detach(), alpha.item()


@pytest.mark.parametrize("signed", [False, True])
def test_the_loop_is_the_specifications(signed: bool) -> None:
    model, (x, y) = mlp().double(), data(3, 20, dtype=torch.float64)
    o = see(model, x, y, lr=0.2, epochs=4)
    settings = SurrogateSettings(iterations=24, tv=0.02, signed=signed)
    (found,) = SME(settings).reconstruct([o], [y], 5)
    start = noise(o, 5, 0, tuple(x.shape))
    expected, alpha = reference_loop(o, start, y, settings)
    assert_close(found.x, expected, 1e-9, "images")
    assert found.facts["alpha"] == pytest.approx(alpha, abs=1e-12)


def test_images_stay_in_the_box_and_alpha_between_its_ends() -> None:
    x, y = data(3, 21)
    o = see(cnn(), x, y, epochs=3)
    least, greatest = ends_of_the_box()
    for iterations in (1, 2, 3, 5, 9):
        settings = SurrogateSettings(iterations=iterations, lr=30.0, alpha_lr=0.7)
        (found,) = SME(settings).reconstruct([o], [y], 0)
        assert bool(((found.x >= least) & (found.x <= greatest)).all())
        assert 0 <= found.facts["alpha"] <= 1
        assert min(found.curve) >= -1e-6
        assert max(found.curve) <= 2 + 1e-6
        assert found.iterations == iterations


def test_the_same_seed_finds_the_same_and_leaves_the_model_as_it_was() -> None:
    x, y = data(3, 22)
    o = see(cnn(), x, y, epochs=3)
    parameters = list(o.public.model.parameters())
    before = trees.map(torch.clone, [o.w0, o.delta, parameters])
    attack = SME(SurrogateSettings(iterations=15))
    (first,) = attack.reconstruct([o], [y], 3)
    (again,) = attack.reconstruct([o], [y], 3)
    (other,) = attack.reconstruct([o], [y], 4)
    assert torch.equal(first.x, again.x)
    assert first.facts == again.facts
    assert not torch.equal(first.x, other.x)
    assert equal([o.w0, o.delta, parameters], before)
    for parameter in parameters:
        assert parameter.grad is None


def test_global_random_state_is_neither_used_nor_moved() -> None:
    x, y = data(2, 23)
    o, found = see(cnn(), x, y), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(SME(SurrogateSettings(iterations=5)).reconstruct([o], [y], 0)[0].x)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)


def test_of_several_starts_the_best_match_is_kept_and_the_others_told() -> None:
    x, y = data(2, 24)
    o = see(cnn(), x, y, epochs=2)
    several = SurrogateSettings(iterations=12, restarts=3)
    (found,) = SME(several).reconstruct([o], [y], 0)
    (alone,) = SME(SurrogateSettings(iterations=12)).reconstruct([o], [y], 0)
    assert len(found.others) == 2
    assert found.objective <= alone.objective + 1e-6
    ends = [found.x, *found.others]
    distances = [(alone.x - end).abs().max().item() for end in ends]
    assert min(distances) < 1e-3, "the first start is one of the three"
    for one, other in itertools.combinations(ends, 2):
        assert (one - other).abs().max().item() > 0.1, "each start has its own noise"


def test_a_stop_gives_what_there_is() -> None:
    x, y = data(2, 25)
    seen: list[tuple[float, float | None]] = []

    def progress(done: float, value: float | None) -> bool:
        seen.append((done, value))
        return len(seen) < 4

    (found,) = SME(SurrogateSettings(iterations=100)).reconstruct(
        [see(cnn(), x, y)], [y], 0, progress
    )
    assert found.iterations == 4
    assert [done for done, _ in seen] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert all(value is not None and 0 <= value <= 2 for _, value in seen)


def test_without_labels_they_are_found_with_the_images() -> None:
    seen, y, _, _ = subjects(4, 1)
    attack = SME(SurrogateSettings(iterations=60, tv=1e-4))
    found = attack.reconstruct(seen, [None] * 4, 0)
    assert equal([reconstruction.y for reconstruction in found], y)


def test_clipped_and_averaged_updates_are_sought_along_longer_paths() -> None:
    x, y = data(2, 26)
    o, s = see(cnn(), x, y), SurrogateSettings()
    clipped = replace(o, public=replace(o.public, clipped=True))
    assert SCALES == (1.0, 3.0, 10.0, 30.0)
    assert scales(o, s) == (1.0,)
    assert scales(clipped, s) == SCALES
    assert scales(replace(o, clients=4, together=8), s) == SCALES
    assert scales(clipped, s.model_copy(update={"path_scale": 5.0})) == (5.0,)
    assert scales(clipped, s.model_copy(update={"learn_alpha": False})) == (1.0,)


def test_clipping_changes_nothing_of_gradient_inversion() -> None:
    x, y = data(2, 27)
    o = see(cnn(), x, y, epochs=2)
    public = replace(o.public, clipped=True)
    clipped = replace(o, delta=trees.scale(o.delta, 0.25), public=public)
    attack = IG(IGSettings(iterations=10))
    (one,) = attack.reconstruct([o], [y], 0)
    (other,) = attack.reconstruct([clipped], [y], 0)
    assert_close(one.x, other.x, 1e-4, "images")
    assert other.facts["path_scale"] == 1.0


def test_entries_that_were_not_sent_do_not_count_against_a_match() -> None:
    model, (x, y) = mlp().double(), data(3, 28, dtype=torch.float64)
    o = see(model, x, y)
    sizes = flat(o.delta).abs().sort(descending=True).values
    least = sizes[len(sizes) // 10]
    sparse = replace(
        o,
        delta=trees.map(lambda v: v * (v.abs() > least), o.delta),
        public=replace(o.public, sparse=True),
    )
    keep = trees.map(lambda v: (v != 0).double(), sparse.delta)
    on_model = cosine_match(sparse.public, 0.0)(model)
    variables = {"x": x, "alpha": torch.tensor(1.0).double()}
    value, _ = on_model(variables, lane(sparse, y)._replace(keep=keep))
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert objective(sparse, x, y, 1.0) > 0.01
    (found,) = SME(SurrogateSettings(iterations=3)).reconstruct([sparse], [y], 0)
    assert found.objective < 2


def test_settings_that_no_attack_knows_are_refused() -> None:
    for name, budget in itertools.product(IMAGE_ATTACKS, BUDGETS.values()):
        settings_of(IMAGE_ATTACKS[name]).model_validate(budget.get(name, {}))
    with pytest.raises(ValueError, match="alpha_start"):
        SurrogateSettings.model_validate({"alpha_start": 0.5})


def test_secure_aggregation_is_attacked_with_the_dummies_of_all() -> None:
    model, attack = cnn(), SME(SurrogateSettings(iterations=5))
    clients = []
    for i in range(3):
        truth = Truth(*data(2, 70 + i))
        clients.append(Subject(see(model, *truth, client=i), truth))
    together = aggregate(clients)
    assert together.truth is not None
    y = together.truth.y.sort().values
    (found,) = attack.reconstruct([together.seen], [y], 0)
    assert found.x.shape == (6, 1, 8, 8)
    assert found.facts["path_scale"] in SCALES
    _, y = data(2, 70)
    (one,) = attack.reconstruct([aggregate(clients[:1]).seen], [y], 0)
    (alone,) = attack.reconstruct([clients[0].seen], [y], 0)
    assert torch.equal(one.x, alone.x)


# Claims about the attacks, on digits: the specification's small recipe, in seconds


@pytest.mark.parametrize("epochs", [1, 6])
def test_only_a_simulated_training_costs_more_with_more_local_steps(
    epochs: int,
) -> None:
    calls = 0

    class Counted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += len(x)
            return super().forward(x)

    x, y = data(4, 160)
    o = see(Counted(*cnn()), x, y, epochs=epochs, batch=2)

    def examples(attack: Any) -> int:
        """Examples through the model in one iteration.

        The first is recorded, the second compared with that, the others run from it.
        """
        nonlocal calls
        calls = 0
        attack.reconstruct([o], [y], 0)
        return calls // 2

    assert examples(SME(SurrogateSettings(iterations=5))) == 4
    assert examples(IG(IGSettings(iterations=5))) == 4
    assert examples(DLFA(DLFASettings(iterations=5))) == 4 * epochs


SMALL = SurrogateSettings(iterations=150, tv=1e-3)
SMALL_IG = IGSettings(iterations=150, tv=1e-3, lr=1.0)


@pytest.mark.slow
def test_the_surrogate_is_inversion_for_few_steps_and_better_for_many() -> None:
    psnr: dict[tuple[str, int], float] = {}
    identified: list[dict[str, float]] = []
    for epochs in (1, 5, 20):
        values: dict[str, list[float]] = {"ig": [], "sme": []}
        for seed in (0, 1):
            settings = {"local__epochs": epochs, "local__batch_size": 2, "seed": seed}
            seen, y, truths, pixels = subjects(4, 4, **settings)
            by_inversion = IG(SMALL_IG).reconstruct(seen, y, 0)
            values["ig"].append(decibel(by_inversion, truths, pixels))
            by_surrogate = SME(SMALL).reconstruct(seen, y, 0)
            values["sme"].append(decibel(by_surrogate, truths, pixels))
            if epochs != 5:
                continue
            public_x = build_task(digits(**settings)).data.test.x
            for found, truth in zip(by_surrogate, truths, strict=True):
                score = metrics.score(found.x, truth, pixels)
                identified.append(metrics.identification(score, public_x, pixels, 0))
        for name, of_seeds in values.items():
            psnr[name, epochs] = sum(of_seeds) / 2
    ig_loss = psnr["ig", 1] - psnr["ig", 20]
    sme_loss = psnr["sme", 1] - psnr["sme", 20]
    assert abs(psnr["sme", 1] - psnr["ig", 1]) <= 1.5, psnr
    assert psnr["sme", 20] - psnr["ig", 20] >= 2.5, psnr
    assert psnr["sme", 5] > psnr["ig", 5], psnr
    assert psnr["ig", 1] > psnr["ig", 5] > psnr["ig", 20], psnr
    assert ig_loss > sme_loss, psnr
    top1 = sum(client["top1"] for client in identified) / len(identified)
    assert top1 > 20 * identified[0]["chance"], identified


@pytest.mark.slow
def test_clipping_is_no_defence_and_noise_and_aggregation_are() -> None:
    experiment = digits(local__epochs=10, local__batch_size=2)
    simulated = simulate(experiment, build_task(experiment), 4, 4)
    seen, y, truths, pixels = subjects(4, 4, local__epochs=10, local__batch_size=2)
    none = decibel(SME(SMALL).reconstruct(seen, y, 0), truths, pixels)

    clipped = replace(seen[0].public, clipped=True)
    short = []
    for o in seen:
        short.append(replace(o, delta=trees.scale(o.delta, 0.1), public=clipped))
    by_unaware = SME(SMALL.model_copy(update={"path_scale": 1.0}))
    unaware = decibel(by_unaware.reconstruct(short, y, 0), truths, pixels)
    searched = decibel(SME(SMALL).reconstruct(short, y, 0), truths, pixels)
    assert unaware < none - 1.5, (none, unaware)
    assert searched > none - 1.5, (none, searched)

    draw, noisy = torch.Generator().manual_seed(0), []

    def disturbed(delta: Params, sigma: float) -> Params:
        return trees.map(
            lambda v: v + sigma * torch.randn(v.shape, generator=draw), delta
        )

    for sigma in (3e-4, 1e-3):
        hidden = [replace(o, delta=disturbed(o.delta, sigma)) for o in seen]
        noisy.append(decibel(SME(SMALL).reconstruct(hidden, y, 0), truths, pixels))
    assert none > noisy[0] + 1 > noisy[1] + 2, (none, noisy)

    together = aggregate(simulated)
    assert together.truth is not None
    labels = together.truth.y.sort().values
    found = SME(SMALL).reconstruct([together.seen], [labels], 0)
    mean = decibel(found, [together.truth], pixels)
    assert mean < none - 3, (none, mean)
