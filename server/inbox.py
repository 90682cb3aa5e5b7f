"""Replies of nodes, taken out of Flower's hands: bounded, and each read on its own.

A node sends a reply as objects, of which Flower builds it and believes every word: one
whose parts do not fit together ends the program of the server, one of a million parts
keeps it busy for minutes, and one that names a chunk of 20 MB a million times takes all
memory. Here a reply that can be no answer is an error of its node. Replies are fetched
and read beside the round loop, whose deadline waits for none of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto import message_pb2, runtime_pb2
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
)

BAD_MESSAGE = 9000  # code of an error that stands for a reply that can be no answer
CHUNK = 20_000_000  # bytes of an array in one object, at most; Flower has 20 MiB
CHUNK_TYPE = "ArrayChunk"
READERS = 2  # replies that are fetched and read at one time
PATIENCE = 60.0  # seconds for the objects of a reply, which are there already
A_MOMENT = 0.05  # seconds in which most replies have been read


class Bounds(NamedTuple):
    """The size that the reply to one message may have."""

    objects: int
    around: int  # bytes of everything but the values of arrays
    arrays: float  # bytes of the values of arrays


def bounds_of(clients: int, limit: float) -> Bounds:
    """The bounds of a reply for so many clients, of `limit` bytes at most."""
    chunks = 0 if limit == float("inf") else 2 * int(limit / CHUNK)
    # Three objects a client: a record, its array, and the only chunk of that.
    return Bounds(50 + 4 * clients + chunks, 1_000_000 + 2_000 * clients, limit)


class Head(NamedTuple):
    """A reply that has arrived, of which nothing was fetched."""

    message: Message  # without its content; where it comes from is known to be true
    tree: message_pb2.ObjectTree


class Source(Protocol):
    """The place where the objects of replies are."""

    def heads(self, message_ids: Iterable[str]) -> list[Head]:
        """The replies to these messages that have arrived; each is given once."""

    def objects(self, object_ids: list[str]) -> dict[str, bytes]:
        """These objects. Raises ObjectPullError."""

    def discard(self, head: Head) -> None:
        """Forget a reply and its objects."""


class Runtime:
    """The SuperLink as a source, over the connection of Flower's grid."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid

    def heads(self, message_ids: Iterable[str]) -> list[Head]:
        request = runtime_pb2.PullAppMessagesRequest(message_ids=message_ids)
        response = self.grid._runtime_client.PullMessages(request)
        trees = response.message_object_trees
        heads = []
        for proto, tree in zip(response.messages_list, trees, strict=True):
            heads.append(Head(message_from_proto(proto), tree))
        return heads

    def objects(self, object_ids: list[str]) -> dict[str, bytes]:
        fetch = make_pull_object_fn_protobuf(
            self.grid._runtime_client.PullObject, self.grid.node, self.grid.run.run_id
        )
        return pull_objects(object_ids, fetch, max_time=PATIENCE)

    def discard(self, head: Head) -> None:
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.grid.node,
            run_id=self.grid.run.run_id,
            message_object_id=head.message.metadata.message_id,
        )
        self.grid._runtime_client.ConfirmMessageReceived(request)


def read(source: Source, head: Head, bounds: Bounds) -> Message:
    """The whole reply, or an error in its place. Raises httpx.HTTPError."""
    try:
        return _whole(source, head, bounds)
    except httpx.HTTPError:
        raise
    except ObjectPullError as error:
        return _instead(head, ErrorCode.MESSAGE_UNAVAILABLE, str(error))
    # Whatever Flower stumbles over, in a message that its sender made up.
    except Exception as error:
        return _instead(head, BAD_MESSAGE, str(error) or type(error).__name__)


def _whole(source: Source, head: Head, bounds: Bounds) -> Message:
    object_ids: dict[str, None] = {}
    try:
        for part in iterate_object_tree(head.tree):
            object_ids[part.object_id] = None
            if len(object_ids) > bounds.objects:
                raise ValueError(
                    f"it has more than {bounds.objects} parts, "
                    "which is more than its clients need"
                )
        objects = source.objects(list(object_ids))
    finally:
        source.discard(head)
    _check_objects(objects, bounds)
    message_id = head.message.metadata.message_id
    whole: Any = inflate_object_from_contents(message_id, objects)
    if not isinstance(whole, Message):
        raise ValueError(f"it is a {type(whole).__name__}, expected a Message")
    if whole.has_error():
        return make_message(head.message.metadata, error=whole.error)
    return make_message(head.message.metadata, content=whole.content)


def _check_objects(objects: dict[str, bytes], bounds: Bounds) -> None:
    """Raises ValueError for objects that are more than an answer, once put together."""
    around = 0
    arrays: dict[str, list[str]] = {}  # the chunks of an array, by its id
    for object_id, content in objects.items():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind != CHUNK_TYPE:
            around += len(content)
        if kind == "Array":
            arrays[object_id] = children
    if around > bounds.around:
        raise ValueError(
            f"it has {around} bytes beside its arrays, expected at most {bounds.around}"
        )
    values = 0
    for object_id, chunks in arrays.items():
        body = objects[object_id].partition(HEAD_BODY_DIVIDER)[2]
        for index in json.loads(body)["arraychunk_ids"]:
            values += len(objects[chunks[index]])
            if values > bounds.arrays:
                raise ValueError(
                    f"its arrays have more than {bounds.arrays / 1e6:g} MB: "
                    "engine.message_limit_mb is the limit"
                )


def _instead(head: Head, code: int, reason: str) -> Message:
    return make_message(head.message.metadata, error=Error(code, reason))


class Inbox:
    """Replies by the message that they answer, fetched and read in threads."""

    def __init__(self, source: Source, limit: float) -> None:
        """`limit` in bytes of the arrays of one reply."""
        self.source, self.limit = source, limit
        self._threads = ThreadPoolExecutor(1 + READERS, "inbox")
        self._bounds: dict[str, Bounds] = {}  # by message, of those without a reply
        self._heads: Future[list[Head]] | None = None
        self._reading: dict[str, Future[Message]] = {}
        self._read: dict[str, Message] = {}

    def expect(self, message_id: str, clients: int) -> None:
        """Take a reply to this message, for so many clients."""
        self._bounds[message_id] = bounds_of(clients, self.limit)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop what there is about messages that nobody asks for any more."""
        for message_id in message_ids:
            self._bounds.pop(message_id, None)
            self._reading.pop(message_id, None)
            self._read.pop(message_id, None)

    def take(self, message_ids: set[str]) -> list[Message]:
        """The replies to these messages that have been read, each once.

        Most are read in a moment, for which this waits; others come with a later
        call. Raises what the connection to the SuperLink raises.
        """
        end = time.monotonic() + A_MOMENT
        self._look(message_ids)
        while under_way := self._under_way():
            wait(under_way, max(end - time.monotonic(), 0.0), "FIRST_COMPLETED")
            self._collect()
            if time.monotonic() > end:
                break
        taken = []
        for message_id in message_ids & self._read.keys():
            taken.append(self._read.pop(message_id))
        return taken

    def _look(self, message_ids: set[str]) -> None:
        """Ask for the heads of replies, unless that is under way."""
        self._collect()
        missing = message_ids & self._bounds.keys()
        if self._heads is None and missing:
            self._heads = self._threads.submit(self.source.heads, missing)

    def _under_way(self) -> list[Future[Any]]:
        futures: list[Future[Any]] = [*self._reading.values()]
        return futures if self._heads is None else [*futures, self._heads]

    def _collect(self) -> None:
        if self._heads is not None and self._heads.done():
            heads, self._heads = self._heads, None  # those that failed are asked again
            for head in heads.result():
                self._begin(head)
        for message_id, future in list(self._reading.items()):
            if future.done():
                del self._reading[message_id]
                self._read[message_id] = future.result()

    def _begin(self, head: Head) -> None:
        message_id = head.message.metadata.reply_to_message_id
        bounds = self._bounds.pop(message_id, None)
        if bounds is None:  # forgotten meanwhile
            bounds = Bounds(0, 0, 0)
        future = self._threads.submit(read, self.source, head, bounds)
        self._reading[message_id] = future


def inbox_of(grid: Grid, limit: float) -> Inbox | None:
    """The inbox of a grid whose replies are objects in a SuperLink, None for others.

    In a simulation replies never leave this machine.
    """
    if not hasattr(grid, "_runtime_client"):
        return None
    return Inbox(Runtime(grid), limit)
