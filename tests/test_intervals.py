"""FedAU's weights from intervals: by hand, in fractions, and in their limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fedcore.rounds.participation import Bernoulli, Markov
from tests.helpers import Server
from tests.participation import (
    OMEGA,
    SEQUENCE,
    bernoulli_limit,
    fractions,
    harmonic,
    markov_limit,
    no_counts,
    omegas,
    recursion,
    simulated,
    weight_in,
    zeros,
)


@pytest.mark.parametrize("cutoff", OMEGA)
def test_the_intervals_of_the_example_have_the_means_worked_by_hand(
    cutoff: int | None,
) -> None:
    expected = fractions(OMEGA[cutoff])
    assert [omega for omega, _, _ in recursion(SEQUENCE, cutoff)] == expected
    assert omegas(SEQUENCE, cutoff)[:, 0].tolist() == [float(x) for x in expected]


@pytest.mark.parametrize("cutoff", OMEGA)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedau", {}), ("fedstale", {"beta": 0.0, "rates": "estimated"})],
)
def test_an_update_is_multiplied_by_the_weight_of_its_round(
    name: str, settings: dict[str, Any], cutoff: int | None
) -> None:
    """For FedStale, 1 / q: without cut-off q = 1, 1, 1, 1/3, 1/3, 2/5, 1/2 ... 2/5."""
    found = [
        weight_in(name, SEQUENCE[:t], cutoff=cutoff, **settings)
        for t in range(len(SEQUENCE) + 1)
    ]
    assert found == [float(x) for x in fractions(OMEGA[cutoff])]


def test_the_estimated_rate_is_participations_over_the_rounds_up_to_the_last() -> None:
    """q(t) = c / (s + 1), with c participations so far, the last in round s; else 1."""
    draw = np.random.default_rng(0)
    for p in (0.1, 0.5, 0.9):
        history = (draw.random(25) < p).astype(int)
        for t in range(len(history) + 1):
            came = np.flatnonzero(history[:t])
            q = Fraction(len(came), int(came[-1]) + 1) if len(came) else Fraction(1)
            assert 0 < q <= 1
            assert weight_in(
                "fedstale", history[:t].tolist(), beta=0.0, rates="estimated"
            ) == float(1 / q), (p, t)


@pytest.mark.parametrize("cutoff", [None, 1, 2, 3, 7])
def test_a_client_that_always_comes_has_weight_one(cutoff: int | None) -> None:
    assert (omegas(np.ones(40), cutoff) == 1.0).all()
    for t in (0, 1, 2, 17):
        assert weight_in("fedau", [1] * t, cutoff=cutoff) == 1.0
        assert (
            weight_in("fedstale", [1] * t, beta=0.0, rates="estimated", cutoff=cutoff)
            == 1.0
        )  # q = 1 exactly


def test_a_client_that_never_came_has_weight_one_and_later_the_cutoff() -> None:
    assert (omegas(np.zeros(200)) == 1.0).all()
    assert omegas(np.zeros(7), 3)[:, 0].tolist() == [1, 1, 1, 3, 3, 3, 3, 3]
    for cutoff in (1, 2, 5, 50):
        assert omegas(np.zeros(120), cutoff)[:, 0].tolist() == [1.0] * cutoff + [
            float(cutoff)
        ] * (121 - cutoff)
    assert [weight_in("fedau", [0] * t, cutoff=3) for t in range(8)] == [
        1,
        1,
        1,
        3,
        3,
        3,
        3,
        3,
    ]


def test_a_regular_client_gets_its_period_as_weight() -> None:
    for m in (1, 2, 4, 9):
        history = [t % m == m - 1 for t in range(5 * m + 3)]
        assert (omegas(history)[m:] == m).all(), (
            f"present in rounds {m - 1}, {2 * m - 1}, ..."
        )
        early = [
            t % m == 0 for t in range(5 * m + 1)
        ]  # present in rounds 0, m, 2m, ...
        found = omegas(early)[:, 0]
        for j in range(1, 7):
            after_j = [t for t in range(len(found)) if sum(early[:t]) == j]
            assert all(
                found[t] == float(Fraction(1 + (j - 1) * m, j)) for t in after_j
            ), (m, j)
    assert omegas([1, 0, 0, 0, 1])[:, 0].tolist() == [1, 1, 1, 1, 1, 5 / 2]


CYCLES = [
    (10, 90, 50, Fraction(100, 11)),
    (2, 98, 50, Fraction(100, 3)),
    (10, 90, 90, Fraction(100, 11)),
    (10, 90, 91, Fraction(10)),
    (10, 90, None, Fraction(10)),
    (2, 98, None, Fraction(50)),
    (3, 7, 3, Fraction(10, 5)),
    (1, 9, 1, Fraction(1)),
]


@pytest.mark.parametrize(("a", "b", "cutoff", "expected"), CYCLES)
def test_after_whole_cycles_the_weight_is_rounds_over_closed_intervals(
    a: int, b: int, cutoff: int | None, expected: Fraction
) -> None:
    assert expected == Fraction(a + b, a + (b // cutoff if cutoff else 0))
    history = ([0] * b + [1] * a) * 4
    assert omegas(history, cutoff)[a + b :: a + b, 0].tolist() == [float(expected)] * 4


@pytest.mark.parametrize(
    ("p", "limit", "deviation"), [(0.1, 9.9485, 9.21), (0.02, 31.7915, 17.77)]
)
def test_under_bernoulli_participation_the_weight_goes_to_the_limit(
    p: float, limit: float, deviation: float
) -> None:
    length = np.minimum(
        np.arange(1, 100_000), 50
    )  # of an interval: geometric, cut off at 50
    chance = p * (1 - p) ** np.arange(len(length))
    assert (length * chance).sum() == pytest.approx(bernoulli_limit(p, 50), rel=1e-9)
    assert bernoulli_limit(p, 50) == pytest.approx(limit, abs=5e-5)
    assert math.sqrt(
        (length**2 * chance).sum() - bernoulli_limit(p, 50) ** 2
    ) == pytest.approx(deviation, abs=5e-3)

    rounds = 4000
    found = simulated(Bernoulli(mean=p).process(2000, 1, no_counts), rounds, [50, None])
    assert harmonic(found[50]) == pytest.approx(limit, rel=0.01)
    assert harmonic(found[None]) == pytest.approx(1 / p, rel=0.02)
    # A mean over `rounds / limit` intervals has the deviation of one of them, over the
    # root of their number.
    assert found[50].std() * math.sqrt(rounds / limit) == pytest.approx(
        deviation, rel=0.06
    )


def test_under_markov_participation_the_weight_goes_to_the_limit() -> None:
    assert markov_limit(0.1, 50, 0.05) == pytest.approx(9.620, abs=5e-4)
    assert markov_limit(0.1, 10, 0.05) == pytest.approx(5.859, abs=5e-4)
    found = simulated(
        Markov(mean=0.1, q=0.05).process(1000, 1, no_counts), 5000, [50, 10]
    )
    assert harmonic(found[50]) == pytest.approx(9.620, rel=0.01)
    assert harmonic(found[10]) == pytest.approx(5.859, rel=0.01)


def test_a_markov_client_without_memory_has_the_bernoulli_limit() -> None:
    for p, cutoff in itertools.product((0.05, 0.1, 0.5, 0.9), (1, 2, 10, 50)):
        assert markov_limit(p, cutoff, q=p) == pytest.approx(
            bernoulli_limit(p, cutoff), rel=1e-12
        )
    found = simulated(Markov(mean=0.2, q=0.2).process(1000, 1, no_counts), 2000, [10])
    assert harmonic(found[10]) == pytest.approx(bernoulli_limit(0.2, 10), rel=0.01)


MEANS = {
    None: "1 1 5/4 3/2 27/16 29/16",
    2: "1 1 3/2 3/2 3/2 3/2",
    3: "1 1 5/4 7/4 7/4 7/4",
}


@pytest.mark.parametrize("cutoff", MEANS)
def test_the_mean_weight_over_all_histories_is_exact(cutoff: int | None) -> None:
    """p = 1/2: all 32 histories of five rounds are equally likely. Each is a client."""
    found = omegas(np.array(list(itertools.product([0, 1], repeat=5))).T, cutoff)
    means = [
        sum(Fraction(x).limit_denominator(1000) for x in row) / 32
        for row in found.tolist()
    ]
    assert means == fractions(MEANS[cutoff])


def random_histories(n: int = 300, rounds: int = 90) -> np.ndarray:
    """[T, n], rare clients and frequent ones."""
    draw = np.random.default_rng(5)
    return draw.random((rounds, n)) < draw.choice([0.0, 0.02, 0.1, 0.3, 0.7, 1.0], n)


@pytest.mark.parametrize("cutoff", [None, 1, 2, 3, 5, 50])
def test_recursion_and_both_closed_forms_agree_to_the_last_bit(
    cutoff: int | None,
) -> None:
    """The running mean in fractions, and two closed forms.

    (t - s) / M of the server's counters; and (c, e) of a client, which hears of its own
    rounds alone.
    """
    histories = random_histories()
    found = omegas(histories, cutoff)
    for i, history in enumerate(histories.T):
        c, e = 0, 0
        for t, (omega, m, s) in enumerate(recursion(history.tolist(), cutoff)):
            server = (t - s) / m if m else 1.0
            g = t - e
            mc, sc = (c, g) if cutoff is None else (c + g // cutoff, g % cutoff)
            client = (t - sc) / mc if mc else 1.0
            assert found[t, i] == server == client == float(omega), (i, t)
            if t < len(history) and history[t]:
                c, e = mc + 1, t + 1


@pytest.mark.parametrize("cutoff", [None, 1, 2, 3, 5, 50])
def test_weights_keep_their_bounds_and_a_cutoff_never_lowers_them(
    cutoff: int | None,
) -> None:
    histories = random_histories()
    found = omegas(histories, cutoff)
    t = np.arange(len(found))[:, None]
    assert (found >= 1).all()
    assert (found <= np.maximum(t, 1)).all()
    assert cutoff is None or (found <= cutoff).all()
    absent = ~histories
    assert (found[1:][absent] >= found[:-1][absent]).all(), (
        "a round of absence lowered a weight"
    )
    for i, history in enumerate(histories.T):
        for t, (omega, m, s) in enumerate(recursion(history.tolist(), cutoff)):
            assert m == 0 or m * omega == t - s
            assert m == 0 or round(m * found[t, i]) == t - s


def test_a_weight_rises_in_a_long_absence_only_with_a_cutoff() -> None:
    for m, expected in (
        (1, Fraction(60, 11)),
        (2, Fraction(110, 12)),
        (4, Fraction(15)),
    ):
        history = [1] * 10 + [0] * 50 * m
        assert omegas(history, 50)[-1, 0] == float(expected)
        assert weight_in("fedau", history, cutoff=50) == float(expected)
        assert weight_in("fedau", history) == 1.0


def test_a_participation_in_the_round_that_reaches_the_cutoff_closes_one_interval() -> (
    None
):
    assert omegas([0, 0, 1, 1], 3)[:, 0].tolist() == [
        1,
        1,
        1,
        3,
        2,
    ]  # two intervals, 3 and 1; three would give 4/3


@pytest.mark.parametrize("cutoff", [None, 3, 50])
def test_the_future_and_other_clients_do_not_change_a_weight(
    cutoff: int | None,
) -> None:
    histories = random_histories(60, 80)
    found, other = omegas(histories, cutoff), random_histories(60, 80)[::-1]
    for t0 in (0, 1, 40, 79):
        changed = np.concatenate([histories[:t0], other[t0:]])
        assert (omegas(changed, cutoff)[: t0 + 1] == found[: t0 + 1]).all(), (
            "rounds from t0 on changed a weight of t <= t0"
        )
    mixed = histories.copy()
    mixed[:, 1:] = other[:, 1:]
    assert (omegas(mixed, cutoff)[:, 0] == found[:, 0]).all(), (
        "client 0 depends on other clients"
    )
    order = np.random.default_rng(0).permutation(60)
    assert (omegas(histories[:, order], cutoff) == found[:, order]).all(), (
        "permuted clients have not permuted weights"
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedau", {}), ("fedstale", {"beta": 0.0, "rates": "estimated"})],
)
def test_who_else_comes_in_a_round_does_not_change_its_weights(
    name: str, settings: dict[str, Any]
) -> None:
    def step(cohort: Sequence[int]) -> float:
        server = Server(name, 3, w=zeros(), **settings)
        for present in SEQUENCE:
            server.round({i: [0.0] for i in ([0, 2] if present else [1])})
        return server.round({i: [1.0 if i == 0 else 0.0] for i in cohort}).item()

    assert (
        step([0])
        == step([0, 1])
        == step([0, 1, 2])
        == pytest.approx(5 / 2 / 3, rel=1e-15)
    )
