"""One client after another: the oracle that every other engine is tested against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Work, keep_states, one_thread, run_alone
from fedcore.engines.readout import Readout, added
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree


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
        # Between clients too: waking a second thread for each costs more than it saves.
        with one_thread():
            for client in clients.tolist():
                state = trees.to(self.states.get(client), device)
                done = run_alone(self.work, fn, client, down, state, t)
                yield keep_states(self.states, fn, done)

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weight: Weight,
        total: RunningSum,
    ) -> Iterator[Readout]:
        return added(self.each(fn, clients, down, t), weight, total)

    def describe(self) -> str:
        return f"sequential on {self.work.task.device}"

    def close(self) -> None:
        pass
