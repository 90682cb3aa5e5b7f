"""A Flower grid in this process, in which weather can be made.

Messages go through Flower's own serialisation to the real ClientApp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fedcore.client.app import app as client_app
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.node_pb2 import NodeInfo

Weather = Callable[[Message], list[Message]]
"""The replies that arrive for one that was sent: none, one or several."""


class FakeGrid:
    """Nodes 100, 101, ... which host partitions 0, 1, ..."""

    def __init__(
        self, preset: str, nodes: int, weather: Weather = lambda reply: [reply]
    ) -> None:
        self.weather = weather
        self.contexts = {100 + i: self.context(preset, i, nodes) for i in range(nodes)}
        self.replies: dict[str, list[Message]] = {}
        self.sent = 0
        self.activated = dict.fromkeys(self.contexts, "0")

    def context(self, preset: str, partition: int, nodes: int) -> Context:
        place: dict[str, Any] = {"partition-id": partition, "num-partitions": nodes}
        return Context(
            1, 100 + partition, place, RecordDict(), {"preset": preset, "set": ""}
        )

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=self.activated.get(node, ""))
            for node in self.contexts
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.sent += 1
            number = f"message {self.sent}"
            message.metadata.__dict__["_message_id"] = number  # as Flower does
            node = message.metadata.dst_node_id
            if node not in self.contexts:
                continue
            ids.append(number)
            message.content = over_the_wire(message.content)
            reply = client_app(message, self.contexts[node])
            reply.content = over_the_wire(reply.content)
            query = message.metadata.message_type == "query"
            self.replies[number] = [reply] if query else self.weather(reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [
            reply for number in message_ids for reply in self.replies.pop(number, [])
        ]


def over_the_wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def in_place_of(reply: Message, code: int, reason: str) -> Message:
    """The error that Flower sends in place of a reply."""
    return Message(Error(code, reason), metadata=reply.metadata)
