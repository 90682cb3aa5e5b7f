"""Randomness by name: every draw comes from a generator keyed by (seed, purpose, round, client), never from a global one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _sequence(seed: int, purpose: str, ids: tuple[int, ...]) -> np.random.SeedSequence:
    # The purpose is hashed with CRC-32, which unlike hash() is the same in every process.
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *ids])


def rng(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """The generator for one purpose, e.g. `rng(seed, "batches", t, client)`; `ids` are non-negative."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, ids)))


def seed_of(seed: int, purpose: str, *ids: int) -> int:
    """A 63-bit seed for libraries that take an integer, from the same key as `rng`."""
    return int(_sequence(seed, purpose, ids).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
