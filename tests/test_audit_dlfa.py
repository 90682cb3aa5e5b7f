"""DLFA: the attack that simulates local training."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit.attacks.dlfa import (
    DLFA,
    Lane,
    Settings,
    averaged,
    disorder,
    layer_weights,
    outside,
    squared_variation,
    training_of,
)
from tests.audits import audited, cnn, data, exact, see
from tests.helpers import assert_close


def test_the_true_images_in_their_batches_have_the_update_of_the_client() -> None:
    model, (x, y) = cnn().double(), exact(4, 110)
    seen = see(model, x, y, lr=0.1, epochs=3, batch=2)
    objective = DLFA(Settings()).objective(seen, training_of(seen))(model)
    target = trees.scale(seen.delta, -1 / (0.1 * 2))
    fixed, f = Lane(seen.w0, target, y), torch.tensor(1.0)

    def match(images: Tensor) -> float:
        every_epoch = images.expand(3, *images.shape)
        return objective({"x": every_epoch, "f": f}, fixed)[1].item()

    assert match(x) < 1e-20
    other, _ = exact(4, 111)
    simulated = see(model, other, y, lr=0.1, epochs=3, batch=2).delta
    weights, away, whole = layer_weights(seen.delta), 0.0, 0.0
    for name, change in seen.delta.items():
        away += weights[name] * float((simulated[name] - change).square().sum())
        whole += weights[name] * float(change.square().sum())
    assert match(other) == pytest.approx(away / whole, rel=1e-9)


def test_earlier_layers_weigh_more() -> None:
    names = ("0.weight", "0.bias", "4.weight", "10.weight")
    weights = layer_weights(dict.fromkeys(names, torch.ones(1)))
    raw = [1, 1, math.exp(-1), math.exp(-2)]
    expected = [weight / sum(raw) for weight in raw]
    assert list(weights.values()) == pytest.approx(expected)


def test_the_priors_of_the_simulated_attack_are_its_papers() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 5, generator=draw)
    across = (x[..., 1:] - x[..., :-1]).square().sum()
    down = (x[..., 1:, :] - x[..., :-1, :]).square().sum()
    expected = (across + down).item() / 3
    assert squared_variation(x).item() == pytest.approx(expected, rel=1e-5)

    low, high = torch.tensor(-0.5), torch.tensor(0.5)
    beyond = (x - high).clamp(min=0) + (low - x).clamp(min=0)
    expected = beyond.square().sum().item() / 3
    assert outside(x, low, high).item() == pytest.approx(expected, rel=1e-5)

    epochs = torch.randn(4, 3, 1, 2, 2, generator=draw)
    pairs = itertools.product(epochs.mean(1), repeat=2)
    apart = [(a - b).square().mean().item() for a, b in pairs]
    expected = sum(apart) / len(apart)
    assert disorder(epochs).item() == pytest.approx(expected, rel=1e-5)
    shuffled = torch.stack([epochs[0], epochs[0][[2, 0, 1]]])
    assert disorder(shuffled).item() == pytest.approx(0, abs=1e-12)


def test_epochs_are_put_in_one_order_before_they_are_averaged() -> None:
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    shuffled = torch.stack([x, x[[3, 1, 4, 0, 2]], x[[4, 3, 2, 1, 0]]])
    assert_close(averaged(shuffled), x, 1e-6, "images")


def test_the_simulated_attack_comes_nearer_than_its_start() -> None:
    clients = audited(1, 3, local__epochs=2, local__batch_size=2)
    still, attack = Settings(iterations=1, lr=1e-6), Settings(iterations=60)
    start, found = (
        DLFA(settings).reconstruct(clients.seen, clients.labels, 0)
        for settings in (still, attack)
    )
    assert found[0].curve[-1] < 0.3 * found[0].curve[0]
    assert clients.decibel(found) > clients.decibel(start) + 2
    assert found[0].x.shape == clients.truths[0].x.shape


def test_the_simulated_attack_says_what_it_cannot_do() -> None:
    x, y = data(2, 112)
    seen = see(cnn(), x, y)
    nothing = replace(seen, delta=trees.zeros_like(seen.delta))
    (still,) = DLFA(Settings(iterations=2)).reconstruct([nothing], [y], 0)
    assert bool(still.x.isfinite().all())
    with pytest.raises(ValueError, match="needs labels"):
        DLFA(Settings()).reconstruct([seen], [None], 0)
    several = replace(seen, clients=2, together=4)
    with pytest.raises(ValueError, match="not the mean of several"):
        DLFA(Settings()).reconstruct([several], [torch.zeros(4).long()], 0)
