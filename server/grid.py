"""The engine whose clients are Flower nodes: Ray actors under `flwr run`, devices in a deployment.

One message a node carries the ids of the clients that it hosts. Clients are addressed by their logical id, never by Flower's random
node id. Whatever a reply holds that it should not is left out, counted and named.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedcore import trees, wire
from fedcore.engines.base import Work, failure
from fedcore.errors import RunError
from fedcore.run_client import run_client
from fedcore.state import StateStore
from fedcore.types import Batches, ClientFunction, Reports, Tree

POLL = 0.05  # seconds between looks for replies; Flower's own loop sleeps 3
WAIT = 120.0  # seconds for all nodes to be there at the start

Answer = tuple[Tree, float] | str
"""(up, number of examples) of one client, or why there is none."""


class GridEngine:
    """Clients on Flower nodes; they keep their state themselves."""

    def __init__(self, grid: Grid, work: Work, timeout: float) -> None:
        """`timeout` in seconds: a round goes on without the clients that have not answered by then."""
        self.grid, self.work, self.timeout = grid, work, timeout
        self.states: StateStore | None = None
        self.choices: dict[str, Any] = {}
        self._nodes: list[int] = []  # node id by partition id
        self._expected: dict[str, Tree] = {}

    def each(self, fn: ClientFunction, clients: Tensor, down: Tree, t: int) -> Iterator[Reports]:
        name = fn.__name__
        if not self._nodes:
            self._nodes = self._find_nodes()
        _, schema = wire.schemas(fn)
        like = self._shape_of(fn, down, t)
        hosted: dict[int, list[int]] = {}
        for client in clients.tolist():
            hosted.setdefault(self._nodes[client % len(self._nodes)], []).append(client)
        record = wire.encode(down)
        messages = [
            Message(
                RecordDict({"down": record, "work": ConfigRecord({"function": name, "t": t, "clients": ids})}),
                dst_node_id=node,
                message_type="train",
                ttl=self.timeout,
            )
            for node, ids in hosted.items()
        ]
        answers: dict[int, Answer] = {}
        todo = clients.tolist()
        for reply in self._replies(messages):
            for client, answer in self._read(reply, hosted, schema, like, t).items():
                answers.setdefault(client, answer)
            while todo and todo[0] in answers:  # in ascending order, each as soon as it and all before it are there
                yield self._report(todo[0], answers.pop(todo[0]))
                todo.pop(0)
        for client in todo:
            yield self._report(client, answers.get(client, f"timeout: no answer within {self.timeout:g} s"))

    def _report(self, client: int, answer: Answer) -> Reports:
        if isinstance(answer, str):
            return failure([client], answer)
        up, count = answer
        return Reports(torch.tensor([client]), trees.map(lambda x: x[None], up), torch.tensor([count]))

    def _replies(self, messages: list[Message]) -> Iterator[Message]:
        """Replies as they come, until all are there or the time is up."""
        waiting = set(self.grid.push_messages(messages))
        deadline = time.monotonic() + self.timeout
        while waiting and time.monotonic() < deadline:
            replies: Iterable[Message] = self.grid.pull_messages(waiting)
            for reply in replies:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if waiting:
                time.sleep(POLL)

    def _read(self, reply: Message, hosted: dict[int, list[int]], schema: Any, like: Tree, t: int) -> dict[int, Answer]:
        """What one node says of its clients, checked: nothing in it is trusted."""
        asked = hosted.get(reply.metadata.src_node_id, [])
        if reply.has_error():
            return dict.fromkeys(asked, f"error: {_one_line(reply.error.reason)}")
        about = reply.content.get("about")
        if not isinstance(about, ConfigRecord) or about.get("t") != t:
            return dict.fromkeys(asked, f"wrong round: expected an answer for round {t + 1}")
        answers: dict[int, Answer] = {}
        counts = dict(zip(_list(about, "clients"), _list(about, "num-examples"), strict=False))
        for client, reason in zip(_list(about, "failed"), _list(about, "reasons"), strict=False):
            answers[client] = str(reason)
        for client in asked:
            record, count = reply.content.get(f"up-{client}"), counts.get(client)
            if not isinstance(record, ArrayRecord):
                answers.setdefault(client, "no update: the node's answer holds none for this client")
            elif not isinstance(count, int | float) or isinstance(count, bool) or not (0 <= count < math.inf):
                answers[client] = f"bad count: {count!r} examples, expected a number from 0 on"
            else:
                try:
                    answers[client] = (wire.decode(record, schema, like), float(count))
                except wire.WireError as e:
                    where = type(self.work.method).__module__
                    answers[client] = f"bad message: it sent {e}: is it running another version of {where}?"
        return {client: answer for client, answer in answers.items() if client in asked}

    def _find_nodes(self) -> list[int]:
        """Node ids in order of partition id. Raises RunError when they do not all come."""
        deadline = time.monotonic() + WAIT
        found: dict[int, int] = {}
        total = 0
        while time.monotonic() < deadline:
            new = [node for node in self.grid.get_node_ids() if node not in found.values()]
            for reply in self._replies([Message(RecordDict(), dst_node_id=node, message_type="query") for node in new]):
                if reply.has_error():
                    raise RunError(f"a Flower node cannot start: {_one_line(reply.error.reason)}")
                node = reply.content["node"]
                assert isinstance(node, ConfigRecord)
                found[int(str(node["partition-id"]))] = reply.metadata.src_node_id
                total = int(str(node["num-partitions"]))
            if total and len(found) == total:
                return [found[i] for i in range(total)]
            time.sleep(POLL)
        raise RunError(f"{len(found)} of {total or 'all'} Flower nodes answered within {WAIT:g} s: are they running the same app?")

    def _shape_of(self, fn: ClientFunction, down: Tree, t: int) -> Tree:
        """What a client sends, by running one on a single example: shapes and types that replies must have."""
        name = fn.__name__
        if name not in self._expected:
            data, task = self.work.task.data, self.work.task
            one = Batches(data.x[:1][None], data.y[:1][None], torch.ones(1, 1, device=task.device))
            state = self.work.method.init_client(task.init_params())
            self._expected[name], _ = run_client(fn, task, torch.tensor(float(t)), down, state, one)
        return self._expected[name]

    def describe(self) -> str:
        return f"grid of {len(self._nodes)} Flower nodes"

    def close(self) -> None:
        pass


def _list(record: ConfigRecord, key: str) -> list[Any]:
    value = record.get(key)
    return value if isinstance(value, list) else []


def _one_line(text: str | None) -> str:
    return " ".join((text or "unknown").split())[:300]
