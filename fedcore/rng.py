"""Randomness by name: every draw comes from a generator with a key.

The key is (seed, purpose, round, client) or a part of it; no draw comes from a global
generator.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "Words",
    "rng",
    "seed_of",
    "streams",
    "torch_seed",
    "uniforms",
]

Words = npt.NDArray[np.uint32]


def _sequence(seed: int, purpose: str, ids: tuple[int, ...]) -> np.random.SeedSequence:
    # The purpose is hashed with CRC-32, which unlike hash() is the same everywhere.
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *ids])


def rng(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """The generator for one purpose; `ids` are non-negative, e.g. round and client.

    >>> draws = rng(7, "batches", 3, 12).permutation(5)
    >>> bool((draws == rng(7, "batches", 3, 12).permutation(5)).all())
    True
    """
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, ids)))


def seed_of(seed: int, purpose: str, *ids: int) -> int:
    """A 63-bit seed for libraries that take an integer, from the same key as `rng`."""
    words = _sequence(seed, purpose, ids).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


@contextmanager
def torch_seed(
    seed: int, purpose: str, *ids: int, device: torch.device | None = None
) -> Iterator[None]:
    """Code inside that draws from torch's generators draws from this key.

    The initial weights of a layer are such draws. The CPU's generator is put back as it
    was afterwards; nothing else here draws from that of a GPU, `device`.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(seed, purpose, *ids))
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed_of(seed, purpose, *ids))
    try:
        yield
    finally:
        torch.set_rng_state(before)


# Many generators at once: NumPy's own seeding, vectorised over keys.

_FEW = 12  # keys that NumPy itself is faster for
_PCG = 0x2360ED051FC65DA44385DF649FCCF645  # the multiplier of PCG64 (O'Neill 2014)
_POOL = 4  # words of NumPy's SeedSequence, whose constants follow (O'Neill, 2015)
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_LEFT, _RIGHT = 0xCA01F9DD, 0x4973F715
_MASK_32 = (1 << 32) - 1
_MASK_128 = (1 << 128) - 1


def streams(seed: int, purpose: str, ids: np.ndarray) -> Iterator[np.random.Generator]:
    """`rng(seed, purpose, *row)` for each row of `ids` [n, k], in a third of the time.

    A generator is good until the next one is asked for. Raises ValueError for ids that
    are negative, or have more than 32 bits.
    """
    state = _state(_entropy(seed, purpose, ids))
    bits = np.random.PCG64()
    generator = np.random.Generator(bits)
    for a, b, c, d in zip(*(word.tolist() for word in state), strict=True):
        start = a << 64 | b
        increment = ((c << 64 | d) << 1 | 1) & _MASK_128
        position = ((start + increment) * _PCG + increment) & _MASK_128
        bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": position, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }
        yield generator


def uniforms(seed: int, purpose: str, ids: np.ndarray) -> npt.NDArray[np.float64]:
    """Four uniform numbers in (0, 1) for each row of `ids` [n, k]: float64 [n, 4].

    A row of them is a function of (seed, purpose, *row) and of nothing else; one number
    of a key cannot be told from chance by the others. They are made from the words that
    would seed `rng(seed, purpose, *row)`: use another purpose for each of the two.
    Raises ValueError for ids that are negative, or have more than 32 bits.

    >>> few = uniforms(7, "clock", np.array([[3], [12]]))
    >>> few.shape, bool((few[1] == uniforms(7, "clock", np.array([[12]]))).all())
    ((2, 4), True)
    """
    _refuse_wide(ids)
    if len(ids) <= _FEW:
        state: list[npt.NDArray[np.uint64]] = [np.empty(0, dtype=np.uint64)]
        for row in ids.tolist():
            sequence = _sequence(seed, purpose, tuple(row))
            state.append(sequence.generate_state(4, np.uint64).astype(np.uint64))
        words = np.concatenate(state).reshape(-1, 4)
    else:
        words = np.stack(_state(_entropy(seed, purpose, ids)), axis=1)
    # The middles of 2^52 equal parts: neither 0 nor 1 is among them. With a bit more,
    # the last middle would be rounded to 1.
    middles = (words >> np.uint64(12)).astype(np.float64) + 0.5
    return middles * 2.0**-52


def _entropy(seed: int, purpose: str, ids: np.ndarray) -> list[Words]:
    """The words of the keys (seed, purpose, *row), each uint32 [n]."""
    _refuse_wide(ids)
    entropy: list[Words] = []
    for word in [*_words(seed), *_words(zlib.crc32(purpose.encode()))]:
        entropy.append(np.full(len(ids), word, dtype=np.uint32))
    for column in ids.T:
        entropy.append(column.astype(np.uint32))
    return entropy


def _refuse_wide(ids: np.ndarray) -> None:
    if (ids >> 32).any():
        raise ValueError(
            "ids of generators are from 0 to 2^32 - 1; "
            f"found {ids.min()} to {ids.max()}"
        )


def _words(n: int) -> list[int]:
    """The 32-bit words of a number, the lowest first; one for 0."""
    return [n >> shift & _MASK_32 for shift in range(0, max(n.bit_length(), 1), 32)]


def _state(entropy: list[Words]) -> list[npt.NDArray[np.uint64]]:
    """`SeedSequence(...).generate_state(4, uint64)` of each row of entropy.

    The words of entropy are uint32 [n]; four of uint64 [n] are returned.
    """
    key = _INIT_A

    def hashed(x: Words) -> Words:
        nonlocal key
        x = x ^ np.uint32(key)
        key = key * _MULT_A & _MASK_32
        x = x * np.uint32(key)
        return x ^ x >> np.uint32(16)

    def mixed(x: Words, y: Words) -> Words:
        x = np.uint32(_LEFT) * x - np.uint32(_RIGHT) * y
        return x ^ x >> np.uint32(16)

    padded = entropy + _POOL * [np.zeros_like(entropy[0])]
    pool = [hashed(word) for word in padded[:_POOL]]
    for i in range(_POOL):
        for j in range(_POOL):
            if i != j:
                pool[j] = mixed(pool[j], hashed(pool[i]))
    for word in entropy[_POOL:]:
        pool = [mixed(x, hashed(word)) for x in pool]
    words, key = [], _INIT_B
    for i in range(8):
        x = pool[i % _POOL] ^ np.uint32(key)
        key = key * _MULT_B & _MASK_32
        x = x * np.uint32(key)
        words.append((x ^ x >> np.uint32(16)).astype(np.uint64))
    pairs = zip(words[::2], words[1::2], strict=True)
    return [low | high << np.uint64(32) for low, high in pairs]
