"""The queue of a buffered schedule, where work is lost: dropout, age, and windows."""

from __future__ import annotations

import numpy as np

from fedcore.clock.queue import Queue
from fedcore.clock.settings import Buffered
from tests.test_queue import SECONDS, constant, outcomes, updates, windows_of

# Failures


def test_who_drops_out_frees_its_place_and_does_not_count() -> None:
    schedule = Buffered(buffer=3, concurrency=4)
    queue = Queue(schedule, population=12, seed=2, dropout=0.4)
    lost = 0
    for t in range(50):
        update = queue.advance(t, constant(np.arange(12) + 1))
        ends = [outcome for _, outcome in update.arrived]
        assert ends.count("") == 3
        assert set(ends) <= {"", "dropout"}
        lost += ends.count("dropout")
    share = lost / (lost + 150)
    assert abs(share - 0.4) < 4 * np.sqrt(0.24 / 150)


def test_a_dropout_is_the_work_s_and_not_the_order_s() -> None:
    """Whether a piece of work is lost depends on its client and version alone."""
    fate: dict[tuple[int, int], set[bool]] = {}
    for buffer, concurrency in ((3, 4), (5, 9), (1, 2)):
        schedule = Buffered(buffer=buffer, concurrency=concurrency)
        queue = Queue(schedule, population=12, seed=2, dropout=0.4)
        for update in updates(queue, 30, constant(np.arange(12) + 1)):
            for item, outcome in update.arrived:
                ends = fate.setdefault((item.version, item.client), set())
                ends.add(outcome == "dropout")
    assert all(len(ends) == 1 for ends in fate.values())


def test_where_all_drop_out_a_buffer_is_closed_short() -> None:
    queue = Queue(Buffered(buffer=2, concurrency=2), 3, seed=0, dropout=1 - 1e-12)
    update = queue.advance(0, constant(SECONDS))
    assert outcomes(update) == dict.fromkeys(range(3), "dropout")
    assert update.now == max(item.finish for item, _ in update.arrived)
    assert queue.in_flight == []
    assert queue.advance(1, constant(SECONDS)).sent == [0, 1, 2]


def test_what_is_too_old_is_not_counted() -> None:
    schedule = Buffered(buffer=2, concurrency=3, max_staleness=1)
    queue = Queue(schedule, population=3, seed=0)
    done = updates(queue, 3, constant(SECONDS))
    # Client 2 is back at 7, two versions late: the buffer waits for client 1 at 9.
    assert [update.now for update in done] == [3, 6, 9]
    assert outcomes(done[2]) == {0: "", 1: "", 2: "stale"}
    plain = Queue(schedule.model_copy(update={"max_staleness": 2}), 3, seed=0)
    assert updates(plain, 3, constant(SECONDS))[2].now == 8


# Windows


def test_work_is_given_to_those_who_are_there() -> None:
    there = windows_of((0, 0, 10), (1, 4, 10), period=20)
    queue = Queue(Buffered(buffer=2, concurrency=2), 2, seed=0, windows=there)
    update = queue.advance(0, constant(np.array([5, 3])))
    assert [item.sent for item, _ in update.arrived] == [0, 5]
    assert update.now == 8


def test_work_is_lost_when_a_window_ends() -> None:
    there = windows_of((0, 0, 10), (1, 0, 2), period=20)
    queue = Queue(Buffered(buffer=1, concurrency=2), 2, seed=0, windows=there)
    update = queue.advance(0, constant(np.array([5, 3])))
    assert outcomes(update) == {0: "", 1: "unavailable"}
    assert [item.finish for item, _ in update.arrived] == [5, 2]
    assert update.now == 5


def test_work_that_pauses_goes_on_in_the_next_window() -> None:
    there = windows_of((0, 0, 10), (1, 0, 2), period=20, pauses=True)
    queue = Queue(Buffered(buffer=2, concurrency=2), 2, seed=0, windows=there)
    update = queue.advance(0, constant(np.array([5, 3])))
    assert outcomes(update) == {0: "", 1: ""}
    assert update.now == 21


def test_an_empty_queue_waits_for_the_next_window() -> None:
    there = windows_of((0, 6, 9), (1, 13, 19), period=20)
    queue = Queue(Buffered(buffer=2, concurrency=2), 2, seed=0, windows=there)
    update = queue.advance(0, constant(np.array([3, 3])))
    assert [(item.sent, item.finish) for item, _ in update.arrived] == [
        (6, 9),
        (13, 16),
    ]
    again = queue.advance(1, constant(np.array([3, 3])))
    # Client 1 is still there; client 0 comes with the next period.
    assert [(item.sent, item.finish) for item, _ in again.arrived] == [
        (26, 29),
        (16, 19),
    ]


def test_where_no_window_is_long_enough_a_buffer_is_closed_short() -> None:
    there = windows_of((0, 0, 2), (1, 3, 5), period=10)
    queue = Queue(Buffered(buffer=1, concurrency=2), 2, seed=0, windows=there)
    for t in range(4):
        update = queue.advance(t, constant(np.array([3, 3])))
        assert outcomes(update) == {0: "unavailable", 1: "unavailable"}
        assert update.now == 5 + 10 * t
        assert queue.in_flight == []
