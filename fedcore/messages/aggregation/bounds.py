"""Bounds that the server puts on every message, whatever becomes of it then.

A client chooses what it says of its number of examples, and how large its message is.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fedcore import trees
from fedcore.messages.aggregation.settings import DEVICE_EXAMPLES, AggregationSettings
from fedcore.messages.vectors import layout, norms, with_leaves
from fedcore.reports import Reports
from fedcore.types import Tree


class Bounded(NamedTuple):
    """Reports within the bounds, and the clients that were not."""

    reports: Reports
    clipped: list[int]


class Bounds:
    """The cap on counts, and the bound on norms."""

    def __init__(self, settings: AggregationSettings, is_devices: bool) -> None:
        """Devices have a cap whatever the settings say: nobody checked their data."""
        self.clip, self.max_examples = settings.clip, settings.max_examples
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
        """Counts capped, and messages clipped to the bound, as one vector each."""
        capped = reports._replace(num_examples=self.capped(reports.num_examples))
        if self.clip is None or len(reports.clients) == 0:
            return Bounded(capped, [])
        sizes = norms(reports.up)
        if len(sizes) == 0 or not bool((sizes > self.clip).any()):
            return Bounded(capped, [])
        factor = (self.clip / sizes).clamp(max=1)
        up = _scaled(reports.up, factor)
        clipped = reports.clients[(sizes > self.clip).cpu()].tolist()
        return Bounded(capped._replace(up=up), clipped)


def _scaled(up: Tree, factor: Tensor) -> Tree:
    """Every vector of every client times its factor, [n]."""
    leaves = trees.leaves(up)
    for places in layout(up).vectors:
        for place in places:
            x = leaves[place]
            wide = factor.view(-1, *[1] * (x.ndim - 1))
            leaves[place] = (x * wide).to(x.dtype)  # float64 holds every finite entry
    return with_leaves(up, leaves)
