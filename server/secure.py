"""Secure sums of clients on Flower nodes: five exchanges, E1 to E5.

`fedcore.messages.secure.server_session` says what is exchanged; here it is sent, waited
for and read, in the records that `client/secure.py` lists. A client that does not
answer an exchange is left out from then on. E1, in which clients train, has the time of
a round, and its goal; the others take moments, and have a time of their own.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedcore.engines.base import failure
from fedcore.errors import TooFewReports
from fedcore.messages.secure.fields import by_client, flat
from fedcore.messages.secure.masks import size_of
from fedcore.messages.secure.ring import Encoded
from fedcore.messages.secure.server_session import ServerSession
from fedcore.reports import Reports

from .post import Inquiry, Post, one_line, reason_of
from .replies import MISSING, twice

log = logging.getLogger("fedcore")

EXCHANGES = {1: "training", 2: "shares", 3: "masked sums", 4: "survivors", 5: "unmask"}
VECTOR = "vector"
PATIENCE = 60.0  # seconds for an exchange after the first, beside what it takes to send
SLOWEST = 125_000.0  # bytes a second at which a masked vector has to come at least
GRACE = 3.0  # seconds for the last signatures and shares, where there are enough
KINDS = ("refused", "disconnected", "not finite", "bad count", "error")
ACCUSED = re.compile(r"refused: shares of client (\d+) are not authentic")
AWAY = ("disconnected", "timeout", "not needed")  # kinds that are nobody's fault

Answer = dict[str, Any] | memoryview
"""What one client answers: the fields of a message, or its masked vector."""


class Mailing(NamedTuple):
    """How messages go to the nodes of a grid, and how long they are waited for."""

    post: Post
    timeout: float  # of E1, in seconds
    rejoin: float  # of E1, in seconds
    goal: int  # answers that end E1
    note: Callable[[set[int], int], None]  # who is waited for, in which exchange


class SecretSum:
    """One sum, from the first exchange to the last."""

    def __init__(
        self,
        session: ServerSession,
        mailing: Mailing,
        hosted: Mapping[int, list[int]],
        work: Mapping[str, Any],
    ) -> None:
        """`hosted` has the clients by node; `work` what every message says of it."""
        self.session, self._mailing, self._work = session, mailing, dict(work)
        self._node_of: dict[int, int] = {}
        for node, clients in hosted.items():
            self._node_of |= dict.fromkeys(clients, node)
        self.asked = set(self._node_of)
        self.answered: set[int] = set()  # clients whose keys were taken
        self.failed_first: set[int] = set()  # clients that said in E1 why they cannot
        self.bytes_up = 0
        self.named: dict[int, str] = {}  # clients that did wrong in E5
        self.spoiled: dict[int, str] = {}  # those of them that spoiled the sum
        self.accusers: dict[int, set[int]] = {}  # who says whose shares are forged
        self._taken = 0  # answers of this exchange

    def run(
        self, down: ArrayRecord, places: Mapping[int, Mapping[str, Any]]
    ) -> Iterator[Reports]:
        """Exchange until the sum can be unmasked; failures, and pauses.

        `places` are sent beside the model, by client. From E5 on nothing is yielded, so
        that a run that is to stop does so when the sum is kept, which nobody sends
        twice. Raises TooFewReports.
        """
        session = self.session
        offers = {client: session.offer(client) for client in self._node_of}
        yield from self._exchange(1, offers, session.add_keys, down, places)
        later: list[tuple[int, Callable[[], Any], Callable[..., bool]]] = [
            (2, session.rosters, session.add_shares),
            (3, session.inboxes, session.add_masked),
            (4, session.survivors, session.add_signature),
        ]
        for number, messages, take in later:
            yield from self._exchange(number, messages(), take)
        for report in self._exchange(5, session.requests(), session.add_shares_of):
            self.named.update(report.failed)

    def total(self) -> Encoded:
        """The sum. Raises TooFewReports where it cannot be unmasked."""
        before = set(self.session.blame)
        try:
            numbers, words = self.session.total()
        except TooFewReports:
            for client in self.session.blame.keys() - before:
                reason = f"bad message: {self.session.blame[client]}"
                self.named[client] = self.spoiled[client] = reason
            raise
        return Encoded(
            torch.from_numpy(numbers.view(np.int32).copy()),
            torch.from_numpy(words.view(np.int64).copy()),
        )

    def _exchange(
        self,
        number: int,
        messages: Mapping[int, Mapping[str, Any]],
        take: Callable[[int, Any], bool],
        down: ArrayRecord | None = None,
        places: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> Iterator[Reports]:
        mailing, t = self._mailing, int(self._work["t"])
        hosted = self._hosted(messages)
        contents = self._contents(number, hosted, messages, down, places or {})
        waiting, self._taken = set(messages), 0
        mailing.note(waiting, number)
        seconds = self._seconds(number)
        rejoin = mailing.rejoin if number == 1 else 0.0
        inquiry = Inquiry(mailing.post, contents, seconds, rejoin, t)
        begin, heard = time.monotonic(), set[int]()
        for node_reply in inquiry.replies(lambda: self._is_enough(number, begin)):
            if node_reply is None:
                yield failure([], "")  # a pause
                continue
            node, reply = node_reply
            if node in heard:
                yield failure(hosted[node], twice(t))
                continue
            heard.add(node)
            answers = answers_in(reply, number, t, hosted[node], seconds)
            for client, answer in answers.items():
                reason = self._taken_from(client, answer, number, take)
                if reason:
                    yield failure([client], reason)
            waiting -= set(hosted[node])
            mailing.note(waiting, number)

    def _taken_from(
        self,
        client: int,
        answer: Answer | str,
        number: int,
        take: Callable[[int, Any], bool],
    ) -> str:
        """Take one client's answer; why it is left out, or is to be named, or ""."""
        if isinstance(answer, str):
            if number == 1 and answer.split(":")[0] not in AWAY:
                self.failed_first.add(client)
            if number == 3 and (accusation := ACCUSED.fullmatch(answer)):
                accused = int(accusation[1][:9])
                if accused in self.asked:
                    self.accusers.setdefault(accused, set()).add(client)
            # A client that is in the sum already is not left out of it.
            is_in = number > 3 and answer.split(":")[0] in AWAY
            return "" if is_in else answer
        if take(client, answer):
            self._taken += 1
            self.bytes_up += nbytes_of(answer)
            if number == 1:
                self.answered.add(client)
            return ""
        fault = self.session.blame.get(client)
        return "" if fault is None else f"bad message: {fault}"

    def _is_enough(self, number: int, begin: float) -> bool:
        if number == 1:
            return self._taken >= self._mailing.goal
        if number < 4 or time.monotonic() - begin < GRACE:
            return False
        plan = self.session.plan
        is_complete = all(len(near) + 1 == len(plan.ids) for near in plan.near.values())
        return is_complete and self._taken >= plan.t

    def _seconds(self, number: int) -> float:
        if number == 1:
            return self._mailing.timeout
        seconds = PATIENCE
        if number == 3:
            seconds += size_of(*self.session.size) / SLOWEST
        return min(seconds, self._mailing.timeout)

    def _hosted(self, clients: Mapping[int, Any]) -> dict[int, list[int]]:
        hosted: dict[int, list[int]] = {}
        for client in clients:
            hosted.setdefault(self._node_of[client], []).append(client)
        return hosted

    def _contents(
        self,
        number: int,
        hosted: Mapping[int, list[int]],
        messages: Mapping[int, Mapping[str, Any]],
        down: ArrayRecord | None,
        places: Mapping[int, Mapping[str, Any]],
    ) -> dict[int, RecordDict]:
        """The message to each node."""
        contents = {}
        for node, clients in hosted.items():
            records: dict[str, Any] = {}
            if down is not None:
                records["down"] = down
            work = {**self._work, "exchange": number, "clients": clients}
            work |= flat({client: messages[client] for client in clients})
            records["work"] = ConfigRecord(work)
            if places:
                own = flat({client: places[client] for client in clients})
                records["places"] = ConfigRecord(own)
            contents[node] = RecordDict(records)
        return contents


def answers_in(
    reply: Message | str, number: int, t: int, asked: list[int], timeout: float
) -> dict[int, Answer | str]:
    """What each client that was asked answers, or why it does not."""
    if isinstance(reply, str):
        return dict.fromkeys(asked, reply)
    if reply.has_error():
        return dict.fromkeys(asked, reason_of(reply.error, timeout))
    about = reply.content.get("about")
    facts = dict(about) if isinstance(about, ConfigRecord) else {}
    if facts.get("t") != t or facts.get("exchange") != number:
        reason = f"bad message: expected an answer to exchange {number} of t = {t}"
        return dict.fromkeys(asked, reason)
    failed, reasons = facts.get("failed"), facts.get("reasons")
    said: dict[Any, str] = {}
    if isinstance(failed, list) and isinstance(reasons, list):
        for client, text in zip(failed[: len(asked)], reasons, strict=False):
            said.setdefault(client, _reason(str(text)))
    answers: dict[int, Answer | str] = {}
    sent = by_client(facts)
    for client in asked:
        record = reply.content.get(f"masked-{client}")
        if client in said:
            answers[client] = said[client]
        elif number == 3 and isinstance(record, ArrayRecord) and VECTOR in record:
            answers[client] = memoryview(record[VECTOR].data)
        elif number != 3 and client in sent:
            answers[client] = sent[client]
        else:
            answers[client] = MISSING
    return answers


def _reason(text: str) -> str:
    reason = one_line(text)
    return reason if reason.split(":")[0] in KINDS else f"error: {reason}"


def nbytes_of(answer: Any) -> int:
    """The bytes of what a client answers, without names of fields."""
    if isinstance(answer, memoryview):
        return answer.nbytes
    if isinstance(answer, dict):
        return sum(nbytes_of(value) for value in answer.values())
    if isinstance(answer, list):
        return sum(nbytes_of(value) for value in answer)
    return len(answer) if isinstance(answer, bytes | str) else 8
