"""The Flower nodes that take part: who they are, and which clients they host.

A node says in its introduction which partition of the clients it hosts: with P nodes,
the node of partition p hosts the clients i with i mod P = p, one each where there are
as many nodes as clients. Nothing that a node says is trusted: its words are compared
with its key and with those of the others: how many nodes there are is what most of
them say.

A node builds its task before it introduces itself, and says why where it cannot. Such
a node is left out with its reason and asked again after a while, for what is missing
(a disk that is not mounted yet) may come.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedcore import __version__
from fedcore.deploy.certs import client_id
from fedcore.errors import RunError
from fedcore.escapes import escaped
from fedcore.rounds.rundir import short_sha256

from .post import LOOK, POLL, Post, one_line, reason_of

log = logging.getLogger("fedcore")

WAIT = 120.0  # seconds for all nodes to come, where no number of them is asked for
INTRODUCTION = 600.0  # seconds for an introduction: a node builds its task meanwhile
ASK_AGAIN = 30.0  # seconds until a node that was not ready is asked again
REMIND = 10.0  # seconds between lines that say who is missing
ANYWHERE = -1  # in the place of a partition: the node is refused wherever it is

Introduction = dict[str, Any]
"""The content of a node's introduction, of which nothing is certain."""


class NotReady(NamedTuple):
    """A node that cannot build its task."""

    reason: str
    ask_again: float  # on the monotonic clock


class Refusal(NamedTuple):
    """Why a node cannot take part, and the partition whose node is in its way."""

    reason: str
    partition: int = ANYWHERE


class Nodes:
    """Meets the nodes of a grid, and waits for as many as a round needs."""

    def __init__(
        self, post: Post, population: int, min_clients: int | None, base: str = ""
    ) -> None:
        """`base` is the SHA-256 of the server's frozen parameters, "" without any."""
        self.post, self.population, self.min_clients = post, population, min_clients
        self.base = base
        self.partitions = 0  # P, as most nodes say; 0 before one can take part
        self._says: dict[int, int] = {}  # P, by node
        self._believed = 0  # P, before a node that says so is known to be ready
        self.by_partition: dict[int, int] = {}  # node ids, of those that are online
        self._met: set[int] = set()  # nodes that were asked to introduce themselves
        self._questions: dict[str, int] = {}  # message id to a node yet to answer
        self._refused: dict[int, int] = {}  # node to the partition that is another's
        self._not_ready: dict[int, NotReady] = {}

    def gather(self) -> Iterator[None]:
        """Meet new nodes, and wait for as many as a round needs; None now and then.

        Before the first round these are all nodes, for a while, if no number is set.
        Raises RunError when no node can take part.
        """
        is_first = not self.by_partition
        begin, reminded, paused = time.monotonic(), 0.0, 0.0
        while True:
            trouble = self._meet()
            waited = time.monotonic() - begin
            if self._is_complete() or self._is_enough(is_first, waited):
                break
            if waited - reminded > REMIND:
                reminded = waited
                log.warning("waiting for clients: %s", self._missing())
            if waited - paused > LOOK:
                paused = waited
                yield None
            time.sleep(POLL)
        if not self.partitions:
            raise RunError(f"no Flower node can take part: {trouble}")
        if is_first and not self._is_complete():
            log.warning(
                "%d of %d Flower nodes are there; going on with them",
                len(self.by_partition),
                self.partitions,
            )

    def meet(self) -> None:
        """Meet new nodes, and forget those that went, without waiting."""
        self._meet()

    def host(self, client: int) -> int | None:
        """The node that hosts a client; None where it is not there."""
        return self.by_partition.get(client % self.partitions)

    def clients(self) -> np.ndarray:
        """Ids of the clients whose nodes are there, int64, ascending."""
        is_there = np.zeros(self.partitions, dtype=bool)
        is_there[[*self.by_partition]] = True
        return np.flatnonzero(is_there[np.arange(self.population) % self.partitions])

    def _is_complete(self) -> bool:
        return len(self.by_partition) == self.partitions > 0

    def _is_enough(self, is_first: bool, waited: float) -> bool:
        if self.min_clients is not None:
            wanted = min(self.min_clients, self.partitions or self.min_clients)
            return len(self.by_partition) >= wanted
        all_have_answered = bool(self._met) and not self._questions
        is_hopeless = all_have_answered and not self.by_partition
        return not is_first or is_hopeless or waited > WAIT

    def _missing(self) -> str:
        total = self.partitions or self.population
        others = (i for i in range(total) if i not in self.by_partition)
        missing = list(itertools.islice(others, 21))
        names = ", ".join(map(str, missing[:20]))
        if len(missing) > 20:
            names += ", ..."
        there = f"{len(self.by_partition)} of {total} are there"
        if self.min_clients is not None:
            there += f", and min_clients = {self.min_clients}"
        return f"{there}; missing: {names}"

    def _meet(self) -> str:
        """Ask new nodes to introduce themselves, and hear those that answer.

        The reason of the last one that cannot take part.
        """
        trouble = "none is registered"
        online = set(self.post.grid.get_node_ids())
        self._forget_all_but(online)
        new = (online - self._met) | self._to_ask_again()
        self._met = online  # a node that goes and comes back is asked again
        hello = RecordDict({"server": ConfigRecord({"fedcore": __version__})})
        questions = dict.fromkeys(new, hello)
        self._questions |= self.post.push(questions, "query", INTRODUCTION)
        for message_id, reply in self.post.pull(set(self._questions)):
            node = self._questions.pop(message_id)
            trouble = self._introduce(node, reply) or trouble
        return trouble

    def _forget_all_but(self, online: set[int]) -> None:
        for partition, node in list(self.by_partition.items()):
            if node not in online:
                del self.by_partition[partition]
        for node in self._says.keys() - online:
            del self._says[node]
        for node in self._refused.keys() - online:
            del self._refused[node]
        for node in self._not_ready.keys() - online:
            del self._not_ready[node]

    def _to_ask_again(self) -> set[int]:
        """Nodes whose place has become free, or that may be ready by now."""
        nodes: set[int] = set()
        for node, partition in self._refused.items():
            if partition not in (ANYWHERE, *self.by_partition):
                nodes.add(node)
        now, asked = time.monotonic(), set(self._questions.values())
        for node, not_ready in self._not_ready.items():
            if now >= not_ready.ask_again and node not in asked:
                nodes.add(node)
        return nodes

    def _introduce(self, node: int, reply: Message) -> str | None:
        """Enter a node under its partition; the reason, where that cannot be.

        The reason is logged. A node that is refused hears of it, one that is not ready
        knows it.
        """
        record = None if reply.has_error() else reply.content.get("node")
        introduction = dict(record) if isinstance(record, ConfigRecord) else {}
        self._refused.pop(node, None)
        if refusal := self._refusal(node, reply, introduction):
            self._leave_out(node, introduction, refusal.reason)
            self._refused[node] = refusal.partition
            self._tell(node, refusal.reason)
            return refusal.reason
        if reason := introduction.get("not-ready"):
            reason = f"it is not ready: {one_line(str(reason))}"
            before = self._not_ready.get(node)
            if before is None or before.reason != reason:
                self._leave_out(node, introduction, reason)
            ask_again = time.monotonic() + ASK_AGAIN
            self._not_ready[node] = NotReady(reason, ask_again)
            return reason
        self._not_ready.pop(node, None)
        partition: Any = introduction["partition-id"]
        self.partitions = self._believed
        self.by_partition[partition] = node
        return None

    def _count_partitions(self) -> None:
        """Believe what most nodes say of P, and ask the others again.

        The first to come could else keep all others out.
        """
        counts = Counter(self._says.values())

        def trust(total: int) -> tuple[int, bool, bool]:
            return counts[total], total == self.population, total == self._believed

        before, self._believed = self._believed, max(counts, key=trust)
        if before not in (0, self._believed):
            self._met -= self._says.keys()
            self.by_partition.clear()

    def _total(self, introduction: Introduction) -> Any:
        return introduction.get("num-partitions", self.population)

    def _refusal(
        self, node: int, reply: Message, introduction: Introduction
    ) -> Refusal | None:
        if reply.has_error():
            return Refusal(reason_of(reply.error, INTRODUCTION))
        partition: Any = introduction.get("partition-id")
        total = self._total(introduction)
        version = introduction.get("fedcore")
        if introduction and version != __version__:
            return Refusal(
                f"it runs fedcore {_shown(version)}, the server {__version__}: "
                "install the same on both"
            )
        if not _is_partition(partition, total):
            return Refusal(
                f"a node says that it is partition {_shown(repr(partition))} of "
                f"{_shown(repr(total))}: give it partition-id and num-partitions"
            )
        key = client_id(self.post.names().get(node, ""))
        if key is not None and key != partition:
            return Refusal(
                f"it says that it is client {partition} and has the key of "
                f"client {key}: give it its own key or id"
            )
        if reason := self._other_base(introduction):
            return Refusal(reason)
        self._says[node] = total
        self._count_partitions()
        if self._believed != total:
            return Refusal(
                f"a node says that it is one of {_shown(total)} partitions, "
                f"others say {_shown(self._believed)}"
            )
        if self.by_partition.get(partition, node) != node:
            return Refusal(
                f"another node is client {partition} already: "
                "give each a --id (partition-id) of its own",
                partition,
            )
        return None

    def _other_base(self, introduction: Introduction) -> str | None:
        """Why a node's frozen parameters cannot be trained with, None where they can.

        Those of a node that is not ready are not known.
        """
        base = introduction.get("base", "")
        if base == self.base or "not-ready" in introduction:
            return None
        theirs = short_sha256(_shown(base))
        return (
            f"its base ({theirs}) is another than the server's "
            f"({short_sha256(self.base)}): give it a copy of the server's"
        )

    def _leave_out(self, node: int, introduction: Introduction, reason: str) -> None:
        partition = introduction.get("partition-id")
        client = "" if partition is None else f" (client {_shown(repr(partition))})"
        log.warning("Flower node %d%s is left out: %s", node, client, reason)

    def _tell(self, node: int, reason: str) -> None:
        record = ConfigRecord({"fedcore": __version__, "refused": reason})
        self.post.push({node: RecordDict({"server": record})}, "query", WAIT)


def _is_partition(partition: Any, total: Any) -> bool:
    if not isinstance(partition, int) or not isinstance(total, int):
        return False
    return 0 <= partition < total


def _shown(value: object) -> str:
    """Text of a node, at a length and in characters that a terminal can bear."""
    return escaped(str(value))[:40]
