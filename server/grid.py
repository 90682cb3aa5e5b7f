"""The engine whose clients are Flower nodes.

They are Ray actors under `flwr run`, and devices in a deployment. One message a node
carries the ids of the clients that it hosts. Clients are addressed by their logical
id, never by Flower's random node id. Whatever a reply holds that it should not is left
out, counted and named.

    nodes     the nodes that are there, and the clients that each hosts
    orders    what messages say
    post      messages sent, waited for until a deadline, and counted if late
    replies   what came back, read and checked
    ledger    when each piece of work was sent, and was back
    buffering one update of a buffered schedule; `flights` has the work in flight
    sums      sums of which nothing else can be read; `secure` is one of them
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from flwr.serverapp import Grid
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival
from fedcore.clock.queue import Item
from fedcore.clock.settings import Buffered
from fedcore.engines.base import Work, failure, stamp
from fedcore.engines.readout import Readout, added
from fedcore.messages.secure.ask import Ask, SecretTotal
from fedcore.method import evaluates
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

from .buffering import Buffer, Given
from .flights import Flights
from .ledger import Ledger, Sent
from .nodes import Nodes
from .orders import Orders
from .post import Inquiry, Post
from .replies import Answer, Reading, complaint, report, twice
from .secure import EXCHANGES, Mailing
from .sums import Securing, Sums, taken

log = logging.getLogger("fedcore")

PAUSE = failure([], "")  # a report of no client


class GridEngine:
    """Clients on Flower nodes; they keep their state themselves."""

    def __init__(
        self,
        grid: Grid,
        work: Work,
        timeout: float,
        *,
        min_clients: int | None = None,
        report_goal: int | None = None,
        min_reports: int = 1,
        rejoin: float = 0.0,
        limit: float = float("inf"),
        series: str = "",
        safe: Callable[[], int] | None = None,
        watch: Path | None = None,
        state: Path | None = None,
        securing: Securing | None = None,
    ) -> None:
        """A round goes on without clients that have not answered in `timeout` seconds.

        `min_clients` nodes have to be there before a round starts, and `report_goal`
        reports end one; a buffer is closed with `min_reports` where nobody is left to
        be asked. A node that goes away in a round and is back within `rejoin`
        seconds is asked again. A message of more than `limit` bytes is refused.
        Clients keep their state by `series`, the same whenever one run is gone on
        with, and may forget rounds before `safe()`. The clients whose answers are
        waited for are written to the file `watch`. Nodes on this machine without a
        directory for the states of their clients use `state`; the caller removes it.
        `securing` is about secure sums.
        """
        self.work, self.timeout = work, timeout
        self._goal, self._rejoin = report_goal, rejoin
        self._safe, self._watch = safe, watch
        self._post = Post(grid, limit)
        self._nodes = Nodes(
            self._post, work.task.population, min_clients, work.task.base_sha256
        )
        self.states: StateStore | None = None
        self.choices: dict[str, Any] = {}
        self._orders = Orders(work, limit, series, safe, state)
        self._sums = Sums(work, securing or Securing())
        self._ledger = Ledger()
        self._min_reports = min_reports
        self._flights = Flights(self._post, self._nodes, self._ledger, rejoin)
        self._buffer: Buffer | None = None  # of the last update

    @property
    def late(self) -> int:
        """Answers so far that came after their round had ended."""
        return self._post.late_answers

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        """Reports in ascending order of clients, each as soon as those before it.

        Raises RunError when no node is there at the start, and for a message over the
        limit.
        """
        self._orders.begin(t)
        for _ in self._nodes.gather():
            yield PAUSE
        self._orders.check_size(down)
        reader = self._orders.reader(fn, down, t, self.timeout)
        todo = clients.tolist()
        hosted, answers = self._hosts(todo)
        contents = self._orders.contents(fn, hosted, down)
        # A round has its goal; an evaluation hears everybody.
        goal = len(todo) if self._goal is None or evaluates(fn) else self._goal
        reported: set[int] = set()
        heard: set[int] = set()
        waited_for = set(todo) - answers.keys()
        self._note_waiting(waited_for)
        inquiry = Inquiry(self._post, contents, self.timeout, self._rejoin, t)
        noting = _Noting(self._ledger, inquiry, hosted, _sent(fn, down, t))
        for node_reply in inquiry.replies(lambda: len(reported) >= goal):
            if node_reply is None:
                yield PAUSE
                continue
            node, reply = node_reply
            if node in heard:
                yield complaint(hosted[node], twice(t))
                continue
            heard.add(node)
            reading = reader.read(reply, hosted[node])
            noting.add(node, not isinstance(reply, str), reading)
            answers |= reading.answers
            for client, answer in reading.answers.items():
                if not isinstance(answer, str):
                    reported.add(client)
            waited_for -= set(hosted[node])
            self._note_waiting(waited_for)
            for client, text in reading.complaints.items():
                yield complaint([client], text)
            while todo and todo[0] in answers:
                client = todo.pop(0)
                yield report(client, answers.pop(client))
        noting.end()
        for client in todo:
            yield report(client, answers[client])

    def buffer(
        self,
        fn: ClientFunction,
        down: Tree,
        t: int,
        settings: Buffered,
        pending: list[Item],
        down_of: Callable[[int], Tree],
    ) -> Iterator[Reports]:
        """Reports of one server update, as `fedcore.engines.base.BufferedGrid` has it.

        Raises RunError when no node is there at the start, and for a message over the
        limit.
        """
        self._orders.begin(t)
        for _ in self._nodes.gather():
            yield PAUSE
        self._orders.check_size(down)
        sent = Sent(t, fn.__name__, 0, trees.nbytes(down))
        if not self._flights.has_begun:
            self._flights.take_up(pending, sent)
        parcels = self._orders.parcels(fn, down, t, settings, down_of)
        task, enough = self.work.task, max(self._min_reports, 1)
        given = Given(sent, settings, parcels, self.work.seed, task.population, enough)
        self._buffer = Buffer(given, self._flights, self._nodes, self._note_flights)
        for _ in self._buffer.fill(self._rejoin):
            yield PAUSE
        yield from self._buffer.reports()

    def sent(self) -> list[int]:
        return [] if self._buffer is None else sorted(self._buffer.sent)

    def in_flight(self) -> list[Item]:
        return self._flights.items()

    def _note_flights(self) -> None:
        waiting = self._flights.note()
        self._note_waiting({work["client"] for work in waiting}, in_flight=waiting)

    def secret_sum(self, ask: Ask, into: SecretTotal) -> Iterator[Reports]:
        """Let clients add up what is asked for, masked from end to end.

        A sum that an earlier start of this server had is taken from its journal. Raises
        TooFewReports where it cannot be read.
        """
        self._orders.begin(ask.t)
        asking = self._sums.begin(ask, self._orders.now, self._orders.work_of(ask.fn))
        entry = asking.recalled()
        if entry is not None:
            log.warning("round %d goes on with a sum that was made before", ask.t + 1)
            yield from taken(entry, into)
            return
        for _ in self._nodes.gather():
            yield PAUSE
        self._orders.check_size(ask.down)
        hosted, missing = self._hosts(ask.clients.tolist())
        for client, reason in missing.items():
            yield failure([client], str(reason))
        goal = len(ask.clients)
        if self._goal is not None and not evaluates(ask.fn):
            goal = self._goal
        mailing = Mailing(
            self._post, self.timeout, self._rejoin, goal, self._note_waiting
        )
        yield from asking.run(hosted, mailing, into)

    def _hosts(self, clients: list[int]) -> tuple[dict[int, list[int]], dict[int, Any]]:
        """Clients by the node that hosts them, and answers for those without one."""
        nodes = self._nodes
        hosted: dict[int, list[int]] = {}
        answers: dict[int, Answer] = {}
        for client in clients:
            partition = client % nodes.partitions
            node = nodes.by_partition.get(partition)
            if node is not None:
                hosted.setdefault(node, []).append(client)
            else:
                answers[client] = (
                    f"disconnected: the Flower node of partition {partition} of "
                    f"{nodes.partitions} is not there"
                )
        return hosted, answers

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weight: Weight,
        total: RunningSum,
    ) -> Iterator[Readout]:
        return added(self.each(fn, clients, down, t), weight, total)

    def _note_waiting(
        self,
        clients: set[int],
        exchange: int = 0,
        in_flight: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write for `fedcore status` who is waited for, and in which exchange.

        In a buffered schedule also on which version each client is at work.

        Not synced: the file is of use only while this process runs.
        """
        if self._watch is None:
            return
        note = {
            "round": self._orders.now[0] + 1,
            "waiting_for": sorted(clients),
            "since": time.time(),
            "late": self.late,
            "exchange": EXCHANGES.get(exchange, ""),
            "in_flight": in_flight or [],
        }
        # A full disk ends a run where something is kept, and not for this.
        with suppress(OSError):
            write_atomically(self._watch, json.dumps(note).encode(), sync=False)

    def describe(self) -> str:
        return f"grid of {len(self._nodes.by_partition)} Flower nodes"

    def arrivals(self) -> list[Arrival]:
        self._ledger.note_late(self._post.take_late())
        return self._ledger.take(self._orders.now[0] + 1)

    def close(self) -> None:
        if self._safe is not None:
            self._sums.close(self._safe())


def _sent(fn: ClientFunction, down: Tree, t: int) -> Sent | None:
    """Work as its arrivals are recorded; an evaluation, or work alone, is not."""
    if evaluates(fn) or not trees.leaves(down):
        return None
    return Sent(t, fn.__name__, 0, trees.nbytes(down))


class _Noting(NamedTuple):
    """Notes the arrivals of one exchange; nothing where `sent` is None."""

    ledger: Ledger
    inquiry: Inquiry
    hosted: dict[int, list[int]]  # clients by node
    sent: Sent | None

    def add(self, node: int, has_come: bool, reading: Reading) -> None:
        """The answers of a node, or why there is none."""
        if self.sent is not None:
            back_us = stamp() if has_come else -1
            sent = self.sent._replace(sent_us=self.inquiry.sent_us[node])
            self.ledger.add(sent, back_us, reading.answers, reading.measures)

    def end(self) -> None:
        """Late answers are noted when they come."""
        if self.sent is None:
            return
        for message_id, node in self.inquiry.unanswered.items():
            sent = self.sent._replace(sent_us=self.inquiry.sent_us[node])
            self.ledger.expect(message_id, sent, self.hosted[node])
