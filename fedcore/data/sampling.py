"""Examples drawn each on its own: the batches of DP-SGD.

Of a client's n examples a step takes each with probability q, whatever it takes of the
others: so the number in a batch is binomial, and may be 0. Nothing is cut off: batches
are as wide as the largest that was drawn among the clients that work together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedcore.local_settings import LocalSettings
from fedcore.rng import streams

__all__ = ["Key", "epoch_steps", "sampled_rows"]

PADDING = -1  # in place of a row number
WIDTHS = 4  # by which the examples to expect are divided, where few widths may occur


class Key(NamedTuple):
    """The key of clients' draws in a round."""

    seed: int
    clients: np.ndarray
    t: int
    plan: int

    def generators(self) -> Iterator[np.random.Generator]:
        """A generator for each client, good until the next one is asked for."""
        rows = [np.full_like(self.clients, value) for value in (self.t, self.plan)]
        ids = np.stack([rows[0], self.clients, rows[1]], 1)
        return streams(self.seed, "examples", ids)


def sampled_rows(
    held: list[np.ndarray],
    steps: np.ndarray,
    local: LocalSettings,
    key: Key | None,
    even: bool,
) -> np.ndarray:
    """Row numbers [n, K, B] of what each client's steps draw of its rows `held`.

    `steps` [n] is their number, K the largest of them, B the largest batch that was
    drawn, 1 at least; the rest is PADDING. Without a key the operating system is asked.
    `even`: B is a multiple of a quarter of the examples to expect, so that few shapes
    occur.

    >>> local = LocalSettings(batch_size=2, dp={"clip": 1.0})
    >>> key = Key(0, np.array([7]), t=0, plan=0)
    >>> rows = sampled_rows([np.arange(6)], np.array([3]), local, key, even=False)
    >>> rows[0].tolist()
    [[1, 2, 5], [3, -1, -1], [-1, -1, -1]]
    """
    draws = _of_system() if key is None else key.generators()
    drawn = []
    for rows, count, draw in zip(held, steps.tolist(), draws, strict=False):
        drawn.append(_of_client(rows, count, local, draw))
    width = 1
    for batches in drawn:
        width = max(width, max(map(len, batches), default=0))
    if even:
        longest = max(map(len, held), default=0)
        unit = max(math.ceil(local.expected_batch(longest) / WIDTHS), 1)
        width = -(-width // unit) * unit
    shape = (len(held), steps.max(initial=0), width)
    padded = np.full(shape, PADDING, dtype=np.int64)
    for client, batches in enumerate(drawn):
        for k, batch in enumerate(batches):
            padded[client, k, : len(batch)] = batch
    return padded


def epoch_steps(rate: float) -> int:
    """Steps that draw every example once, on average, at 1 / `rate` of them a step.

    >>> epoch_steps(0.3)
    4
    """
    return math.ceil(round(1 / rate, 9))


def _of_client(
    rows: np.ndarray, steps: int, local: LocalSettings, draw: np.random.Generator
) -> list[np.ndarray]:
    """The rows of each step of one client."""
    sizes = draw.binomial(len(rows), local.example_rate(len(rows)), size=steps)
    batches = []
    for size in sizes.tolist():
        # Any set of this size is as likely as another: together, each row on its own.
        chosen = draw.choice(rows, size, replace=False, shuffle=False)
        batches.append(np.sort(chosen))
    return batches


def _of_system() -> Iterator[np.random.Generator]:
    while True:
        yield np.random.default_rng()  # seeded by the operating system
