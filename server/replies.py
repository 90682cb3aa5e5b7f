"""The replies of nodes, read and checked: nothing in a reply is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedcore import trees
from fedcore.engines.base import failure
from fedcore.escapes import escaped
from fedcore.messages import wire
from fedcore.reports import Reports
from fedcore.types import Tree

from .post import one_line, reason_of

MISSING = "no update: the node's answer holds none for this client"

MOST_CLAIMS = 10  # beyond two a client: a few too many are named
NO_WORK = -1  # in the place of a version
LARGEST = 10**12  # steps, or microseconds of work, that are believed
LONGEST = 300  # characters that are quoted of what a node sent

Answer = tuple[Tree, int] | str
"""The message of one client with its number of examples, or why there is none."""


def report(client: int, answer: Answer) -> Reports:
    """One client's answer as a report."""
    if isinstance(answer, str):
        return failure([client], answer)
    up, count = answer
    stacked = trees.map(lambda x: x[None], up)
    return Reports(torch.tensor([client]), stacked, torch.tensor([float(count)]))


def complaint(clients: list[int], text: str) -> Reports:
    """A fault of clients beside their answers: of no work that they were given."""
    versions = dict.fromkeys(clients, NO_WORK)
    return failure(clients, text)._replace(versions=versions)


class Measure(NamedTuple):
    """A client's own measure of its work: information, and nothing depends on it."""

    steps: int = 0
    work_us: int = 0  # microseconds


class Reading(NamedTuple):
    """The content of one node's reply."""

    answers: dict[int, Answer]  # one for every client that was asked
    complaints: dict[int, str]  # about the rest of the reply, by client
    measures: Mapping[int, Measure] = MappingProxyType({})  # of those that worked


class Claim(NamedTuple):
    """A line about one client in a reply: a count of examples, or a failure."""

    client: Any
    failure: Any = None
    count: Any = None


class Reader:
    """Reads the replies of one round to one client function."""

    def __init__(
        self, schema: Any, like: Tree, t: int, timeout: float, source: str
    ) -> None:
        """`like` has the shapes that are expected; `source` is the method's file."""
        self.schema, self.like, self.t = schema, like, t
        self.timeout, self.source = timeout, source

    def read(self, reply: Message | str, asked: list[int]) -> Reading:
        """The answers of the clients that were asked, and complaints about others."""
        if isinstance(reply, str):
            return _same_for_all(asked, reply)
        if reply.has_error():
            return _same_for_all(asked, reason_of(reply.error, self.timeout))
        about = reply.content.get("about")
        if not isinstance(about, ConfigRecord):
            return _same_for_all(asked, 'bad message: no record "about" in the answer')
        if about.get("t") != self.t:
            arrived = _shown(about.get("t"))
            return _same_for_all(
                asked, f"wrong round: an answer for t = {arrived}, expected {self.t}"
            )
        claims = _claims(about)
        if len(claims) > MOST_CLAIMS + 2 * len(asked):
            return _same_for_all(
                asked,
                f"bad message: it has {len(claims)} lines about clients, "
                f"and was asked for {len(asked)}",
            )
        return self._read_claims(reply.content, claims, asked)

    def _read_claims(
        self, content: RecordDict, claims: list[Claim], asked: list[int]
    ) -> Reading:
        """Complaints are about clients of this node: the name of another is a claim."""
        allowed = set(asked)
        answers: dict[int, Answer] = {}
        complaints: dict[int, str] = {}
        missing = MISSING
        for claim in claims:
            if claim.client in answers:
                complaints[claim.client] = twice(self.t)
            elif claim.client in allowed:
                answers[claim.client] = self._answer(content, claim)
            elif missing == MISSING:  # one complaint says enough
                missing = (
                    f"unknown client: its node answered for client "
                    f"{_shown(claim.client)}, which it was not asked for"
                )
        silent = allowed - answers.keys()
        if missing != MISSING and not silent:
            complaints.setdefault(asked[0], missing)
        answers |= dict.fromkeys(silent, missing)
        return Reading(answers, complaints, measures_in(content, asked))

    def _answer(self, content: RecordDict, claim: Claim) -> Answer:
        if claim.failure is not None:
            reason = one_line(str(claim.failure)).removeprefix("error: ")
            return f"error: {reason}"
        record, count = content.get(f"up-{claim.client}"), claim.count
        if not isinstance(record, ArrayRecord):
            return MISSING
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            return (
                f"bad count: {_shown(count)} examples, "
                "expected a whole number from 0 on"
            )
        try:
            return wire.decode(record, self.schema, self.like), count
        except wire.WireError as error:
            problem = escaped(str(error)[:LONGEST])
            return (
                f"bad message: it sent {problem}: "
                f"is it running another version of {self.source}?"
            )


def measures_in(content: RecordDict, asked: list[int]) -> dict[int, Measure]:
    """What a reply says of the time that work took; 0 for what makes no sense."""
    about = content.get("about")
    if not isinstance(about, ConfigRecord):
        return {}
    columns = [_list(about, key) for key in ("clients", "steps", "work-us")]
    measures: dict[int, Measure] = {}
    for client, steps, work_us in zip(*columns, strict=False):
        if client in asked and client not in measures:
            measures[client] = Measure(_bounded(steps), _bounded(work_us))
    return measures


def _bounded(value: object) -> int:
    """A whole number of a node; 0 in the place of anything else."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 0 <= value <= LARGEST else 0


def twice(t: int) -> str:
    return f"answered twice: of the answers in round {t + 1} the first counts"


def _same_for_all(asked: list[int], reason: str) -> Reading:
    return Reading(dict.fromkeys(asked, reason), {})


def _claims(about: ConfigRecord) -> list[Claim]:
    """Failures first, then counts: a client that failed sends no update."""
    failed, reasons = _list(about, "failed"), _list(about, "reasons")
    clients, counts = _list(about, "clients"), _list(about, "num-examples")
    claims = []
    for client, reason in zip(failed, reasons, strict=False):
        claims.append(Claim(client, failure=reason))
    for client, count in zip(clients, counts, strict=False):
        claims.append(Claim(client, count=count))
    return claims


def _list(record: ConfigRecord, key: str) -> list[Any]:
    value = record.get(key)
    return value if isinstance(value, list) else []


def _shown(value: object) -> str:
    return escaped(repr(value)[:100])[:100]
