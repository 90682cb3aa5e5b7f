"""A device that lies: another lie each round, over the wire that honest ones use.

    python hostile_device.py client --id 9 --server HOST:PORT ...

It has a key of the federation, and trains as it should. What it then sends is up to it.
In round t (from 0 on) it tells LIES[t], and the last of them to the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import fedcore.client.supernode
import torch
from fedcore.client.connection import Refused
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message
from flwr.app.message import make_message

from fedcore import trees
from fedcore.cli import main
from fedcore.messages import wire
from fedcore.types import Params, Tree

STEERS = "\x1b[2J\x1b[31mall is well\u202e\r\nround 99: fine\x07"

Lie = Callable[[Message], Message | None]
"""Changes an honest reply in place, or gives another one."""


def about(reply: Message) -> dict[str, Any]:
    record: Any = reply.content["about"]
    return dict(record)


def say(reply: Message, **changes: Any) -> None:
    reply.content["about"] = ConfigRecord({**about(reply), **changes})


def update(reply: Message, change: Callable[[Tree], Tree]) -> None:
    """Change every tensor of the message."""
    for name, record in list(reply.content.array_records.items()):
        leaves = wire.unpack(record)
        reply.content[name] = wire.encode(named(trees.map(change, leaves)))


def named(leaves: dict[str, torch.Tensor]) -> Any:
    """The fields of a method's message, of which one holds parameters."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        field, _, rest = path.partition(trees.SEPARATOR)
        if rest:
            tree.setdefault(field, {})[rest] = leaf
        else:
            tree[field] = leaf
    return tree


def a_count_of_a_billion(reply: Message) -> None:
    update(reply, lambda x: -10 * x)
    say(reply, **{"num-examples": [10**9]})


def an_enormous_update(reply: Message) -> None:
    update(reply, lambda x: x * 1e36 if x.ndim else x)


def a_sign_flip(reply: Message) -> None:
    update(reply, lambda x: -10 * x if x.ndim else x)


def content(reply: Message, data: bytes) -> None:
    for name in list(reply.content.array_records):
        array = Array("uint8", (len(data),), wire.FORMAT, data)
        reply.content[name] = ArrayRecord({wire.FORMAT: array})


def a_million_names(reply: Message) -> None:
    header = ",".join(f'"{i}/":{{}}' for i in range(1_000_000))
    content(reply, (len(header) + 2).to_bytes(8, "little") + b"{%s}" % header.encode())


def not_a_number(reply: Message) -> None:
    update(reply, lambda x: x * float("nan"))


def a_name_that_steers(reply: Message) -> None:
    for name, record in list(reply.content.array_records.items()):
        leaves: Params = {**wire.unpack(record), STEERS: torch.zeros(1)}
        reply.content[name] = wire.encode(named(leaves))


def a_reason_that_steers(reply: Message) -> None:
    say(reply, clients=[], failed=about(reply)["clients"], reasons=[STEERS])


def an_error_that_steers(reply: Message) -> Message:
    return make_message(reply.metadata, error=Error(0, STEERS))


def another_round(reply: Message) -> None:
    say(reply, t=about(reply)["t"] + 7)


def the_name_of_another(reply: Message) -> None:
    say(reply, clients=[0], **{"num-examples": [9]})


def many_parts(reply: Message) -> None:
    arrays = {}
    for i in range(3000):
        data = i.to_bytes(4, "little")
        arrays[str(i)] = Array("uint8", (4,), wire.FORMAT, data)
    reply.content["more"] = ArrayRecord(arrays)


def many_entries(reply: Message) -> None:
    reply.content["more"] = ConfigRecord({str(i): i for i in range(100_000)})


def one_chunk_many_times(reply: Message) -> None:
    content(reply, bytes(1_000_000))
    for record in reply.content.array_records.values():
        array = record[wire.FORMAT]
        array.__dict__["deflate"] = partial(_with_many_chunks, array)


def _with_many_chunks(array: Array) -> bytes:
    """The array as Flower sends it, its only chunk named a hundred thousand times."""
    head, _, body = Array.deflate(array).partition(b"\0")
    facts = json.loads(body) | {"arraychunk_ids": [0] * 100_000}
    body = json.dumps(facts).encode()
    return b"Array %s %d\0%s" % (head.split(b" ")[1], len(body), body)


class Broken(ConfigRecord):
    """Entries that are none."""

    def deflate(self) -> bytes:
        return b"ConfigRecord  2\0\xff\xff"


def no_entries(reply: Message) -> None:
    reply.content["about"] = Broken()


LIES: list[Lie] = [
    a_count_of_a_billion,
    an_enormous_update,
    a_sign_flip,
    a_million_names,
    not_a_number,
    a_name_that_steers,
    a_reason_that_steers,
    an_error_that_steers,
    another_round,
    the_name_of_another,
    many_parts,
    many_entries,
    one_chunk_many_times,
    no_entries,
]


def lying(honest: Callable[[Message, Context], Message]) -> Any:
    """A ClientApp that does what it should, and lies about it."""

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        work: Any = message.content.get("work")
        if work is None or work["function"] != "train":
            return reply
        lie = LIES[min(work["t"], len(LIES) - 1)]
        print(f"round {work['t'] + 1}: {lie.__name__}", file=sys.stderr, flush=True)
        return lie(reply) or reply

    return app


def pushing(push: Callable[..., None]) -> Any:
    """Sends a reply; in place of one that the server refuses, an error."""

    def push_message(
        connection: Any, node: Any, reply: Message, seconds: float
    ) -> None:
        try:
            push(connection, node, reply, seconds)
        except Refused as refusal:
            print(f"refused: {refusal}", file=sys.stderr, flush=True)
            with suppress(Refused):
                push(connection, node, an_error_that_steers(reply), seconds)

    return push_message


if __name__ == "__main__":
    node: Any = fedcore.client.supernode
    node.app = lying(node.app)
    node.push_message = pushing(node.push_message)
    main()
