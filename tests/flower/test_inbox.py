"""Replies that are no answers, read one apart from another, while the loop goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from fedcore.server.inbox import BAD_MESSAGE, CHUNK, Head, Inbox, bounds_of
from fedcore.server.post import Inquiry, Post, too_late
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from tests.flower.federation import until

LIMIT = 1e6


def metadata(answered: str = "question", message_id: str = "reply") -> Metadata:
    return Metadata(1, message_id, 7, 1, answered, "", 1e9, 60.0, "train")


def answer(data: bytes = b"values", **more: Any) -> RecordDict:
    array = Array("uint8", (len(data),), "safetensors", data)
    about = ConfigRecord({"t": 0, "clients": [3], "num-examples": [9]})
    records: dict[str, Any] = {"up-3": ArrayRecord({"safetensors": array})}
    return RecordDict({**records, "about": about, **more})


class Objects:
    """A SuperLink with one reply, whose objects may be rewritten."""

    def __init__(self, content: RecordDict) -> None:
        message = make_message(metadata("another question"), content)
        self.contents: dict[str, bytes] = {}
        for object_id, part in get_all_nested_objects(message).items():
            self.contents[object_id] = part.deflate()
        self.tree = get_object_tree(message)
        self.fetched = 0
        self.discarded: list[str] = []

    def heads(self, message_ids: Iterable[str]) -> list[Head]:
        heads = []
        for answered in message_ids:
            # What a reply says of itself is not what the SuperLink knows of it.
            about = metadata(answered, self.tree.object_id)
            heads.append(Head(make_message(about, RecordDict()), self.tree))
        return heads

    def objects(self, object_ids: list[str]) -> dict[str, bytes]:
        self.fetched += len(object_ids)
        return {object_id: self.contents[object_id] for object_id in object_ids}

    def discard(self, head: Head) -> None:
        self.discarded.append(head.message.metadata.reply_to_message_id)

    def replace(self, kind: bytes, edit: Callable[[bytes], bytes]) -> None:
        """Edit the objects of a kind, whose ids stay as they are."""
        for object_id, content in self.contents.items():
            if content.startswith(kind + b" "):
                self.contents[object_id] = edit(content)


def with_body(body: bytes) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        kind, children, _ = content.partition(b"\0")[0].split(b" ")
        return b"%s %s %d\0%s" % (kind, children, len(body), body)

    return edit


def reply_of(source: Any, limit: float = LIMIT) -> Message:
    inbox = Inbox(source, limit)
    inbox.expect("question", 1)
    [reply] = until(lambda: inbox.take({"question"}), "no reply")
    assert source.discarded == ["question"]
    assert inbox.take({"question"}) == []  # each once
    return reply  # type: ignore[no-any-return]


def test_an_answer_comes_whole_from_the_node_that_sent_it() -> None:
    reply = reply_of(Objects(answer(bytes(100_000))))
    assert reply.content["about"]["num-examples"] == [9]  # type: ignore[index]
    assert reply.content["up-3"]["safetensors"].data == bytes(100_000)  # type: ignore[index]
    assert reply.metadata.reply_to_message_id == "question"


def many_arrays() -> Objects:
    arrays = {}
    for i in range(300):
        arrays[str(i)] = Array("uint8", (1,), "safetensors", bytes([i % 256, i // 256]))
    return Objects(answer(more=ArrayRecord(arrays)))


def many_names() -> Objects:
    source = Objects(answer())
    [array] = [i for i, c in source.contents.items() if c.startswith(b"Array ")]
    names = json.dumps({str(i): array for i in range(20_000)}).encode()
    source.replace(b"ArrayRecord", with_body(names))
    return source


def one_chunk_many_times() -> Objects:
    source = Objects(answer(bytes(10_000)))
    header = {"dtype": "uint8", "shape": [1], "stype": "safetensors"}
    body = json.dumps({**header, "arraychunk_ids": [0] * 200}).encode()
    source.replace(b"Array", with_body(body))
    return source


def rewritten(kind: bytes, body: bytes) -> Callable[[], Objects]:
    def make() -> Objects:
        source = Objects(answer())
        source.replace(kind, with_body(body))
        return source

    return make


def another_root() -> Objects:
    source = Objects(answer())
    source.tree = source.tree.children[0]
    return source


def another_content() -> Objects:
    source = Objects(answer())
    [record] = [i for i, c in source.contents.items() if c.startswith(b"RecordDict ")]
    part = get_all_nested_objects(answer()["about"])
    [(_, about)] = part.items()
    source.contents[record] = about.deflate()
    return source


def without_a_part() -> Objects:
    source = Objects(answer())
    del source.tree.children[0].children[0].children[:]
    return source


def endless() -> Objects:
    """A chain of objects, each of which is the child of another."""
    source = Objects(answer())
    source.contents, child = {}, ""
    nodes = []
    for i in range(3000):
        content = f"RecordDict {child} 2\0{i:02}".encode()
        child = get_object_id(content)
        source.contents[child] = content
        nodes.append(ObjectTree(object_id=child))
    source.tree = ObjectTree(object_id=child, children=nodes)
    return source


LIES: dict[str, tuple[Callable[[], Objects], str]] = {
    "many arrays": (many_arrays, "it has more than 54 parts"),
    "many names": (many_names, "bytes beside its arrays, expected at most 1002000"),
    "one chunk many times": (one_chunk_many_times, "its arrays have more than 1 MB"),
    "no protobuf": (rewritten(b"ConfigRecord", b"\xff\xff"), ""),
    "no JSON": (rewritten(b"ArrayRecord", b"{"), ""),
    "no JSON in an array": (rewritten(b"Array", b"[]"), ""),
    "a chunk that is not there": (rewritten(b"Array", b'{"arraychunk_ids": [9]}'), ""),
    "no message": (another_root, "it is a RecordDict, expected a Message"),
    "another content": (another_content, "Invalid arguments for Message"),
    "without a part": (without_a_part, ""),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_reply_that_can_be_no_answer_is_an_error_of_its_node(kind: str) -> None:
    make, reason = LIES[kind]
    reply = reply_of(make())
    assert reply.has_error()
    assert reply.error.code == BAD_MESSAGE
    assert reason in reply.error.reason
    assert reply.metadata.reply_to_message_id == "question"


def test_a_chain_of_objects_without_end_is_an_error_of_its_node() -> None:
    source = endless()
    inbox = Inbox(source, LIMIT)
    inbox.expect("question", 1000)
    [reply] = until(lambda: inbox.take({"question"}), "no reply")
    assert reply.error.code == BAD_MESSAGE


def test_nothing_is_fetched_of_a_reply_of_too_many_parts() -> None:
    source = many_arrays()
    reply_of(source)
    assert source.fetched == 0


def test_a_reply_may_have_what_its_clients_need() -> None:
    for clients, size in ((1, 100 * CHUNK), (1000, 10 * CHUNK)):
        needed = 3 + 3 * clients + size // CHUNK
        assert bounds_of(clients, size).objects > needed


def test_a_reply_whose_parts_have_gone_counts_as_none() -> None:
    source: Any = Objects(answer())

    def gone(object_ids: list[str]) -> dict[str, bytes]:
        raise ObjectPullError(object_ids[0], "gone")

    source.objects = gone
    assert reply_of(source).error.code != BAD_MESSAGE


def test_a_superlink_that_has_gone_is_no_fault_of_a_node() -> None:
    source: Any = Objects(answer())

    def gone(object_ids: list[str]) -> dict[str, bytes]:
        raise httpx.ConnectError("gone")

    source.objects = gone
    inbox = Inbox(source, LIMIT)
    inbox.expect("question", 1)
    with pytest.raises(httpx.ConnectError):
        until(lambda: inbox.take({"question"}), "nothing raised")


def test_a_superlink_that_is_back_is_asked_again() -> None:
    source: Any = Objects(answer())
    heads, calls = source.heads, []

    def gone_at_first(message_ids: Iterable[str]) -> list[Head]:
        calls.append(message_ids)
        if len(calls) == 1:
            raise httpx.ConnectError("gone")
        found: list[Head] = heads(message_ids)
        return found

    source.heads = gone_at_first
    inbox = Inbox(source, LIMIT)
    inbox.expect("question", 1)
    with pytest.raises(httpx.ConnectError):
        until(lambda: inbox.take({"question"}), "nothing raised")
    until(lambda: inbox.take({"question"}), "no reply")


class Grid:
    """Nodes 0, 1, ... whose messages are named after them."""

    def push_messages(self, messages: list[Message]) -> list[str]:
        ids = []
        for message in messages:
            message_id = f"to {message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
        return ids

    def get_nodes(self) -> list[Any]:
        return []


class Reading(Objects):
    """A SuperLink in which reading the reply of node 0 waits for the gate."""

    gate = threading.Event()

    def heads(self, message_ids: Iterable[str]) -> list[Head]:
        heads = super().heads(message_ids)
        for n, head in enumerate(heads):
            if head.message.metadata.reply_to_message_id == "to 0":
                heads[n] = head._replace(tree=ObjectTree(object_id="held"))
        return heads

    def objects(self, object_ids: list[str]) -> dict[str, bytes]:
        if object_ids == ["held"]:
            self.gate.wait()
        return super().objects(list(self.contents))


def test_nothing_is_kept_of_a_reply_that_is_read_when_nobody_asks_any_more() -> None:
    source = Reading(answer())
    source.gate = threading.Event()
    inbox = Inbox(source, LIMIT)
    inbox.expect("to 0", 1)
    until(lambda: inbox.take({"to 0"}) or inbox._reading, "nothing was read")
    (reading,) = inbox._reading.values()
    inbox.forget(["to 0"])
    source.gate.set()
    reading.result(60)
    assert inbox.take({"to 0"}) == []
    assert not inbox._read


def test_the_deadline_of_a_round_is_kept_while_a_reply_is_read() -> None:
    source = Reading(answer())
    post = Post(Grid())  # type: ignore[arg-type]
    post._inbox = Inbox(source, LIMIT)
    contents = {node: RecordDict() for node in range(3)}
    begin = time.monotonic()
    inquiry = Inquiry(post, contents, 0.5, 0.0, 0)
    replies = dict(filter(None, inquiry.replies(lambda: False)))
    assert time.monotonic() - begin < 5
    assert replies[0] == too_late(0.5)
    for node in (1, 2):
        assert replies[node].has_content()  # type: ignore[union-attr]

    # It is late, once it has been read.
    source.gate.set()

    def is_counted() -> bool:
        post.drop_late()
        return post.late_answers == 1

    until(is_counted, "the late answer was not counted")
