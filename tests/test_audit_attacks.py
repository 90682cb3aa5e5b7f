"""DLG, iDLG, DLFA, analytic recovery, what attacks need, and models made to leak."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks.analytic import Analytic
from fedcore.audit.attacks.analytic import Settings as AnalyticSettings
from fedcore.audit.attacks.base import gradient, lacking, noise
from fedcore.audit.attacks.dlfa import (
    DLFA,
    averaged,
    disorder,
    layer_weights,
    outside,
    squared_variation,
    update_match,
)
from fedcore.audit.attacks.dlfa import Lane as Fixed
from fedcore.audit.attacks.dlfa import Settings as DLFASettings
from fedcore.audit.attacks.dlg import DLG
from fedcore.audit.attacks.dlg import Settings as DLGSettings
from fedcore.audit.attacks.idlg import IDLG, label
from fedcore.audit.inspection import inspect_model
from fedcore.audit.observe import Observation, Truth
from fedcore.audit.plan import IMAGE_ATTACKS
from tests.attacks import (
    PIXELS,
    cnn,
    data,
    decibel,
    gradient_of,
    mlp,
    see,
    subjects,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("same_models")

# DLG and iDLG


@pytest.mark.parametrize(
    "build", [mlp, lambda: mlp(between=nn.Identity()), lambda: mlp(between=nn.Tanh())]
)
def test_gradient_leakage_recovers_one_example_of_a_smooth_model(build: Any) -> None:
    model, settings = build(), DLGSettings(iterations=5)
    truths = [Truth(*data(1, 80)), Truth(*data(1, 81))]
    seen = [see(model, *truth, client=i) for i, truth in enumerate(truths)]
    with_labels = IDLG(settings).reconstruct(seen, [None] * 2, 0)
    jointly = DLG(settings).reconstruct(seen, [None] * 2, 0)
    joint_psnr = []
    for truth, one, other in zip(truths, with_labels, jointly, strict=True):
        assert one.y is not None
        assert one.y.tolist() == truth.y.tolist()
        assert metrics.score(one.x, truth, PIXELS).psnr.item() > 30
        joint_psnr.append(metrics.score(other.x, truth, PIXELS).psnr.item())
    # From some starts it settles on another label, as its authors say too.
    assert max(joint_psnr) > 30, joint_psnr


def test_gradient_leakage_matches_the_mean_gradient_at_the_start() -> None:
    model, (x, y) = mlp().double(), data(2, 90, dtype=torch.float64)
    o = see(model, x, y, lr=0.3)
    (found,) = DLG(DLGSettings(iterations=1)).reconstruct([o], [None], 0)
    x0, z0 = noise(o, 0, 0, (2, 1, 8, 8)), noise(o, 0, 1, (2, 5))
    w = {name: p.clone().requires_grad_() for name, p in o.w0.items()}
    outputs = torch.func.functional_call(model, w, (x0,))
    loss = -(z0.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
    g = torch.autograd.grad(loss, list(w.values()))
    G = gradient_of(model, o.w0, x, y)
    value = sum(((a - b) ** 2).sum() for a, b in zip(g, G.values(), strict=True))
    assert found.curve[0] == pytest.approx(float(value), rel=1e-9)
    assert found.objective <= found.curve[0]


def test_the_mean_gradient_is_that_of_the_steps_along_the_path() -> None:
    model, (x, y) = mlp().double(), data(4, 93, dtype=torch.float64)
    seen = see(model, x, y, lr=0.3, epochs=2, batch=2)
    w, slopes = dict(seen.w0), []
    for rows in ([0, 1], [2, 3], [0, 1], [2, 3]):
        slope = gradient_of(model, w, x[rows], y[rows])
        w = trees.axpy(-0.3, slope, w)
        slopes.append(slope)
    mean = trees.map(lambda *g: sum(g) / 4, *slopes)
    assert_close(gradient(seen), mean, 1e-12, "mean of four gradients")


def test_the_best_place_is_kept_where_a_search_runs_away() -> None:
    x, y = data(3, 91)
    (found,) = DLG(DLGSettings(iterations=20, lr=50.0)).reconstruct(
        [see(cnn(), x, y)], [None], 0
    )
    assert math.isfinite(found.objective)
    assert bool(found.x.isfinite().all())
    assert found.objective <= min(found.curve) + 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_the_label_of_one_example_is_always_read_off(seed: int) -> None:
    model, (x, y) = cnn(), data(1, 100 + seed)
    for epochs in (1, 10):
        assert label(see(model, x, y, lr=0.1, epochs=epochs)) == int(y)


def test_idlg_is_for_one_example() -> None:
    with pytest.raises(ValueError, match="is for one example; client 0 has 2"):
        IDLG(DLGSettings()).reconstruct([see(mlp(), *data(2, 92))], [None], 0)


# DLFA


def test_the_true_images_in_their_batches_have_the_update_of_the_client() -> None:
    model, (x, y) = cnn().double(), data(4, 110, dtype=torch.float64)
    o = see(model, x, y, lr=0.1, epochs=3, batch=2)
    value = update_match(o, DLFASettings())(model)
    fixed = Fixed(o.w0, trees.scale(o.delta, -1 / (0.1 * 2)), y)

    def match_of(images: Tensor) -> float:
        epochs = images.expand(3, *images.shape)
        _, match = value({"x": epochs, "f": torch.tensor(1.0)}, fixed)
        return match.item()

    assert match_of(x) < 1e-20
    other, _ = data(4, 111, dtype=torch.float64)
    simulated = see(model, other, y, lr=0.1, epochs=3, batch=2).delta
    away = whole = 0.0
    for name, weight in layer_weights(o.delta).items():
        away += weight * (simulated[name] - o.delta[name]).square().sum().item()
        whole += weight * o.delta[name].square().sum().item()
    assert match_of(other) == pytest.approx(away / whole, rel=1e-9)


def test_earlier_layers_weigh_more() -> None:
    names = ("0.weight", "0.bias", "4.weight", "10.weight")
    weights = layer_weights(dict.fromkeys(names, torch.ones(1)))
    raw = torch.tensor([0.0, 0.0, -1.0, -2.0]).exp()
    assert list(weights.values()) == pytest.approx((raw / raw.sum()).tolist())


def test_the_priors_of_the_simulated_attack_are_its_papers() -> None:
    x = torch.randn(3, 2, 4, 5)
    across = (x[..., 1:] - x[..., :-1]).square().sum()
    down = (x[..., 1:, :] - x[..., :-1, :]).square().sum()
    variation = (across + down).item() / 3
    assert squared_variation(x).item() == pytest.approx(variation, rel=1e-5)

    low, high = torch.tensor(-0.5), torch.tensor(0.5)
    beyond = (x - high).clamp(min=0) + (low - x).clamp(min=0)
    expected = beyond.square().sum().item() / 3
    assert outside(x, low, high).item() == pytest.approx(expected, rel=1e-5)

    epochs = torch.randn(4, 3, 1, 2, 2)
    means = epochs.mean(1).flatten(1)
    distances = (means[:, None] - means[None]).square().mean()
    assert disorder(epochs).item() == pytest.approx(distances.item(), rel=1e-5)
    reordered = torch.stack([epochs[0], epochs[0][[2, 0, 1]]])
    assert disorder(reordered).item() == pytest.approx(0, abs=1e-12)


def test_epochs_are_put_in_one_order_before_they_are_averaged() -> None:
    x = torch.randn(5, 1, 4, 4)
    shuffled = torch.stack([x, x[[3, 1, 4, 0, 2]], x[[4, 3, 2, 1, 0]]])
    assert_close(averaged(shuffled), x, 1e-6, "images")


def test_the_simulated_attack_comes_nearer_than_its_start() -> None:
    seen, y, truths, pixels = subjects(1, 4, local__epochs=2, local__batch_size=2)
    still = DLFA(DLFASettings(iterations=1, lr=1e-6)).reconstruct(seen, y, 0)
    (found,) = DLFA(DLFASettings(iterations=40)).reconstruct(seen, y, 0)
    assert found.curve[-1] < 0.3 * found.curve[0]
    assert decibel([found], truths, pixels) > decibel(still, truths, pixels) + 1
    assert found.x.shape == truths[0].x.shape


def test_the_simulated_attack_says_what_it_cannot_do() -> None:
    x, y = data(2, 112)
    o = see(cnn(), x, y)
    still = replace(o, delta=trees.zeros_like(o.delta))
    (found,) = DLFA(DLFASettings(iterations=2)).reconstruct([still], [y], 0)
    assert bool(found.x.isfinite().all())
    with pytest.raises(ValueError, match="needs labels"):
        DLFA(DLFASettings()).reconstruct([o], [None], 0)
    mean = replace(o, clients=2, together=4)
    with pytest.raises(ValueError, match="not the mean of several"):
        DLFA(DLFASettings()).reconstruct([mean], [torch.zeros(4).long()], 0)


# Analytic recovery


@pytest.mark.parametrize("steps", [1, 20])
def test_one_example_through_a_first_linear_layer_is_recovered_exactly(
    steps: int,
) -> None:
    model, (x, y) = mlp(between=nn.ReLU()).double(), data(1, 120, dtype=torch.float64)
    seen = see(model, x, y, epochs=steps)
    (found,) = Analytic(AnalyticSettings()).reconstruct([seen], [None], 0)
    assert found.facts["inputs"] == 1
    assert_close(found.x, x, 1e-10, f"input after {steps} steps")


def test_rows_that_one_example_alone_made_active_are_exact_among_several() -> None:
    x, y = data(3, 121, dtype=torch.float64)
    model, rows = mlp(between=nn.ReLU()).double(), x.flatten(1)
    layer = model.get_submodule("1")
    assert isinstance(layer, nn.Linear)
    # Three units that answer to one example each: weight[i] . x[j] = 1 if i = j.
    units = torch.linalg.solve(rows @ rows.T, torch.eye(3, dtype=x.dtype)) @ rows
    with torch.no_grad():
        layer.weight.copy_(units.repeat(4, 1))
        layer.bias.fill_(-0.5)
    (found,) = Analytic(AnalyticSettings()).reconstruct([see(model, x, y)], [None], 0)
    score = metrics.score(found.x, Truth(x, y), PIXELS)
    assert score.psnr.tolist() == [metrics.CAP] * 3


def test_recovery_from_layers_that_allow_none_says_why() -> None:
    attack = Analytic(AnalyticSettings())
    reason = "not a linear one with a bias on the raw input"
    with pytest.raises(ValueError, match=reason):
        attack.reconstruct([see(cnn(), *data(1, 122))], [None], 0)
    o = see(mlp(), *data(1, 122))
    hidden = replace(o, delta=dict(list(o.delta.items())[2:]))
    with pytest.raises(ValueError, match="never left the client"):
        attack.reconstruct([hidden], [None], 0)
    still = replace(o, delta=trees.zeros_like(o.delta))
    with pytest.raises(ValueError, match="no row of the first layer was active"):
        attack.reconstruct([still], [None], 0)


# What attacks need


SCALE = "needs the local step size and the number of local steps"
BATCHES = "needs the local step size, epochs and batch size"


@pytest.mark.parametrize(
    ("attack", "change", "reason"),
    [
        ("sme", {"pixels": None}, "needs inputs that are images"),
        ("ig", {"loss": lambda a, b: a.sum(1)}, "needs a classification task"),
        ("dlg", {"lr": None}, SCALE),
        ("idlg", {"epochs": None}, SCALE),
        ("dlfa", {"epochs": None, "steps": 5}, BATCHES),
    ],
)
def test_an_attack_that_lacks_something_says_what(
    attack: str, change: dict[str, Any], reason: str
) -> None:
    o, needs = see(mlp(), *data(2, 150)), IMAGE_ATTACKS[attack].needs
    assert lacking(needs, o) is None
    changed = replace(o, public=replace(o.public, **change))
    assert str(lacking(needs, changed)).startswith(reason)


def test_analytic_recovery_needs_nothing() -> None:
    o = see(mlp(), *data(2, 151))
    bare = replace(
        o.public,
        pixels=None,
        loss=lambda a, b: a.sum(1),
        lr=None,
        epochs=None,
        batch_size=None,
    )
    assert lacking(IMAGE_ATTACKS["analytic"].needs, replace(o, public=bare)) is None


# Models made to leak


def with_parameter(seen: Observation, name: str, value: Tensor) -> Observation:
    return replace(seen, w0={**seen.w0, name: value})


def test_a_model_that_nobody_changed_is_not_suspected() -> None:
    x, y = data(3, 6)
    assert inspect_model(see(cnn(), x, y)) == []
    (line,) = inspect_model(see(mlp(), x, y))
    assert "is linear on the raw input" in line


def test_an_imprint_layer_is_found() -> None:
    layers = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    o = see(nn.Sequential(nn.Flatten(), *layers), *data(3, 6))
    equal_rows = with_parameter(o, "1.weight", torch.ones(32, 64) / 64)
    planted = with_parameter(equal_rows, "1.bias", torch.linspace(-1, 0, 32))
    lines = "\n".join(inspect_model(planted))
    assert '32 of 32 rows of "1.weight" are one direction' in lines
    equal_biases = with_parameter(equal_rows, "1.bias", torch.zeros(32))
    assert "one direction" not in "\n".join(inspect_model(equal_biases))


@pytest.mark.parametrize(("name", "factor"), [("weight", 20.0), ("bias", 1e4)])
def test_parameters_out_of_range_are_found(name: str, factor: float) -> None:
    o = see(cnn(), *data(3, 6))
    last = [key for key in o.w0 if key.endswith(name)][-1]
    lines = inspect_model(with_parameter(o, last, factor * o.w0[last]))
    assert f'"{last}" is ' in "\n".join(lines)
    trained = see(cnn(), *data(3, 6), epochs=40, lr=0.1)
    assert inspect_model(replace(trained, w0=trained.wT)) == []
