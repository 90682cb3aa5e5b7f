"""What is hashed, sealed and signed in a session: the same on both sides."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcore.messages.secure.primitives import Message, Secret, derived, digest

__all__ = [
    "SEAL",
    "keys_message",
    "mask_key",
    "public_key",
    "ring_seed",
    "seal_of",
    "session_of",
    "share_digest",
    "survivors_message",
]

SEAL = 16  # bytes of a digest that only has to be hard to meet


def public_key(private: bytes) -> bytes:
    """The public key of X25519 that belongs to a private one; 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def mask_key(seed: bytes) -> Secret:
    """s_u, the private key for masks, of the seed that is shared."""
    return derived(seed, "mask key")


def keys_message(client: int, c: bytes, s: bytes, terms: bytes) -> bytes:
    """The digest that a client signs with its keys."""
    return digest("keys", client, c, s, terms)


def survivors_message(session: bytes, survivors: Sequence[int]) -> bytes:
    """The digest that a client signs with the list of survivors."""
    return digest("survivors", session, list(survivors))


def ring_seed(run: str, ids: Sequence[int]) -> bytes:
    """The seed of the order in which clients stand in a ring."""
    return digest("ring", run, list(ids))


def session_of(terms: bytes, roster: Message) -> bytes:
    """The digest of all that clients of a session have in common."""
    names = ("ids", "k", "t", "c", "s", "weights")
    return digest("session", terms, *(roster[name] for name in names))


def share_digest(
    kind: str, session: bytes, owner: int, holder: int, share: bytes
) -> bytes:
    """What an owner says of a share before it is given away; `kind` "b" or "seed"."""
    return digest("share", kind, session, owner, holder, share)[:SEAL]


def seal_of(session: bytes, client: int, b: bytes) -> bytes:
    """What a client says of b_u, by which it is known when it is put together."""
    return digest("seal", session, client, b)[:SEAL]
