"""Secure sums of clients on Flower nodes: five exchanges, E1 to E5.

`fedcore.messages.secure.server_session` says what is exchanged; here it is sent, waited
for and read, in the records that `client/secure.py` lists. A client that does not
answer an exchange is left out from then on. E1, in which clients train, has the time of
a round, and its goal; the others take moments, and have a time of their own.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedcore import trees
from fedcore.deploy import certs
from fedcore.engines.base import Work, failure, one_thread
from fedcore.engines.message_shape import message_shape
from fedcore.errors import TooFewReports
from fedcore.messages import wire
from fedcore.messages.secure.ask import Ask, SecretTotal
from fedcore.messages.secure.identity import Authority
from fedcore.messages.secure.masks import size_of
from fedcore.messages.secure.ring import Encoded
from fedcore.messages.secure.server_session import ServerSession, Size
from fedcore.messages.secure.terms import LISTED, Terms
from fedcore.reports import Reports

from .journal import Entry
from .post import Inquiry, Post, one_line, reason_of
from .replies import MISSING, twice

log = logging.getLogger("fedcore")

EXCHANGES = {1: "training", 2: "shares", 3: "masked sums", 4: "survivors", 5: "unmask"}
VECTOR = "vector"
PATIENCE = 60.0  # seconds for an exchange after the first, beside what it takes to send
SLOWEST = 125_000.0  # bytes a second at which a masked vector has to come at least
GRACE = 3.0  # seconds for the last signatures and shares, where there are enough
KINDS = ("refused", "disconnected", "not finite", "bad count", "error")
AWAY = ("disconnected", "timeout", "not needed")  # kinds that are nobody's fault

UNSIGNED = (
    "aggregation.secure without certificates of clients: a server that follows the "
    "protocol sees sums alone; one that lies to clients about their keys, or about who "
    "is there, is not kept out. fedcore certs makes certificates for a server with TLS"
)

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
        self._taken = 0  # answers of this exchange

    def run(
        self, down: ArrayRecord, places: Mapping[int, ConfigRecord]
    ) -> Iterator[Reports]:
        """Exchange until the sum can be unmasked; failures, and pauses.

        `places` are sent beside the model, by client. Raises TooFewReports.
        """
        session = self.session
        offers = {client: session.offer(client) for client in self._node_of}
        yield from self._exchange(1, offers, session.add_keys, down, places)
        later: list[tuple[int, Callable[[], Any], Callable[..., bool]]] = [
            (2, session.rosters, session.add_shares),
            (3, session.inboxes, session.add_masked),
            (4, session.survivors, session.add_signature),
            (5, session.requests, session.add_shares_of),
        ]
        for number, messages, take in later:
            yield from self._exchange(number, messages(), take)

    def total(self) -> Encoded:
        """The sum. Raises TooFewReports where it cannot be unmasked."""
        numbers, words = self.session.total()
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
        places: Mapping[int, ConfigRecord] | None = None,
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
        places: Mapping[int, ConfigRecord],
    ) -> dict[int, RecordDict]:
        """The message to each node."""
        contents = {}
        for node, clients in hosted.items():
            records: dict[str, Any] = {}
            if down is not None:
                records["down"] = down
            about = {**self._work, "exchange": number, "clients": clients}
            records["work"] = ConfigRecord(about)
            for client in clients:
                records[f"to-{client}"] = ConfigRecord(dict(messages[client]))
                if client in places:
                    records[f"place-{client}"] = places[client]
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
            said[client] = _reason(str(text))
    answers: dict[int, Answer | str] = {}
    for client in asked:
        record = reply.content.get(f"from-{client}")
        if client in said:
            answers[client] = said[client]
        elif number == 3 and isinstance(record, ArrayRecord) and VECTOR in record:
            answers[client] = memoryview(record[VECTOR].data)
        elif number != 3 and isinstance(record, ConfigRecord):
            answers[client] = dict(record)
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


def restore(entry: Entry, into: SecretTotal) -> None:
    """Take a sum from the journal. Raises TooFewReports where it came to nothing."""
    made, fault = entry
    into.total, into.clients, into.moment = made.total, made.clients, made.moment
    into.bytes_up = made.bytes_up
    if fault:
        raise TooFewReports(fault)


def terms_of(ask: Ask, run: str, is_signed: bool) -> Terms:
    """What all clients of a sum have to agree on."""
    fields, rules = [], []
    for name, rule in ask.parts:
        fields.append(name)
        rules.append(LISTED if isinstance(rule, Tensor) else rule)
    ring = ask.ring
    return Terms(
        run,
        ring.n_max,
        float(ring.reach),
        float(ring.cap),
        tuple(fields),
        tuple(rules),
        ask.news or "",
        "",
        is_signed,
    )


def weights_of(ask: Ask) -> dict[int, list[float]]:
    """The weights that the server lists, by client, in the order of the fields."""
    columns = []
    for _, rule in ask.parts:
        if isinstance(rule, Tensor):
            columns.append(rule.double().tolist())
    clients = ask.clients.tolist()
    return {
        client: [column[row] for column in columns]
        for row, client in enumerate(clients)
    }


def question_of(terms: Terms, down: bytes) -> str:
    """A digest of what is asked; the clients, which may differ, are not in it."""
    return terms._replace(is_signed=False).digest(down).hex()


def size_in(work: Work, ask: Ask) -> Size:
    """The words of one client's vector, by encoding a message of this machine's."""
    assert work.sending is not None, "the run has aggregation.secure"
    up = trees.zeros_like(message_shape(work, ask.fn, ask.down, ask.t))
    parts = []
    for part in ask.parts:
        rule = part.rule
        if isinstance(rule, Tensor):
            rule = torch.ones(1, dtype=torch.float64)
        parts.append(part._replace(rule=rule))
    one = ask._replace(clients=torch.zeros(1, dtype=torch.int64), parts=tuple(parts))
    memory = None
    if ask.news is not None:
        first = work.method.init_memory(work.task.init_params())
        memory = trees.to(first, work.task.device)
    with one_thread():
        encoded = work.sending.send(one, 0, up, 1.0, memory).encoded
    return Size(len(encoded.numbers), len(encoded.words))


class Certificates:
    """The certificates of clients in a server's directory of keys."""

    def __init__(self, folder: Path | None) -> None:
        """None for a server without keys."""
        self._folder = None if folder is None else folder / "clients"
        self._found: dict[int, bytes] = {}
        self.authority: Authority | None = None
        has_some = self._folder is not None and any(self._folder.glob("client-*.crt"))
        if folder is not None and has_some:
            self.authority = Authority(certs.load_certificate(folder / "ca.crt"))

    def of(self, clients: list[int]) -> dict[int, bytes]:
        """Those of these clients that are there, in DER."""
        if self._folder is None or self.authority is None:
            return {}
        for client in clients:
            file = self._folder / f"client-{client}.crt"
            if client not in self._found and file.exists():
                content = certs.load_certificate(file).public_bytes(Encoding.DER)
                self._found[client] = content
        return {i: self._found[i] for i in clients if i in self._found}


def sha256_of(down: ArrayRecord) -> bytes:
    """The digest of a model, as it is sent."""
    return hashlib.sha256(down[wire.FORMAT].data).digest()
