"""Sums of a round that are made in secret: what is asked, and what comes of it.

Where the engine's clients mask their messages (devices), the engine has the sum alone.
In this process the same integers are added in the clear: masks would cancel exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import one_thread
from fedcore.engines.message_shape import message_shape
from fedcore.engines.readout import Readout
from fedcore.errors import SettingsError, TooFewReports
from fedcore.messages.secure import graph
from fedcore.messages.secure.ask import (
    Ask,
    MaskingEngine,
    Part,
    Rule,
    SecretTotal,
)
from fedcore.messages.secure.measures import Summary
from fedcore.messages.secure.reading import Counts
from fedcore.messages.secure.ring import Ring, power_of_two
from fedcore.messages.secure.sending import OWN, Sending, Unusable
from fedcore.messages.secure.settings import SecureSettings
from fedcore.method import evaluates
from fedcore.reports import Reports, Weight, Weights, by_examples, equally
from fedcore.types import ClientFunction, Memory, News, Tree

if TYPE_CHECKING:
    from fedcore.rounds.doors import Desk

CPU = torch.device("cpu")
REMEMBERED = "remembered"  # in the server's state: int64 [population], see Ask.moments


@dataclass(frozen=True)
class SecretSums:
    """How a run asks for sums, and when it does not take one."""

    sending: Sending
    settings: SecureSettings
    largest: int  # clients of a round at most
    shapes: dict[object, Tree] = field(default_factory=dict)  # of messages, by function

    def ask(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weigh: Weight | Tensor | Weights = equally,
        news: News | None = None,
    ) -> Ask:
        """What clients are asked to add up; weights by the server are theirs, [n]."""
        parts = parts_of(weigh)
        n_max = max(self.largest, len(clients))
        ring = Ring(n_max, self.settings.reach, self._cap(parts))
        name = None if news is None else news.__name__
        return Ask(fn, clients, down, t, parts, ring, name)

    def _cap(self, parts: tuple[Part, ...]) -> float:
        """W of the ring: of the part with the largest weights."""
        cap = 1.0
        for _, rule in parts:
            if isinstance(rule, Tensor):
                largest = float(rule.max()) if len(rule) else 1.0
                cap = max(cap, power_of_two(largest))
            elif rule == "examples":
                cap = max(cap, self.sending.cap)
        return cap

    def refuse(self, ask: Ask, clients: Tensor) -> None:
        """Raises TooFewReports where a sum of these clients would show too much.

        `clients` are some of those that were asked, ascending: all of them, and later
        those that have trained, as devices are asked to go on (the second exchange).
        """
        n = len(clients)
        k = graph.degree(n, self.settings.neighbours)
        t = self.threshold(ask.fn, n)
        fault = graph.graph_fault(n, k, t)
        if fault is not None:
            raise TooFewReports(f"{fault} (aggregation.secure)")
        self._refuse_weights(ask, clients, t)

    def _refuse_weights(self, ask: Ask, clients: Tensor, least: int) -> None:
        """Refuse weights by the server that single one of these clients out.

        `least` is the effective number of clients that there has to be.
        """
        rows = torch.searchsorted(ask.clients, clients)
        lists = []
        for _, rule in ask.parts:
            if isinstance(rule, Tensor):
                lists.append(rule[rows].double().tolist())
        is_one_field = [part.field for part in ask.parts] == [""]
        fault = graph.lists_fault(lists, is_one_field, least, ask.ring.cap)
        if fault is not None:
            raise TooFewReports(f"{fault} (aggregation.secure)")

    def threshold(self, fn: ClientFunction, n: int) -> int:
        """t, the clients of n that have to stay to the end."""
        usual = graph.threshold(n, self.settings.neighbours)
        if evaluates(fn):
            return usual
        t = self.settings.threshold or usual
        noising = self.sending.noising
        return t if noising is None else max(t, noising.least)

    def check(self, ask: Ask, made: SecretTotal) -> None:
        """Raises TooFewReports where a sum is not to be used.

        No more is asked of the clients in it than they ask themselves before they
        unmask it: they keep what came of the work that it holds.
        """
        if made.total is None or len(made.clients) < graph.LEAST:
            raise TooFewReports(
                f"a sum of {len(made.clients)} clients: expected at least "
                f"{graph.LEAST} (aggregation.secure)"
            )
        self._refuse_weights(ask, torch.tensor(made.clients), 0)
        counted = Counts.of(made.total).clients
        if counted != len(made.clients):
            raise TooFewReports(
                f"the sum of {len(made.clients)} clients counts {counted}: its masks "
                "were not all taken off"
            )

    def shape(self, ask: Ask, make: Callable[[], Tree]) -> Tree:
        """A message of those that are summed; `make()` makes the first."""
        down = tuple((path, x.shape) for path, x in trees.flatten(ask.down).items())
        key = ask.fn.__name__, ask.news, down
        if key not in self.shapes:
            self.shapes[key] = make()
        return self.shapes[key]

    def add_up(
        self,
        ask: Ask,
        reports: Iterable[Reports],
        into: SecretTotal,
        memory: Memory | None = None,
    ) -> Iterator[Readout]:
        """Add the messages of reports in this process, in any grouping and order.

        Yields what the server is told beside the sum: who is in it, and who is not.
        `memory` has what clients remember, where the method has news. Raises
        TooFewReports where devices would not go on, once they have trained.
        """
        heard: set[int] = set()
        for report in reports:
            with one_thread():
                readout = self._added(ask, report, into, memory)
            heard.update(readout.clients.tolist())
            yield readout
        into.clients = sorted(heard)
        self.refuse(ask, torch.tensor(into.clients, dtype=torch.int64))

    def _added(
        self, ask: Ask, report: Reports, into: SecretTotal, memory: Memory | None
    ) -> Readout:
        clients, failed = report.clients, dict(report.failed)
        up, counts = trees.to((report.up, report.num_examples), CPU)
        rows: Tree = None
        if ask.news is not None and memory is not None and len(clients):
            rows = trees.to(memory.gather(clients), CPU)
        good, kept, nbytes = [], [], 0
        for row, client in enumerate(clients.tolist()):
            before = None if rows is None else trees.at(rows, row)
            message, count = trees.at(up, row), float(counts[row])
            try:
                sent = self.sending.send(ask, client, message, count, before)
            except Unusable as error:
                failed[client] = str(error)
                continue
            good.append(row)
            kept.append(sent.remembered)
            nbytes += sent.encoded.nbytes
            into.add(sent.encoded)
        there = clients[good]
        if rows is not None and memory is not None and good:
            memory.put(there, trees.stack(kept))
        return _readout(there.tolist(), failed, nbytes)


def measured(
    desk: Desk, secret: SecretSums, ask: Ask, failed: set[int]
) -> tuple[dict[str, Summary], int]:
    """(each measure over the clients of an evaluation, those with examples).

    Failures go to `failed`. Raises TooFewReports where a sum would show too much of one
    client.
    """
    secret.refuse(ask, ask.clients)
    made, engine = SecretTotal(), desk.engine
    if isinstance(engine, MaskingEngine):
        readouts = masked(engine, ask, made)
    else:
        reports = engine.each(ask.fn, ask.clients, ask.down, ask.t)
        readouts = secret.add_up(ask, reports, made)
    for readout in readouts:
        desk.heard(ask.t, readout.failed)
        failed.update(readout.failed)
    secret.check(ask, made)
    assert made.total is not None
    shape = secret.shape(ask, lambda: message_shape(desk.work, ask.fn, ask.down, ask.t))
    words = made.total.words
    summaries = secret.sending.measures.read(shape.metrics, words[OWN:])
    return summaries, Counts.of(made.total).with_examples


def masked(engine: MaskingEngine, ask: Ask, into: SecretTotal) -> Iterator[Readout]:
    """The sum of masked messages, in `into`.

    Yields what the server is told beside it: who failed, and at the end who is in it.
    """
    for report in engine.secret_sum(ask, into):
        yield _readout([], dict(report.failed), 0)
    yield _readout(into.clients, {}, 0)


def _readout(clients: list[int], failed: dict[int, str], nbytes: int) -> Readout:
    """Clients that are in a sum, and those that are not; of neither any number."""
    there = torch.tensor(clients, dtype=torch.int64)
    return Readout(there, torch.ones(len(clients)), {}, failed, True, nbytes)


def with_moments(ask: Ask, kept: dict[str, Tensor]) -> Ask:
    """The ask, with what the server counts on each client to remember."""
    if ask.news is None:
        return ask
    moments = torch.full((len(ask.clients),), -1)
    if REMEMBERED in kept:
        moments = kept[REMEMBERED][ask.clients]
    return ask._replace(moments=moments)


def remember(
    kept: dict[str, Tensor], ask: Ask, made: SecretTotal, population: int
) -> None:
    """Note the moment of the clients in a sum of news, where devices remember it."""
    if ask.news is None or made.moment < 0:
        return
    moments = torch.full((population,), -1)
    if REMEMBERED in kept:
        moments = kept[REMEMBERED].clone()
    moments[made.clients] = made.moment
    kept[REMEMBERED] = moments


def moments_alone(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what the server keeps, that which devices are counted on to remember."""
    return {name: kept[name] for name in (REMEMBERED,) if name in kept}


def roster_of(
    weight: Weight | Tensor | Weights, asked: Tensor, there: Tensor
) -> Weight | Tensor | Weights:
    """The weights, those by the server of the clients alone that are there.

    A tensor has one for each of those that were asked, ascending.
    """
    if isinstance(weight, Mapping):
        fields: dict[str, Weight | Tensor] = {}
        for name, own in weight.items():
            fields[name] = _narrowed(own, asked, there)
        return fields
    return _narrowed(weight, asked, there)


def _narrowed(weight: Weight | Tensor, asked: Tensor, there: Tensor) -> Weight | Tensor:
    if not isinstance(weight, Tensor):
        return weight
    return weight[torch.searchsorted(asked, there).to(weight.device)]


def parts_of(weigh: Weight | Tensor | Weights) -> tuple[Part, ...]:
    """The rules of a message's weights, as clients are told them.

    Raises SettingsError for weights that follow from anything else than examples.
    """
    if isinstance(weigh, Mapping):
        return tuple(Part(name, _rule(own)) for name, own in weigh.items())
    return (Part("", _rule(weigh)),)


def _rule(weigh: Weight | Tensor) -> Rule:
    if isinstance(weigh, Tensor):
        return weigh.double().cpu()
    if weigh is by_examples:
        return "examples"
    if weigh is equally:
        return "equally"
    name = getattr(weigh, "__qualname__", weigh)
    raise SettingsError(
        f"aggregation.secure = true: {name} makes weights of what the server is not "
        "told; weigh by_examples, equally, or by a tensor known before clients are "
        "asked"
    )
