"""Formulas of attacks on messages: published numbers, and bounds that they keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore.messages.adversary import attacks
from tests.attacked import assert_near, multi_krum

H = torch.tensor([[1.0, 2, 3], [2, 1, 4], [0, 3, 2], [2, 3, 3]], dtype=torch.float64)


def test_simple_attacks_have_the_numbers_of_the_specification() -> None:
    assert_near(attacks.mean(H), [1.25, 2.25, 3])
    assert_near(attacks.deviation(H), [0.9574271078, 0.9574271078, 0.8164965809])
    assert_near(attacks.ipm(H, 1), [-1.25, -2.25, -3])
    assert_near(attacks.ipm(H, 0.1), [-0.125, -0.225, -0.3])
    assert_near(attacks.alie(H, 1.5), [2.6861406616, 3.6861406616, 4.2247448714])


def minsum_as_one_can_read_the_paper(honest: Tensor, direction: Any) -> Tensor:
    return attacks.minsum(honest, direction, "max")


@pytest.mark.parametrize(
    ("attack", "direction", "g"),
    [
        (attacks.minmax, "unit", 2.6998479688),
        (attacks.minmax, "sign", 1.4685019685),
        (attacks.minmax, "std", 1.5888745006),
        (attacks.minsum, "unit", 0.3535533906),
        (attacks.minsum, "sign", 0.2041241452),
        (attacks.minsum, "std", 0.2236067977),
        (minsum_as_one_can_read_the_paper, "unit", 1.7677669530),
        (minsum_as_one_can_read_the_paper, "sign", 1.0206207262),
        (minsum_as_one_can_read_the_paper, "std", 1.1180339887),
    ],
)
def test_minmax_and_minsum_go_as_far_as_the_specification_says(
    attack: Any, direction: Any, g: float
) -> None:
    p = attacks.perturbation(H, direction)
    step = attack(H, direction) - attacks.mean(H)
    assert float(step.dot(p) / p.dot(p)) == pytest.approx(g, abs=1e-9)


def test_minmax_sends_the_vector_of_the_specification() -> None:
    expected = [-0.2712315177, 0.7287684823, 1.7026894027]
    assert_near(attacks.minmax(H, "std"), expected)


@pytest.mark.parametrize(
    ("n", "f", "z"),
    [
        (20, 4, 0.157311),
        (25, 5, 0.253347),
        (50, 10, 0.253347),
        (50, 12, 0.336038),
        (100, 20, 0.285841),
        (11, 2, 0.139710),
        (5, 1, 0.0),
        (10, 2, 0.0),
        (20, 2, 0.0),
    ],
)
def test_z_of_alie_follows_from_the_cohort(n: int, f: int, z: float) -> None:
    assert attacks.z_max(n, f) == pytest.approx(z, abs=6e-7)


def test_z_of_alie_is_finite_for_a_majority_of_malicious_clients() -> None:
    assert attacks.z_max(n=6, f=5) == 0
    assert 0 < attacks.z_max(n=10, f=7) < 1


@st.composite
def honest(draw: st.DrawFn) -> Tensor:
    h, d = draw(st.integers(2, 7)), draw(st.integers(1, 5))
    values = np.random.default_rng(draw(st.integers(0, 10**6))).normal(size=(h, d))
    return torch.from_numpy(
        values * 10 ** draw(st.integers(-3, 3)) + draw(st.floats(-2, 2))
    )


@settings(max_examples=40)
@given(honest(), st.sampled_from(["unit", "sign", "std"]))
def test_minmax_and_minsum_are_as_far_as_allowed_and_not_farther(
    rows: Tensor, direction: Any
) -> None:
    mu = attacks.mean(rows)
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    squares = squares.square()

    def farthest(sent: Tensor) -> tuple[float, float]:
        gaps = (sent - rows).square().sum(1)
        return float(gaps.max()), float(gaps.sum())

    for number, sent, allowed in (
        (0, attacks.minmax(rows, direction), float(squares.max())),
        (1, attacks.minsum(rows, direction), float(squares.sum(1).min())),
    ):
        reach = farthest(sent)[number]
        assert reach <= allowed * (1 + 1e-6)
        beyond = farthest(mu + 1.001 * (sent - mu))[number]
        is_farther = beyond > allowed * (1 - 1e-9) or torch.equal(sent, mu)
        assert is_farther, "a longer step was allowed"


def test_equal_honest_messages_leave_nothing_to_hide_in() -> None:
    rows = torch.ones(3, 4)
    for attack in (attacks.minmax, attacks.minsum):
        for direction in ("unit", "sign", "std"):
            sent = attack(rows, direction)  # type: ignore[arg-type]
            assert_near(sent, torch.ones(4))
    alone = torch.ones(1, 4)
    assert_near(attacks.alie(alone, 1.5), torch.ones(4))
    assert_near(attacks.minmax(torch.zeros(2, 4), "unit"), torch.zeros(4))


def test_blocks_of_columns_change_no_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.arange(8.0)
    found = []
    for entries in (2**22, 3 * 5, 1):
        monkeypatch.setattr(attacks, "ENTRIES", entries)
        rows = torch.arange(40.0).sin().view(5, 8)
        step = attacks.mimic_direction(rows, z, 1)
        sent = [attacks.minmax(rows, "std"), attacks.minsum(rows, "sign"), step]
        found.append((torch.stack(sent), attacks.mimicked(rows, z)))
    for values, row in found[1:]:
        assert_near(values, found[0][0], digits=12)
        assert row == found[0][1]


def test_alie_is_optimised_against_multi_krum_as_in_the_specification() -> None:
    mu, sigma = attacks.mean(H), attacks.deviation(H)

    def damage(tau: float) -> float:
        rows = torch.cat([H, (mu + tau * sigma)[None]])
        return float((multi_krum(rows, 1) - mu).norm())

    tau, _ = attacks.strongest(damage)
    assert tau == pytest.approx(1.623652, abs=5e-7)
    assert_near(mu + tau * sigma, [2.8045286841, 3.8045286841, 4.3257065162])
