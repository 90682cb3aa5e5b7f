"""A schedule that follows a recorded run: the same answers, in the same order.

Who was first is not drawn by a run of devices, and in a file all the same. So a
recording, with the settings, seed and data of its run, gives the run's model again, on
any engine that computes as the devices did.

A buffered recording says which versions' work an update took. A synchronous one says
who was asked in each exchange, and who reported; the others were late, or failed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from fedcore.clock.arrivals import LATE, NEVER, read_arrivals
from fedcore.clock.files import Ints
from fedcore.clock.queue import OUTCOMES, SILENT, WAITS, Arrived, Item, Update
from fedcore.clock.settings import Buffered, Replay
from fedcore.errors import SettingsError

__all__ = ["Recorded", "ReplayPlan"]

TOO_LATE = ("timeout", "not needed")  # outcomes of work that was done all the same
SILENT_OF = {outcome: slot for slot, outcome in OUTCOMES.items()}


class Recorded(NamedTuple):
    """One exchange of a recorded synchronous round; ids ascending, int64."""

    asked: Ints
    sent: Ints  # [asked], microseconds
    back: Ints  # [asked], -1: never
    reported: Ints
    left_out: dict[int, str]  # the kind of reason of all others that were asked
    moved: Ints  # those of them who did their work all the same, too late
    end: int  # microseconds: when the last report was in


class ReplayPlan:
    """What a recording says of every update of its run."""

    def __init__(self, settings: Replay, population: int, server_us: int = 0) -> None:
        """`server_us` is the server's time after the answers of an update.

        Raises SettingsError for a file that is no recording of such a schedule with
        this population.
        """
        self.file = settings.file
        table = read_arrivals(settings.file)
        self.server_us = server_us
        self._update = table["update"].to_numpy()
        self._client = table["client"].to_numpy()
        self._version = table["version"].to_numpy()
        self._sent = table["sent_us"].to_numpy()
        self._back = table["back_us"].to_numpy()
        self._function = np.array(table["function"].to_pylist(), dtype=object)
        kinds = [text.partition(":")[0] for text in table["outcome"].to_pylist()]
        self._outcome = np.array(kinds, dtype=object)
        self._usable: np.ndarray = self._outcome == ""
        self.last_update = int(self._update[-1])
        self.is_buffered = isinstance(settings.of, Buffered)
        self._refuse_population(population)
        if not self.is_buffered:
            self._refuse_versions()
        # Rows by version, in order of arrival within one.
        self._by_version = np.argsort(self._version, kind="stable")
        self._versions = self._version[self._by_version]
        if self.is_buffered:
            self._refuse_twice()
        self._finish = _ends(self._sent, self._back)
        self._now = self._times()
        self._slot, self.slots = self._places()
        self._flight: tuple[int, dict[int, Item]] = (-1, {})  # update, by row

    def refuse(self, rounds: int, functions: Collection[str]) -> None:
        """Raises SettingsError where the recording is not of such a run.

        It has to hold `rounds` updates, and no client functions but these.
        """
        if self.last_update < rounds:
            raise SettingsError(
                f"rounds = {rounds}: {self.file} holds {self.last_update} updates; set "
                "rounds to at most that"
            )
        for name in sorted({*self._function.tolist()}):
            if name not in functions:
                raise SettingsError(
                    f'{self.file} holds work of a client function "{name}", and the '
                    f"method has {', '.join(sorted(functions))}: was it recorded with "
                    "another method?"
                )

    # A buffered recording

    def update(self, t: int) -> Update:
        """What happened up to server update t + 1.

        Those are sent version t whose work on it was used, now or later. Raises
        SettingsError after the recording's end.
        """
        rows = self._rows_of(t)
        sent = self._client[self._started(t)]
        arrived = []
        for row in rows:
            arrived.append(Arrived(self._item(row), self._outcome[row]))
        arrived.sort(key=lambda done: (done.item.version, done.item.client))
        return Update(np.sort(sent).tolist(), arrived, int(self._now[t]))

    def in_flight(self, t: int) -> list[Item]:
        """Work under way after update t + 1, that came to its end in the recording."""
        last, flight = self._flight
        if last != t:
            if last == t - 1:
                flight = dict(flight)
                for row in self._rows_of(t):
                    flight.pop(row, None)
                new = self._with_version(t)
                rows = new[self._update[new] > t + 1]
            else:
                is_under_way = (self._version <= t) & (self._update > t + 1)
                rows, flight = np.flatnonzero(is_under_way), {}
            for row in rows.tolist():
                flight[row] = self._item(row)
            self._flight = t, flight
        return [flight[row] for row in sorted(flight)]

    def _item(self, row: int) -> Item:
        return Item(
            int(self._finish[row]),
            row,  # in order of arrival, for ends at the same instant
            int(self._client[row]),
            int(self._version[row]),
            int(self._slot[row]),
            int(self._sent[row]),
        )

    # A synchronous recording

    def cohort(self, t: int) -> Ints:
        """Ids of the clients that were asked for anything in round t, ascending."""
        if t >= self.last_update:
            raise self._over(t)
        return np.unique(self._client[self._with_version(t)])

    def exchange(self, t: int, function: str, number: int = 0) -> Recorded:
        """Who was asked for this function's work in round t, and who reported.

        `number` counts the exchanges of a round that have the same function, from 0 on.
        Nobody was asked in one that is not there.
        """
        if t >= self.last_update:
            raise self._over(t)
        rows = self._with_version(t)
        rows = rows[self._function[rows] == function]
        is_second = self._outcome[rows] == LATE
        exchanges = _exchanges(rows[~is_second], self._client)
        first = exchanges[number] if number < len(exchanges) else rows[:0]
        first = first[np.argsort(self._client[first], kind="stable")]
        asked, sent = self._client[first], self._sent[first]
        back, usable = self._back[first].copy(), self._usable[first]
        place_of = {client: place for place, client in enumerate(asked.tolist())}
        for row in rows[is_second].tolist():
            place = place_of.get(int(self._client[row]))
            if place is not None and sent[place] == self._sent[row]:
                back[place] = self._back[row]
        left_out = {}
        for row in first[~usable].tolist():
            left_out[int(self._client[row])] = str(self._outcome[row])
        is_late = np.isin(self._outcome[first].astype(str), TOO_LATE)
        moved = asked[is_late & (back != NEVER)]
        end = max(int(sent.max(initial=0)), int(back[usable].max(initial=0)))
        return Recorded(asked, sent, back, asked[usable], left_out, moved, end)

    def time(self, t: int) -> int:
        """Microseconds at the end of round t."""
        if t >= self.last_update:
            raise self._over(t)
        return int(self._now[t])

    # Rows

    def _rows_of(self, t: int) -> range:
        """The rows of update t + 1."""
        if t >= self.last_update:
            raise self._over(t)
        first, after = np.searchsorted(self._update, [t + 1, t + 2])
        return range(int(first), int(after))

    def _with_version(self, t: int) -> Ints:
        """The rows of work that started from version t."""
        first, after = np.searchsorted(self._versions, [t, t + 1])
        rows: Ints = self._by_version[first:after]
        return rows

    def _started(self, t: int) -> Ints:
        """The rows of work on version t that was used."""
        rows = self._with_version(t)
        started: Ints = rows[self._usable[rows]]
        return started

    def _times(self) -> Ints:
        """When each update was made, with the server's time after it: int64 [updates].

        A synchronous round without an answer in time ends when the next one begins.
        """
        now, times = 0, np.empty(self.last_update, dtype=np.int64)
        for t in range(self.last_update):
            rows = self._rows_of(t)
            ends = self._finish[rows.start : rows.stop]
            if not self.is_buffered:
                ends = ends[self._usable[rows.start : rows.stop]]
            now = max(now, int(ends.max(initial=0))) + self.server_us
            if not self.is_buffered and t + 1 < self.last_update:
                following = self._with_version(t + 1)
                if len(following):
                    now = max(now, int(self._sent[following].min()))
            times[t] = now
        return times

    def _places(self) -> tuple[Ints, int]:
        """The slot of each row, and how many there are.

        Work on version t that is used later gets the lowest that are free after update
        t + 1; work that is never used, or at once, has none.
        """
        slots = np.full(len(self._update), WAITS, dtype=np.int64)
        for row in np.flatnonzero(~self._usable).tolist():
            slots[row] = SILENT_OF.get(self._outcome[row], SILENT)
        if not self.is_buffered:
            return slots, 0
        free: list[int] = []
        made = 0
        for t in range(self.last_update):
            for row in self._rows_of(t):
                if slots[row] >= 0:
                    heapq.heappush(free, int(slots[row]))
            started = self._started(t)
            for row in started[self._update[started] > t + 1].tolist():
                if not free:
                    heapq.heappush(free, made)
                    made += 1
                slots[row] = heapq.heappop(free)
        return slots, made

    # What is refused

    def _refuse_population(self, population: int) -> None:
        largest = int(self._client.max())
        if largest >= population:
            raise SettingsError(
                f"{self.file} holds work of client {largest}, and the population is "
                f"{population}: set population to that of the recorded run"
            )

    def _refuse_versions(self) -> None:
        is_old = self._usable & (self._version != self._update - 1)
        if bool(is_old.any()):
            row = int(np.flatnonzero(is_old)[0])
            raise SettingsError(
                f"{self.file}: update {self._update[row]} took work on version "
                f"{self._version[row]}, so that the run was buffered; set "
                'schedule.of.name = "buffered" and the staleness that it had, or give '
                "its preset with --replay"
            )

    def _refuse_twice(self) -> None:
        _, function = np.unique(self._function.astype(str), return_inverse=True)
        usable = np.flatnonzero(self._usable)
        keys = np.stack([self._version, self._client, function], 1)[usable]
        order = np.lexsort(keys.T)
        is_same = (np.diff(keys[order], axis=0) == 0).all(axis=1)
        if is_same.any():
            row = int(usable[order[1:][is_same]].min())
            raise SettingsError(
                f"{self.file}: row {row + 1} has work of client {self._client[row]} on "
                f"version {self._version[row]} for the second time, expected each "
                "version once"
            )

    def _over(self, t: int) -> SettingsError:
        return SettingsError(
            f"round {t + 1}: {self.file} holds {self.last_update} updates; set rounds "
            "to at most that"
        )


def _exchanges(rows: Ints, client: Ints) -> list[Ints]:
    """The rows of each exchange out of those of a round with the same function.

    The next one begins with a client that was asked before. client: of every row.
    """
    exchanges: list[list[int]] = []
    asked = set[int]()
    for row in rows.tolist():
        if not exchanges or client[row] in asked:
            exchanges.append([])
            asked = set()
        exchanges[-1].append(row)
        asked.add(int(client[row]))
    return [np.array(exchange, dtype=np.int64) for exchange in exchanges]


def _ends(sent: Ints, back: Ints) -> Ints:
    """When each piece of work came to its end: int64 [rows].

    One without an answer ends as soon as the order allows.
    """
    is_back = back != NEVER
    so_far = np.maximum.accumulate(np.where(is_back, back, sent))
    ends: Ints = np.where(is_back, back, so_far)
    return ends
