"""Masks: streams of AES-256-CTR, added to the words of a vector and taken off again.

A vector lies in one array of bytes: d words of 32 bits, then s words of 64, the lowest
byte first. The stream of a key runs through all of it without a gap, from a zero
counter: a key is used for one mask. Masks are added in the words' own rings, modulo
2^32 and 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import (
    Cipher,
    CipherContext,
    algorithms,
    modes,
)

from fedcore.messages.secure.primitives import Secret, derived

__all__ = [
    "Mask",
    "Numbers",
    "Vector",
    "Words",
    "add_masks",
    "joined",
    "pair_mask",
    "parted",
    "self_mask",
    "size_of",
]

Vector = npt.NDArray[np.uint8]  # [4 d + 8 s]
Numbers = npt.NDArray[np.uint32]  # [d]
Words = npt.NDArray[np.uint64]  # [s]

BLOCK = 1 << 18  # bytes of a stream at a time: they, and their sum, stay in the cache
_ZEROS = memoryview(bytes(BLOCK))


class Mask(NamedTuple):
    """One mask of a vector: the key of its stream, and whether it is added."""

    key: Secret
    is_added: bool


def self_mask(secret: bytes, session: bytes) -> Mask:
    """The mask that a client adds for itself, of its secret b_u."""
    return Mask(derived(secret, "self", session), True)


def pair_mask(shared: bytes, session: bytes, own: int, other: int) -> Mask:
    """The mask of two clients, of the secret they share.

    The client with the greater id adds it, the other one subtracts it.
    """
    low, high = sorted((own, other))
    return Mask(derived(shared, "pair", session, low, high), own > other)


def size_of(numbers: int, words: int) -> int:
    """Bytes of a vector with so many words of 32 and of 64 bits."""
    return 4 * numbers + 8 * words


def joined(numbers: Numbers, words: Words) -> Vector:
    """The vector of words of 32 bits [d] and words of 64 bits [s]: a copy.

    >>> joined(np.array([1], np.uint32), np.array([2], np.uint64)).tolist()
    [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    """
    vector = np.empty(size_of(len(numbers), len(words)), np.uint8)
    low, high = parted(vector, len(numbers))
    low[:] = numbers
    high[:] = words
    return vector


def parted(vector: Vector, numbers: int) -> tuple[Numbers, Words]:
    """The first `numbers` words of 32 bits and the words of 64 behind them: views."""
    border = 4 * numbers
    return vector[:border].view("<u4"), vector[border:].view("<u8")


def add_masks(vector: Vector, numbers: int, masks: Sequence[Mask]) -> None:
    """Add masks to a vector in place, or subtract those that are not added."""
    streams = []
    for mask in masks:
        change = np.add if mask.is_added else np.subtract
        streams.append((_stream(mask.key), change))
    target = bytearray(BLOCK + 16)  # the library wants a block to spare
    stream = np.frombuffer(target, np.uint8)
    for part in parted(vector, numbers):
        step = BLOCK // part.itemsize
        for begin in range(0, len(part), step):
            block = part[begin : begin + step]
            drawn = stream[: block.nbytes].view(part.dtype)
            for encryptor, change in streams:
                encryptor.update_into(_ZEROS[: block.nbytes], target)
                change(block, drawn, out=block)


def _stream(key: bytes, counter: bytes = bytes(16)) -> CipherContext:
    """AES-256 in counter mode: of zeros, the stream of a key."""
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
