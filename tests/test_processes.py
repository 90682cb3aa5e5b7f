"""Who takes part: rates, switches and cycles of the processes themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedcore.rounds.participation import Bernoulli, Cyclic, Markov, Process
from tests.participation import (
    harmonic,
    no_counts,
    simulated,
)


def attendance(process: Process, rounds: int) -> np.ndarray:
    """[rounds, population], 1 = took part."""
    found, state = np.zeros((rounds, process.population), dtype=bool), process.start()
    for t in range(rounds):
        cohort, state = process.sample(t, state)
        found[t, cohort.numpy()] = True
    return found


def test_markov_clients_come_at_their_rate_and_switch_as_often_as_defined() -> None:
    """(q01, q10) at q = 0.05, by rate.

    p = 0.1: (0.05, 0.45). p = 0.02: (1/49, 1), as q10 would be 2.45. p = 1: q10 = 0.
    """
    each, rounds = 100, 8000
    expected = {
        0.1: (0.05, 0.45),
        0.02: (1 / 49, 1.0),
        0.5: (0.05, 0.05),
        1.0: (math.nan, 0.0),
    }
    process = Markov(p=tuple(np.repeat(list(expected), each)), q=0.05).process(
        4 * each, 3, no_counts
    )
    found = attendance(process, rounds)
    for k, (p, (q01, q10)) in enumerate(expected.items()):
        mine = found[:, k * each : (k + 1) * each]
        assert mine.mean() == pytest.approx(p, rel=0.02), f"rate of p = {p}"
        before, now = mine[:-1], mine[1:]
        assert before[~before].size == 0 or now[~before].mean() == pytest.approx(
            q01, rel=0.03
        ), f"q01 of p = {p}"
        assert 1 - now[before].mean() == pytest.approx(q10, rel=0.03), f"q10 of p = {p}"


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 1.0])
def test_markov_clients_come_at_their_rate_and_switch_as_often_from_the_first_round_on(
    p: float,
) -> None:
    """The start is stationary, and its draws are not those of round 0."""
    n = 20_000
    first, second = attendance(Markov(mean=p, q=0.05).process(n, 9, no_counts), 2)
    q10 = min(0.05 * (1 / p - 1), 1.0)
    allowed = 5 * math.sqrt(p * (1 - p) / n)
    assert first.mean() == pytest.approx(p, abs=allowed)
    assert second.mean() == pytest.approx(p, abs=allowed)
    assert (first & ~second).mean() == pytest.approx(
        p * q10, abs=5 * math.sqrt(p * q10 / n)
    )


def test_the_mean_interval_of_markov_clients_is_one_over_their_rate() -> None:
    for p in (0.02, 0.1, 0.5, 1.0):
        found = simulated(
            Markov(mean=p, q=0.05).process(300, 4, no_counts), 5000, [None]
        )
        assert harmonic(found[None]) == pytest.approx(1 / p, rel=0.02), p


def test_cyclic_clients_come_in_one_block_of_every_cycle() -> None:
    """a = max(1, round(100 p)) of every a + b rounds, from the first on.

    Halves are rounded to even, and p = 1 rests one round of 101.
    """
    rates, active = (
        [0.1, 0.02, 0.001, 0.125, 0.375, 0.99, 1.0],
        [10, 2, 1, 12, 38, 99, 100],
    )
    each = 40
    found = attendance(
        Cyclic(p=tuple(np.repeat(rates, each)), cycle=100).process(
            each * len(rates), 5, no_counts
        ),
        420,
    )
    for k, a in enumerate(active):
        b = max(1, 100 - a)
        for mine in found[:, k * each : (k + 1) * each].T.astype(int):
            first = int(mine.argmax())
            assert 0 <= first < b
            windows = np.convolve(mine[first:], np.ones(a + b, dtype=int), "valid")
            came = set(windows.tolist())
            assert came == {a}, f"p = {rates[k]}: {came} of {a + b} rounds, not {a}"
            assert mine[first : first + a].all()
            assert not mine[first + a : first + a + b].any()


def test_cyclic_clients_start_at_every_round_of_their_absence_alike() -> None:
    """The first block begins uniformly in rounds 0 .. b - 1.

    So the rate of round 0 is 1 / b, and not p.
    """
    found = attendance(Cyclic(mean=0.1, cycle=100).process(9000, 6, no_counts), 90)
    first = np.bincount(found.argmax(0), minlength=90)
    assert len(first) == 90
    assert (
        (first - 100) ** 2 / 100
    ).sum() < 140  # chi-square with 89 degrees of freedom: 1 in 2000 is above
    assert found[0].mean() == pytest.approx(1 / 90, abs=0.005)


def test_bernoulli_clients_come_at_their_rate_independently() -> None:
    found = attendance(
        Bernoulli(p=tuple(np.repeat([0.02, 0.1, 0.9], 200))).process(600, 8, no_counts),
        3000,
    )
    for k, p in enumerate((0.02, 0.1, 0.9)):
        mine = found[:, k * 200 : (k + 1) * 200]
        assert mine.mean() == pytest.approx(p, rel=0.02)
        allowed = 5 * p / math.sqrt(mine.size)  # five standard deviations
        assert (mine[1:] & mine[:-1]).mean() == pytest.approx(p * p, abs=allowed), (
            "round after round"
        )
        assert (mine[:, 1:] & mine[:, :-1]).mean() == pytest.approx(
            p * p, abs=allowed
        ), "client beside client"
