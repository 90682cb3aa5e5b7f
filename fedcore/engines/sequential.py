"""One client after another: obviously correct, and the oracle that every other engine is tested against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Work, alone, keep, one_thread
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Reports, Tree


class Sequential:
    """Clients in ascending order, in this process, on one thread."""

    def __init__(self, work: Work, states: StateStore) -> None:
        self.work, self.states = work, states
        self.choices: dict[str, Any] = {}
        self.late = 0

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        device = self.work.task.device
        with one_thread():  # between clients too: to wake a second thread for each costs more than it brings
            for client in clients.tolist():
                state = trees.to(self.states.get(client), device)
                yield keep(
                    self.states, fn, alone(self.work, fn, client, down, state, t)
                )

    def describe(self) -> str:
        return f"sequential on {self.work.task.device}"

    def close(self) -> None:
        pass
