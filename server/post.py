"""Messages to Flower nodes: sent, waited for until a deadline, and counted if late."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedcore.engines.base import stamp
from fedcore.escapes import escaped

from .inbox import BAD_MESSAGE, inbox_of

log = logging.getLogger("fedcore")

POLL = 0.05  # seconds between looks for replies; Flower's own loop sleeps 3
LOOK = 1.0  # seconds between looks whether the nodes are still the same processes
LINGER = 60.0  # seconds, at most, in which Flower takes an answer after the deadline

RESTARTED = "disconnected: the client started anew in the middle of its work"
OFFLINE = "disconnected: the Flower node went offline"
NO_SUCH_NODE = "disconnected: Flower has no such node any more"
NOT_NEEDED = "not needed: the round had the reports that it asked for"

NodeReply = tuple[int, Message | str]
"""A node, and its reply or the reason why there is none."""


class LateReply(NamedTuple):
    """A reply that nobody waits for any more."""

    message_id: str
    reply: Message | None  # None: Flower takes none any more
    back_us: int  # as `fedcore.engines.base.stamp`


class Post:
    """Sends messages to nodes, and takes their replies out of Flower's hands."""

    def __init__(self, grid: Grid, limit: float = float("inf")) -> None:
        """A reply has at most `limit` bytes."""
        self.grid = grid
        self.late_answers = 0  # replies that came after the round had ended
        self._inbox = inbox_of(grid, limit)
        self._late: dict[str, float] = {}  # message id to the time at which it expires
        self._came_late: list[LateReply] = []

    def push(
        self, contents: dict[int, RecordDict], kind: str, lifetime: float
    ) -> dict[str, int]:
        """Send each node its content; the nodes by message id, without unknown nodes.

        Flower takes no reply after `lifetime` seconds.
        """
        messages: dict[int, Message] = {}
        for node, content in contents.items():
            messages[node] = Message(
                content, dst_node_id=node, message_type=kind, ttl=lifetime
            )
        accepted = set(self.grid.push_messages(list(messages.values())))
        node_of: dict[str, int] = {}
        for node, message in messages.items():
            message_id = message.metadata.message_id
            if message_id in accepted:
                node_of[message_id] = node
                if self._inbox is not None:
                    self._inbox.expect(message_id, _share_in(contents[node]))
        return node_of

    def pull(self, message_ids: set[str]) -> Iterator[tuple[str, Message]]:
        """Replies to these messages that are there, each with the message's id.

        Late replies to others are noted on the way.
        """
        wanted = message_ids | self._late.keys()
        if not wanted:
            return
        replies: Iterable[Message]
        if self._inbox is None:
            replies = self.grid.pull_messages(list(wanted))
        else:
            replies = self._inbox.take(wanted)
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id
            if message_id in message_ids:
                yield message_id, reply
            elif message_id in self._late:
                self._note_late(message_id, reply)

    def _note_late(self, message_id: str, reply: Message) -> None:
        del self._late[message_id]
        self.late_answers += not reply.has_error()
        self._came_late.append(LateReply(message_id, reply, stamp()))

    def expect_late(self, message_ids: set[str], expiry: float) -> None:
        """Count the replies to these messages if they come before `expiry`."""
        self._late |= dict.fromkeys(message_ids, expiry)

    def drop_late(self) -> None:
        """Take late replies from Flower and count them; their updates are not used."""
        for _ in self.pull(set()):
            pass
        now = time.monotonic()
        expired = [key for key, expiry in self._late.items() if expiry <= now]
        for message_id in expired:
            del self._late[message_id]
            self._came_late.append(LateReply(message_id, None, -1))
        if self._inbox is not None:
            self._inbox.forget(expired)

    def take_late(self) -> list[LateReply]:
        """Late replies since the last call, and messages that can have none."""
        late, self._came_late = self._came_late, []
        return late

    def activation_times(self) -> dict[int, str]:
        """When each node that is online came, by node, where Flower tells."""
        return {node.node_id: node.last_activated_at for node in self._node_infos()}

    def names(self) -> dict[int, str]:
        """The names under which nodes' keys were registered, by node."""
        return {node.node_id: node.name for node in self._node_infos()}

    def _node_infos(self) -> list[Any]:
        # The grid of a simulation has no such method.
        infos: list[Any] = getattr(self.grid, "get_nodes", list)()
        return infos


def _share_in(content: RecordDict) -> int:
    """The number of clients that a message is about, by the size of their answers.

    In an exchange of a secure sum each has as much to say as ten, of its neighbours.
    """
    work = content.get("work")
    if not isinstance(work, ConfigRecord):
        return 1
    clients = work.get("clients")
    number = len(clients) if isinstance(clients, list) else 1
    return 10 * number if "exchange" in work else number


class Away(NamedTuple):
    """A node that went away in the middle of a round."""

    until: float  # on the monotonic clock: when it is given up
    reason: str


class Inquiry:
    """One message to each node, and the replies that come before a deadline.

    A node that goes away and is back within `rejoin` seconds is asked again.
    """

    def __init__(
        self,
        post: Post,
        contents: dict[int, RecordDict],
        timeout: float,
        rejoin: float,
        t: int,
    ) -> None:
        self.post, self.timeout, self.rejoin, self.t = post, timeout, rejoin, t
        self._contents = contents
        self._linger = min(timeout, LINGER)
        post.drop_late()
        self._activated = post.activation_times()
        self.sent_us = dict.fromkeys(contents, stamp())  # by node, the last time
        self._node_of = post.push(contents, "train", timeout + self._linger)
        self._waiting = set(self._node_of)
        self._away: dict[int, Away] = {}
        self.unanswered: dict[str, int] = {}  # nodes by message, of late answers
        self._deadline = time.monotonic() + timeout

    def replies(self, is_enough: Callable[[], bool]) -> Iterator[NodeReply | None]:
        """Every node at least once, as replies come; None now and then, as a pause."""
        for node in self._contents.keys() - self._node_of.values():
            yield node, NO_SUCH_NODE
        looked = time.monotonic()
        while (self._waiting or self._away) and not is_enough():
            is_late = time.monotonic() > self._deadline
            lost: dict[str, str] = {}
            if time.monotonic() - looked > LOOK:
                yield None
                looked = time.monotonic()
                lost = self._look_after_nodes()
            for message_id, reply in self.post.pull(self._waiting - lost.keys()):
                if self.rejoin and is_offline(reply):
                    lost[message_id] = OFFLINE
                else:
                    self._waiting.discard(message_id)
                    yield self._node_of[message_id], reply
            self._note_lost(lost)
            for node in self._given_up(is_late):
                yield node, self._away.pop(node).reason
            if is_late:
                break
            if self._waiting or self._away:
                time.sleep(POLL)
        yield from self._without_reply()

    def _look_after_nodes(self) -> dict[str, str]:
        """Ask nodes again that are back; messages that are lost, with the reason.

        Flower gives a message out once: when the process that took it has gone, so
        has the message.
        """
        self.post.drop_late()
        activated = self.post.activation_times()
        lost: dict[str, str] = {}
        for message_id in self._waiting:
            node = self._node_of[message_id]
            if activated.get(node) != self._activated.get(node):
                lost[message_id] = RESTARTED if node in activated else OFFLINE
        for node in self._away.keys() & activated.keys():
            self._ask_again(node, activated[node])
        return lost

    def _ask_again(self, node: int, activated: str) -> None:
        remaining = max(self._deadline - time.monotonic(), 0.0)
        content = {node: self._contents[node]}
        self.sent_us[node] = stamp()
        again = self.post.push(content, "train", remaining + self._linger)
        if again:
            log.warning(
                "Flower node %d is back in round %d, and asked again", node, self.t + 1
            )
            del self._away[node]
            self._activated[node] = activated
            self._node_of |= again
            self._waiting |= again.keys()

    def _note_lost(self, lost: dict[str, str]) -> None:
        until = time.monotonic() + self.rejoin
        for message_id, reason in lost.items():
            self._waiting.discard(message_id)
            self._away[self._node_of[message_id]] = Away(until, reason)
        self._expect_late(set(lost))

    def _expect_late(self, message_ids: set[str]) -> None:
        self.post.expect_late(message_ids, self._deadline + self._linger)
        for message_id in message_ids:
            self.unanswered[message_id] = self._node_of[message_id]

    def _given_up(self, is_late: bool) -> list[int]:
        now = time.monotonic()
        return [
            node for node, away in self._away.items() if is_late or now >= away.until
        ]

    def _without_reply(self) -> Iterator[NodeReply]:
        is_over = time.monotonic() > self._deadline
        reason = too_late(self.timeout) if is_over else NOT_NEEDED
        self._expect_late(self._waiting)
        for node in [*map(self._node_of.__getitem__, self._waiting), *self._away]:
            yield node, reason


def is_offline(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def too_late(timeout: float) -> str:
    return f"timeout: no answer within {timeout:g} s"


def reason_of(error: Error, timeout: float) -> str:
    """Why there is no reply, for the log: the word before the colon is counted."""
    if error.code in (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ):
        return too_late(timeout)
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return OFFLINE
    kind = "bad message" if error.code == BAD_MESSAGE else "error"
    return f"{kind}: {one_line(error.reason)}"


def one_line(text: str | None) -> str:
    """A reason fit for a log and a terminal, at most 200 characters long.

    Flower gives <class 'E'>:<'text'>, where Ray's text is a traceback that ends in the
    message of the exception. Characters that steer a terminal are escaped.
    """
    message = (text or "unknown").rpartition("Message: ")[2]
    message = message.rpartition(">:<'")[2].removesuffix("'>")
    return escaped(" ".join(message.split()))[:200]
