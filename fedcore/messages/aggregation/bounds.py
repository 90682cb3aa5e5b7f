"""Bounds that the server puts on every message, whatever becomes of it then.

A client chooses what it says of its number of examples, and how large its message is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.messages.aggregation.settings import DEVICE_EXAMPLES, AggregationSettings
from fedcore.messages.vectors import layout, with_leaves
from fedcore.reports import Reports


class Bounded(NamedTuple):
    """Reports within the bounds, and what they were before."""

    reports: Reports
    clipped: list[int]
    norms: dict[str, Tensor]  # by vector, float64 [n] on the CPU, where they are known


class Bounds:
    """The cap on counts, and the bound on norms."""

    def __init__(self, settings: AggregationSettings, is_devices: bool) -> None:
        """Devices have a cap where the settings name none: nobody checked their data.

        Norms are measured where there is a bound on them, or a rule.
        """
        self.clip, self.max_examples = settings.clip, settings.max_examples
        self._measures = self.clip is not None or not settings.is_mean
        if is_devices and self.max_examples is None:
            self.max_examples = DEVICE_EXAMPLES

    def capped(self, num_examples: Tensor) -> Tensor:
        """Numbers of examples, none above the cap."""
        if self.max_examples is None:
            return num_examples
        return num_examples.clamp(max=self.max_examples)

    def over(self, clients: Tensor, num_examples: Tensor) -> list[int]:
        """Clients that claim more examples than the cap."""
        if self.max_examples is None:
            return []
        claimed: list[int] = clients[num_examples.cpu() > self.max_examples].tolist()
        return claimed

    def apply(self, reports: Reports) -> Bounded:
        """Counts capped, and every vector of a message clipped by itself.

        One bound on all vectors together would leave most of it to the longest: of
        SCAFFOLD's message, the change of the control variate.
        """
        bounded = reports._replace(num_examples=self.capped(reports.num_examples))
        if not self._measures or len(reports.clients) == 0:
            return Bounded(bounded, [], {})
        leaves, places = trees.leaves(reports.up), layout(reports.up)
        is_clipped = torch.zeros(len(reports.clients), dtype=torch.bool)
        norms: dict[str, Tensor] = {}
        for name, vector in zip(places.names, places.vectors, strict=True):
            size = _norms([leaves[place] for place in vector])
            norms[name] = size.cpu()
            if self.clip is None or not bool((size > self.clip).any()):
                continue
            is_clipped |= norms[name] > self.clip
            factor = (self.clip / size).clamp(max=1)
            for place in vector:
                leaves[place] = _scaled(leaves[place], factor)
        up = with_leaves(reports.up, leaves)
        clipped = reports.clients[is_clipped].tolist()
        return Bounded(bounded._replace(up=up), clipped, norms)


def _norms(pieces: list[Tensor]) -> Tensor:
    """The L2 norm of each row of a vector in pieces [n, ...], float64 [n]."""
    norms = []
    for x in pieces:
        rows = x.reshape(len(x), -1)
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return whole


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Every row of x [n, ...] times its factor, in float64, which holds every entry."""
    return (x * factor.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)
