"""A client's part in one secure sum: five exchanges, each answered once (E1 to E5).

    E1 keys       the client has trained; it sends two public keys
    E2 shares     it hears of the others, and sends shares of two secrets to neighbours
    E3 masked     it gets its neighbours' shares, and sends its masked vector
    E4 survivors  it hears whose vectors arrived, and signs the list
    E5 unmask     it sees that its neighbours signed the same, and sends shares

Messages are dictionaries; u is the client, N(u) its neighbours, ascending ids, U1 to U5
those who answered an exchange. What clients send:

    E1  c, s       bytes 32           public keys, for encryption and for masks
        terms      bytes 32           digest of terms and model (`terms.Terms.digest`)
        signature  bytes              over ("keys", u, c, s, terms); empty if not signed
    E2  sent       bytes 80 |N(u)|    for each of N(u), encrypted: shares of b_u, seed_u
        digests    bytes 32 (|N(u)| + 1)  of these shares, for N(u) and u itself
        seal       bytes 16           digest of b_u
    E3  an array uint8 [4 d + 8 s]    the masked vector (`masks`)
    E4  signature  bytes              over ("survivors", session, U3); or empty
    E5  shares     bytes 32 m         of b_v where v is in U3, else of seed_v, for the m
                                      clients v of N(u) and u in U2, ascending

What they are sent (E1 is in `terms`):

    E2  ids           list[int]       U1
        k, t          int
        c, s          bytes 32 |U1|   keys of all
        weights       bytes           float64 of all, listed field by listed field
        certificates  list[bytes]     of N(u), in DER; empty if not signed
        signatures    list[bytes]     of their keys; empty if not signed
    E3  senders       list[int]       N(u) in U2
        sent          bytes 80 each   what they sent to u
    E4  survivors     list[int]       U3
    E5  signers       list[int]       U4 in N(u) and u
        signatures    list[bytes]     of the survivors

Secrets come from the operating system, live until E5 or the first refusal, and appear
in no repr and no pickle; a session that has to outlive its process is `packed`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcore.messages.secure.client_state import ClientState
from fedcore.messages.secure.graph import LEAST, lists_fault
from fedcore.messages.secure.identity import Identity
from fedcore.messages.secure.masks import (
    Numbers,
    Vector,
    Words,
    add_masks,
    joined,
    pair_mask,
    self_mask,
)
from fedcore.messages.secure.primitives import (
    KEY,
    Message,
    Refused,
    Secret,
    agreed,
    bytes_in,
    chunks,
    derived,
    ids_in,
    list_in,
    only,
)
from fedcore.messages.secure.roster import Expected
from fedcore.messages.secure.shamir import new_secret, split
from fedcore.messages.secure.terms import Terms, weights_by_field
from fedcore.messages.secure.transcript import (
    keys_message,
    mask_key,
    public_key,
    seal_of,
    share_digest,
    survivors_message,
)

__all__ = ["SENT", "ClientSession", "Refused"]

SENT = 2 * KEY + 16  # bytes of two shares, encrypted
_NONCE = bytes(12)  # of keys that encrypt one message

P = ParamSpec("P")
T = TypeVar("T")
Answer = Callable[Concatenate["ClientSession", P], T]


def exchange(number: int) -> Callable[[Answer[P, T]], Answer[P, T]]:
    """Marks the method that answers an exchange: in its turn, and once.

    A refusal, or any other error, ends the session and drops its secrets.
    """

    def decorated(answer: Answer[P, T]) -> Answer[P, T]:
        @wraps(answer)
        def in_turn(self: ClientSession, /, *args: P.args, **kwargs: P.kwargs) -> T:
            if self.has_ended:
                raise Refused(
                    f"exchange {number} was asked for, and the session has ended"
                )
            last = self._state.exchange
            if last != number - 1:
                raise Refused(f"exchange {number} was asked for after exchange {last}")
            try:
                found = answer(self, *args, **kwargs)
            except BaseException:
                self.close()
                raise
            self._state.exchange = number
            if number == 5:
                self.close()
            return found

        return in_turn

    return decorated


class ClientSession:
    """One client in one secure sum."""

    def __init__(
        self,
        client: int,
        terms: Terms,
        down: bytes,
        weights: Sequence[float] = (),
        identity: Identity | None = None,
    ) -> None:
        """A session before E1; the client may train now.

        `down` is the SHA-256 of the model it was sent, `weights` its own in the fields
        whose weights the server lists. Raises Refused where the terms cannot be right.
        """
        fault = terms.fault()
        if fault is not None:
            raise Refused(fault)
        if len(weights) != terms.listed:
            raise Refused(f"{len(weights)} own weights, expected {terms.listed}")
        if terms.is_signed and identity is None:
            raise Refused(
                f"clients sign their keys here, and client {client} has no "
                "certificate: run fedcore certs again, and copy it"
            )
        if not terms.is_signed and identity is not None:
            raise Refused(
                "the server has no certificates of clients, so that keys of others "
                "cannot be checked: run fedcore certs again, and copy server/clients"
            )
        if identity is not None and identity.client != client:
            raise Refused(f"asked as client {client}, and this is {identity.client}")
        self.client = client
        self.terms = terms
        self.weights = list(weights)
        self._terms_digest = terms.digest(down)
        self._expected = Expected(
            client, terms, self._terms_digest, list(weights), identity
        )
        self._down = down
        self._identity = identity
        self._state = ClientState()
        self.has_ended = False

    def __repr__(self) -> str:
        last = "ended" if self.has_ended else f"after exchange {self._state.exchange}"
        return f"<session of client {self.client}, {last}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a session holds secrets and is never pickled or copied")

    def close(self) -> None:
        """End the session, and drop every secret it holds."""
        self.has_ended = True
        self._state = ClientState()

    def packed(self) -> bytes:
        """The session as bytes, secrets too: for a file that nobody else can read."""
        if self.has_ended:
            raise Refused("the session has ended")
        return self._down + self._state.packed()

    @classmethod
    def unpacked(
        cls,
        content: bytes,
        client: int,
        terms: Terms,
        weights: Sequence[float] = (),
        identity: Identity | None = None,
    ) -> ClientSession:
        """The session that was packed, with what it was made with."""
        session = cls(client, terms, content[:KEY], weights, identity)
        session._state = ClientState.unpacked(content[KEY:])
        return session

    @exchange(1)
    def keys(self, numbers: Numbers, words: Words) -> Message:
        """E1: what is to be added up, uint32 [d] and uint64 [s]; the public keys."""
        state = self._state
        state.numbers, state.vector = len(numbers), joined(numbers, words)
        state.c, state.seed = Secret(secrets.token_bytes(KEY)), new_secret()
        c, s = public_key(state.c), public_key(mask_key(state.seed))
        state.public = c + s
        signed = keys_message(self.client, c, s, self._terms_digest)
        return {
            "c": c,
            "s": s,
            "terms": self._terms_digest,
            "signature": self._signature(signed),
        }

    @exchange(2)
    def shares(self, roster: Message) -> Message:
        """E2: the cohort and its keys; shares of both secrets for the neighbours."""
        state = self._state
        cohort = self._expected.check(state.public, roster)
        state.ids, state.t, state.weights = cohort.ids, cohort.t, cohort.weights
        state.session, state.mask_keys = cohort.session, cohort.s
        state.certificates = cohort.certificates
        state.b = new_secret()
        holders = sorted([*cohort.near, self.client])
        places = [holder + 1 for holder in holders]
        of_b = split(state.b, state.t, places)
        of_seed = split(state.seed, state.t, places)
        sent, digests = [], []
        for holder in holders:
            mine, mask = of_b[holder + 1], of_seed[holder + 1]
            for kind, share in (("b", mine), ("seed", mask)):
                marked = share_digest(kind, state.session, self.client, holder, share)
                digests.append(marked)
            if holder == self.client:
                state.held[holder] = mine  # a share of the own seed is never given
                continue
            state.shared[holder] = agreed(state.c, cohort.c[holder])
            box = self._box(holder, self.client, holder)
            sent.append(box.encrypt(_NONCE, mine + mask, None))
        return {
            "sent": b"".join(sent),
            "digests": b"".join(digests),
            "seal": seal_of(state.session, self.client, state.b),
        }

    @exchange(3)
    def masked(self, inbox: Message) -> Vector:
        """E3: the neighbours' shares; the masked vector, uint8 [4 d + 8 s]."""
        state = self._state
        only(inbox, ("senders", "sent"))
        senders = ids_in(inbox, "senders")
        sent = chunks(bytes_in(inbox, "sent", SENT * len(senders)), SENT)
        if len(senders) + 1 < state.t:
            raise Refused(
                f"shares of {len(senders)} neighbours, expected {state.t - 1}"
            )
        if not set(senders) <= set(state.mask_keys):
            raise Refused("shares of clients that are no neighbours")
        masks = [self_mask(state.b, state.session)]
        s = mask_key(state.seed)
        for sender, content in zip(senders, sent, strict=True):
            try:
                box = self._box(sender, sender, self.client)
                state.held[sender] = Secret(box.decrypt(_NONCE, content, None))
            except InvalidTag:
                raise Refused(f"shares of client {sender} are not authentic") from None
            shared = agreed(s, state.mask_keys[sender])
            masks.append(pair_mask(shared, state.session, self.client, sender))
        vector, state.vector = state.vector, None
        assert vector is not None, "kept since E1"
        add_masks(vector, state.numbers, masks)
        state.c = state.seed = state.b = Secret()
        state.shared, state.mask_keys = {}, {}
        return vector

    @exchange(4)
    def survivors(self, message: Message) -> Message:
        """E4: those whose vectors arrived; a signature of the list."""
        state = self._state
        only(message, ("survivors",))
        survivors = ids_in(message, "survivors")
        if self.client not in survivors:
            raise Refused("this client sent its vector, and is not among the survivors")
        if not set(survivors) <= set(state.ids):
            raise Refused("survivors that were not among those that sent keys")
        if len(survivors) < LEAST:
            raise Refused(
                f"a sum of {len(survivors)} clients: expected at least {LEAST}"
            )
        near = len(set(survivors) & set(state.held))
        if near < state.t:
            raise Refused(f"{near} survivors near this client, expected {state.t}")
        self._check_left(survivors)
        state.survivors = survivors
        return {"signature": self._signature(self._survivors_message())}

    def _check_left(self, survivors: list[int]) -> None:
        """Refuse a sum in which one client has more than a third of the weight."""
        state, terms = self._state, self.terms
        n, remain = len(state.ids), set(survivors)
        lists = []
        for listed in weights_by_field(state.weights, n):
            pairs = zip(state.ids, listed, strict=True)
            lists.append([weight for client, weight in pairs if client in remain])
        fault = lists_fault(lists, terms.is_one_field, 0, terms.cap)
        if fault is not None:
            raise Refused(fault)

    @exchange(5)
    def unmask(self, message: Message) -> Message:
        """E5: the neighbours' signatures; one share of each client, never both."""
        state = self._state
        only(message, ("signers", "signatures"))
        signers = ids_in(message, "signers")
        signatures = list_in(message, "signatures", bytes, len(signers))
        if not set(signers) <= set(state.held) & set(state.survivors):
            raise Refused("signatures of clients that are not survivors near this one")
        if len(signers) < state.t:
            raise Refused(f"{len(signers)} signatures, expected {state.t}")
        for signer, signature in zip(signers, signatures, strict=True):
            if self._identity is None or signer == self.client:
                continue
            self._identity.authority.verify(
                signer,
                state.certificates[signer],
                signature,
                self._survivors_message(),
            )
        shares, survivors = [], set(state.survivors)
        for client in sorted(state.held):
            of_b, of_seed = state.shares_of(client)
            shares.append(of_b if client in survivors else of_seed)
        return {"shares": b"".join(shares)}

    def _survivors_message(self) -> bytes:
        return survivors_message(self._state.session, self._state.survivors)

    def _signature(self, message: bytes) -> bytes:
        return b"" if self._identity is None else self._identity.sign(message)

    def _box(self, other: int, sender: int, receiver: int) -> AESGCM:
        """The cipher for what one neighbour sends to the other; one message a key."""
        state = self._state
        shared = state.shared[other]
        return AESGCM(derived(shared, "share", state.session, sender, receiver))
