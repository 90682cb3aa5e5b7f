"""The buffered schedule again, in the simplest code: sets, and time in single steps.

It looks at every client in every step. What it shares with the queue are the keys of
the draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fedcore.clock.queue import Queue
from fedcore.clock.settings import Buffered
from fedcore.clock.windows import Windows
from fedcore.rng import rng, uniforms

SEED = 11


class Work(NamedTuple):
    finish: int
    n: int
    client: int
    version: int
    sent: int
    outcome: str


@dataclass
class Simple:
    """N clients with M at work, K answers an update; d[version][client]."""

    d: list[list[int]]
    buffer: int
    concurrency: int
    dropout: float = 0.0
    most: int | None = None  # staleness
    windows: list[list[bool]] | None = None  # whether client i is there, by time
    pauses: bool = False
    server: int = 0
    once: bool = True  # a client gets a version once
    now: int = 0
    n: int = 0
    at_work: list[Work] = field(default_factory=list)

    @property
    def clients(self) -> range:
        return range(len(self.d[0]))

    def there(self, client: int, time: int) -> bool:
        if self.windows is None:
            return True
        own = self.windows[client % len(self.windows)]
        return own[time % len(own)]

    def end(self, client: int, duration: int) -> tuple[int, bool]:
        """(when work that begins now ends, whether it is lost)."""
        time, rest = self.now, duration
        while rest:
            if self.there(client, time):
                rest -= 1
            elif not self.pauses:
                return time, True
            time += 1
        return time, False

    def refill(self, t: int, number: int | None) -> None:
        busy = {work.client for work in self.at_work}
        free = []
        for client in self.clients:
            has_had_it = self.once and client in self.given
            if client not in busy and not has_had_it and self.there(client, self.now):
                free.append(client)
        wanted = min(self.concurrency - len(self.at_work), len(free))
        chosen = free[:wanted]
        if 0 < wanted < len(free):
            draw = rng(SEED, "participation", t)
            if number is not None:
                draw = rng(SEED, "dispatch", t, number)
            places = draw.choice(len(free), wanted, replace=False, shuffle=False)
            chosen = [free[place] for place in sorted(places.tolist())]
        for client in chosen:
            finish, is_lost = self.end(client, self.d[t][client])
            outcome = "unavailable" if is_lost else ""
            if self.dropout:
                key = np.array([[t, client]])
                if uniforms(SEED, "dropout", key)[0, 0] < self.dropout:
                    outcome = "dropout"
            work = Work(finish, self.n, client, t, self.now, outcome)
            self.at_work.append(work)
            self.given.add(client)
            self.n += 1

    def update(self, t: int) -> tuple[list[int], list[Work], int]:
        """(who got version t, what came to its end, when)."""
        self.given: set[int] = set()
        refills = 0
        done: list[Work] = []
        answers = 0
        self.refill(t, None)
        while answers < self.buffer:
            if not self.at_work:
                if len(self.given) == len(self.clients) or self.windows is None:
                    break
                before = self.n
                while self.n == before:
                    self.now += 1
                    self.refill(t, refills)
                refills += 1
            work = min(self.at_work)
            self.at_work.remove(work)
            self.now = max(self.now, work.finish)
            is_stale = self.most is not None and t - work.version > self.most
            if is_stale and not work.outcome:
                work = work._replace(outcome="stale")
            done.append(work)
            answers += not work.outcome
            is_alone = all(other.finish > self.now for other in self.at_work)
            if answers < self.buffer and is_alone:
                before = self.n
                self.refill(t, refills)
                refills += self.n > before
        self.now += self.server
        done.sort(key=lambda work: (work.version, work.client))
        return sorted(self.given), done, self.now


def test_without_once_per_version_the_table_is_another_one() -> None:
    d = [[2, 3, 7]] * 6
    assert [Simple(d, 2, 3).update(0)[2]] == [3]
    simple, again = Simple(d, 2, 3), Simple(d, 2, 3, once=False)
    assert [simple.update(t)[2] for t in range(6)] == [3, 6, 8, 10, 12, 14]
    assert [again.update(t)[2] for t in range(6)] == [3, 6, 7, 9, 12, 14]


UPDATES = 8


@st.composite
def weeks(draw: st.DrawFn) -> list[list[bool]]:
    """Windows of one to three kinds of clients, in a period of a few microseconds."""
    period = draw(st.integers(2, 9))
    days = st.lists(st.booleans(), min_size=period, max_size=period).filter(any)
    return draw(st.lists(days, min_size=1, max_size=3))


def windows_of(week: list[list[bool]], pauses: bool) -> Windows:
    """A window for every microsecond: those that touch are one."""
    rows = []
    for kind, own in enumerate(week):
        for time, is_there in enumerate(own):
            if is_there:
                rows.append((kind, time, time + 1))
    kinds, starts, ends = np.array(rows).T
    return Windows(kinds, starts, ends, len(week[0]), pauses=pauses)


@settings(derandomize=True, max_examples=100)
@given(
    population=st.integers(1, 7),
    dropout=st.sampled_from([0.0, 0.3]),
    most=st.none() | st.integers(0, 2),
    week=st.none() | weeks() | weeks(),
    pauses=st.booleans(),
    server=st.sampled_from([0, 0, 3]),
    longest=st.sampled_from([0, 2, 6, 30]),
    stop=st.integers(0, UPDATES),
    data=st.data(),
)
def test_the_queue_is_the_simple_one(
    population: int,
    dropout: float,
    most: int | None,
    week: list[list[bool]] | None,
    pauses: bool,
    server: int,
    longest: int,
    stop: int,
    data: Any,
) -> None:
    buffer = data.draw(st.integers(1, population))
    concurrency = data.draw(st.integers(1, population))
    row = st.lists(st.integers(0, longest), min_size=population, max_size=population)
    table = data.draw(st.lists(row, min_size=UPDATES, max_size=UPDATES))
    there = None if week is None else windows_of(week, pauses)
    schedule = Buffered(buffer=buffer, concurrency=concurrency, max_staleness=most)

    def fresh() -> Queue:
        return Queue(schedule, population, SEED, dropout=dropout, windows=there)

    simple = Simple(table, buffer, concurrency, dropout, most, week, pauses, server)
    queue = fresh()
    for t in range(UPDATES):
        if t == stop:
            kept = queue.tensors()
            queue = fresh()
            queue.restore(kept)
        given_to: list[int] = []

        def work(clients: np.ndarray, t: int = t, seen: Any = given_to) -> np.ndarray:
            assert clients.tolist() == sorted(clients.tolist())
            seen += clients.tolist()
            durations: np.ndarray = np.array(table[t])[clients]
            return durations

        update = queue.advance(t, work, server)
        sent, done, now = simple.update(t)
        assert update.sent == sent == sorted(given_to)
        found = []
        for item, outcome in update.arrived:
            found.append(
                Work(item.finish, item.n, item.client, item.version, item.sent, outcome)
            )
        assert found == done
        assert (update.now, queue.now) == (now, now)
        at_work = [(item.finish, item.n, item.client) for item in queue.in_flight]
        assert at_work == sorted(work[:3] for work in simple.at_work)
        outcomes = [work_done.outcome for work_done in done]
        if outcomes.count("") < buffer:
            event("closed short")
        for outcome in outcomes:
            event(f"outcome {outcome}")
