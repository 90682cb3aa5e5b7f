"""Randomness by name: every draw comes from a generator keyed by (seed, purpose, round, client), never from a global one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch


def _sequence(seed: int, purpose: str, ids: tuple[int, ...]) -> np.random.SeedSequence:
    # The purpose is hashed with CRC-32, which unlike hash() is the same in every process.
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *ids])


def rng(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """The generator for one purpose, e.g. `rng(seed, "batches", t, client)`; `ids` are non-negative."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, ids)))


def streams(seed: int, purpose: str, ids: np.ndarray) -> Iterator[np.random.Generator]:
    """`rng(seed, purpose, *row)` for each row of `ids` [n, k], in a third of the time: NumPy's own seeding, for all rows at once.

    A generator is good until the next one is asked for. Raises ValueError for ids that are negative, or have more than 32 bits.
    """
    if (ids >> 32).any():
        raise ValueError(
            f"ids of generators are from 0 to 2^32 - 1; found {ids.min()} to {ids.max()}"
        )
    head = [
        int(word) for n in (seed, zlib.crc32(purpose.encode())) for word in _words(n)
    ]
    entropy = [np.full(len(ids), word, dtype=np.uint32) for word in head] + [
        column.astype(np.uint32) for column in ids.T
    ]
    bits = np.random.PCG64()
    generator, mask = np.random.Generator(bits), (1 << 128) - 1
    for a, b, c, d in zip(*(word.tolist() for word in _state(entropy)), strict=True):
        start, inc = a << 64 | b, ((c << 64 | d) << 1 | 1) & mask
        bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": ((start + inc) * _PCG + inc) & mask, "inc": inc},
            "has_uint32": 0,
            "uinteger": 0,
        }
        yield generator


_PCG = 0x2360ED051FC65DA44385DF649FCCF645  # the multiplier of PCG64 (O'Neill 2014)
_POOL = 4  # words of NumPy's SeedSequence, whose constants follow (O'Neill's seed_seq, 2015)
_INIT_A, _MULT_A, _INIT_B, _MULT_B, _LEFT, _RIGHT = (
    0x43B0D7E5,
    0x931E8875,
    0x8B51F9DD,
    0x58F38DED,
    0xCA01F9DD,
    0x4973F715,
)


def _words(n: int) -> list[int]:
    """Of 32 bits, the lowest first; one for 0."""
    return [n >> shift & 0xFFFFFFFF for shift in range(0, max(n.bit_length(), 1), 32)]


Words = npt.NDArray[np.uint32]


def _state(entropy: list[Words]) -> list[npt.NDArray[np.uint64]]:
    """`SeedSequence(...).generate_state(4, uint64)` of each row of entropy, whose words are uint32 [n]: four of uint64 [n]."""
    key = _INIT_A

    def hashed(x: Words) -> Words:
        nonlocal key
        x = x ^ np.uint32(key)
        key = key * _MULT_A & 0xFFFFFFFF
        x = x * np.uint32(key)
        return x ^ x >> np.uint32(16)

    def mixed(x: Words, y: Words) -> Words:
        x = np.uint32(_LEFT) * x - np.uint32(_RIGHT) * y
        return x ^ x >> np.uint32(16)

    nothing = np.zeros_like(entropy[0])
    pool = [hashed(word) for word in (entropy + _POOL * [nothing])[:_POOL]]
    for i in range(_POOL):
        for j in range(_POOL):
            if i != j:
                pool[j] = mixed(pool[j], hashed(pool[i]))
    for word in entropy[_POOL:]:
        pool = [mixed(x, hashed(word)) for x in pool]
    words, key = [], _INIT_B
    for i in range(8):
        x = pool[i % _POOL] ^ np.uint32(key)
        key = key * _MULT_B & 0xFFFFFFFF
        x = x * np.uint32(key)
        words.append((x ^ x >> np.uint32(16)).astype(np.uint64))
    return [
        low | high << np.uint64(32)
        for low, high in zip(words[::2], words[1::2], strict=True)
    ]


def seed_of(seed: int, purpose: str, *ids: int) -> int:
    """A 63-bit seed for libraries that take an integer, from the same key as `rng`."""
    return int(
        _sequence(seed, purpose, ids).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


@contextmanager
def torch_seed(seed: int, purpose: str, *ids: int) -> Iterator[None]:
    """Code inside that draws from torch's CPU generator (weight initialisation, say) draws from this key.

    The generator is put back as it was afterwards.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(seed, purpose, *ids))
    try:
        yield
    finally:
        torch.set_rng_state(before)
