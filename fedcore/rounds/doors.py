"""The two doors of a round, between a method and the engine that runs its clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Engine, Work
from fedcore.engines.message_shape import message_shape
from fedcore.engines.readout import Readout, read_finite
from fedcore.errors import RunError, SettingsError
from fedcore.messages.aggregation.aggregator import Aggregator
from fedcore.messages.aggregation.bounds import Bounds
from fedcore.method import Round, evaluates
from fedcore.reports import (
    Mean,
    Reports,
    RunningSum,
    Weight,
    Weights,
    by_examples,
    equally,
    failures,
    joined,
    weights_of,
)
from fedcore.rounds.reference import Reference
from fedcore.rounds.secret import SecretSums, roster_of
from fedcore.rounds.secret_mean import mean_in_secret
from fedcore.rounds.tally import Tally
from fedcore.rounds.timing import Timing
from fedcore.types import ClientFunction, News, Tree

if TYPE_CHECKING:
    from fedcore.rounds.captures import Captures
    from fedcore.rounds.client_table import ClientTable
    from fedcore.rounds.observer import Notes, Observer
    from fedcore.rounds.signals import StopRequest


class Receiving(NamedTuple):
    """The server's treatment of messages before they become one."""

    bounds: Bounds
    aggregator: Aggregator | None  # None: the mean
    reference: Reference | None  # where the rule needs the server's own message
    remedy: str  # advice to one whose model was ruined all the same
    secret: SecretSums | None = None  # only sums can be read


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
    receiving: Receiving
    timing: Timing = field(default_factory=Timing)
    # Whether the weight that divides a mean has the discounts of old answers in it.
    counts_discount: bool = False

    def heard(self, t: int, failed: Mapping[int, str]) -> None:
        """Name the clients that were left out in round t, each reason once.

        Raises Interrupted where the run was told to stop.
        """
        self.stop.heed()
        for client, reason in failed.items():
            message = f"round {t + 1}: client {client} left out: {reason}"
            self.notes.once(reason, message)


class Call(NamedTuple):
    """One call of a client function, for messages that the server looks at."""

    fn: ClientFunction
    clients: Tensor  # those that hear of it
    down: Tree
    asked: int  # those that were asked, whether they are there or not
    weigh: Weight | Weights | None  # how a mean weighs what they send


@dataclass(frozen=True)
class OpenRound(Round):
    """A round whose doors lead to an engine."""

    desk: Desk = field(kw_only=True)
    tally: Tally = field(kw_only=True)
    absent: frozenset[int] = field(kw_only=True)  # clients that drop out
    # What a rule, and attacks, keep from round to round; replaced by this round.
    aggregation: dict[str, Tensor] = field(kw_only=True)
    adversary: dict[str, Tensor] = field(kw_only=True)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        method, has_message = self.desk.work.method, bool(trees.leaves(down))
        if has_message and self.desk.receiving.secret is not None:
            raise SettingsError(
                f"aggregation.secure = true: {type(method).__name__} takes single "
                "updates through Round.each, and sums alone can be read"
            )
        if has_message and not method.needs_updates:
            raise TypeError(
                f"{type(method).__name__} takes single updates through Round.each: say "
                "needs_updates = True in the class, or use Round.mean"
            )
        asked = len(clients)
        clients = self._ask(fn, clients, down)
        for reports in self._received(Call(fn, clients, down, asked, None)):
            if len(reports.clients) == 0:
                continue
            if self.tally.is_secret and trees.leaves(reports.up):
                raise SettingsError(
                    f"aggregation.secure = true: {fn.__name__} sends numbers of single "
                    "clients, and sums alone can be read"
                )
            yield reports

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        weight: Weight | Tensor | Weights = by_examples,
        news: News | None = None,
    ) -> Mean:
        weigh, asked = weights_of(weight, clients), len(clients)
        secret = self.desk.receiving.secret
        if secret is not None:
            there = self._ask(fn, clients, down)
            call = Call(fn, there, down, asked, weigh)
            roster = roster_of(weight, clients, there)
            return mean_in_secret(self, secret, call, roster, news)
        clients = self._ask(fn, clients, down)
        call = Call(fn, clients, down, asked, weigh)
        total = RunningSum(self.desk.counts_discount)
        aggregator = self.desk.receiving.aggregator
        if aggregator is not None and not evaluates(fn):
            return self._by_rule(aggregator, call)
        if self._needs_updates(fn) or news or isinstance(weigh, Mapping):
            for reports in self._received(call):
                total.add_by(self.with_news(reports, news), weigh)
        elif len(clients):
            engine, capped = self.desk.engine, self._capped(weigh)
            for readout in engine.mean(fn, clients, down, self.t, capped, total):
                self._count(fn, down, readout)
        return total.mean(lambda: self.zero_message(fn, down, news))

    def _needs_updates(self, fn: ClientFunction) -> bool:
        """Whether a mean has to look at single updates."""
        desk = self.desk
        is_attacked = desk.work.adversary.is_due(fn, self.t)
        is_bounded = desk.receiving.bounds.clip is not None and not evaluates(fn)
        has_waited = desk.timing.is_buffering and not evaluates(fn)
        return desk.captures.wanted or is_attacked or is_bounded or has_waited

    def _capped(self, weigh: Weight) -> Weight:
        """The weights of clients that claim no more examples than the cap."""
        bounds = self.desk.receiving.bounds
        return lambda clients, claimed: weigh(clients, bounds.capped(claimed))

    def _by_rule(self, aggregator: Aggregator, call: Call) -> Mean:
        """The mean that the rule makes of the updates, once all of them are in.

        Methods with news, or with weights by field, refuse rules.
        """
        name, kept, weigh = call.fn.__name__, self.aggregation, call.weigh
        assert weigh is not None
        assert not isinstance(weigh, Mapping)
        if not aggregator.uses_weights:
            call = call._replace(weigh=equally)
        clients, asked = call.clients, call.asked
        if self.desk.timing.is_buffered:  # a rule is about the answers in the buffer
            clients, asked = (
                torch.tensor(sorted(self.tally.asked)),
                len(self.tally.asked),
            )
        with closing(aggregator.gather(clients)) as gathered:
            for reports in self._received(call):
                weights = weigh(reports.clients, reports.num_examples)
                if reports.discount is not None and aggregator.uses_weights:
                    weights = weights * reports.discount.to(weights)
                gathered.add(reports, weights)
            own, state = self._own_message(call)
            verdict = aggregator.judge(gathered, name, self.t, asked, kept, own)
        kept.update(state)
        kept.update(verdict.kept)
        for vector, aggregated in verdict.aggregated.items():
            self.tally.aggregation[name, vector] = aggregated
        return verdict.mean

    def _received(self, call: Call) -> Iterator[Reports]:
        """Usable updates, within the server's bounds; everything is counted."""
        fn, clients, down, *_ = call
        if self.desk.timing.is_buffering and not evaluates(fn):
            reports = self.desk.timing.answers(fn, down)
        elif len(clients) == 0:
            return
        elif self.desk.work.adversary.is_due(fn, self.t):
            reports = self.attacked(call)
        else:
            reports = self.desk.engine.each(fn, clients, down, self.t)
        for usable, readout in read_finite(reports):
            bounded = self.desk.receiving.bounds.apply(usable)
            self.tally.add_norms(bounded.norms)
            self.tally.clipped.update(bounded.clipped)
            self.desk.captures.add(self.t, fn, down, bounded.reports)
            self._count(fn, down, readout, usable.versions)
            yield bounded.reports

    def attacked(self, call: Call) -> Iterator[Reports]:
        """The reports with those of malicious clients replaced, once all are in."""
        fn, clients, down, asked, weigh = call
        arrived: list[Reports] = []
        for report in self.desk.engine.each(fn, clients, down, self.t):
            if len(report.clients):
                arrived.append(report)
            yield failures(report)
        if not arrived:
            return
        honest, weights, trial = joined(arrived), None, None
        if weigh is not None and not isinstance(weigh, Mapping):
            claimed = self.desk.receiving.bounds.capped(honest.num_examples)
            weights = weigh(honest.clients, claimed)
        work, aggregator = self.desk.work, self.desk.receiving.aggregator
        if aggregator is not None and work.adversary.aims_at_rule:
            own, _ = self._own_message(call)
            trial = aggregator.trial(fn.__name__, self.t, asked, self.aggregation, own)
        replaced, kept = work.adversary.replaced(
            honest, fn, self.t, down, self.adversary, trial, weights, work.links
        )
        self.adversary.update(kept)
        yield replaced

    def _own_message(self, call: Call) -> tuple[Tree, dict[str, Tensor]]:
        """The server's own message, and what it keeps as a client, for a rule."""
        reference = self.desk.receiving.reference
        if reference is None:
            return None, {}
        return reference.message(call.fn, call.down, self.t, self.aggregation)

    def _ask(self, fn: ClientFunction, clients: Tensor, down: Tree) -> Tensor:
        """The clients that hear the message, entered as asked."""
        if not trees.leaves(down):  # work without a message cannot be missed
            self._refuse_twice(fn, clients)
            return clients
        timing = self.desk.timing
        asked = timing.ask(fn, clients, down, self.absent)
        self.tally.asked.update(asked.members)
        self.tally.bytes_down += asked.messages * trees.nbytes(down)
        if asked.left_out:
            self.tally.leave_out(fn, asked.left_out)
            self.desk.heard(self.t, asked.left_out)
        if not timing.is_buffered:  # a client gets a version once
            self._refuse_twice(fn, asked.clients)
        return asked.clients

    def _refuse_twice(self, fn: ClientFunction, clients: Tensor) -> None:
        if self.tally.hides_scalars and not evaluates(fn):
            self.tally.refuse_twice(fn, clients)

    def _count(
        self,
        fn: ClientFunction,
        down: Tree,
        readout: Readout,
        versions: Mapping[int, int] | None = None,
    ) -> None:
        desk, tally = self.desk, self.tally
        if not evaluates(fn):
            tally.remember(fn, down, readout)
        desk.heard(self.t, readout.failed)
        if tally.hides_scalars:
            readout = readout._replace(metrics={})
        tally.add(fn, readout, versions)
        tally.capped.update(
            desk.receiving.bounds.over(readout.clients, readout.num_examples)
        )
        desk.observer.client_done(self.t, len(tally.reported), len(tally.asked))
        if len(readout.clients) and not tally.is_secret:
            desk.table.add(self.t + 1, fn.__name__, readout, versions)

    def zero_message(
        self, fn: ClientFunction, down: Tree, news: News | None = None
    ) -> Tree:
        try:
            message = message_shape(self.desk.work, fn, down, self.t, news)
        except Exception as error:  # the task's first example may be the broken one
            raise RunError(
                f"nobody reported, and the server cannot run {fn.__name__} on an "
                f"example of its own: {error}"
            ) from error
        return trees.zeros_like(message)
