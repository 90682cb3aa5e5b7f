"""Masks taken off a sum, with the shares that survivors give of secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedcore.errors import TooFewReports
from fedcore.messages.secure.masks import Mask, pair_mask, self_mask
from fedcore.messages.secure.primitives import agreed
from fedcore.messages.secure.shamir import recover
from fedcore.messages.secure.transcript import (
    mask_key,
    public_key,
    seal_of,
    share_digest,
)

__all__ = ["Keys", "Plan", "Shares", "Unmasking"]


class Plan(NamedTuple):
    """The cohort of a session, as the server laid it out."""

    ids: list[int]  # U1, ascending
    t: int
    near: dict[int, list[int]]  # neighbours by client
    session: bytes


class Keys(NamedTuple):
    """The keys that a client sent in E1."""

    c: bytes
    s: bytes
    signature: bytes


class Shares(NamedTuple):
    """The shares that a client sent in E2."""

    sent: dict[int, bytes]  # encrypted, by receiver
    digests: dict[int, tuple[bytes, bytes]]  # of shares of b and of seed, by holder
    seal: bytes


class Unmasking:
    """Shares of secrets as they come in E5, and the masks that they give."""

    def __init__(
        self,
        plan: Plan,
        keys: Mapping[int, Keys],
        shares: Mapping[int, Shares],
        survivors: Sequence[int],
        blame: dict[int, str],
    ) -> None:
        """An unmasking of the sum of `survivors`; who did wrong is noted in `blame`."""
        self.plan = plan
        self.keys = keys
        self.shares = shares  # of U2: whose masks are in the sum
        self.survivors = set(survivors)
        self.blame = blame
        self._given: dict[int, dict[int, bytes]] = {}  # by owner and place

    def add(self, holder: int, owners: Sequence[int], given: Sequence[bytes]) -> bool:
        """Take the shares that one client holds of others; whether all are right."""
        wrong = []
        for owner, share in zip(owners, given, strict=True):
            kind = "b" if owner in self.survivors else "seed"
            said = self.shares[owner].digests[holder][kind == "seed"]
            found = share_digest(kind, self.plan.session, owner, holder, share)
            if found == said:
                self._given.setdefault(owner, {})[holder + 1] = share
            else:
                wrong.append(str(owner))
        if wrong:
            reason = f"its shares of clients {', '.join(wrong[:5])} are wrong"
            self.blame.setdefault(holder, reason)
        return not wrong

    def masks(self) -> list[Mask]:
        """All masks that are on the sum, as they are taken off. Raises TooFewReports.

        Shares are dropped, and no other masks can be had of them.
        """
        given, self._given = self._given, {}
        masks: list[Mask] = []
        for owner in sorted(self.shares):
            shares = given.get(owner, {})
            if len(shares) < self.plan.t:
                raise TooFewReports(
                    f"{len(shares)} shares of client {owner}, expected {self.plan.t}"
                )
            found = self._masks_of(owner, shares)
            if found is None:
                fault = "its shares do not give its secret"
                self.blame.setdefault(owner, fault)
                raise TooFewReports(
                    f"client {owner}: {fault}, and its masks stay on the sum"
                )
            masks += found
        return masks

    def _masks_of(self, owner: int, shares: Mapping[int, bytes]) -> list[Mask] | None:
        """The masks of one client's secret; None where it is not the one it sealed."""
        try:
            secret = recover(shares, self.plan.t)
        except ValueError:
            return None
        session = self.plan.session
        if owner in self.survivors:
            if seal_of(session, owner, secret) != self.shares[owner].seal:
                return None
            return [self_mask(secret, session)._replace(is_added=False)]
        s = mask_key(secret)
        if public_key(s) != self.keys[owner].s:
            return None
        masks = []
        for other in self.plan.near[owner]:
            if other in self.survivors:
                shared = agreed(s, self.keys[other].s)
                # Its own masks, had it stayed, would have undone the other clients'.
                masks.append(pair_mask(shared, session, owner, other))
        return masks
