"""The engine whose clients are Flower nodes.

They are Ray actors under `flwr run`, and devices in a deployment. One message a node
carries the ids of the clients that it hosts. Clients are addressed by their logical
id, never by Flower's random node id. Whatever a reply holds that it should not is left
out, counted and named.

    nodes     the nodes that are there, and the clients that each hosts
    post      messages sent, waited for until a deadline, and counted if late
    replies   what came back, read and checked
    secure    sums of which nothing else can be read; `journal` keeps the last ones
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Work, failure
from fedcore.engines.message_shape import message_shape
from fedcore.engines.readout import Readout, added
from fedcore.errors import RunError, TooFewReports
from fedcore.messages import wire
from fedcore.messages.secure.ask import Ask, SecretTotal
from fedcore.messages.secure.server_session import ServerSession, Size
from fedcore.messages.secure.settings import SecureSettings
from fedcore.messages.secure.terms import Terms
from fedcore.method import evaluates
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import writing
from fedcore.storage.memory import size_text
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

from . import secure
from .journal import FOLDER, Entry, Journal, Void
from .nodes import Nodes
from .post import Inquiry, Post
from .replies import Answer, Reader, twice

log = logging.getLogger("fedcore")

PAUSE = failure([], "")  # a report of no client
MOMENT = 1 << 16  # a moment is t times this, plus k


class Securing(NamedTuple):
    """Settings and places of a run with `aggregation.secure`."""

    settings: SecureSettings = SecureSettings()
    certs: Path | None = None  # the server's directory of keys, with `clients/`
    checkpoint: Path | None = None  # where sums outlive the server; None: nowhere


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
        reports end one. A node that goes away in a round and is back within `rejoin`
        seconds is asked again. A message of more than `limit` bytes is refused.
        Clients keep their state by `series`, the same whenever one run is gone on
        with, and may forget rounds before `safe()`. The clients whose answers are
        waited for are written to the file `watch`. Nodes on this machine without a
        directory for the states of their clients use `state`; the caller removes it.
        `securing` is about secure sums.
        """
        self.work, self.timeout = work, timeout
        self._goal, self._rejoin, self._limit = report_goal, rejoin, limit
        self._series, self._safe = series, safe
        self._watch, self._state = watch, state
        self._post = Post(grid, limit)
        self._nodes = Nodes(
            self._post, work.task.population, min_clients, work.task.base_sha256
        )
        self.states: StateStore | None = None
        self.choices: dict[str, Any] = {}
        self._now = (-1, -1)  # t, and how often clients were given work in it, from 0
        # Of messages, by client function and the shapes of what it was sent.
        self._shapes: dict[Hashable, Tree] = {}
        self._sizes: dict[Hashable, Size] = {}  # of vectors of secure sums
        self._securing = securing or Securing()
        self._certificates = secure.Certificates(self._securing.certs)
        folder = self._securing.checkpoint
        self._journal = None if folder is None else Journal(folder / FOLDER)
        self._void = Void(None if folder is None else folder / FOLDER)
        self._has_said_unsigned = False

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
        self._count_work(t)
        for _ in self._nodes.gather():
            yield PAUSE
        self._check_size(down)
        reader = self._reader(fn, down, t)
        todo = clients.tolist()
        hosted, answers = self._hosts(todo)
        contents = self._contents(fn, hosted, down)
        # A round has its goal; an evaluation hears everybody.
        goal = len(todo) if self._goal is None or evaluates(fn) else self._goal
        reported: set[int] = set()
        heard: set[int] = set()
        waited_for = set(todo) - answers.keys()
        self._note_waiting(waited_for)
        inquiry = Inquiry(self._post, contents, self.timeout, self._rejoin, t)
        for node_reply in inquiry.replies(lambda: len(reported) >= goal):
            if node_reply is None:
                yield PAUSE
                continue
            node, reply = node_reply
            if node in heard:
                yield failure(hosted[node], twice(t))
                continue
            heard.add(node)
            reading = reader.read(reply, hosted[node])
            answers |= reading.answers
            for client, answer in reading.answers.items():
                if not isinstance(answer, str):
                    reported.add(client)
            waited_for -= set(hosted[node])
            self._note_waiting(waited_for)
            for client, complaint in reading.complaints.items():
                yield failure([client], complaint)
            while todo and todo[0] in answers:
                client = todo.pop(0)
                yield _report(client, answers.pop(client))
        for client in todo:
            yield _report(client, answers[client])

    def _count_work(self, t: int) -> None:
        self._now = (t, self._now[1] + 1 if self._now[0] == t else 0)

    def secret_sum(self, ask: Ask, into: SecretTotal) -> Iterator[Reports]:
        """Let clients add up what is asked for, masked from end to end.

        A sum that an earlier start of this server had is taken from its journal. Raises
        TooFewReports where it cannot be read.
        """
        self._count_work(ask.t)
        t, k = self._now
        record = wire.encode(ask.down)
        run = f"{self._series}/{t}/{k}/{ask.fn.__name__}"
        is_signed = self._certificates.authority is not None
        terms = secure.terms_of(ask, run, is_signed)
        question = secure.question_of(terms, secure.sha256_of(record))
        if self._journal is not None:
            self._journal.prune(self._safe() if self._safe else t)
            entry = self._journal.read(t, k, question)
            if entry is not None and set(entry.total.clients) <= set(
                ask.clients.tolist()
            ):
                log.warning("round %d goes on with a sum that was made before", t + 1)
                secure.restore(entry, into)
                return
        try:
            yield from self._sum(ask, terms, record, into)
        except TooFewReports as error:
            self._keep_sum(question, Entry(into, str(error)))
            raise
        self._keep_sum(question, Entry(into))

    def _keep_sum(self, question: str, entry: Entry) -> None:
        if self._journal is not None:
            self._journal.write(*self._now, question, entry)

    def _sum(
        self, ask: Ask, terms: Terms, record: ArrayRecord, into: SecretTotal
    ) -> Iterator[Reports]:
        for _ in self._nodes.gather():
            yield PAUSE
        self._check_size(ask.down)
        self._say_unsigned()
        hosted, missing = self._hosts(ask.clients.tolist())
        for client, reason in missing.items():
            yield failure([client], str(reason))
        session = ServerSession(
            terms,
            secure.sha256_of(record),
            self._size_of(ask),
            weights=secure.weights_of(ask),
            neighbours=self._securing.settings.neighbours,
            least=self._securing.settings.threshold,
            authority=self._certificates.authority,
            certificates=self._certificates.of(ask.clients.tolist()),
        )
        goal = len(ask.clients)
        if self._goal is not None and not evaluates(ask.fn):
            goal = self._goal
        mailing = secure.Mailing(
            self._post, self.timeout, self._rejoin, goal, self._note_waiting
        )
        moment = self._now[0] * MOMENT + self._now[1]
        secret = secure.SecretSum(session, mailing, hosted, self._work_of(ask.fn))
        try:
            yield from secret.run(record, self._places(ask))
            into.total = secret.total()
            into.clients, into.moment = session.clients, moment
        finally:
            into.bytes_up = secret.bytes_up
            if not evaluates(ask.fn):
                void = secret.asked - secret.failed_first - set(into.clients)
                self._void.update(secret.answered, void, moment)

    def _places(self, ask: Ask) -> dict[int, ConfigRecord]:
        """What clients are told of their own works before this one."""
        clients = ask.clients.tolist()
        moments = [-1] * len(clients)
        if ask.moments is not None:
            moments = ask.moments.tolist()
        places = {}
        for client, moment in zip(clients, moments, strict=True):
            void: Any = self._void.of(client)
            facts = {"moment": moment, "void": void}
            places[client] = ConfigRecord(facts)
        return places

    def _size_of(self, ask: Ask) -> Size:
        shapes = tuple((path, x.shape) for path, x in trees.flatten(ask.down).items())
        key = ask.fn.__name__, ask.news, tuple(part.field for part in ask.parts), shapes
        if key not in self._sizes:
            self._sizes[key] = secure.size_in(self.work, ask)
        return self._sizes[key]

    def _say_unsigned(self) -> None:
        if self._certificates.authority is None and not self._has_said_unsigned:
            self._has_said_unsigned = True
            log.warning(secure.UNSIGNED)

    def _check_size(self, down: Tree) -> None:
        size = trees.nbytes(down)
        if size > self._limit:
            raise RunError(
                f"a message of {size_text(size)} to every client, over the limit of "
                f"{size_text(int(self._limit))}: use a smaller model, or raise "
                "engine.message_limit_mb, also in the memory of the server "
                "(a copy a client) and of the clients"
            )

    def _reader(self, fn: ClientFunction, down: Tree, t: int) -> Reader:
        _, schema = wire.schemas(fn)
        sent = tuple((path, x.shape) for path, x in trees.flatten(down).items())
        key = fn.__name__, sent
        if key not in self._shapes:
            self._shapes[key] = message_shape(self.work, fn, down, t)
        module = type(self.work.method).__module__
        source = module.replace(".", "/") + ".py"
        return Reader(schema, self._shapes[key], t, self.timeout, source)

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

    def _contents(
        self, fn: ClientFunction, hosted: dict[int, list[int]], down: Tree
    ) -> dict[int, RecordDict]:
        """The message to each node."""
        work, record = self._work_of(fn), wire.encode(down)
        contents = {}
        for node, clients in hosted.items():
            records: dict[str, Any] = {"down": record}
            records["work"] = ConfigRecord({**work, "clients": clients})
            contents[node] = RecordDict(records)
        return contents

    def _work_of(self, fn: ClientFunction) -> dict[str, Any]:
        """What every message says of the work that it asks for."""
        t, k = self._now
        safe = self._safe() if self._safe else t
        work: dict[str, Any] = {"function": fn.__name__, "t": t, "k": k}
        work |= {"series": self._series, "safe": safe}
        if self._state is not None:
            with writing(self._state):
                self._state.mkdir(parents=True, exist_ok=True)
            work["state"] = str(self._state.resolve())
        return work

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

    def _note_waiting(self, clients: set[int], exchange: int = 0) -> None:
        """Write for `fedcore status` who is waited for, and in which exchange.

        Not synced: the file is of use only while this process runs.
        """
        if self._watch is None:
            return
        note = {
            "round": self._now[0] + 1,
            "waiting_for": sorted(clients),
            "since": time.time(),
            "late": self.late,
            "exchange": secure.EXCHANGES.get(exchange, ""),
        }
        # A full disk ends a run where something is kept, and not for this.
        with suppress(OSError):
            write_atomically(self._watch, json.dumps(note).encode(), sync=False)

    def describe(self) -> str:
        return f"grid of {len(self._nodes.by_partition)} Flower nodes"

    def close(self) -> None:
        pass


def _report(client: int, answer: Answer) -> Reports:
    if isinstance(answer, str):
        return failure([client], answer)
    up, count = answer
    stacked = trees.map(lambda x: x[None], up)
    return Reports(torch.tensor([client]), stacked, torch.tensor([float(count)]))
