"""Attacks on messages: the numbers of the formulas, and what is replaced by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fedcore.strategies.fedavg import FedAvg
from torch import Tensor

from fedcore.messages.adversary import attacks

H = torch.tensor([[1.0, 2, 3], [2, 1, 4], [0, 3, 2], [2, 3, 3]], dtype=torch.float64)
TRAIN = FedAvg.train


def assert_near(found: Tensor, expected: list[float], digits: int = 9) -> None:
    gap = (found - torch.tensor(expected, dtype=torch.float64)).abs().max()
    assert gap < 0.6 * 10.0**-digits, f"{found.tolist()}, expected {expected}"


# Formulas


def test_simple_attacks_have_the_numbers_of_the_specification() -> None:
    assert_near(attacks.mean(H), [1.25, 2.25, 3])
    assert_near(attacks.deviation(H), [0.9574271078, 0.9574271078, 0.8164965809])
    assert_near(attacks.ipm(H, 1), [-1.25, -2.25, -3])
    assert_near(attacks.ipm(H, 0.1), [-0.125, -0.225, -0.3])
    assert_near(attacks.alie(H, 1.5), [2.6861406616, 3.6861406616, 4.2247448714])


@pytest.mark.parametrize(
    ("attack", "direction", "g"),
    [
        (attacks.minmax, "unit", 2.6998479688),
        (attacks.minmax, "sign", 1.4685019685),
        (attacks.minmax, "std", 1.5888745006),
        (attacks.minsum, "unit", 0.3535533906),
        (attacks.minsum, "sign", 0.2041241452),
        (attacks.minsum, "std", 0.2236067977),
        (lambda h, p: attacks.minsum(h, p, "max"), "unit", 1.7677669530),
        (lambda h, p: attacks.minsum(h, p, "max"), "sign", 1.0206207262),
        (lambda h, p: attacks.minsum(h, p, "max"), "std", 1.1180339887),
    ],
)
def test_minmax_and_minsum_go_as_far_as_the_specification_says(
    attack: Any, direction: Any, g: float
) -> None:
    p = attacks.perturbation(H, direction)
    step = attack(H, direction) - attacks.mean(H)
    assert float(step.dot(p) / p.dot(p)) == pytest.approx(g, abs=1e-9)


def test_minmax_sends_the_vector_of_the_specification() -> None:
    vector = [-0.2712315177, 0.7287684823, 1.7026894027]
    assert_near(attacks.minmax(H, "std"), vector)


@pytest.mark.parametrize(
    ("n", "f", "z"),
    [
        *[(20, 4, 0.157311), (25, 5, 0.253347), (50, 10, 0.253347)],
        *[(50, 12, 0.336038), (100, 20, 0.285841), (11, 2, 0.139710)],
        *[(5, 1, 0.0), (10, 2, 0.0), (20, 2, 0.0)],
    ],
)
def test_z_of_alie_follows_from_the_cohort(n: int, f: int, z: float) -> None:
    assert attacks.z_max(n, f) == pytest.approx(z, abs=1e-6)


def multi_krum(rows: Tensor, f: int) -> Tensor:
    """Multi-Krum as ByzFL has it: scores over n - f - 1 neighbours, mean of n - f."""
    n = len(rows)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    scores = distances.square().sort(1).values[:, 1 : n - f].sum(1)
    return rows[scores.argsort(stable=True)[: n - f]].mean(0)


def test_alie_is_optimised_against_multi_krum_as_in_the_specification() -> None:
    mu, sigma = attacks.mean(H), attacks.deviation(H)

    def damage(tau: float) -> float:
        rows = torch.cat([H, (mu + tau * sigma)[None]])
        return float((multi_krum(rows, 1) - mu).norm())

    tau, _ = attacks.strongest(damage)
    assert tau == pytest.approx(1.623652, abs=5e-7)
    expected = [2.8045286841, 3.8045286841, 4.3257065162]
    assert_near(mu + tau * sigma, expected)
