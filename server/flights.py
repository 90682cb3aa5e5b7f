"""Work in flight: messages of single clients that are out, lost, sent again or back.

A client works on one thing at a time. What it brings waits here until a buffer takes
it, and counts as in flight until then. A client that goes away and is back within
`rejoin` seconds gets the same work again, and so does each that had some when the
server was killed: a client that does the same work twice sends the same bits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from flwr.app import Message, RecordDict

from fedcore.clock.queue import Item
from fedcore.engines.base import stamp

from .ledger import Ledger, Sent
from .nodes import Nodes
from .post import (
    LINGER,
    NO_SUCH_NODE,
    OFFLINE,
    RESTARTED,
    Post,
    is_offline,
    too_late,
)
from .replies import Answer, Measure, Reading

log = logging.getLogger("fedcore")

NOT_BACK = "disconnected: its node is not there since the server started anew"


@dataclass
class Flight:
    """A piece of work that a client was given."""

    n: int  # running number in the run
    client: int
    sent: Sent
    since: float  # of the system's clock, for `fedcore status`
    node: int = -1
    message_id: str = ""  # "" while its client is away
    activated: str | None = None  # when its node came, as Flower says
    until: float = 0.0  # on the monotonic clock: when a client is given up
    reason: str = ""  # why its client is away

    @property
    def version(self) -> int:
        """The model that it starts from, by the number of server updates."""
        return self.sent.version


class Landed(NamedTuple):
    """Work that has come to its end."""

    flight: Flight
    back_us: int  # -1 where nothing came
    answer: Answer
    measure: Measure
    complaints: list[str]


class Parcels(NamedTuple):
    """The messages of an update: how they are made, and how answers are read."""

    content: Callable[[int, int], RecordDict]  # by client and version
    read: Callable[[Message, int, int], Reading]  # of client and version
    max_age: float  # seconds after which work is given up


class Flights:
    """The works of all clients, from when they are sent until a buffer takes them."""

    def __init__(self, post: Post, nodes: Nodes, ledger: Ledger, rejoin: float) -> None:
        self._post, self._nodes, self._ledger = post, nodes, ledger
        self._rejoin = rejoin
        self._out: dict[int, Flight] = {}  # by client
        self._client_of: dict[str, int] = {}  # by message
        self._landed: deque[Landed] = deque()
        self._activated: dict[int, str] = {}
        self._next = 0
        self.has_begun = False  # whether work of an earlier process was taken up

    def __len__(self) -> int:
        return len(self._out) + len(self._landed)

    @property
    def all(self) -> list[Flight]:
        """Every work that no buffer has taken, by its number."""
        flights = [*self._out.values(), *(landed.flight for landed in self._landed)]
        return sorted(flights, key=lambda flight: flight.n)

    def items(self) -> list[Item]:
        """The same as a run keeps them."""
        items = []
        for flight in self.all:
            sent_us, version = flight.sent.sent_us, flight.version
            items.append(Item(-1, flight.n, flight.client, version, -1, sent_us))
        return items

    def take_up(self, pending: Iterable[Item], sent: Sent) -> None:
        """Have work of an earlier process in flight, for clients that are yet to come.

        `sent` is what is sent now.
        """
        self.has_begun = True
        until = time.monotonic() + self._rejoin
        for item in pending:
            own = sent._replace(version=item.version, sent_us=stamp())
            flight = Flight(item.n, item.client, own, time.time())
            flight.until, flight.reason = until, NOT_BACK
            self._out[item.client] = flight
            self._next = max(self._next, item.n + 1)

    def launch(self, clients: list[int], sent: Sent, parcels: Parcels) -> None:
        """Give each of these clients the work, in their order."""
        flights = []
        for client in clients:
            flight = Flight(self._next, client, sent, time.time())
            self._out[client] = flight
            self._next += 1
            flights.append(flight)
        self._send(flights, parcels)

    def _send(self, flights: list[Flight], parcels: Parcels) -> None:
        """Send works to the nodes that are there; the others are away."""
        rest = flights
        while rest:
            batch, rest = self._one_a_node(rest)
            contents: dict[int, RecordDict] = {}
            for node, flight in batch.items():
                contents[node] = parcels.content(flight.client, flight.version)
                flight.sent = flight.sent._replace(sent_us=stamp())
                flight.node, flight.activated = node, self._activated.get(node)
            pushed = self._post.push(contents, "train", parcels.max_age + LINGER)
            for message_id, node in pushed.items():
                batch[node].message_id = message_id
                self._client_of[message_id] = batch[node].client
            for flight in batch.values():
                if not flight.message_id:
                    self._lose(flight, NO_SUCH_NODE)

    def _one_a_node(
        self, flights: list[Flight]
    ) -> tuple[dict[int, Flight], list[Flight]]:
        """(works by node, one each; the others)."""
        batch: dict[int, Flight] = {}
        rest = []
        for flight in flights:
            node = self._nodes.host(flight.client)
            if node is None:
                self._lose(flight, OFFLINE)
            elif node in batch:
                rest.append(flight)
            else:
                batch[node] = flight
        return batch, rest

    def look(self, parcels: Parcels) -> None:
        """Look after the nodes: who went away, who is back, who takes too long."""
        self._nodes.meet()
        self._post.drop_late()
        self._activated = self._post.activation_times()
        for flight in [*self._out.values()]:
            activated = self._activated.get(flight.node)
            if not flight.message_id:
                continue
            if activated != flight.activated:
                is_there = flight.node in self._activated
                self._lose(flight, RESTARTED if is_there else OFFLINE)
            elif stamp() - flight.sent.sent_us > 1e6 * parcels.max_age:
                self._give_up(flight, too_late(parcels.max_age))
        self._mind_away(parcels)

    def _mind_away(self, parcels: Parcels) -> None:
        """Send works again to clients that are back; give up those that stay away."""
        back, now = [], time.monotonic()
        for flight in [*self._out.values()]:
            if flight.message_id:
                continue
            node = self._nodes.host(flight.client)
            if node is not None and (self._rejoin or flight.reason == NOT_BACK):
                back.append(flight)
            elif now >= flight.until:
                self._give_up(flight, flight.reason)
        for flight in back:
            log.warning(
                "client %d is there, and gets its work on version %d again",
                flight.client,
                flight.version,
            )
        self._send(back, parcels)

    def poll(self, parcels: Parcels) -> bool:
        """Take the answers that have come; whether there is anything to be taken."""
        for message_id, reply in self._post.pull(set(self._client_of)):
            client = self._client_of.get(message_id)
            if client is None:
                continue  # a second answer to the same message
            flight = self._out[client]
            if is_offline(reply):
                self._lose(flight, OFFLINE)
                continue
            self._forget(flight)
            reading = parcels.read(reply, client, flight.version)
            measure = reading.measures.get(client, Measure())
            complaints = [*reading.complaints.values()]
            answer = reading.answers[client]
            self._landed.append(Landed(flight, stamp(), answer, measure, complaints))
        return bool(self._landed)

    def take(self, refuse: Callable[[int], str | None]) -> Landed | None:
        """The first of the works that have come to their end; its client is free.

        `refuse(version)` is a reason not to use work that started from that version.
        """
        if not self._landed:
            return None
        landed = self._landed.popleft()
        reason = refuse(landed.flight.version)
        if reason is not None and not isinstance(landed.answer, str):
            landed = landed._replace(answer=reason)
        flight = landed.flight
        self._ledger.add(
            flight.sent,
            landed.back_us,
            {flight.client: landed.answer},
            {flight.client: landed.measure},
        )
        return landed

    def _lose(self, flight: Flight, reason: str) -> None:
        """Its client went away, and may come back."""
        self._expect_late(flight)
        flight.message_id, flight.reason = "", reason
        flight.until = time.monotonic() + self._rejoin

    def _give_up(self, flight: Flight, reason: str) -> None:
        self._expect_late(flight)
        self._forget(flight)
        self._landed.append(Landed(flight, -1, reason, Measure(), []))

    def _expect_late(self, flight: Flight) -> None:
        if flight.message_id:
            self._client_of.pop(flight.message_id, None)
            self._post.expect_late({flight.message_id}, time.monotonic() + LINGER)
            self._ledger.expect(flight.message_id, flight.sent, [flight.client])

    def _forget(self, flight: Flight) -> None:
        self._client_of.pop(flight.message_id, None)
        del self._out[flight.client]

    def note(self) -> list[dict[str, Any]]:
        """Who works on which version since when, for `fedcore status`."""
        return [
            {"client": f.client, "version": f.version, "since": f.since}
            for f in self._out.values()
        ]
