"""What attacks need and cost, and the claims that are made of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks.base import Attack, lacking, settings_of
from fedcore.audit.attacks.dlfa import DLFA
from fedcore.audit.attacks.dlfa import Settings as DLFASettings
from fedcore.audit.attacks.inverting_gradients import IG
from fedcore.audit.attacks.inverting_gradients import Settings as IGSettings
from fedcore.audit.attacks.sme import SME, SurrogateSettings
from fedcore.audit.observe import aggregate
from fedcore.audit.plan import BUDGETS, IMAGE_ATTACKS
from fedcore.tasks import build_task
from tests.audits import Audited, audited, cnn, data, digits, mlp, see, with_public


def sum_of(outputs: Tensor, y: Tensor) -> Tensor:
    """A loss that is no cross-entropy."""
    return outputs.sum(1)


# Needs and settings


@pytest.mark.parametrize(
    ("attack", "change", "reason"),
    [
        ("sme", {"pixels": None}, "needs inputs that are images"),
        ("ig", {"loss": sum_of}, "needs a classification task"),
        ("dlg", {"lr": None}, "needs the local step size and the number of local"),
        ("idlg", {"epochs": None}, "needs the local step size and the number of local"),
        (
            "dlfa",
            {"epochs": None, "steps": 5},
            "needs the local step size, epochs and batch size",
        ),
    ],
)
def test_an_attack_that_lacks_something_says_what(
    attack: str, change: dict[str, Any], reason: str
) -> None:
    seen, needs = see(mlp(), *data(2, 150)), IMAGE_ATTACKS[attack].needs
    assert lacking(needs, seen) is None
    assert str(lacking(needs, with_public(seen, **change))).startswith(reason)


def test_analytic_recovery_needs_nothing() -> None:
    bare = with_public(
        see(mlp(), *data(2, 151)),
        pixels=None,
        loss=sum_of,
        lr=None,
        epochs=None,
        batch_size=None,
    )
    assert lacking(IMAGE_ATTACKS["analytic"].needs, bare) is None


def test_every_budget_has_settings_that_its_attacks_know() -> None:
    for attack, budget in itertools.product(IMAGE_ATTACKS, BUDGETS):
        settings = BUDGETS[budget].get(attack, {})
        settings_of(IMAGE_ATTACKS[attack]).model_validate(settings)
    with pytest.raises(ValueError, match="alpha_start"):
        SurrogateSettings.model_validate({"alpha_start": 0.5})


# Claims, on digits: the specification's small recipe at a size of seconds


@pytest.mark.parametrize("epochs", [1, 6])
def test_the_cost_of_an_iteration_grows_with_local_steps_for_simulation_alone(
    epochs: int,
) -> None:
    calls = 0

    class Counted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += len(x)
            return super().forward(x)

    x, y = data(4, 160)
    seen = see(Counted(*cnn()), x, y, epochs=epochs, batch=2)

    def examples(attack: Attack[Any]) -> int:
        """Examples that go through the model in one iteration.

        The first iteration is recorded, the second compared with the recording; the
        others run from that.
        """
        nonlocal calls
        calls = 0
        attack.reconstruct([seen], [y], 0)
        return calls // 2

    assert examples(SME(SurrogateSettings(iterations=5))) == 4
    assert examples(IG(IGSettings(iterations=5))) == 4
    assert examples(DLFA(DLFASettings(iterations=5))) == 4 * epochs


SMALL = SurrogateSettings(iterations=150, tv=1e-3)
SMALL_IG = IGSettings(iterations=150, tv=1e-3, lr=1.0)


@pytest.mark.slow
def test_the_surrogate_is_inversion_for_few_steps_and_better_for_many() -> None:
    ig: dict[int, float] = {1: 0.0, 5: 0.0, 20: 0.0}  # dB by local epochs
    sme = dict(ig)
    top1: list[float] = []
    for epochs, seed in itertools.product(ig, (0, 1)):
        settings = {"local__epochs": epochs, "local__batch_size": 2, "seed": seed}
        clients = audited(4, 4, **settings)
        inverted = IG(SMALL_IG).reconstruct(clients.seen, clients.labels, 0)
        ig[epochs] += clients.decibel(inverted) / 2
        found = SME(SMALL).reconstruct(clients.seen, clients.labels, 0)
        sme[epochs] += clients.decibel(found) / 2
        if epochs == 5:
            public_x = build_task(digits(**settings)).data.test.x
            for reconstruction, truth in zip(found, clients.truths, strict=True):
                score = metrics.score(reconstruction.x, truth, clients.pixels)
                identified = metrics.identification(score, public_x, clients.pixels, 0)
                top1.append(identified["top1"])
                chance = identified["chance"]
    assert abs(sme[1] - ig[1]) <= 1.5, (sme, ig)
    assert sme[20] - ig[20] >= 2.5, (sme, ig)
    assert sme[5] > ig[5], (sme, ig)
    assert ig[1] > ig[5] > ig[20], ig
    assert ig[1] - ig[20] > sme[1] - sme[20], (sme, ig)
    assert sum(top1) / len(top1) > 20 * chance, top1


@pytest.mark.slow
def test_clipping_is_no_defence_and_noise_and_aggregation_are() -> None:
    clients = audited(4, 4, local__epochs=10, local__batch_size=2)
    y = clients.labels
    none = clients.decibel(SME(SMALL).reconstruct(clients.seen, y, 0))

    clipped, short = replace(clients.seen[0].public, clipped=True), []
    for seen in clients.seen:
        delta = trees.scale(seen.delta, 0.1)
        short.append(replace(seen, delta=delta, public=clipped))
    fixed = SurrogateSettings(iterations=150, tv=1e-3, path_scale=1.0)
    unaware = clients.decibel(SME(fixed).reconstruct(short, y, 0))
    searched = clients.decibel(SME(SMALL).reconstruct(short, y, 0))
    assert unaware < none - 1.5, (none, unaware)
    assert searched > none - 1.5, (none, searched)

    draw, noisy = torch.Generator().manual_seed(0), []
    for sigma in (3e-4, 1e-3):
        disturbed = []
        for seen in clients.seen:
            delta = {}
            for name, value in seen.delta.items():
                noise = torch.randn(value.shape, generator=draw)
                delta[name] = value + sigma * noise
            disturbed.append(replace(seen, delta=delta))
        noisy.append(clients.decibel(SME(SMALL).reconstruct(disturbed, y, 0)))
    assert none > noisy[0] + 1 > noisy[1] + 2, (none, noisy)

    both = Audited([aggregate(clients.subjects)], clients.pixels)
    mean = both.decibel(SME(SMALL).reconstruct(both.seen, both.labels, 0))
    assert mean < none - 3, (none, mean)
