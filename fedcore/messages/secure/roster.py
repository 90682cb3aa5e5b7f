"""The cohort of a secure sum, as a client checks it before it gives away a share."""

from __future__ import annotations

from typing import NamedTuple

from fedcore.messages.secure.graph import graph_fault, lists_fault, neighbours_of
from fedcore.messages.secure.identity import Identity
from fedcore.messages.secure.primitives import (
    KEY,
    Message,
    Refused,
    bytes_in,
    chunks,
    ids_in,
    int_in,
    list_in,
    only,
)
from fedcore.messages.secure.terms import Terms, weights_by_field
from fedcore.messages.secure.transcript import keys_message, ring_seed, session_of

__all__ = ["NAMES", "Cohort", "Expected"]

NAMES = ("ids", "k", "t", "c", "s", "weights", "certificates", "signatures")


class Cohort(NamedTuple):
    """A cohort that a client takes part in: ids ascending, and its neighbours'."""

    ids: list[int]
    t: int
    weights: bytes
    near: list[int]
    c: dict[int, bytes]  # of neighbours, for encryption
    s: dict[int, bytes]  # of neighbours, for masks
    certificates: dict[int, bytes]  # of neighbours, in DER; none if not signed
    session: bytes


class Expected(NamedTuple):
    """What a client knows before it hears of the others."""

    client: int
    terms: Terms
    terms_digest: bytes
    weights: list[float]  # its own, in the listed fields
    identity: Identity | None

    def check(self, public: bytes, roster: Message) -> Cohort:
        """The cohort in a message of E2; `public` are the client's own two keys.

        Raises Refused for everything that would make the sum show too much.
        """
        only(roster, NAMES)
        ids, k, t = ids_in(roster, "ids"), int_in(roster, "k"), int_in(roster, "t")
        n = len(ids)
        fault = graph_fault(n, k, t)
        if fault is not None:
            raise Refused(fault)
        if n > self.terms.n_max:
            raise Refused(f"{n} clients in a sum of at most {self.terms.n_max}")
        if self.client not in ids:
            raise Refused("this client is not in the list of those that sent keys")
        c = chunks(bytes_in(roster, "c", KEY * n), KEY)
        s = chunks(bytes_in(roster, "s", KEY * n), KEY)
        own = ids.index(self.client)
        if c[own] + s[own] != public:
            raise Refused("the list of keys has others than this client sent")
        if len({*c, *s}) < 2 * n:
            raise Refused("the list of keys has one key twice")
        weights = bytes_in(roster, "weights", 8 * n * self.terms.listed)
        self._check_weights(weights, own, n, t)
        near = neighbours_of(ids, k, ring_seed(self.terms.run, ids))[self.client]
        places = {client: place for place, client in enumerate(ids)}
        cohort = Cohort(
            ids,
            t,
            weights,
            near,
            {other: c[places[other]] for other in near},
            {other: s[places[other]] for other in near},
            {},
            session_of(self.terms_digest, roster),
        )
        return cohort._replace(certificates=self._check_signatures(roster, cohort))

    def _check_weights(self, weights: bytes, own: int, n: int, t: int) -> None:
        """Refuse weights of which few clients have most, and another one of its own."""
        fields = weights_by_field(weights, n)
        fault = lists_fault(fields, self.terms.is_one_field, t, self.terms.cap)
        if fault is not None:
            raise Refused(fault)
        for weight, listed in zip(self.weights, fields, strict=True):
            if listed[own] != weight:
                raise Refused(
                    f"a weight of {listed[own]:g} in the list, "
                    f"and of {weight:g} when this client was asked"
                )

    def _check_signatures(self, roster: Message, cohort: Cohort) -> dict[int, bytes]:
        """Certificates of the neighbours, who signed their keys with them."""
        near = cohort.near if self.identity is not None else []
        certificates = list_in(roster, "certificates", bytes, len(near))
        signatures = list_in(roster, "signatures", bytes, len(near))
        if self.identity is None:
            return {}
        for other, certificate, signature in zip(
            near, certificates, signatures, strict=True
        ):
            signed = keys_message(
                other, cohort.c[other], cohort.s[other], self.terms_digest
            )
            self.identity.authority.verify(other, certificate, signature, signed)
        return dict(zip(near, certificates, strict=True))
