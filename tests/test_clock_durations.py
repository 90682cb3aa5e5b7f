"""Durations of work: formulas by hand, laws of the distributions, and their keys."""

from __future__ import annotations

import math
from itertools import accumulate
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.clock.durations import LONGEST, Durations
from fedcore.clock.exchange import exchange
from fedcore.clock.settings import ClockSettings
from fedcore.rng import rng, uniforms

LOG_NORMAL = {"name": "lognormal", "median": 2.0, "sigma": 1.2}
ZIPF = {"name": "zipf", "base": 0.5, "a": 2.0, "cap": 6}
TWO_CLASS = {"name": "two_class", "value": 1.0, "factor": 10.0, "share": 0.3}
EVERYTHING = {
    "step_s": LOG_NORMAL,
    "down_mbps": ZIPF,
    "up_mbps": TWO_CLASS,
    "latency_s": LOG_NORMAL,
    "jitter": 0.4,
}


def clock(**changes: Any) -> ClockSettings:
    return ClockSettings.model_validate({"step_s": 1.0, **changes})


def steps_alone(durations: Durations, clients: np.ndarray) -> np.ndarray:
    """Seconds of one step of each client's."""
    ones = np.ones(len(clients), dtype=np.int64)
    seconds: np.ndarray = durations.of(clients, 0, ones, 0, 0) / 1e6
    return seconds


def test_a_duration_is_the_formula() -> None:
    settings_ = clock(step_s=0.25, down_mbps=8, up_mbps=2, latency_s=0.5)
    durations = Durations(settings_, 5, seed=0)
    clients, steps = np.array([1, 4]), np.array([0, 12])
    # 2 x 0.5 + 8e-6 x 3 000 000 / 8 + 0.25 x (0 or 12) + 8e-6 x 500 000 / 2
    expected = [1 + 3 + 0 + 2, 1 + 3 + 3 + 2]
    found = durations.of(clients, 7, steps, 3_000_000, 500_000)
    assert found.dtype == np.int64
    assert found.tolist() == [seconds * 1_000_000 for seconds in expected]
    seconds = durations.expected(clients, steps, 3_000_000, 500_000)
    assert seconds.tolist() == expected


def test_bytes_up_are_needed_only_where_up_has_a_limit() -> None:
    assert Durations(clock(up_mbps=1), 1, 0).needs_bytes_up
    assert not Durations(clock(down_mbps=1), 1, 0).needs_bytes_up


def test_durations_are_whole_microseconds() -> None:
    durations = Durations(clock(step_s=1.4e-6), 1, 0)
    found = durations.of(np.array([0, 0]), 0, np.array([1, 2]), 0, 0)
    assert found.tolist() == [1, 3]


def test_no_duration_is_too_long_for_64_bits() -> None:
    settings_ = clock(
        step_s={"name": "lognormal", "median": 1e9, "sigma": 10}, jitter=10
    )
    clients, steps = np.arange(2000), np.full(2000, 10**9)
    found = Durations(settings_, 2000, 0).of(clients, 0, steps, 0, 0)
    assert found.max() == LONGEST
    assert found.min() >= 0


def test_a_log_normal_speed_has_its_median_and_mean() -> None:
    clients = np.arange(200_000)
    seconds = steps_alone(Durations(clock(step_s=LOG_NORMAL), 200_000, 1), clients)
    logs = np.log(seconds / 2)
    assert abs(logs.mean()) < 3 * 1.2 / len(clients) ** 0.5
    assert logs.std() == pytest.approx(1.2, rel=0.005)
    assert seconds.mean() == pytest.approx(2 * math.exp(1.2**2 / 2), rel=0.02)


def test_a_zipf_speed_has_its_probabilities() -> None:
    clients = np.arange(200_000)
    seconds = steps_alone(Durations(clock(step_s=ZIPF), 200_000, 1), clients)
    ranks, counts = np.unique(seconds / 0.5, return_counts=True)
    assert ranks.tolist() == [1, 2, 3, 4, 5, 6]
    inside = [rank**-2.0 / (math.pi**2 / 6) for rank in range(1, 6)]
    expected = np.array([*inside, 1 - sum(inside)])  # what is above counts as the cap
    assert np.abs(counts / len(clients) - expected).max() < 0.004


def test_a_two_class_speed_has_its_share_of_slow_clients() -> None:
    clients = np.arange(200_000)
    seconds = steps_alone(Durations(clock(step_s=TWO_CLASS), 200_000, 1), clients)
    assert set(seconds.tolist()) == {1.0, 10.0}
    assert (seconds == 10).mean() == pytest.approx(0.3, abs=0.004)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_none_may_be_slow(share: float) -> None:
    settings_ = clock(step_s={**TWO_CLASS, "share": share})
    seconds = steps_alone(Durations(settings_, 5000, 1), np.arange(5000))
    assert set(seconds.tolist()) == {10.0 if share else 1.0}


def test_jitter_is_of_one_work_and_has_its_mean() -> None:
    durations = Durations(clock(jitter=0.5, latency_s=1), 3, seed=2)
    client, steps = np.array([1]), np.array([4])
    found = []
    for version in range(20_000):
        found.append(durations.of(client, version, steps, 0, 0)[0] / 1e6 - 2)
    logs = np.log(np.array(found) / 4)
    assert abs(logs.mean()) < 3 * 0.5 / len(found) ** 0.5
    assert logs.std() == pytest.approx(0.5, rel=0.02)
    expected = durations.expected(client, steps, 0, 0)
    assert expected[0] == pytest.approx(2 + 4 * math.exp(0.125))
    assert np.mean(found) + 2 == pytest.approx(expected[0], rel=0.01)


def test_draws_of_a_client_are_independent_of_each_other() -> None:
    draws = uniforms(0, "clock", np.arange(50_000)[:, None])
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.005
    off_diagonal = np.corrcoef(draws.T) - np.eye(4)
    assert np.abs(off_diagonal).max() < 0.02


def test_the_numbers_of_a_key_are_those_that_seed_its_generator() -> None:
    ids = np.array([[3, 5], [0, 2**32 - 1]])
    for seed in (0, 7, 2**40 + 1):
        found = uniforms(seed, "clock work", ids)
        for row, (version, client) in zip(found, ids.tolist(), strict=True):
            generator = rng(seed, "clock work", version, client)
            sequence: Any = generator.bit_generator.seed_seq
            words = sequence.generate_state(4, np.uint64)
            expected = [((int(word) >> 12) + 0.5) / 2**52 for word in words]
            assert row.tolist() == expected


def test_uniform_numbers_are_inside_their_interval() -> None:
    top = np.uint64(2**64 - 1) >> np.uint64(12)
    assert 0 < 0.5 * 2.0**-52 < (float(top) + 0.5) * 2.0**-52 < 1
    for ids in (np.array([[-1]]), np.array([[2**32]]), np.full((20, 1), 2**32)):
        with pytest.raises(ValueError, match="ids of generators are from 0"):
            uniforms(0, "clock", ids)
    assert uniforms(0, "clock", np.empty((0, 1), dtype=np.int64)).shape == (0, 4)


@settings(max_examples=60, derandomize=True)
@given(
    clients=st.sets(st.integers(0, 2000), min_size=1, max_size=40),
    alone=st.integers(0, 10**6),
    version=st.integers(0, 1000),
    seed=st.integers(0, 2**64),
)
def test_a_duration_depends_on_the_client_and_version_alone(
    clients: set[int], alone: int, version: int, seed: int
) -> None:
    settings_ = ClockSettings.model_validate(EVERYTHING)
    together = np.array(sorted(clients))
    steps = 1 + together % 7
    large, small = Durations(settings_, 10**6, seed), Durations(settings_, 2001, seed)
    found = large.of(together, version, steps, 10_000, 20_000)
    assert found.tolist() == small.of(together, version, steps, 10_000, 20_000).tolist()
    place = alone % len(together)
    single = together[place : place + 1]
    one = small.of(single, version, steps[place : place + 1], 10_000, 20_000)
    assert one.tolist() == [found[place]]


def normal(uniform: float) -> float:
    return NormalDist().inv_cdf(uniform)


def test_draws_are_those_of_their_keys() -> None:
    settings_ = ClockSettings.model_validate(EVERYTHING)
    durations = Durations(settings_, 100, seed=5)
    nbytes_down, nbytes_up = 1_000_000, 250_000
    clients, steps = np.array([8, 31]), np.array([3, 4])
    found = durations.of(clients, 6, steps, nbytes_down, nbytes_up)
    for place, client in enumerate(clients.tolist()):
        # A number for each of step_s, down_mbps, up_mbps and latency_s, in this order.
        own = uniforms(5, "clock", np.array([[client]]))[0].tolist()
        step_s = 2 * math.exp(1.2 * normal(own[0]))
        chances = [rank**-2 * 6 / math.pi**2 for rank in range(1, 6)]
        rank = 1 + sum(own[1] > below for below in accumulate(chances))
        up_mbps = 10.0 if own[2] < 0.3 else 1.0
        latency_s = 2 * math.exp(1.2 * normal(own[3]))
        work = uniforms(5, "clock work", np.array([[6, client]]))[0].tolist()
        seconds = (
            2 * latency_s
            + 8e-6 * nbytes_down / (0.5 * rank)
            + step_s * steps[place] * math.exp(0.4 * normal(work[0]))
            + 8e-6 * nbytes_up / up_mbps
        )
        assert found[place] == pytest.approx(1e6 * seconds, abs=1)


def test_who_was_asked_before_changes_no_duration() -> None:
    settings_ = ClockSettings.model_validate(EVERYTHING)
    fresh, asked = Durations(settings_, 40, seed=5), Durations(settings_, 40, seed=5)
    for clients in (np.array([7, 20]), np.array([3, 7, 12, 20, 39]), np.arange(40)):
        steps = np.ones(len(clients), dtype=np.int64)
        asked.expected(clients, steps, 9, 9)
    clients, steps = np.arange(40), np.ones(40, dtype=np.int64)
    before = asked.of(clients, 1, steps, 9, 9)
    assert before.tolist() == fresh.of(clients, 1, steps, 9, 9).tolist()


def test_the_purpose_the_seed_and_the_version_are_in_the_keys() -> None:
    settings_ = ClockSettings.model_validate(EVERYTHING)
    clients, steps = np.arange(20), np.ones(20, dtype=np.int64)
    found = set()
    for seed, version in [(0, 0), (0, 1), (1, 0)]:
        durations = Durations(settings_, 20, seed)
        found.add(tuple(durations.of(clients, version, steps, 9, 9).tolist()))
        plain = durations.expected(clients, steps, 9, 9)
        found.add(tuple(plain.tolist()))
    assert len(found) == 5  # what is expected is the same for both versions of seed 0


def test_who_is_slower_than_the_deadline_never_reports() -> None:
    settings_ = clock(step_s={"name": "lognormal", "median": 1.0, "sigma": 1.0})
    durations = Durations(settings_, 50, seed=3)
    clients, steps = np.arange(50), np.full(50, 5)
    is_fast = durations.expected(clients, steps, 0, 0) <= 8
    assert 10 < is_fast.sum() < 45
    for version in range(5):
        found = exchange(
            clients,
            durations.of(clients, version, steps, 0, 0),
            deadline=8_000_000,
            goal=None,
            silent=frozenset(),
            lost=frozenset(),
            finishes=False,
        )
        assert found.reported.tolist() == clients[is_fast].tolist()
