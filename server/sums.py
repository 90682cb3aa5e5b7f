"""The secure sums of a run: what is asked, of whom, and what is kept of them.

secure    the exchanges of one sum
journal   sums that a restart of the server goes on with
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cryptography.hazmat.primitives.serialization import Encoding
from torch import Tensor

from fedcore import trees
from fedcore.deploy import certs
from fedcore.engines.base import Work, failure, one_thread
from fedcore.engines.message_shape import message_shape
from fedcore.errors import TooFewReports
from fedcore.messages import wire
from fedcore.messages.moment import Moment
from fedcore.messages.secure.ask import Ask, SecretTotal
from fedcore.messages.secure.distributed import DistributedNoise
from fedcore.messages.secure.identity import Authority
from fedcore.messages.secure.server_session import ServerSession, Size
from fedcore.messages.secure.settings import SecureSettings
from fedcore.messages.secure.terms import LISTED, Terms, question_digest
from fedcore.method import evaluates
from fedcore.reports import Reports

from .journal import FOLDER, Entry, Journal, Void
from .secure import Mailing, SecretSum

log = logging.getLogger("fedcore")

LEFT_OUT = "left out of sums until the server starts anew"
UNSIGNED = (
    "aggregation.secure without certificates of clients: a server that follows the "
    "protocol sees sums alone; one that lies to clients about their keys, or about who "
    "is there, is not kept out. fedcore certs makes certificates for a server with TLS"
)


class Securing(NamedTuple):
    """Settings and places of a run with `aggregation.secure`."""

    settings: SecureSettings = SecureSettings()
    certs: Path | None = None  # the server's directory of keys, with `clients/`
    checkpoint: Path | None = None  # where sums outlive the server; None: nowhere


class Sums:
    """What the sums of a run have in common."""

    def __init__(self, work: Work, securing: Securing) -> None:
        self.work, self.settings = work, securing.settings
        self.certificates = Certificates(securing.certs)
        folder = None
        if securing.checkpoint is not None:
            folder = securing.checkpoint / FOLDER
        self.journal = None if folder is None else Journal(folder)
        self.void = Void(folder)
        self._sizes: dict[Hashable, Size] = {}
        # Clients whose shares did not give their secret, and why: each could spoil
        # every sum that it is in.
        self.spoiled: dict[int, str] = {}
        self._accusers: dict[int, set[int]] = {}
        self._has_said_unsigned = False

    def begin(self, ask: Ask, now: tuple[int, int], work: Mapping[str, Any]) -> Asking:
        """A sum, the k-th work of round t; `work` is what every message says of it."""
        return Asking(self, ask, now, work)

    def size(self, ask: Ask) -> Size:
        """The words of one client's vector."""
        shapes = tuple((path, x.shape) for path, x in trees.flatten(ask.down).items())
        fields = tuple(part.field for part in ask.parts)
        key = ask.fn.__name__, ask.news, fields, shapes
        if key not in self._sizes:
            self._sizes[key] = size_in(self.work, ask)
        return self._sizes[key]

    def close(self, safe: int) -> None:
        """Delete the sums that the run's checkpoint, of `safe` rounds, has."""
        if self.journal is not None:
            self.journal.prune(safe)

    def accused(self, accusers: Mapping[int, set[int]]) -> dict[int, str]:
        """Clients whose shares two others could not read by now: they are left out.

        Those who could not had to leave the sum, so that one client might end all. The
        word of one is not enough: it may be the one that lies.
        """
        found = {}
        for client, others in accusers.items():
            said = self._accusers.setdefault(client, set())
            said |= others
            if len(said) >= 2:
                some = ", ".join(map(str, sorted(said)[:5]))
                fault = f"its shares are not authentic, by clients {some}"
                found[client] = self.spoiled[client] = f"bad message: {fault}"
        return found

    def say_unsigned(self) -> None:
        """Say once what is not claimed where clients have no certificates."""
        if self.certificates.authority is None and not self._has_said_unsigned:
            self._has_said_unsigned = True
            log.warning(UNSIGNED)


class Asking:
    """One sum that is asked for."""

    def __init__(
        self, sums: Sums, ask: Ask, now: tuple[int, int], work: Mapping[str, Any]
    ) -> None:
        self._sums, self._ask, self._now, self._work = sums, ask, now, work
        self._named: dict[int, str] = {}  # clients that did wrong in E5
        self._record = wire.encode(ask.down)
        data = self._record[wire.FORMAT].data
        assert sums.work.sending is not None, "the run has aggregation.secure"
        self._digest = question_digest(data, sums.work.sending.agreed)
        model = hashlib.sha256(data).digest()
        t, k = now
        run = f"{work['series']}/{t}/{k}/{ask.fn.__name__}"
        is_signed = sums.certificates.authority is not None
        self._noising = None if evaluates(ask.fn) else noising_of(sums.work)
        self._terms = terms_of(ask, run, is_signed)
        if self._noising is not None:
            self._terms = self._terms._replace(settings=self._noising.terms())
        # What is asked; the clients, which may differ, are not in it, nor are settings:
        # a run may be gone on with for more rounds.
        question = self._terms._replace(is_signed=False)
        self._question = question.digest(model).hex()

    def recalled(self) -> Entry | None:
        """What the journal has of this sum; None where it was not made before."""
        journal = self._sums.journal
        if journal is None:
            return None
        journal.prune(int(self._work["safe"]))
        entry = journal.read(*self._now, self._question)
        if entry is None:
            return None
        is_ours = set(entry.total.clients) <= set(self._ask.clients.tolist())
        return entry if is_ours else None

    def run(
        self, hosted: Mapping[int, list[int]], mailing: Mailing, into: SecretTotal
    ) -> Iterator[Reports]:
        """Exchange with the clients on these nodes; the sum is in `into` at the end.

        Raises TooFewReports where it cannot be read.
        """
        self._sums.say_unsigned()
        fault, failed = "", dict[int, str]()
        try:
            for report in self._exchange(hosted, mailing, into):
                failed.update(report.failed)
                yield report
        except TooFewReports as error:
            fault = str(error)
        finally:
            # Not where it was interrupted: then the sum has not come to its end.
            is_done = bool(fault) or into.total is not None
            if self._sums.journal is not None and is_done:
                failed.update(self._named)
                entry = Entry(into, fault, failed)
                self._sums.journal.write(*self._now, self._question, entry)
        for client, reason in self._named.items():
            yield failure([client], reason)
        if fault:
            raise TooFewReports(fault)

    def _exchange(
        self, hosted: Mapping[int, list[int]], mailing: Mailing, into: SecretTotal
    ) -> Iterator[Reports]:
        """As `run`, without those that are named at the end."""
        ask, sums = self._ask, self._sums
        left: dict[int, list[int]] = {}
        for node, clients in hosted.items():
            for client in clients:
                if client in sums.spoiled:
                    yield failure([client], f"{sums.spoiled[client]}; {LEFT_OUT}")
                else:
                    left.setdefault(node, []).append(client)
        session = ServerSession(
            self._terms,
            self._digest,
            sums.size(ask),
            weights=weights_of(ask),
            neighbours=sums.settings.neighbours,
            least=None if evaluates(ask.fn) else sums.settings.threshold,
            floor=0 if self._noising is None else self._noising.least,
            authority=sums.certificates.authority,
            certificates=sums.certificates.of(ask.clients.tolist()),
        )
        moment = Moment(*self._now).number
        secret = SecretSum(session, mailing, left, self._work)
        try:
            yield from secret.run(self._record, self._places())
            into.total = secret.total()
            into.clients, into.moment = session.clients, moment
        finally:
            into.bytes_up, self._named = secret.bytes_up, dict(secret.named)
            sums.spoiled.update(secret.spoiled)
            self._named |= sums.accused(secret.accusers)
            if not evaluates(ask.fn):
                void = secret.asked - secret.failed_first - set(into.clients)
                sums.void.update(secret.answered, void, moment)

    def _places(self) -> dict[int, dict[str, Any]]:
        """What clients are told of their own works before this one."""
        clients = self._ask.clients.tolist()
        moments = [-1] * len(clients)
        if self._ask.moments is not None:
            moments = self._ask.moments.tolist()
        places = {}
        for client, moment in zip(clients, moments, strict=True):
            void = self._sums.void.of(client)
            places[client] = {"moment": moment, "void": void}
        return places


def noising_of(work: Work) -> DistributedNoise | None:
    """The noise that devices add; None where they add none."""
    noising = None if work.sending is None else work.sending.noising
    return noising if isinstance(noising, DistributedNoise) else None


def taken(entry: Entry, into: SecretTotal) -> Iterator[Reports]:
    """The failures of a sum of the journal, which is put into `into`.

    Raises TooFewReports where it came to nothing.
    """
    made = entry.total
    into.total, into.clients, into.moment = made.total, made.clients, made.moment
    into.bytes_up = made.bytes_up
    for client, reason in entry.failed.items():
        yield failure([client], reason)
    if entry.fault:
        raise TooFewReports(entry.fault)


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
