"""The two doors of a round, between a method and the engine that runs its clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Engine, Work
from fedcore.engines.message_shape import message_shape
from fedcore.engines.readout import Readout, read_finite
from fedcore.errors import RunError
from fedcore.method import Round, evaluates
from fedcore.reports import (
    Mean,
    Reports,
    RunningSum,
    Weight,
    by_examples,
    weight_of,
)
from fedcore.rounds.tally import Tally
from fedcore.types import ClientFunction, Tree

if TYPE_CHECKING:
    from fedcore.rounds.captures import Captures
    from fedcore.rounds.client_table import ClientTable
    from fedcore.rounds.observer import Notes, Observer
    from fedcore.rounds.signals import StopRequest


@dataclass
class Desk:
    """Where every answer of a run's clients is counted, logged and captured."""

    engine: Engine
    work: Work
    table: ClientTable
    captures: Captures
    observer: Observer
    notes: Notes
    stop: StopRequest

    def heard(self, t: int, failed: Mapping[int, str]) -> None:
        """Name the clients that were left out in round t, each reason once.

        Raises Interrupted where the run was told to stop.
        """
        self.stop.heed()
        for client, reason in failed.items():
            message = f"round {t + 1}: client {client} left out: {reason}"
            self.notes.once(reason, message)


@dataclass(frozen=True)
class OpenRound(Round):
    """A round whose doors lead to an engine."""

    desk: Desk = field(kw_only=True)
    tally: Tally = field(kw_only=True)
    absent: frozenset[int] = field(kw_only=True)  # clients that drop out

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        method, has_message = self.desk.work.method, bool(trees.leaves(down))
        if has_message and not method.needs_updates:
            raise TypeError(
                f"{type(method).__name__} takes single updates through Round.each: say "
                "needs_updates = True in the class, or use Round.mean"
            )
        clients = self._ask(fn, clients, down)
        if len(clients) == 0:
            return
        reports = self.desk.engine.each(fn, clients, down, self.t)
        for usable, readout in read_finite(reports):
            self._count(fn, down, readout)
            if len(usable.clients):
                self.desk.captures.add(self.t, fn, down, usable)
                yield usable

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        weight: Weight | Tensor = by_examples,
    ) -> Mean:
        total, weigh = RunningSum(), weight_of(weight, clients)
        clients = self._ask(fn, clients, down)
        if len(clients) and self.desk.captures.wanted:
            self._capture(fn, clients, down, weigh, total)
        elif len(clients):
            engine = self.desk.engine
            for readout in engine.mean(fn, clients, down, self.t, weigh, total):
                self._count(fn, down, readout)
        return total.mean(lambda: self.zero_message(fn, down))

    def _capture(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        weigh: Weight,
        total: RunningSum,
    ) -> None:
        """The sum in a round that an audit looks at, which needs single updates."""
        reports = self.desk.engine.each(fn, clients, down, self.t)
        for usable, readout in read_finite(reports):
            total.add(usable, weigh(usable.clients, usable.num_examples))
            self.desk.captures.add(self.t, fn, down, usable)
            self._count(fn, down, readout)

    def _ask(self, fn: ClientFunction, clients: Tensor, down: Tree) -> Tensor:
        """The clients that hear the message, entered as asked."""
        if not trees.leaves(down):  # work without a message cannot be missed
            self._refuse_twice(fn, clients)
            return clients
        if self.absent:
            is_there = [client not in self.absent for client in clients.tolist()]
            clients = clients[is_there]
        self.tally.asked.update(clients.tolist())
        self.tally.bytes_down += len(clients) * trees.nbytes(down)
        self._refuse_twice(fn, clients)
        return clients

    def _refuse_twice(self, fn: ClientFunction, clients: Tensor) -> None:
        if self.tally.hides_scalars and not evaluates(fn):
            self.tally.refuse_twice(fn, clients)

    def _count(self, fn: ClientFunction, down: Tree, readout: Readout) -> None:
        desk, tally = self.desk, self.tally
        if not evaluates(fn):
            tally.remember(fn, down, readout)
        desk.heard(self.t, readout.failed)
        if tally.hides_scalars:
            readout = readout._replace(metrics={})
        tally.add(fn, readout)
        desk.observer.client_done(self.t, len(tally.reported), len(tally.asked))
        if len(readout.clients):
            desk.table.add(self.t + 1, fn.__name__, readout)

    def zero_message(self, fn: ClientFunction, down: Tree) -> Tree:
        try:
            message = message_shape(self.desk.work, fn, down, self.t)
        except Exception as error:  # the task's first example may be the broken one
            raise RunError(
                f"nobody reported, and the server cannot run {fn.__name__} on an "
                f"example of its own: {error}"
            ) from error
        return trees.zeros_like(message)
