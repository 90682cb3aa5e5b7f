"""The buffered schedule's queue: tables by hand, ages, windows, and what may happen."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.clock import queue as queue_module
from fedcore.clock.durations import Durations
from fedcore.clock.queue import Item, Queue, Update, pick
from fedcore.clock.settings import Buffered, ClockSettings
from fedcore.clock.windows import Windows
from fedcore.rng import rng
from fedcore.rounds.participation import UniformProcess

Work = Callable[[np.ndarray], np.ndarray]
Pairs = list[list[tuple[int, int]]]  # (version, client) of each update

SECONDS = np.array([2, 3, 7])  # d of the worked tables


def constant(durations: np.ndarray) -> Work:
    """The same duration for every piece of a client's work."""
    return lambda clients: durations[clients]


def updates(queue: Queue, number: int, work: Work, first: int = 0) -> list[Update]:
    """So many server updates, from version `first` on."""
    return [queue.advance(first + t, work) for t in range(number)]


def pairs(done: list[Update]) -> Pairs:
    """(version, client) of every update."""
    found: Pairs = []
    for update in done:
        items = [item for item, _ in update.arrived]
        found.append([(item.version, item.client) for item in items])
    return found


def ages(done: list[Update]) -> list[list[int]]:
    """tau of every answer."""
    found = []
    for t, update in enumerate(done):
        found.append([t - item.version for item, _ in update.arrived])
    return found


def outcomes(update: Update) -> dict[int, str]:
    """How the work of each client that came to its end ended."""
    return {item.client: outcome for item, outcome in update.arrived}


def windows_of(
    *rows: tuple[int, int, int], period: int, pauses: bool = False
) -> Windows:
    kinds, starts, ends = np.array(rows).T
    return Windows(kinds, starts, ends, period, pauses=pauses)


# The worked tables of the specification, (f) 3


def test_the_table_of_buffers_of_two() -> None:
    queue = Queue(Buffered(buffer=2, concurrency=3), population=3, seed=0)
    done = updates(queue, 6, constant(SECONDS))
    assert [update.now for update in done] == [3, 6, 8, 10, 12, 14]
    assert pairs(done) == [
        [(0, 0), (0, 1)],
        [(1, 0), (1, 1)],
        [(0, 2), (2, 0)],
        [(2, 1), (3, 0)],
        [(3, 1), (4, 0)],
        [(2, 2), (5, 0)],
    ]
    assert ages(done) == [[0, 0], [0, 0], [2, 0], [1, 0], [1, 0], [3, 0]]
    # Client 0 is back at 2 and idle until version 1, at 3; client 2 is back at 7 and
    # gets version 2 at once.
    by_key = {}
    for update in done:
        for item, _ in update.arrived:
            by_key[item.version, item.client] = item
    assert by_key[1, 0].sent == 3
    assert by_key[0, 2].finish == by_key[2, 2].sent == 7


def test_the_table_of_buffers_of_one() -> None:
    queue = Queue(Buffered(buffer=1, concurrency=3), population=3, seed=0)
    done = updates(queue, 6, constant(SECONDS))
    assert [update.now for update in done] == [2, 3, 4, 6, 6, 7]
    # At 6 two are back: client 1 was sent first.
    assert [client for ((_, client),) in pairs(done)] == [0, 1, 0, 1, 0, 2]
    assert [tau for (tau,) in ages(done)] == [0, 1, 1, 1, 1, 5]


def test_the_server_s_time_comes_on_top_and_work_goes_on_meanwhile() -> None:
    queue = Queue(Buffered(buffer=1, concurrency=3), population=3, seed=0)
    first = queue.advance(0, constant(SECONDS), server_us=10)
    assert (first.now, queue.now) == (12, 12)
    # Both have waited for the server, and are taken as they came; client 0 began at 12.
    second = queue.advance(1, constant(SECONDS), server_us=10)
    third = queue.advance(2, constant(SECONDS), server_us=10)
    assert pairs([first, second, third]) == [[(0, 0)], [(0, 1)], [(0, 2)]]
    assert [second.now, third.now] == [22, 32]
    finish = {item.client: item.finish for item in queue.in_flight}
    assert finish == {0: 14, 1: 25}
    fourth = queue.advance(3, constant(SECONDS))
    assert (pairs([fourth]), fourth.now) == ([[(1, 0)]], 32)


# Who gets work


def test_the_first_refill_with_nobody_at_work_is_a_cohort_of_a_synchronous_round() -> (
    None
):
    for t in range(5):
        process = UniformProcess(40, 7, 6)
        cohort, _ = process.sample(t, {})
        queue = Queue(Buffered(buffer=6, concurrency=6), population=40, seed=7)
        update = queue.advance(t, constant(np.ones(40, dtype=np.int64)))
        assert update.sent == cohort.tolist()


def test_later_refills_have_keys_of_their_own() -> None:
    queue = Queue(Buffered(buffer=3, concurrency=2), population=9, seed=5)
    durations = np.arange(9) + 10
    update = queue.advance(4, constant(durations))
    begin = rng(5, "participation", 4).choice(9, 2, replace=False, shuffle=False)
    expected = sorted(begin.tolist())
    for number in range(2):  # after the first and the second answer
        free = [client for client in range(9) if client not in expected]
        draw = rng(5, "dispatch", 4, number)
        place = draw.choice(len(free), 1, replace=False, shuffle=False)
        expected.append(free[int(place[0])])
    assert update.sent == sorted(expected)


@settings(derandomize=True, max_examples=30)
@given(
    population=st.integers(1, 30),
    wanted=st.integers(0, 30),
    number=st.none() | st.integers(0, 3),
    data=st.data(),
)
def test_a_pick_is_a_choice_among_the_free(
    population: int, wanted: int, number: int | None, data: Any
) -> None:
    ids = st.sets(st.integers(0, population - 1))
    excluded, there = data.draw(ids), data.draw(st.none() | ids)
    present = None if there is None else np.array(sorted(there), dtype=np.int64)
    found = pick(3, population, 6, number, wanted, sorted(excluded), present)
    free = [client for client in range(population) if client not in excluded]
    if there is not None:
        free = [client for client in free if client in there]
    if wanted >= len(free):
        assert found == free
        return
    draw = rng(3, "participation", 6)
    if number is not None:
        draw = rng(3, "dispatch", 6, number)
    places = draw.choice(len(free), wanted, replace=False, shuffle=False)
    assert found == sorted(free[place] for place in places.tolist())


@pytest.mark.parametrize("windows", [False, True])
def test_a_client_gets_a_version_once(windows: bool) -> None:
    there = None
    if windows:
        there = Windows(np.array([0, 1]), np.array([0, 5]), np.array([7, 10]), 10)
    draw = np.random.default_rng(0)
    schedule = Buffered(buffer=5, concurrency=4)
    queue = Queue(schedule, population=6, seed=1, dropout=0.2, windows=there)
    for t in range(60):
        update = queue.advance(t, lambda clients: draw.integers(1, 9, len(clients)))
        assert update.sent == sorted(set(update.sent))
        items = [item for item, _ in update.arrived]
        keys = [(item.version, item.client) for item in items]
        assert keys == sorted(set(keys))
        at_work = [item.client for item in queue.in_flight]
        assert len(at_work) == len(set(at_work)) <= 4


# The age of work: specification (f) 6


class Ages:
    """Arrivals while each piece of work was out, counted one by one."""

    def __init__(self, concurrency: int) -> None:
        self.concurrency, self.arrivals = concurrency, 0
        self.out: dict[int, int] = {}  # number of the work -> arrivals since it began
        self.returned = 0
        self.of: dict[int, int] = {}

    def follow(self, sent: list[Item], arrived: list[Item]) -> None:
        """Events in order of time; checks the law after each arrival."""
        waiting = sorted(sent, key=lambda item: item.n)
        for item in sorted(arrived):
            while waiting and waiting[0].sent < item.finish:
                self.out[waiting.pop(0).n] = 0
            self.arrivals += 1
            self.of[item.n] = self.out.pop(item.n)
            self.returned += self.of[item.n]
            for n in self.out:
                self.out[n] += 1
            law = (self.concurrency - 1) * self.arrivals
            assert self.returned + sum(self.out.values()) == law
        for item in waiting:
            self.out[item.n] = 0


@settings(derandomize=True, max_examples=25)
@given(
    buffer=st.integers(1, 6),
    concurrency=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 3),
)
def test_each_arrival_ages_all_other_work_by_one(
    buffer: int, concurrency: int, seed: int, spread: float
) -> None:
    """Whatever the durations; and age and staleness belong together, exactly."""
    draw = np.random.default_rng(seed)
    times: set[int] = set()

    def work(clients: np.ndarray) -> np.ndarray:
        found = []
        for _ in clients.tolist():  # no two at one instant: the law is of such runs
            number = int(1e9 * draw.lognormal(0, spread)) + 1
            while queue.now + number in times:
                number += 1
            times.add(queue.now + number)
            found.append(number)
        return np.array(found)

    population = buffer + concurrency
    schedule = Buffered(buffer=buffer, concurrency=concurrency)
    queue, followed = Queue(schedule, population, seed), Ages(concurrency)
    before: set[int] = set()
    first: dict[int, int] = {}  # work -> answers in its buffer when it was sent
    for t in range(30):
        update = queue.advance(t, work)
        arrived = [item for item, _ in update.arrived]
        under_way = queue.in_flight
        assert len(under_way) + 1 == concurrency  # the place of the last one is free
        new = [item for item in [*arrived, *under_way] if item.n not in before]
        assert sorted(item.client for item in new) == update.sent
        before |= {item.n for item in new}
        ends = sorted(item.finish for item in arrived)
        for item in new:
            first[item.n] = sum(end <= item.sent for end in ends)
        followed.follow(new, arrived)
        for item in arrived:
            tau = (first[item.n] + followed.of[item.n]) // buffer
            assert t - item.version == tau


# Places in the store of what waits


def test_slots_are_the_lowest_free_ones_and_stay_until_the_work_is_back() -> None:
    draw = np.random.default_rng(3)
    schedule = Buffered(buffer=3, concurrency=8)
    queue = Queue(schedule, population=20, seed=0, dropout=0.2)
    slots: dict[int, int] = {}
    for t in range(80):
        update = queue.advance(t, lambda clients: draw.integers(1, 30, len(clients)))
        for item, outcome in update.arrived:
            if item.version < t:
                assert item.slot == slots.pop(item.n)
                assert (item.slot < 0) == (outcome == "dropout")
            else:
                assert item.slot < 0  # nothing has waited
        taken = set(slots.values())
        new = [item for item in queue.in_flight if item.version == t]
        for item in sorted(new, key=lambda item: item.n):
            if item.slot >= 0:
                free = min(set(range(8)) - taken)
                assert item.slot == free
                taken.add(free)
            slots[item.n] = item.slot
        assert slots == {item.n: item.slot for item in queue.in_flight}


# Keys: specification (f) 12


def test_durations_of_clients_do_not_know_of_buffers_and_populations() -> None:
    clock = ClockSettings.model_validate(
        {"step_s": {"name": "lognormal", "median": 1.0}, "jitter": 0.5}
    )
    took: dict[tuple[int, int], set[int]] = {}
    for buffer, concurrency, population in ((2, 5, 30), (3, 9, 30), (2, 5, 12)):
        durations = Durations(clock, population, seed=4)
        schedule = Buffered(buffer=buffer, concurrency=concurrency)
        queue = Queue(schedule, population, seed=4)
        for t in range(25):

            def work(
                clients: np.ndarray, t: int = t, durations: Any = durations
            ) -> Any:
                return durations.of(clients, t, np.full(len(clients), 3), 0, 0)

            for item, _ in queue.advance(t, work).arrived:
                key = item.version, item.client
                took.setdefault(key, set()).add(item.finish - item.sent)
    assert all(len(several) == 1 for several in took.values())
    versions = {took[key].copy().pop() for key in took if key[1] == 3}
    assert len(versions) > 3  # they do know of versions


# What a checkpoint keeps


def test_a_queue_goes_on_from_its_tensors() -> None:
    draw = np.random.default_rng(0)
    table = draw.integers(1, 50, (60, 10))
    there = windows_of((0, 0, 30), (1, 10, 45), period=50)

    def fresh() -> Queue:
        schedule = Buffered(buffer=3, concurrency=4, max_staleness=5)
        return Queue(schedule, 10, seed=9, dropout=0.2, windows=there)

    def advance(queue: Queue, t: int) -> Update:
        return queue.advance(t, lambda clients: table[t][clients], server_us=2)

    whole = fresh()
    expected = [advance(whole, t) for t in range(60)]
    queue = fresh()
    for t in range(60):
        kept = {name: value.clone() for name, value in queue.tensors().items()}
        assert all(value.dtype == torch.int64 for value in kept.values())
        assert kept["queue"].shape == (len(queue.in_flight), 6)
        queue = fresh()
        queue.restore(kept)
        assert queue.now == int(kept["now"])
        assert advance(queue, t) == expected[t]


def test_a_queue_forgets_what_it_did_when_it_is_restored() -> None:
    queue = Queue(Buffered(buffer=2, concurrency=3), population=3, seed=0)
    start = queue.tensors()
    first = updates(queue, 4, constant(SECONDS))
    queue.restore(start)
    assert updates(queue, 4, constant(SECONDS)) == first


# Costs


def counted_lines(module: Any, body: Callable[[], object]) -> int:
    """Lines of a module's file that run in `body`, generators and loops included."""
    lines = 0

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename == module.__file__ else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        body()
    finally:
        sys.settrace(before)
    return lines


def steady(population: int) -> Iterator[Queue]:
    """A queue after some updates, at K = 100 and M = 1000."""
    draw = np.random.default_rng(1)
    schedule = Buffered(buffer=100, concurrency=1000)
    queue = Queue(schedule, population, seed=0)
    for t in range(100):
        queue.advance(t, lambda clients: draw.integers(1, 10**9, len(clients)))
        if t >= 2:
            yield queue


def test_a_million_clients_cost_no_more_than_ten_thousand() -> None:
    lines, peaks = [], []
    for population in (30_000, 10**6):
        several = steady(population)
        next(several)
        lines.append(counted_lines(queue_module, lambda: next(several)))  # noqa: B023
        tracemalloc.start()
        try:
            next(several)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert lines[1] < 1.1 * lines[0]
    assert max(lines) < 100 * 300 + 1000 * 20  # of K pops and refills, of M items
    assert max(peaks) < 10**6  # a byte a client would be more
