"""The buffered schedule: who works on which version, and whose answers are in."""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """A piece of work in flight; times in microseconds since the run's start."""

    finish: int
    n: int  # running number of pieces of work that were given out
    client: int
    version: int  # the model that it starts from, by the number of server updates
    slot: int  # where what it will bring waits; -1 before that
    sent: int


class Arrived(NamedTuple):
    """Work that has come to its end."""

    item: Item
    outcome: str  # "" usable; dropout, unavailable and stale do not fill the buffer


class Update(NamedTuple):
    """What happens up to one server update."""

    sent: list[int]  # clients that get this version, ascending
    arrived: list[Arrived]  # ascending by version and client
    now: int


import heapq
from collections.abc import Callable
import numpy as np
import torch
from torch import Tensor
from fedcore.rng import rng
from fedcore.clock.settings import Buffered
from fedcore.clock.windows import Windows


class Queue:
    def __init__(
        self,
        settings: Buffered,
        population: int,
        seed: int,
        *,
        dropout: float = 0.0,
        windows: Windows | None = None,
    ) -> None:
        self.s, self.N, self.seed = settings, population, seed
        self.now, self.n, self.q = 0, 0, []

    @property
    def in_flight(self) -> list[Item]:
        return sorted(self.q)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "now": torch.tensor(self.now),
            "n": torch.tensor(self.n),
            "queue": torch.tensor(
                [list(i) for i in sorted(self.q)], dtype=torch.int64
            ).reshape(-1, 6),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.now, self.n = int(tensors["now"]), int(tensors["n"])
        self.q = [Item(*r) for r in tensors["queue"].tolist()]
        heapq.heapify(self.q)

    def advance(
        self, t: int, durations: Callable[[np.ndarray], np.ndarray], server_us: int = 0
    ) -> Update:
        given, back, j = set(), [], 0

        def refill(first: bool) -> None:
            nonlocal j
            busy = {i.client for i in self.q}
            free = [c for c in range(self.N) if c not in busy and c not in given]
            m = min(self.s.concurrency - len(self.q), len(free))
            if m <= 0:
                return
            g = (
                rng(self.seed, "participation", t)
                if first
                else rng(self.seed, "dispatch", t, j)
            )
            j += not first
            pick = (
                free
                if m == len(free)
                else sorted(
                    np.array(free)[
                        g.choice(len(free), m, replace=False, shuffle=False)
                    ].tolist()
                )
            )
            for c, d in zip(pick, durations(np.array(pick)).tolist()):
                heapq.heappush(self.q, Item(self.now + d, self.n, c, t, -1, self.now))
                self.n += 1
                given.add(c)

        refill(True)
        while len(back) < self.s.buffer and self.q:
            i = heapq.heappop(self.q)
            self.now = i.finish
            back.append(Arrived(i, ""))
            if len(back) < self.s.buffer and (
                not self.q or self.q[0].finish > self.now
            ):
                refill(False)
        taken = {i.slot for i in self.q}
        free_slots = (x for x in range(self.s.concurrency) if x not in taken)
        self.q = [
            i if i.version != t else i._replace(slot=next(free_slots))
            for i in sorted(self.q, key=lambda i: i.n)
        ]
        heapq.heapify(self.q)
        return Update(
            sorted(given),
            sorted(back, key=lambda a: (a.item.version, a.item.client)),
            self.now,
        )
