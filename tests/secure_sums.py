"""A secure sum in one process: honest clients, and a server that may lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.messages.secure.client_session import ClientSession
from fedcore.messages.secure.identity import Authority, Identity
from fedcore.messages.secure.masks import Numbers, Vector, Words
from fedcore.messages.secure.primitives import Message, Refused
from fedcore.messages.secure.server_session import ServerSession, Size
from fedcore.messages.secure.terms import Terms, read_offer

DOWN = bytes(range(32))  # the SHA-256 of a model
RUN = "series/3/0/train"
OURS = "ours"  # the authority of the federation

Lie = Callable[[int, int, Message], Message]
"""(exchange, client, an honest server's message) -> the message that is sent."""


@cache
def authority_key(name: str) -> ec.EllipticCurvePrivateKey:
    """The key of an authority; another name is another authority."""
    return ec.generate_private_key(ec.SECP256R1())


@cache
def client_key(client: int) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@cache
def authority_certificate(name: str) -> x509.Certificate:
    key = authority_key(name)
    return signed_certificate("authority", key.public_key(), key, is_authority=True)


def signed_certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    by: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool = False,
    use: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    begins: int = -1,
    ends: int = 9,
) -> x509.Certificate:
    """A certificate of `key`; its dates in days from now."""
    now = datetime.now(UTC)

    def titled(words: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words)])

    return (
        x509.CertificateBuilder()
        .subject_name(titled(name))
        .issuer_name(titled("authority"))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins))
        .not_valid_after(now + timedelta(days=ends))
        .add_extension(x509.BasicConstraints(is_authority, None), True)
        .add_extension(x509.ExtendedKeyUsage([use]), False)
        .sign(by, hashes.SHA256())
    )


@cache
def client_certificate(client: int) -> x509.Certificate:
    public = client_key(client).public_key()
    return signed_certificate(f"client-{client}", public, authority_key(OURS))


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@cache
def identity_of(client: int) -> Identity:
    """A client's identity; its authority remembers certificates, as on a device."""
    key, certificate = client_key(client), client_certificate(client)
    return Identity(client, key, certificate, authority_certificate(OURS))


def terms_of(n: int, **changes: object) -> Terms:
    terms = Terms(RUN, max(n, 3), 8.0, 4096.0)
    return terms._replace(**changes)  # type: ignore[arg-type]


class SecureSum:
    """A sum of random vectors, of which all parties are at hand."""

    def __init__(
        self,
        clients: Sequence[int],
        d: int = 21,
        *,
        is_signed: bool = True,
        lost: Mapping[int, Collection[int]] | None = None,
        lie: Lie | None = None,
        weights: Mapping[int, Sequence[float]] | None = None,
        neighbours: int | None = None,
        least: int | None = None,
        terms: Terms | None = None,
    ) -> None:
        """`lost` are those who do not answer an exchange, by exchange, 1 to 5."""
        draw = np.random.default_rng(17)
        self.terms = terms or terms_of(len(clients), is_signed=is_signed)
        self.lost = dict(lost or {})
        self.lie: Lie = lie or (lambda number, client, message: message)
        self.vectors: dict[int, tuple[Numbers, Words]] = {}
        for client in clients:
            numbers = draw.integers(0, 2**32, d, dtype=np.uint32)
            words = draw.integers(0, 2**64, 5, dtype=np.uint64)
            words[2] = 1
            self.vectors[client] = numbers, words
        self.server = ServerSession(
            self.terms,
            DOWN,
            Size(d, 5),
            weights=weights,
            neighbours=neighbours,
            least=least,
            authority=Authority(authority_certificate(OURS)) if is_signed else None,
            certificates={c: der(client_certificate(c)) for c in clients},
        )
        self.sessions: dict[int, ClientSession] = {}
        self.refused: dict[int, str] = {}
        self.masked: dict[int, Vector] = {}
        self.answers: dict[int, dict[int, Message]] = {n: {} for n in range(1, 6)}

    def run(self, until: int = 5) -> SecureSum:
        """All exchanges, or those up to one."""
        steps = (self.keys, self.shares, self.mask, self.sign, self.unmask)
        for step in steps[:until]:
            step()
        return self

    def keys(self) -> None:
        for client in self.vectors:
            terms, weights = read_offer(self.lie(1, client, self.server.offer(client)))
            identity = identity_of(client) if self.terms.is_signed else None
            session = ClientSession(client, terms, DOWN, weights, identity)
            self.sessions[client] = session
            answer = session.keys(*self.vectors[client])
            self.answers[1][client] = answer
            if client not in self.lost.get(1, ()):
                self.server.add_keys(client, answer)

    def shares(self) -> None:
        self._ask(2, self.server.rosters(), "shares", self.server.add_shares)

    def mask(self) -> None:
        for client, message in self.server.inboxes().items():
            if client in self.lost.get(3, ()):
                continue
            try:
                sent = self.sessions[client].masked(self.lie(3, client, message))
            except Refused as error:
                self.refused[client] = str(error)
                continue
            self.masked[client] = sent
            self.server.add_masked(client, sent)

    def sign(self) -> None:
        messages = self.server.survivors()
        self._ask(4, messages, "survivors", self.server.add_signature)

    def unmask(self) -> None:
        self._ask(5, self.server.requests(), "unmask", self.server.add_shares_of)

    def _ask(
        self,
        number: int,
        messages: dict[int, Message],
        name: str,
        add: Callable[[int, Message], bool],
    ) -> None:
        for client, message in messages.items():
            if client in self.lost.get(number, ()):
                continue
            answer = getattr(self.sessions[client], name)
            try:
                found = answer(self.lie(number, client, message))
            except Refused as error:
                self.refused[client] = str(error)
                continue
            self.answers[number][client] = found
            add(client, found)

    def plain(self, clients: Collection[int]) -> tuple[Numbers, Words]:
        """The sum in the clear."""
        d = self.server.size.numbers
        numbers, words = np.zeros(d, np.uint32), np.zeros(5, np.uint64)
        for client in clients:
            numbers = numbers + self.vectors[client][0]
            words = words + self.vectors[client][1]
        return numbers, words

    def is_exact(self) -> bool:
        """Whether the sum is that of the survivors, word for word."""
        numbers, words = self.server.total()
        wanted = self.plain(self.server.clients)
        return bool((numbers == wanted[0]).all() and (words == wanted[1]).all())
