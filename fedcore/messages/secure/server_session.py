"""The server's part in one secure sum: it passes on, adds up, and takes masks off.

Messages are those of `client_session` and `terms`. The order of calls is

    offer(i)                 E1 to each client that is asked, beside the model
    add_keys(i, answer)      as they come; then rosters() gives E2 by client
    add_shares(i, answer)    as they come; then inboxes() gives E3 by client
    add_masked(i, vector)    as they come; then survivors() gives E4 by client
    add_signature(i, answer) as they come; then requests() gives E5 by client
    add_shares_of(i, answer) as they come; then total() is the sum

A client that does not answer is left out; one that sends something wrong as well, with
the reason in `blame`. Answers that come too late are not taken. The middle methods
raise TooFewReports where nobody can go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from fedcore.errors import TooFewReports
from fedcore.messages.secure.client_session import SENT
from fedcore.messages.secure.graph import (
    LEAST,
    degree,
    graph_fault,
    lists_fault,
    neighbours_of,
    threshold,
)
from fedcore.messages.secure.identity import Authority
from fedcore.messages.secure.masks import (
    Numbers,
    Vector,
    Words,
    add_masks,
    parted,
    size_of,
)
from fedcore.messages.secure.primitives import (
    KEY,
    Message,
    Refused,
    agreed,
    bytes_in,
    chunks,
    only,
)
from fedcore.messages.secure.terms import Terms, weights_to
from fedcore.messages.secure.transcript import (
    SEAL,
    keys_message,
    ring_seed,
    session_of,
    survivors_message,
)
from fedcore.messages.secure.unmasking import Keys, Plan, Shares, Unmasking

__all__ = ["COUNT_WORD", "ServerSession", "Size"]

COUNT_WORD = 2  # the word that is 1 of each client: it has to be their number
MOST = 4096  # bytes of a signature


class Size(NamedTuple):
    """Words of a vector."""

    numbers: int  # d, of 32 bits
    words: int  # s, of 64 bits


class ServerSession:
    """One secure sum, as the server sees it."""

    def __init__(
        self,
        terms: Terms,
        down: bytes,
        size: Size,
        *,
        weights: Mapping[int, Sequence[float]] | None = None,
        neighbours: int | None = None,
        least: int | None = None,
        floor: int = 0,
        authority: Authority | None = None,
        certificates: Mapping[int, bytes] | None = None,
        count_word: int | None = COUNT_WORD,
    ) -> None:
        """A session before E1.

        `down` is the SHA-256 of the model that is sent; `weights` are those of each
        client in the listed fields; `neighbours` and `least` are k and t of
        `[secure]`, and t is `floor` at least; `certificates` (DER) those of clients,
        where terms are signed.
        """
        assert terms.is_signed == (authority is not None), "an authority checks"
        self.terms = terms
        self.size = size
        self.blame: dict[int, str] = {}
        self.clients: list[int] = []  # U3, ascending, once it is known
        self.exchange = 1  # whose answers are taken
        self._terms_digest = terms.digest(down)
        self._weights = dict(weights or {})
        self._wanted, self._floor = (neighbours, least), floor
        self._authority = authority
        self._certificates = dict(certificates or {})
        self._count_word = count_word
        self._keys: dict[int, Keys] = {}
        self._public: set[bytes] = set()  # all keys in them
        self._shares: dict[int, Shares] = {}
        self._total: Vector | None = None
        self._added: list[int] = []
        self._signatures: dict[int, bytes] = {}
        self._answered: set[int] = set()  # U5
        self._plan: Plan | None = None
        self._unmasking: Unmasking | None = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a session is never pickled or copied")

    def __repr__(self) -> str:
        return f"<secure sum {self.terms.run}, exchange {self.exchange}>"

    def offer(self, client: int) -> Message:
        """E1, to a client that is asked."""
        return self.terms.offer(self._weights.get(client, ()))

    def add_keys(self, client: int, answer: Message) -> bool:
        """E1: whether the client's keys are taken."""
        if self.exchange != 1 or client in self._keys:
            return False
        try:
            keys = self._checked_keys(client, answer)
        except Refused as error:
            return self._name(client, str(error))
        self._keys[client] = keys
        self._public |= {keys.c, keys.s}
        return True

    def _checked_keys(self, client: int, answer: Message) -> Keys:
        only(answer, ("c", "s", "terms", "signature"))
        c, s = bytes_in(answer, "c", KEY), bytes_in(answer, "s", KEY)
        if bytes_in(answer, "terms", KEY) != self._terms_digest:
            raise Refused("it has another model than was sent, or other terms")
        if c == s or self._public & {c, s}:
            raise Refused("it sent a key twice, or one of another client")
        for key in (c, s):
            agreed(bytes(range(KEY)), key)  # refuses points that are none
        signature = self._checked_signature(
            client, answer, keys_message(client, c, s, self._terms_digest)
        )
        return Keys(c, s, signature)

    def _checked_signature(self, client: int, answer: Message, message: bytes) -> bytes:
        signature = answer["signature"]
        if not isinstance(signature, bytes) or len(signature) > MOST:
            raise Refused("its signature is none")
        if self._authority is not None:
            certificate = _certificate_of(client, self._certificates)
            self._authority.verify(client, certificate, signature, message)
        return signature

    def rosters(self) -> dict[int, Message]:
        """E2 by client. Raises TooFewReports where no client would go on."""
        self.exchange = 2
        ids = sorted(self._keys)
        n = len(ids)
        if n < LEAST:
            raise TooFewReports(f"{n} clients sent keys, expected at least {LEAST}")
        neighbours, least = self._wanted
        k = degree(n, neighbours)
        t = threshold(n, neighbours) if least is None else least
        t = max(t, self._floor)
        fault = graph_fault(n, k, t)
        if fault is not None:
            raise TooFewReports(fault)
        listed = [self._weights.get(client, ()) for client in ids]
        weights = _field_by_field(listed, t, self.terms)
        roster: Message = {
            "ids": ids,
            "k": k,
            "t": t,
            "c": b"".join(self._keys[client].c for client in ids),
            "s": b"".join(self._keys[client].s for client in ids),
            "weights": weights_to(weights),
        }
        near = neighbours_of(ids, k, ring_seed(self.terms.run, ids))
        session = session_of(self._terms_digest, roster)
        self._plan = Plan(ids, t, near, session)
        rosters: dict[int, Message] = {}
        for client in ids:
            signed: Message = {"certificates": [], "signatures": []}
            if self._authority is not None:
                signed = _signed(near[client], self._keys, self._certificates)
            rosters[client] = roster | signed
        return rosters

    @property
    def plan(self) -> Plan:
        """The cohort, once the rosters are made."""
        assert self._plan is not None, "rosters() is called before"
        return self._plan

    def add_shares(self, client: int, answer: Message) -> bool:
        """E2: whether the client's shares are taken."""
        if self.exchange != 2 or client not in self._keys or client in self._shares:
            return False
        try:
            shares = _shares_in(answer, client, self.plan.near[client])
        except Refused as error:
            return self._name(client, str(error))
        self._shares[client] = shares
        return True

    def inboxes(self) -> dict[int, Message]:
        """E3 by client. Raises TooFewReports."""
        self.exchange = 3
        self._expect(len(self._shares), "sent shares")
        inboxes: dict[int, Message] = {}
        for client in sorted(self._shares):
            senders = self._masked_with(client)
            sent = [self._shares[sender].sent[client] for sender in senders]
            inboxes[client] = {"senders": senders, "sent": b"".join(sent)}
        return inboxes

    def _masked_with(self, client: int) -> list[int]:
        """The neighbours in U2, with whom a client has masks."""
        return [other for other in self.plan.near[client] if other in self._shares]

    def add_masked(self, client: int, vector: bytes | memoryview | Vector) -> bool:
        """E3: whether the client's masked vector is added to the sum."""
        if self.exchange != 3 or client not in self._shares or client in self._added:
            return False
        content = np.frombuffer(vector, np.uint8)
        wanted = size_of(*self.size)
        if len(content) != wanted:
            found = f"its vector has {len(content)} bytes, expected {wanted}"
            return self._name(client, found)
        if self._total is None:
            self._total = np.zeros(wanted, np.uint8)
        sum_of_numbers, sum_of_words = parted(self._total, self.size.numbers)
        numbers, words = parted(content, self.size.numbers)
        np.add(sum_of_numbers, numbers, out=sum_of_numbers)
        np.add(sum_of_words, words, out=sum_of_words)
        self._added.append(client)
        return True

    def survivors(self) -> dict[int, Message]:
        """E4 by client. Raises TooFewReports."""
        self.exchange = 4
        self.clients = sorted(self._added)
        self._expect(len(self.clients), "sent their vectors")
        # As clients do: a round that they would all refuse ends here.
        listed = [self._weights.get(client, ()) for client in self.clients]
        _field_by_field(listed, 0, self.terms)
        return {client: {"survivors": self.clients} for client in self.clients}

    def add_signature(self, client: int, answer: Message) -> bool:
        """E4: whether the client's signature is taken."""
        is_late = self.exchange != 4 or client in self._signatures
        if is_late or client not in self.clients:
            return False
        try:
            only(answer, ("signature",))
            message = survivors_message(self.plan.session, self.clients)
            signature = self._checked_signature(client, answer, message)
        except Refused as error:
            return self._name(client, str(error))
        self._signatures[client] = signature
        return True

    def requests(self) -> dict[int, Message]:
        """E5 by client. Raises TooFewReports."""
        self.exchange = 5
        self._expect(len(self._signatures), "signed the list of survivors")
        self._unmasking = Unmasking(
            self.plan, self._keys, self._shares, self.clients, self.blame
        )
        requests: dict[int, Message] = {}
        for client in sorted(self._signatures):
            around = sorted([*self.plan.near[client], client])
            signers = [other for other in around if other in self._signatures]
            requests[client] = {
                "signers": signers,
                "signatures": [self._signatures[other] for other in signers],
            }
        return requests

    def add_shares_of(self, client: int, answer: Message) -> bool:
        """E5: whether the client's shares of others are taken."""
        expected = set(self._signatures) - self._answered
        if self.exchange != 5 or client not in expected:
            return False
        self._answered.add(client)
        owners = sorted([*self._masked_with(client), client])
        try:
            only(answer, ("shares",))
            shares = chunks(bytes_in(answer, "shares", KEY * len(owners)), KEY)
        except Refused as error:
            return self._name(client, str(error))
        assert self._unmasking is not None, "made with the requests"
        return self._unmasking.add(client, owners, shares)

    def total(self) -> tuple[Numbers, Words]:
        """The sum of the survivors' words: uint32 [d], uint64 [s].

        Raises TooFewReports where it cannot be unmasked.
        """
        self.exchange = 6
        assert self._total is not None, "clients survived"
        assert self._unmasking is not None, "made with the requests"
        add_masks(self._total, self.size.numbers, self._unmasking.masks())
        numbers, words = parted(self._total, self.size.numbers)
        if self._count_word is not None:
            _check_count(int(words[self._count_word]), len(self.clients))
        return numbers, words

    def _expect(self, found: int, done: str) -> None:
        wanted = max(self.plan.t, LEAST)
        if found < wanted:
            raise TooFewReports(f"{found} clients {done}, expected at least {wanted}")

    def _name(self, client: int, reason: str) -> bool:
        """Note what a client did wrong; its answer is not taken."""
        self.blame.setdefault(client, reason)
        return False


def _signed(
    near: Sequence[int], keys: Mapping[int, Keys], certificates: Mapping[int, bytes]
) -> Message:
    """Certificates of a client's neighbours, and signatures of their keys."""
    return {
        "certificates": [certificates[other] for other in near],
        "signatures": [keys[other].signature for other in near],
    }


def _certificate_of(client: int, certificates: Mapping[int, bytes]) -> bytes:
    certificate = certificates.get(client)
    if certificate is None:
        raise Refused(
            f"there is no clients/client-{client}.crt in the server's directory: "
            "run fedcore certs again, and copy it"
        )
    return certificate


def _field_by_field(
    listed: Sequence[Sequence[float]], t: int, terms: Terms
) -> list[float]:
    """Weights of a cohort, one listed field after another. Raises TooFewReports."""
    lists, weights = [], list[float]()
    for field in range(terms.listed):
        lists.append([of_client[field] for of_client in listed])
        weights += lists[-1]
    fault = lists_fault(lists, terms.is_one_field, t, terms.cap)
    if fault is not None:
        raise TooFewReports(fault)
    return weights


def _shares_in(answer: Message, client: int, near: Sequence[int]) -> Shares:
    """The shares in an answer to E2. Raises Refused."""
    holders = sorted([*near, client])
    only(answer, ("sent", "digests", "seal"))
    sent = chunks(bytes_in(answer, "sent", SENT * len(near)), SENT)
    digests = bytes_in(answer, "digests", 2 * SEAL * len(holders))
    pairs = [(both[:SEAL], both[SEAL:]) for both in chunks(digests, 2 * SEAL)]
    return Shares(
        dict(zip(near, sent, strict=True)),
        dict(zip(holders, pairs, strict=True)),
        bytes_in(answer, "seal", SEAL),
    )


def _check_count(count: int, clients: int) -> None:
    if count != clients:
        raise TooFewReports(
            f"the sum counts {count} clients, expected {clients}: "
            "a message was not honest, and it cannot be read"
        )
