"""Hashes, derived keys and the fields of messages, for both sides of a secure sum.

A message is a plain dictionary of str, int, float, bytes and lists of int, str or
bytes: each form of transport can carry it. A reader asks for a field by name and kind,
and gets `Refused` where the sender left it out or sent something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.errors import FedcoreError

__all__ = [
    "KEY",
    "Message",
    "Refused",
    "Secret",
    "agreed",
    "bytes_in",
    "chunks",
    "derived",
    "digest",
    "hkdf",
    "ids_in",
    "int_in",
    "list_in",
    "only",
]

VERSION = "fedcore secure sum 1"
KEY = 32  # bytes of a key, a secret, a share, and a digest

Message = dict[str, Any]


class Refused(FedcoreError):
    """A party of a secure sum does not go on: what it was sent is not right."""


class Secret(bytes):
    """Bytes that no repr shows and no pickle takes.

    >>> Secret(b"key")
    <secret>
    """

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is never pickled or copied")


def digest(*parts: object) -> bytes:
    """SHA-256 of the parts as canonical JSON, bytes in hexadecimal; 32 bytes.

    >>> digest("keys", 1, b"x") == digest("keys", 1, b"x") != digest("keys", 1, b"y")
    True
    """
    return sha256(_canonical(parts)).digest()


def derived(secret: bytes, purpose: str, *context: object) -> Secret:
    """A key of 32 bytes for one purpose in one context, by HKDF (RFC 5869)."""
    return Secret(hkdf(secret, None, _canonical((purpose, *context)), KEY))


def hkdf(secret: bytes, salt: bytes | None, info: bytes, size: int) -> bytes:
    """HKDF with SHA-256 (RFC 5869): `size` bytes of key."""
    return HKDF(hashes.SHA256(), size, salt, info).derive(secret)


def agreed(own: bytes, other: bytes) -> Secret:
    """The secret that a private and another's public key have in common (RFC 7748).

    Raises Refused where the public key is none: its secret would be known to all.
    """
    try:
        public = X25519PublicKey.from_public_bytes(other)
        return Secret(X25519PrivateKey.from_private_bytes(own).exchange(public))
    except ValueError as error:
        raise Refused("a public key is not a point of the curve") from error


def _canonical(parts: tuple[object, ...]) -> bytes:
    def plain(part: object) -> str:
        if isinstance(part, bytes):
            return part.hex()
        raise TypeError(f"{type(part).__name__} has no canonical form")

    text = json.dumps(
        [VERSION, *parts], default=plain, separators=(",", ":"), allow_nan=False
    )
    return text.encode()


def only(message: Message, names: Iterable[str]) -> None:
    """Refuse a message with another set of fields than `names`."""
    wanted = set(names)
    for name in sorted(set(message) - wanted):
        raise Refused(f'found a field "{str(name)[:40]}", which is not expected')
    for name in sorted(wanted - set(message)):
        raise Refused(f'the field "{name}" is missing')


def bytes_in(message: Message, name: str, size: int) -> bytes:
    """The field of `size` bytes. Raises Refused."""
    value = message.get(name)
    if not isinstance(value, bytes):
        raise Refused(f'"{name}" is {type(value).__name__}, expected bytes')
    if len(value) != size:
        raise Refused(f'"{name}" has {len(value)} bytes, expected {size}')
    return value


def int_in(message: Message, name: str) -> int:
    """The field that is a whole number. Raises Refused."""
    value = message.get(name)
    if type(value) is not int:
        raise Refused(f'"{name}" is {type(value).__name__}, expected an int')
    return value


def list_in(message: Message, name: str, kind: type, size: int | None = None) -> Any:
    """The field that is a list of `kind`, of `size` entries. Raises Refused."""
    value = message.get(name)
    if not isinstance(value, list):
        raise Refused(f'"{name}" is {type(value).__name__}, expected a list')
    if size is not None and len(value) != size:
        raise Refused(f'"{name}" has {len(value)} entries, expected {size}')
    for entry in value:
        if type(entry) is not kind:
            raise Refused(
                f'"{name}" has an entry that is {type(entry).__name__}, '
                f"expected {kind.__name__}"
            )
    return value


def ids_in(message: Message, name: str) -> list[int]:
    """The field that lists ids of clients, ascending, each once. Raises Refused."""
    ids: list[int] = list_in(message, name, int)
    if ids != sorted(set(ids)) or (ids and ids[0] < 0):
        raise Refused(f'"{name}" is not a list of clients in ascending order')
    return ids


def chunks(value: bytes, size: int) -> list[bytes]:
    """The pieces of `size` bytes, in order.

    >>> chunks(b"aabb", 2)
    [b'aa', b'bb']
    """
    return [value[i : i + size] for i in range(0, len(value), size)]
