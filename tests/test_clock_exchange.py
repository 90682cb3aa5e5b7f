"""Synchronous exchanges: by hand, against order statistics, and their laws."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.clock.exchange import Exchange, exchange

NOBODY = frozenset[int]()
SECOND = 1_000_000


def asked(durations: list[int], **changes: Any) -> Exchange:
    """The exchange with clients 0, 1, ... whose work takes so many microseconds."""
    options: dict[str, Any] = {
        "deadline": None,
        "goal": None,
        "silent": NOBODY,
        "lost": NOBODY,
        "finishes": True,
    }
    options.update(changes)
    clients = np.arange(len(durations))
    return exchange(clients, np.array(durations, dtype=np.int64), **options)


class Worked(NamedTuple):
    """An exchange worked by hand: d = 2, 3 and 7 seconds."""

    options: dict[str, Any]
    time: int
    reported: list[int]
    idle: float
    late: float
    wasted: float
    busy: dict[int, int]


BY_HAND = [
    Worked({}, 7, [0, 1, 2], 3 / 7, 0, 0, {}),
    Worked({"deadline": 5}, 5, [0, 1], 1 / 3, 1 / 3, 1 / 2, {2: 2}),
    Worked({"goal": 2}, 3, [0, 1], 1 / 9, 1 / 3, 3 / 8, {2: 4}),
    Worked({"deadline": 5, "goal": 2}, 3, [0, 1], 1 / 9, 1 / 3, 3 / 8, {2: 4}),
    Worked({"deadline": 5, "goal": 3}, 5, [0, 1], 1 / 3, 1 / 3, 1 / 2, {2: 2}),
    Worked({"goal": 9}, 7, [0, 1, 2], 3 / 7, 0, 0, {}),
    Worked({"deadline": 7}, 7, [0, 1, 2], 3 / 7, 0, 0, {}),
    Worked({"deadline": 1}, 1, [], 0, 1, 1, {0: 1, 1: 2, 2: 6}),
]


@pytest.mark.parametrize("worked", BY_HAND, ids=str)
def test_an_exchange_is_as_worked_by_hand(worked: Worked) -> None:
    options = dict(worked.options)
    if "deadline" in options:
        options["deadline"] *= SECOND
    found = asked([2 * SECOND, 3 * SECOND, 7 * SECOND], **options)
    assert found.reported.tolist() == worked.reported
    assert found.time == worked.time * SECOND
    assert 1 - found.worked / (3 * found.time) == pytest.approx(worked.idle, abs=1e-15)
    assert len(found.late) / 3 == worked.late
    assert found.wasted / found.worked == worked.wasted
    assert found.busy == {i: rest * SECOND for i, rest in worked.busy.items()}


def test_reasons_are_those_of_devices() -> None:
    found = asked([2, 3, 7], deadline=5, goal=1)
    assert found.late == {
        1: "not needed: the round had the reports that it asked for",
        2: "timeout: no answer within 5e-06 s",
    }
    server = pytest.importorskip("server.post")
    assert found.late == {1: server.NOT_NEEDED, 2: server.too_late(5e-6)}


def test_who_is_silent_is_not_late_and_cannot_be_counted_on() -> None:
    found = asked([2, 3, 7], deadline=5, goal=2, silent=frozenset({0}))
    assert found.reported.tolist() == [1]
    assert found.time == 5
    assert list(found.late) == [2]
    assert (found.worked, found.wasted) == (2 + 3 + 5, 2 + 5)
    assert found.busy == {2: 2}


def test_who_goes_away_is_late_and_nobody_waits_for_it_without_a_deadline() -> None:
    found = asked([2, 3, 7], lost=frozenset({2}))
    assert found.reported.tolist() == [0, 1]
    assert found.time == 7
    assert found.late[2].startswith("unavailable: ")
    found = asked([2, 3, 7], lost=frozenset({0}), deadline=10)
    assert (found.time, found.reported.tolist()) == (10, [1, 2])


def test_those_that_stop_are_not_busy_afterwards() -> None:
    assert asked([2, 3, 7], goal=1, finishes=False).busy == {}


def test_nobody_asked_is_no_time() -> None:
    found = asked([], deadline=5, goal=2)
    assert (found.time, found.worked, len(found.reported)) == (0, 0, 0)


def test_a_tie_goes_to_the_client_of_the_lower_number() -> None:
    assert asked([3, 3, 3], goal=2).reported.tolist() == [0, 1]


def harmonic(n: int) -> float:
    return float(sum(1 / j for j in range(1, n + 1)))


# Of the time of an exchange with exponential durations of mean 1, E[T] = H_m - H_{m-k}.
ORDER = [(10, 10, 2.928968), (13, 10, 1.346800), (30, 30, 3.994987)]
ORDER += [(39, 30, 1.424575)]


def exponential(size: int, repeats: int) -> np.ndarray:
    draws = np.random.default_rng(24).exponential(size=(repeats, size))
    microseconds: np.ndarray = np.rint(draws * SECOND).astype(np.int64)
    return microseconds


@pytest.mark.parametrize(("asks", "goal", "expected"), ORDER)
def test_the_first_k_of_m_take_as_long_as_order_statistics_say(
    asks: int, goal: int, expected: float
) -> None:
    assert harmonic(asks) - harmonic(asks - goal) == pytest.approx(expected, abs=5e-7)
    times = []
    for durations in exponential(asks, repeats=8000):
        times.append(asked(durations.tolist(), goal=goal).time / SECOND)
    error = np.std(times) / len(times) ** 0.5
    assert abs(np.mean(times) - expected) < 3 * error < 0.06


def test_a_deadline_cuts_exponential_durations_where_the_law_says() -> None:
    reports, times = 0, []
    for durations in exponential(10, repeats=8000):
        found = asked(durations.tolist(), deadline=2 * SECOND)
        reports += len(found.reported)
        times.append(found.time / SECOND)
    assert reports / 80000 == pytest.approx(1 - np.exp(-2), abs=0.004)
    assert 1 - np.exp(-2) == pytest.approx(0.8647, abs=5e-5)
    # E[min(max of ten, 2)] = integral over 0 ... 2 of 1 - (1 - e^-x)^10.
    x = (np.arange(20000) + 0.5) / 10000
    exact = float(np.sum(1 - (1 - np.exp(-x)) ** 10) / 10000)
    assert exact == pytest.approx(1.904092, abs=5e-7)
    error = np.std(times) / len(times) ** 0.5
    assert abs(np.mean(times) - exact) < 3 * error < 0.01


def oracle(
    durations: list[int],
    deadline: int | None,
    goal: int | None,
    silent: set[int],
    lost: set[int],
) -> tuple[list[int], int]:
    """(who reports, T), by letting the time pass microsecond by microsecond."""
    wanted = len(durations) if goal is None else min(goal, len(durations))
    reported: list[int] = []
    for now in range(max(durations) + 1):
        if deadline is not None and now > deadline:
            break
        for client, duration in enumerate(durations):
            if duration == now and client not in silent | lost:
                reported.append(client)
                if len(reported) == wanted:
                    return sorted(reported), now
    return sorted(reported), max(durations) if deadline is None else deadline


@settings(max_examples=300, derandomize=True)
@given(
    durations=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    deadline=st.none() | st.integers(0, 15),
    goal=st.none() | st.integers(1, 9),
    silent=st.sets(st.integers(0, 7), max_size=3),
    lost=st.sets(st.integers(0, 7), max_size=3),
    finishes=st.booleans(),
)
def test_an_exchange_is_that_of_a_clock_that_ticks(
    durations: list[int],
    deadline: int | None,
    goal: int | None,
    silent: set[int],
    lost: set[int],
    finishes: bool,
) -> None:
    everybody = set(range(len(durations)))
    silent, lost = silent & everybody, lost & everybody - silent
    found = asked(
        durations,
        deadline=deadline,
        goal=goal,
        silent=frozenset(silent),
        lost=frozenset(lost),
        finishes=finishes,
    )
    reported, time = oracle(durations, deadline, goal, silent, lost)
    assert (found.reported.tolist(), found.time) == (reported, time)
    assert set(found.late) == everybody - set(reported) - silent
    for client, reason in found.late.items():
        is_over = deadline is not None and durations[client] > deadline
        kind = "timeout" if is_over else "not needed"
        assert reason.split(":")[0] == ("unavailable" if client in lost else kind)
    spent = {client: min(duration, time) for client, duration in enumerate(durations)}
    assert found.worked == sum(spent.values())
    assert found.wasted == found.worked - sum(spent[client] for client in reported)
    for client, duration in enumerate(durations):
        rest = max(duration - time, 0) if finishes else 0
        assert found.busy.get(client, 0) == rest


@settings(max_examples=50, derandomize=True)
@given(
    durations=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    goal=st.none() | st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
def test_the_order_in_which_clients_are_named_changes_nothing(
    durations: list[int], goal: int | None, order: Any
) -> None:
    places = list(range(len(durations)))
    order.shuffle(places)
    options: dict[str, Any] = {
        "deadline": 6,
        "goal": goal,
        "silent": NOBODY,
        "lost": NOBODY,
        "finishes": True,
    }
    mixed = exchange(np.array(places), np.array(durations)[places], **options)
    plain = asked(durations, **options)
    assert mixed.reported.tolist() == plain.reported.tolist()
    assert mixed._replace(reported=plain.reported) == plain
