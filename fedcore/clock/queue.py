"""The buffered schedule: who works on which version, and whose answers are in.

    t    version of the model: server updates so far      N  clients
    K    answers of one server update                     M  clients at work, at most
    v    version that a piece of work started from        tau = t - v, its age

    refill      gives version t to clients that are there, idle, and have not had it
    one update  refill; then, until K answers are in: the earliest end of work, and a
                refill as soon as nobody else is done at that instant

A client gets a version once. So (v, client) names a piece of work, and every draw with
that key is made once. Work is given out and ends in an order that follows from the
clock alone: nothing is computed here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.clock.settings import Buffered
from fedcore.clock.windows import Windows
from fedcore.rng import rng, uniforms

__all__ = ["Arrived", "Item", "Queue", "Update", "pick"]

WAITS = -1  # slot of work whose update has none yet
SILENT = -2  # of work of a client that drops out: it frees its place, and sends nothing
LOST = -3  # of work that is lost when its client's window ends

OUTCOMES = {SILENT: "dropout", LOST: "unavailable"}
STALE = "stale"

Durations = Callable[[np.ndarray], np.ndarray]
"""Ids of clients, ascending [n] -> microseconds of their work on a version, int64."""


class Item(NamedTuple):
    """A piece of work in flight; times in microseconds since the run's start."""

    finish: int
    n: int  # running number of pieces of work that were given out
    client: int
    version: int  # the model that it starts from, by the number of server updates
    slot: int  # where what it will bring waits; negative: nowhere
    sent: int


class Arrived(NamedTuple):
    """Work that has come to its end."""

    item: Item
    outcome: str  # "" usable; dropout, unavailable and stale do not fill the buffer


class Update(NamedTuple):
    """What happens up to one server update."""

    sent: list[int]  # clients that get this version, ascending
    arrived: list[Arrived]  # ascending by version and client
    now: int


class Queue:
    """Work in flight, in order of its end.

    >>> queue = Queue(Buffered(buffer=2, concurrency=3), population=3, seed=0)
    >>> seconds = np.array([2, 3, 7])
    >>> update = queue.advance(0, lambda clients: seconds[clients])
    >>> update.now, [arrived.item.client for arrived in update.arrived]
    (3, [0, 1])
    """

    def __init__(
        self,
        settings: Buffered,
        population: int,
        seed: int,
        *,
        dropout: float = 0.0,
        windows: Windows | None = None,
    ) -> None:
        """Each piece of work brings nothing with probability `dropout`."""
        self._settings, self._population, self._seed = settings, population, seed
        self._dropout, self._windows = dropout, windows
        self.now = 0
        self._n = 0
        self._heap: list[Item] = []
        # Clients at work, or that have had this version: ascending.
        self._excluded: list[int] = []
        self._given: set[int] = set()  # clients that have had this version

    @property
    def in_flight(self) -> list[Item]:
        """Work under way, by its end."""
        return sorted(self._heap)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps between two updates, int64."""
        rows = np.array(self.in_flight, dtype=np.int64).reshape(-1, 6)
        return {
            "now": torch.tensor(self.now),
            "n": torch.tensor(self._n),
            "queue": torch.from_numpy(rows),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.now, self._n = int(tensors["now"]), int(tensors["n"])
        self._heap = [Item(*row) for row in tensors["queue"].tolist()]  # a heap: sorted

    def advance(self, t: int, durations: Durations, server_us: int = 0) -> Update:
        """What happens up to server update t + 1, which takes `server_us`.

        It has fewer than K answers where nobody is left that could give one.
        """
        self._given = set()
        self._excluded = sorted(item.client for item in self._heap)
        self._durations, self._t, self._refills = durations, t, 0
        arrived: list[Arrived] = []
        missing = self._settings.buffer
        self._refill(is_first=True)
        while missing and (self._heap or self._wait_for_window()):
            item = heapq.heappop(self._heap)
            self.now = max(self.now, item.finish)  # it may have waited for the server
            if item.client not in self._given:
                del self._excluded[bisect_left(self._excluded, item.client)]
            outcome = self._outcome(item)
            arrived.append(Arrived(item, outcome))
            missing -= not outcome
            is_last_now = not self._heap or self._heap[0].finish > self.now
            if missing and is_last_now:
                self._refill()
        self.now += server_us
        self._assign_slots()
        arrived.sort(key=lambda done: (done.item.version, done.item.client))
        return Update(sorted(self._given), arrived, self.now)

    def _outcome(self, item: Item) -> str:
        most = self._settings.max_staleness
        if item.slot in OUTCOMES:
            return OUTCOMES[item.slot]
        is_stale = most is not None and self._t - item.version > most
        return STALE if is_stale else ""

    def _refill(self, is_first: bool = False) -> None:
        """Give version t to as many clients as have a place."""
        wanted = self._settings.concurrency - len(self._heap)
        there = None
        if self._windows is not None and wanted > 0:
            there = self._windows.all_there(self._population, self.now)
        number = None if is_first else self._refills
        clients = pick(
            self._seed,
            self._population,
            self._t,
            number,
            wanted,
            self._excluded,
            there,
        )
        if clients:
            self._refills += not is_first
            self._give(clients)

    def _give(self, clients: list[int]) -> None:
        ids = np.array(clients, dtype=np.int64)
        finish, slots = self._durations(ids) + self.now, [WAITS] * len(clients)
        if self._windows is not None:
            begin = np.full(len(ids), self.now)
            finish, lost = self._windows.ends(ids, begin, finish - self.now)
            slots = np.where(lost, LOST, WAITS).tolist()
        if self._dropout:
            versions = np.full(len(ids), self._t)
            draws = uniforms(self._seed, "dropout", np.stack([versions, ids], 1))[:, 0]
            slots = np.where(draws < self._dropout, SILENT, slots).tolist()
        for client, end, slot in zip(clients, finish.tolist(), slots, strict=True):
            item = Item(end, self._n, client, self._t, slot, self.now)
            heapq.heappush(self._heap, item)
            self._n += 1
            self._given.add(client)
            insort(self._excluded, client)

    def _wait_for_window(self) -> bool:
        """Whether somebody has got work, once nobody is at work any more.

        Time goes on to the next window of a client that has not had this version.
        """
        while self._windows is not None and len(self._given) < self._population:
            opening = self._windows.next_opening(self.now)
            if opening is None:
                break
            self.now = opening
            self._refill()
            if self._heap:
                return True
        return False

    def _assign_slots(self) -> None:
        """The lowest free slots for new work that is under way, in its order."""
        taken = {item.slot for item in self._heap}
        free = (slot for slot in range(self._settings.concurrency) if slot not in taken)
        new = [item for item in self._heap if item.slot == WAITS]
        slot_of = {item.n: next(free) for item in sorted(new, key=lambda item: item.n)}
        for place, item in enumerate(self._heap):
            if item.n in slot_of:  # the order of the heap does not depend on it
                self._heap[place] = item._replace(slot=slot_of[item.n])


def pick(
    seed: int,
    population: int,
    t: int,
    number: int | None,
    wanted: int,
    excluded: list[int],
    there: np.ndarray | None = None,
) -> list[int]:
    """Clients that get version t, ascending: `wanted` of those that are free, or all.

    number: of the refill, from 0 on; None for the first one of a version, which draws
    as a synchronous round does. excluded: ids that are not free, ascending. there: ids
    that are there, ascending; None where all are.

    >>> pick(seed=0, population=4, t=3, number=None, wanted=5, excluded=[1])
    [0, 2, 3]
    """
    free = None
    num_free = population - len(excluded)
    if there is not None:
        free = there[~np.isin(there, np.array(excluded, dtype=np.int64))]
        num_free = len(free)
    if wanted <= 0 or num_free == 0:
        return []
    if wanted >= num_free:
        if free is None:
            free = np.setdiff1d(np.arange(population), np.array(excluded, dtype=int))
        everybody: list[int] = free.tolist()
        return everybody
    draw = rng(seed, "participation", t)
    if number is not None:
        draw = rng(seed, "dispatch", t, number)
    places = draw.choice(num_free, wanted, replace=False, shuffle=False)
    if free is not None:
        drawn: list[int] = np.sort(free[places]).tolist()
        return drawn
    return sorted(_skipping(place, excluded) for place in places.tolist())


def _skipping(place: int, excluded: list[int]) -> int:
    """The id of the `place`-th number that is not in `excluded`, from 0 on.

    >>> [_skipping(place, [1, 2]) for place in range(3)]
    [0, 3, 4]
    """
    # excluded[j] - j numbers before excluded[j] are free.
    before = bisect_right(range(len(excluded)), place, key=lambda j: excluded[j] - j)
    return place + before
