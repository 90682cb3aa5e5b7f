"""Where the updates of a buffered schedule come from: a clock, or a recorded run."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from fedcore.clock.durations import Durations
from fedcore.clock.queue import Item, Queue, Update
from fedcore.clock.replay import ReplayPlan
from fedcore.engines.base import Work
from fedcore.rounds.timing import Kept
from fedcore.types import ClientFunction


class Sizes(NamedTuple):
    """Bytes of the messages of a piece of work."""

    down: int
    up: int


class Source(Protocol):
    """Updates one after another."""

    def begin(self, kept: Kept) -> None:
        """Go on from what a round has kept."""
        return

    def update(self, t: int, work: Work, fn: ClientFunction, sizes: Sizes) -> Update:
        """What happens up to server update t + 1."""
        ...

    def in_flight(self) -> list[Item]:
        """Work that is under way after the update, with its slots."""
        ...

    def kept(self) -> Kept:
        """What a checkpoint keeps."""
        ...


class ClockSource(Source):
    """A queue on a simulated clock."""

    def __init__(self, queue: Queue, durations: Durations, server_us: int) -> None:
        self._queue, self._durations, self._server_us = queue, durations, server_us
        self._start = queue.tensors()

    def begin(self, kept: Kept) -> None:
        self._queue.restore(kept if "queue" in kept else self._start)

    def update(self, t: int, work: Work, fn: ClientFunction, sizes: Sizes) -> Update:
        def durations(clients: np.ndarray) -> np.ndarray:
            steps = work.steps(fn, clients)
            return self._durations.of(clients, t, steps, *sizes)

        return self._queue.advance(t, durations, self._server_us)

    def in_flight(self) -> list[Item]:
        return self._queue.in_flight

    def kept(self) -> Kept:
        return self._queue.tensors()


class TraceSource(Source):
    """The updates of a recorded run."""

    def __init__(self, plan: ReplayPlan) -> None:
        self._plan, self._t = plan, 0
        self._now = 0

    def update(self, t: int, work: Work, fn: ClientFunction, sizes: Sizes) -> Update:
        update, self._t = self._plan.update(t), t
        self._now = update.now
        return update

    def in_flight(self) -> list[Item]:
        return self._plan.in_flight(self._t)

    def kept(self) -> Kept:
        # What is under way stands in the recording.
        return {"now": torch.tensor(self._now)}
