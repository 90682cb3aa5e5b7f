"""One server update of a buffered schedule: work given out until enough is back.

An idle client gets work at once, on the newest version of the model, and each version
once at most. A buffer is K answers, good or bad. What is given up after its age, with a
client that went away for good, or because its model is too old, is none of the K.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fedcore.clock.queue import pick
from fedcore.clock.settings import Buffered
from fedcore.reports import Reports

from .flights import Flights, Landed, Parcels
from .ledger import Sent
from .nodes import Nodes
from .post import LOOK, POLL
from .replies import complaint, report

UNCOUNTED = ("timeout", "disconnected", "stale")  # kinds of what fills no buffer


class Given(NamedTuple):
    """The work of an update, and its rules."""

    sent: Sent
    settings: Buffered
    parcels: Parcels
    seed: int
    population: int
    enough: int  # answers with which a buffer is closed when nobody is left to ask


class Buffer:
    """The answers of one server update, as they come."""

    def __init__(
        self, given: Given, flights: Flights, nodes: Nodes, note: Callable[[], None]
    ) -> None:
        """`note` is called whenever it has changed who is at work."""
        self._given, self._flights, self._nodes = given, flights, nodes
        self._note = note
        self.sent: list[int] = []  # clients that got this version
        self.arrived: list[Landed] = []
        self._counted = 0
        self._refills = 0
        self._there = np.empty(0, dtype=np.int64)

    def fill(self, rejoin: float) -> Iterator[None]:
        """Wait until the buffer is full; None now and then, as a pause.

        Where nobody is at work or can be given any, it is closed as it is, once it has
        `enough` answers or nobody has come within `rejoin` seconds.
        """
        flights, parcels = self._flights, self._given.parcels
        flights.look(parcels)
        looked = time.monotonic()
        stuck_since: float | None = None
        self._there = self._nodes.clients()
        is_due = True
        while True:
            is_due |= self._take()
            if self._is_full():
                break
            if is_due:
                self._refill()
                self._note()
                is_due = False
            now = time.monotonic()
            if len(flights):
                stuck_since = None
            else:
                stuck_since = stuck_since or now
                if self._counted >= self._given.enough or now - stuck_since >= rejoin:
                    break
            if now - looked > LOOK:
                yield None
                looked = time.monotonic()
                flights.look(parcels)
                self._there = self._nodes.clients()
                is_due = True
            if not flights.poll(parcels):
                time.sleep(POLL)
        self._note()

    def _is_full(self) -> bool:
        return self._counted >= self._given.settings.buffer

    def _take(self) -> bool:
        """Take what has come, up to a full buffer; whether there was anything."""
        has_taken = False
        while not self._is_full():
            landed = self._flights.take(self._stale)
            if landed is None:
                break
            has_taken = True
            self.arrived.append(landed)
            answer = landed.answer
            kind = answer.split(":")[0] if isinstance(answer, str) else ""
            self._counted += kind not in UNCOUNTED
        return has_taken

    def _stale(self, version: int) -> str | None:
        """Why work from this version comes too late; None where it does not."""
        most, age = self._given.settings.max_staleness, self._t - version
        if most is None or age <= most:
            return None
        return f"stale: the model that it started from is {age} updates old"

    @property
    def _t(self) -> int:
        return self._given.sent.version

    def _refill(self) -> None:
        """Give this version to clients that are there, idle and yet to get it."""
        given, flights = self._given, self._flights
        wanted = given.settings.concurrency - len(flights)
        if wanted <= 0:
            return
        busy = [flight.client for flight in flights.all]
        excluded = sorted({*busy, *self.sent})
        number = self._refills - 1 if self._refills else None
        self._refills += 1
        clients = pick(
            given.seed, given.population, self._t, number, wanted, excluded, self._there
        )
        flights.launch(clients, given.sent, given.parcels)
        self.sent += clients

    def reports(self) -> Iterator[Reports]:
        """Single clients' reports, ascending by version and client."""

        def key(landed: Landed) -> tuple[int, int]:
            return landed.flight.version, landed.flight.client

        for landed in sorted(self.arrived, key=key):
            client, version = landed.flight.client, landed.flight.version
            for text in landed.complaints:
                yield complaint([client], text)
            yield report(client, landed.answer)._replace(versions={client: version})
