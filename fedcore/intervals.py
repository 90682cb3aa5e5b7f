"""Participation intervals: how often a client takes part, learned from when it did.

Wang and Ji (FedAU, ICLR 2024), Algorithm 2.

    S_n      length of an interval of client n: rounds from one participation (or the
             start) to the next, that next one included
    omega_n  mean of the intervals closed so far, which goes to 1 / p_n
    K        cut-off: an absence of K rounds closes an interval

Intervals tile the past, so their mean is (t - s) / M, with M closed and s rounds in the
open one: two integers a client, exact, and touched only when the client takes part.
Participation means that the update arrived.

>>> x = after(start(population=2), [torch.tensor([1])], t=0)
>>> x = after(x, [torch.tensor([1])], t=3)
>>> omega(x, torch.tensor([0, 1]), t=4)  # client 1 in rounds 0 and 3: 4 rounds / 2
tensor([1., 2.], dtype=torch.float64)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Intervals",
    "after",
    "omega",
    "start",
]


class Intervals(NamedTuple):
    """The intervals of every client of the population, int64 [N]."""

    closed: Tensor  # c, intervals closed when it last took part
    seen: Tensor  # e, rounds elapsed when it last took part; 0 = never did


def start(population: int) -> Intervals:
    """The intervals before the first round."""
    return Intervals(
        torch.zeros(population, dtype=torch.int64),
        torch.zeros(population, dtype=torch.int64),
    )


def _tiles(
    x: Intervals, clients: Tensor, t: int, cutoff: int | None
) -> tuple[Tensor, Tensor]:
    """(M, s) at the start of round t: closed intervals, rounds in the open one."""
    gap = t - x.seen[clients]
    assert bool((gap >= 0).all()), "a client was seen in a round that is yet to come"
    if cutoff is None:
        return x.closed[clients], gap
    return x.closed[clients] + gap // cutoff, gap % cutoff


def omega(x: Intervals, clients: Tensor, t: int, cutoff: int | None = None) -> Tensor:
    """The estimate of 1 / p_n at the start of round t, from earlier rounds only.

    float64 [n]; 1 before an interval closed.
    """
    m, s = _tiles(x, clients, t, cutoff)
    return torch.where(m > 0, (t - s).double() / m.clamp(min=1), 1.0)


def after(
    x: Intervals, arrived: list[Tensor], t: int, cutoff: int | None = None
) -> Intervals:
    """The intervals after round t, in which the updates of `arrived` came.

    `arrived` are ids, in any grouping. `x` stays as it is.
    """
    if not arrived:
        return x
    clients = torch.cat(arrived)
    m, _ = _tiles(x, clients, t, cutoff)
    where = (clients.to(x.closed.device),)
    return Intervals(
        x.closed.index_put(where, m + 1),
        x.seen.index_put(where, torch.full_like(m, t + 1)),
    )
