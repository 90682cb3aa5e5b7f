"""The engine whose clients are Flower nodes: Ray actors under `flwr run`, devices in a deployment.

One message a node carries the ids of the clients that it hosts. Clients are addressed by their logical id, never by Flower's random
node id. Whatever a reply holds that it should not is left out, counted and named.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import Tensor

from fedcore import __version__, trees
from fedcore.deploy.certs import client_id
from fedcore.engines.base import Work, failure, one_thread
from fedcore.engines.readout import Readout, added
from fedcore.engines.run_client import run_client
from fedcore.errors import RunError
from fedcore.messages import wire
from fedcore.method import data_of, evaluates
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.storage.memory import size_text
from fedcore.storage.rows import StateStore
from fedcore.types import Batches, ClientFunction, Tree, Tuning

log = logging.getLogger("fedcore")

POLL = 0.05  # seconds between looks for replies; Flower's own loop sleeps 3
WAIT = 120.0  # seconds for all nodes to be there at the start, where no number of them is asked for
LOOK = 1.0  # seconds between looks whether the nodes that are waited for are still the same
LINGER = 60.0  # seconds, at most, in which Flower still takes an answer after the deadline: it is counted, and thrown away
REMIND = 10.0  # seconds between lines that say who is missing

_RESTARTED = "disconnected: the client started anew in the middle of its work"
_OFFLINE = "disconnected: the Flower node went offline"
MISSING = "no update: the node's answer holds none for this client"

PAUSE = failure([], "")  # reports of nobody

Answer = tuple[Tree, int] | str
"""(up, number of examples) of one client, or why there is none."""


class GridEngine:
    """Clients on Flower nodes; they keep their state themselves.

    With P nodes, the node of partition p hosts the clients i with i mod P = p: one each where there are as many nodes as clients.
    """

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
    ) -> None:
        """`timeout` in seconds: a round goes on without the clients that have not answered by then.

        `min_clients` nodes have to be there before a round starts, and `report_goal` reports end one. A node that goes away in a
        round and is back within `rejoin` seconds is asked again. A message of more than `limit` bytes is refused. Clients keep
        their state by `series`, the same whenever one run is gone on with, and may forget what is older than round `safe()`. Whose
        answer is waited for is written to the file `watch`. Nodes on this machine that have no directory of their own for the
        states of their clients use `state`, which whoever gives it removes.
        """
        self.grid, self.work, self.timeout = grid, work, timeout
        self._min_clients, self._goal, self._limit = min_clients, report_goal, limit
        self._rejoin = rejoin
        self._series, self._safe, self._watch, self._state = series, safe, watch, state
        self._now = (
            -1,
            -1,
        )  # t, and how many times clients were given work in it, from 0
        self._late: dict[
            str, float
        ] = {}  # messages nobody waits for any more, with the time at which they expire
        self.late = 0
        self.states: StateStore | None = None
        self.choices: dict[str, Any] = {}
        self._partitions = 0  # P, as the nodes say
        self._nodes: dict[
            int, int
        ] = {}  # node id by partition id, of the nodes that are online
        self._met: set[int] = set()  # nodes that were asked who they are
        self._refused: dict[
            int, int
        ] = {}  # nodes that cannot take part, with the partition that another has, or -1
        self._questions: dict[
            str, int
        ] = {}  # message id to node, of those that have not said
        self._expected: dict[str, Tree] = {}

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        """Raises RunError when no node is there at the start, and for a message over the limit."""
        self._now = (t, self._now[1] + 1 if self._now[0] == t else 0)
        for _ in self._gather():
            yield PAUSE
        _, schema = wire.schemas(fn)
        if (size := trees.nbytes(down)) > self._limit:
            raise RunError(
                f"a message of {size_text(size)} to every client, over the limit of {size_text(int(self._limit))}: use a smaller "
                "model, or raise engine.message_limit_mb, also in the memory of the server (a copy a client) and of the clients"
            )
        like = self._shape_of(fn, down, t)
        todo, answers, heard = clients.tolist(), dict[int, Answer](), set[int]()
        hosted: dict[int, list[int]] = {}
        for client in todo:
            partition = client % self._partitions
            if partition in self._nodes:
                hosted.setdefault(self._nodes[partition], []).append(client)
            else:
                answers[client] = (
                    f"disconnected: the Flower node of partition {partition} of {self._partitions} is not there"
                )
        record, about = (
            wire.encode(down),
            {
                "function": fn.__name__,
                "t": t,
                "k": self._now[1],
                "series": self._series,
            },
        )
        about["safe"] = self._safe() if self._safe else t
        if self._state is not None:
            self._state.mkdir(parents=True, exist_ok=True)
            about["state"] = str(self._state.resolve())
        contents = {
            node: RecordDict(
                {"down": record, "work": ConfigRecord({**about, "clients": ids})}
            )  # type: ignore[dict-item]
            for node, ids in hosted.items()
        }
        # A round has its goal; an evaluation hears everybody.
        goal = len(todo) if self._goal is None or evaluates(fn) else self._goal
        reported: set[int] = set()
        waited_for = {client for ids in hosted.values() for client in ids}
        self._note_waiting(waited_for)
        for answer in self._ask(contents, lambda: len(reported) >= goal):
            if answer is None:
                yield PAUSE
                continue
            node, reply = answer
            if node in heard:
                yield failure(
                    hosted[node],
                    f"answered twice: of the answers in round {t + 1} the first counts",
                )
                continue
            heard.add(node)
            found, complaints = self._read(reply, hosted[node], schema, like, t)
            answers |= found
            reported.update(
                client
                for client, answer in found.items()
                if not isinstance(answer, str)
            )
            self._note_waiting(waited_for := waited_for - set(hosted[node]))
            for client, complaint in complaints.items():
                yield failure([client], complaint)
            while (
                todo and todo[0] in answers
            ):  # in ascending order, each as soon as it and all before it are there
                client = todo.pop(0)
                yield self._report(client, answers.pop(client))
        for client in todo:
            yield self._report(client, answers[client])

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

    def _note_waiting(self, clients: set[int]) -> None:
        """For `fedcore status`. Not synced: it is only of use while this process runs."""
        if self._watch is not None:
            part = self._watch.with_suffix(".part")
            part.write_text(
                json.dumps(
                    {
                        "round": self._now[0] + 1,
                        "waiting_for": sorted(clients),
                        "since": time.time(),
                        "late": self.late,
                    }
                )
            )
            part.replace(self._watch)

    def _report(self, client: int, answer: Answer) -> Reports:
        if isinstance(answer, str):
            return failure([client], answer)
        up, count = answer
        return Reports(
            torch.tensor([client]),
            trees.map(lambda x: x[None], up),
            torch.tensor([float(count)]),
        )

    def _ask(
        self, contents: dict[int, RecordDict], enough: Callable[[], bool]
    ) -> Iterator[tuple[int, Message | str] | None]:
        """(node, reply) as they come, and (node, why there is none) for the others; every node at least once.

        None now and then, while there is no answer.
        """
        self._drop_late()
        began = self._starts()
        linger = min(self.timeout, LINGER)
        node_of = self._push(contents, "train", self.timeout + linger)
        for node in contents.keys() - node_of.values():
            yield node, "disconnected: Flower has no such node any more"
        waiting = set(node_of)
        away: dict[
            int, tuple[float, str]
        ] = {}  # nodes that went away: until when they are waited for, and why
        deadline = time.monotonic() + self.timeout
        looked = time.monotonic()
        while (waiting or away) and not enough():
            late = time.monotonic() > deadline
            lost: dict[str, str] = {}
            if time.monotonic() - looked > LOOK:
                yield None
                self._drop_late()
                looked = time.monotonic()
                now = self._starts()
                # Whoever took the message is gone: Flower gives it out once.
                lost = {
                    m: _RESTARTED if node_of[m] in now else _OFFLINE
                    for m in waiting
                    if _changed(node_of[m], began, now)
                }
                for node in away.keys() & now.keys():
                    again = self._push(
                        {node: contents[node]},
                        "train",
                        max(deadline - looked, 0.0) + linger,
                    )
                    if again:
                        log.warning(
                            "Flower node %d is back in round %d, and asked again",
                            node,
                            self._now[0] + 1,
                        )
                        del away[node]
                        began[node] = now[node]
                        node_of |= again
                        waiting |= again.keys()
            for message, reply in self._pull(waiting - lost.keys()):
                if (
                    self._rejoin
                    and reply.has_error()
                    and reply.error.code == ErrorCode.NODE_UNAVAILABLE
                ):
                    lost[message] = _OFFLINE
                else:
                    waiting.discard(message)
                    yield node_of[message], reply
            for message, reason in lost.items():
                waiting.discard(message)
                away[node_of[message]] = time.monotonic() + self._rejoin, reason
                self._late[message] = deadline + linger
            for node in [
                node
                for node, (end, _) in away.items()
                if late or time.monotonic() >= end
            ]:
                yield node, away.pop(node)[1]
            if late:
                break
            if waiting or away:
                time.sleep(POLL)
        over = time.monotonic() > deadline
        self._late |= dict.fromkeys(waiting, deadline + linger)
        missing = [node_of[message] for message in waiting] + [*away]
        for node in missing:
            yield (
                node,
                _too_late(self.timeout)
                if over
                else "not needed: the round had the reports that it asked for",
            )

    def _drop_late(self) -> None:
        """Take what came after its round off Flower's hands, count it, and throw it away."""
        for message, reply in self._pull(set(self._late)) if self._late else ():
            self.late += not reply.has_error()
            self._late.pop(message, None)
        self._late = {
            message: end
            for message, end in self._late.items()
            if end > time.monotonic()
        }

    def _push(
        self, contents: dict[int, RecordDict], kind: str, ttl: float
    ) -> dict[str, int]:
        """Node by message id, without the nodes that Flower could not send to."""
        messages = {
            node: Message(r, dst_node_id=node, message_type=kind, ttl=ttl)
            for node, r in contents.items()
        }
        sent = set(self.grid.push_messages(list(messages.values())))
        return {
            m.metadata.message_id: node
            for node, m in messages.items()
            if m.metadata.message_id in sent
        }

    def _pull(self, waiting: set[str]) -> Iterator[tuple[str, Message]]:
        asked = set(waiting)
        for reply in self.grid.pull_messages(list(asked)):
            if reply.metadata.reply_to_message_id in asked:
                yield reply.metadata.reply_to_message_id, reply

    def _read(
        self, reply: Message | str, asked: list[int], schema: Any, like: Tree, t: int
    ) -> tuple[dict[int, Answer], dict[int, str]]:
        """What one node says of its clients, an answer for each that was asked; and complaints, for what it says beyond that.

        Nothing in a reply is trusted.
        """
        if isinstance(reply, str):
            return dict.fromkeys(asked, reply), {}
        if reply.has_error():
            return dict.fromkeys(asked, _reason(reply.error, self.timeout)), {}
        about = reply.content.get("about")
        if not isinstance(about, ConfigRecord):
            return dict.fromkeys(
                asked, 'bad message: no record "about" in the answer'
            ), {}
        if about.get("t") != t:
            return dict.fromkeys(
                asked,
                f"wrong round: an answer for t = {about.get('t')!r}, expected {t}",
            ), {}
        answers: dict[int, Answer] = {}
        complaints: dict[int, str] = {}
        failed = zip(_list(about, "failed"), _list(about, "reasons"), strict=False)
        counts = zip(
            _list(about, "clients"), _list(about, "num-examples"), strict=False
        )
        allowed = set(asked)
        for client, said, count in [
            *((c, r, None) for c, r in failed),
            *((c, None, n) for c, n in counts),
        ]:
            if client in answers:
                complaints[client] = (
                    f"answered twice: of the answers in round {t + 1} the first counts"
                )
            elif client in allowed:
                error = (
                    None
                    if said is None
                    else f"error: {_one_line(str(said)).removeprefix('error: ')}"
                )
                answers[client] = error or self._update(
                    reply.content.get(f"up-{client}"), count, schema, like
                )
            elif not complaints.keys() - allowed:  # one complaint says enough
                complaints[client] = (
                    f"unknown client: a node answered for client {client!r}, which it was not asked for"
                )
        return dict.fromkeys(asked, MISSING) | answers, complaints

    def _update(self, record: Any, count: Any, schema: Any, like: Tree) -> Answer:
        if not isinstance(record, ArrayRecord):
            return MISSING
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            return f"bad count: {count!r} examples, expected a whole number from 0 on"
        try:
            return wire.decode(record, schema, like), count
        except wire.WireError as e:
            where = type(self.work.method).__module__.replace(".", "/")
            return f"bad message: it sent {e}: is it running another version of {where}.py?"

    def _gather(self) -> Iterator[None]:
        """Meet whoever is new, and wait for as many nodes as a round needs; None now and then.

        Before the first round these are all of them, for a while, if no number is set.
        """
        first, begin, reminded, paused = not self._nodes, time.monotonic(), 0.0, 0.0
        while True:
            trouble = self._meet()
            complete = len(self._nodes) == self._partitions > 0
            hopeless = (
                not self._questions and self._met and not self._nodes
            )  # all have answered, and none can take part
            waited = time.monotonic() - begin
            if self._min_clients is not None:
                enough = len(self._nodes) >= min(
                    self._min_clients, self._partitions or self._min_clients
                )
            else:
                enough = not first or bool(hopeless) or waited > WAIT
            if complete or enough:
                break
            if waited - reminded > REMIND:
                reminded = waited
                log.warning("waiting for clients: %s", self._missing())
            if waited - paused > LOOK:
                paused = waited
                yield None
            time.sleep(POLL)
        if not self._partitions:
            raise RunError(f"no Flower node can take part: {trouble}")
        if first and not complete:
            log.warning(
                "%d of %d Flower nodes are there; going on with them",
                len(self._nodes),
                self._partitions,
            )

    def _missing(self) -> str:
        total = self._partitions or self.work.task.population
        gone = [
            str(partition) for partition in range(total) if partition not in self._nodes
        ]
        names = ", ".join(gone[:20]) + (", ..." if len(gone) > 20 else "")
        need = (
            ""
            if self._min_clients is None
            else f", and min_clients = {self._min_clients}"
        )
        return f"{len(self._nodes)} of {total} are there{need}; missing: {names}"

    def _meet(self) -> str:
        """Ask nodes that are new who they are, and hear those that answer. Why the last one of them cannot take part, if so."""
        trouble = "none is registered"
        online = set(self.grid.get_node_ids())
        self._nodes = {
            partition: node for partition, node in self._nodes.items() if node in online
        }
        self._refused = {
            node: partition
            for node, partition in self._refused.items()
            if node in online
        }
        again = {
            node
            for node, partition in self._refused.items()
            if partition not in (-1, *self._nodes)
        }  # its place is free now
        new = online - self._met | again
        self._met = online  # a node that goes and comes back is asked again
        hello = ConfigRecord({"fedcore": __version__})
        self._questions |= self._push(
            {node: RecordDict({"server": hello}) for node in new}, "query", WAIT
        )
        for message, reply in (
            self._pull(set(self._questions)) if self._questions else ()
        ):
            trouble = self._introduce(self._questions.pop(message, 0), reply) or trouble
        return trouble

    def _introduce(self, node: int, reply: Message) -> str | None:
        """Enter a node under its partition; or why it cannot be, which is logged, and said to the node."""
        me = None if reply.has_error() else reply.content.get("node")
        says = me if isinstance(me, ConfigRecord) else ConfigRecord()
        partition, total = (
            says.get("partition-id"),
            says.get("num-partitions", self.work.task.population),
        )
        version, key = says.get("fedcore"), client_id(self._names.get(node, ""))
        trouble, place = None, -1
        if reply.has_error():
            trouble = _reason(reply.error, WAIT)
        elif me is not None and version != __version__:
            trouble = f"it runs fedcore {version!s}, the server {__version__}: install the same on both"
        elif (
            not isinstance(partition, int)
            or not isinstance(total, int)
            or not 0 <= partition < total
        ):
            trouble = f"a node says that it is partition {partition!r} of {total!r}: give it partition-id and num-partitions"
        elif self._partitions not in (0, total):
            trouble = f"a node says that it is one of {total} partitions, others say {self._partitions}"
        elif key is not None and key != partition:
            trouble = f"it says that it is client {partition} and has the key of client {key}: give it its own key or id"
        elif self._nodes.get(partition, node) != node:
            trouble, place = (
                f"another node is client {partition} already: give each a --id (partition-id) of its own",
                partition,
            )
        else:
            self._partitions = total
            self._nodes[partition] = node
        self._refused.pop(node, None)
        if trouble:
            log.warning(
                "Flower node %d%s is left out: %s",
                node,
                f" (client {partition!r})" if partition is not None else "",
                trouble,
            )
            self._refused[node] = place
            self._push(
                {
                    node: RecordDict(
                        {
                            "server": ConfigRecord(
                                {"fedcore": __version__, "refused": trouble}
                            )
                        }
                    )
                },
                "query",
                WAIT,
            )
        return trouble

    def _starts(self) -> dict[int, str]:
        """When each node that is online came, by node, where Flower tells."""
        return {
            node.node_id: node.last_activated_at
            for node in getattr(self.grid, "get_nodes", list)()
        }

    @property
    def _names(self) -> dict[int, str]:
        """The names that nodes' keys were registered under, by node."""
        nodes: list[Any] = getattr(self.grid, "get_nodes", list)()
        return {node.node_id: node.name for node in nodes}

    def _shape_of(self, fn: ClientFunction, down: Tree, t: int) -> Tree:
        """What a client sends, by running one on a single example: shapes and types that replies must have."""
        name = fn.__name__
        if name not in self._expected:
            data, task = self.work.task.data, self.work.task
            one = Batches(
                data.x[:1][None], data.y[:1][None], torch.ones(1, 1, device=task.device)
            )
            batches = Tuning(one, one) if data_of(fn) == "tune" else one
            state = self.work.method.init_client(task.init_params())
            with one_thread():
                self._expected[name], _ = run_client(
                    fn, task, torch.tensor(float(t)), down, state, batches
                )
        return self._expected[name]

    def describe(self) -> str:
        return f"grid of {len(self._nodes)} Flower nodes"

    def close(self) -> None:
        pass


def _changed(node: int, before: dict[int, str], now: dict[int, str]) -> bool:
    """Whether a node is another process than before, or none."""
    return now.get(node) != before.get(node)


def _list(record: ConfigRecord, key: str) -> list[Any]:
    value = record.get(key)
    return value if isinstance(value, list) else []


def _reason(error: Error, timeout: float) -> str:
    if error.code in (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ):
        return _too_late(timeout)
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return _OFFLINE
    return f"error: {_one_line(error.reason)}"


def _too_late(timeout: float) -> str:
    return f"timeout: no answer within {timeout:g} s"


def _one_line(text: str | None) -> str:
    """A reason fit for a log. Flower gives <class 'E'>:<'text'>, where Ray's text is a traceback that ends in what was raised."""
    said = (
        (text or "unknown")
        .rpartition("Message: ")[2]
        .rpartition(">:<'")[2]
        .removesuffix("'>")
    )
    return " ".join(said.split())[:200]
