"""The mean through a round's door, where nothing of messages can be read but sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.engines.readout import Readout
from fedcore.messages.secure.ask import Ask, MaskingEngine, SecretTotal
from fedcore.messages.secure.reading import recovered
from fedcore.reports import Mean, RunningSum, Weight, Weights
from fedcore.rounds.secret import SecretSums, masked, remember, with_moments
from fedcore.types import ClientFunction, News, Tree

if TYPE_CHECKING:
    from fedcore.rounds.doors import Call, OpenRound


def mean_in_secret(
    r: OpenRound,
    secret: SecretSums,
    call: Call,
    roster: Weight | Tensor | Weights,
    news: News | None,
) -> Mean:
    """The mean of the messages of a call in round `r`.

    Raises TooFewReports where it would show too much of one client.
    """
    fn, clients, down, *_ = call

    def zeros() -> Tree:
        return r.zero_message(fn, down, news)

    if len(clients) == 0:
        return RunningSum().mean(zeros)
    ask = secret.ask(fn, clients, down, r.t, roster, news)
    secret.refuse(ask, clients)
    made = SecretTotal()
    for readout in _added(r, secret, call, ask, made):
        _count(r, fn, down, readout)
    r.tally.bytes_up += made.bytes_up
    secret.check(ask, made)
    remember(r.aggregation, ask, made, r.population)
    total = recovered(ask, secret.shape(ask, zeros), made, secret.sending.noising)
    guarded = secret.guard(fn, len(made.clients), len(clients))
    r.tally.add_sum(fn.__name__, total, guarded)
    weight = torch.tensor(total.weight, dtype=torch.float64)
    there = torch.tensor(made.clients)
    return Mean(lambda: total.message, weight, there, total.rounding)


def _added(
    r: OpenRound, secret: SecretSums, call: Call, ask: Ask, made: SecretTotal
) -> Iterator[Readout]:
    """Fill `made`: on devices under masks, in this process in the clear."""
    engine = r.desk.engine
    if isinstance(engine, MaskingEngine):
        yield from masked(engine, with_moments(ask, r.aggregation), made)
        return
    if r.desk.work.adversary.is_due(ask.fn, r.t):
        reports = r.attacked(call)
    else:
        reports = engine.each(ask.fn, ask.clients, ask.down, r.t)
    yield from secret.add_up(ask, reports, made, r.memory)


def _count(r: OpenRound, fn: ClientFunction, down: Tree, readout: Readout) -> None:
    """Count clients of whom nothing but their presence is known."""
    desk, tally = r.desk, r.tally
    tally.remember(fn, down, readout)
    desk.heard(r.t, readout.failed)
    tally.add(fn, readout)
    desk.observer.client_done(r.t, len(tally.reported), len(tally.asked))
