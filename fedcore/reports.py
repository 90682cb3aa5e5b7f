"""Reports of clients, and weighted sums and means of what they sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.errors import TooFewReports
from fedcore.types import Tree

__all__ = ["Mean", "Reports", "RunningSum", "Weight", "by_examples", "equally"]


class Reports(NamedTuple):
    """The reports of n clients; every tensor has a leading client axis."""

    clients: Tensor  # [n] int64 logical ids, ascending
    up: Tree  # [n, ...]
    num_examples: Tensor  # [n] float32, the examples that the work was done on
    # Clients that did not report, with the reason.
    failed: Mapping[int, str] = MappingProxyType({})
    # s(tau) of each, [n] float64, where answers to older versions of the model weigh
    # less; None where all of them are fresh.
    discount: Tensor | None = None
    # The version of the model, by its number of server updates, that the work of each
    # client, failed ones too, started from; None: this round's.
    versions: Mapping[int, int] | None = None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The scalars among what the clients sent, by field name, each [n].

        The loop logs them.
        """
        if not hasattr(self.up, "_asdict"):
            return {}
        fields: dict[str, Any] = self.up._asdict()
        scalars: dict[str, Tensor] = {}
        for name, value in fields.items():
            if isinstance(value, Tensor) and value.ndim == 1:
                scalars[name] = value
        return scalars | dict(fields.get("metrics", {}))


def joined(reports: Sequence[Reports]) -> Reports:
    """Several reports as one, in ascending order of clients; failures are left out."""
    clients = torch.cat([report.clients for report in reports])
    order = clients.argsort()
    up = trees.map(lambda *xs: torch.cat(xs), *[report.up for report in reports])
    num_examples = torch.cat([report.num_examples for report in reports])
    rows = order.to(num_examples.device)
    return Reports(clients[order], trees.at(up, rows), num_examples[rows])


def failures(report: Reports) -> Reports:
    """Only the clients of a report that brought nothing."""
    nobody = torch.empty(0, dtype=torch.int64)
    return Reports(nobody, {}, torch.empty(0), report.failed)


Weight = Callable[[Tensor, Tensor], Tensor]
"""(client ids [n], their numbers of examples [n]) -> the weight of each, [n]."""


def by_examples(clients: Tensor, num_examples: Tensor) -> Tensor:
    """Weights of a mean in which every example counts the same, [n].

    >>> by_examples(torch.tensor([4, 7]), torch.tensor([10.0, 30.0]))
    tensor([10., 30.])
    """
    return num_examples


def equally(clients: Tensor, num_examples: Tensor) -> Tensor:
    """Weights of a mean in which every client counts the same, [n].

    One without examples, too: its objective is zero, and it sends a change of zero.

    >>> equally(torch.tensor([4, 7]), torch.tensor([10.0, 30.0]))
    tensor([1., 1.])
    """
    return torch.ones_like(num_examples)


Weights = Mapping[str, Weight | Tensor]
"""A weight for every field of a message that has one of its own, by the field's name.

The other fields count equally.
"""


def weight_of(weight: Weight | Tensor, clients: Tensor) -> Weight:
    """A weight as a function; a tensor holds one weight for each of `clients`.

    Raises ValueError where a tensor has another length.
    """
    if not isinstance(weight, Tensor):
        return weight
    if weight.shape != clients.shape:
        raise ValueError(
            f"weights of shape {tuple(weight.shape)} for {len(clients)} clients: "
            "expected one weight a client"
        )
    if bool((clients[1:] <= clients[:-1]).any()):
        raise ValueError(
            "one weight a client needs ascending client ids, found "
            f"{clients.tolist()[:10]}: sort them, and the weights with them"
        )

    def by_client(asked: Tensor, num_examples: Tensor) -> Tensor:
        return weight[torch.searchsorted(clients, asked)]

    return by_client


def weights_of(weight: Weight | Tensor | Weights, clients: Tensor) -> Weight | Weights:
    """As `weight_of`, of every field where each has its own."""
    if not isinstance(weight, Mapping):
        return weight_of(weight, clients)
    return {name: weight_of(of_field, clients) for name, of_field in weight.items()}


@dataclass(frozen=True)
class Mean:
    """The weighted sum of the updates that arrived, and what to divide it by.

    >>> mean = Mean(lambda: torch.tensor([8.0]), torch.tensor(4.0), torch.tensor([1]))
    >>> mean.value
    tensor([2.])
    """

    # Made when asked for: zeros need a look at what a client sends.
    make_total: Callable[[], Tree]
    # 0-d float64, sum_i w_i; with weights by field the number of clients
    weight: Tensor
    clients: Tensor  # int64, the clients whose update is in it, as they arrived
    # What rounding adds to the L2 norm of one client's w_i up_i at most: in a secure
    # sum, whose entries are whole steps.
    rounding: float = 0.0

    @property
    def total(self) -> Tree:
        """sum_i w_i up_i; zeros where nobody reported."""
        return self.make_total()

    @property
    def value(self) -> Tree:
        """total / weight. Raises TooFewReports where the weight is zero."""
        if not bool(self.weight > 0):
            raise TooFewReports("no client reported that has an example")
        inverse = 1 / self.weight

        def divided(x: Tensor) -> Tensor:
            mean = x * inverse
            return mean.to(x.dtype) if x.is_floating_point() else mean

        return trees.map(divided, self.total)


class RunningSum:
    """sum_i w_i up_i as updates come in: one model of memory, whatever the cohort."""

    def __init__(self, counts_discount: bool = False) -> None:
        """With `counts_discount` the weight that divides has the discounts in it, too.

        Without, an old update makes the whole step smaller.
        """
        self._counts_discount = counts_discount
        self._total: Tree = None
        self._weight = torch.zeros((), dtype=torch.float64)
        self._clients: list[Tensor] = []

    def add_by(self, reports: Reports, weight: Weight | Weights) -> None:
        """Single updates, weighed by one function, or by one for every field."""
        if not isinstance(weight, Mapping):
            weights = weight(reports.clients, reports.num_examples)
            self.add(reports, weights)
        elif len(reports.clients):
            self._add_fields(reports, weight)

    def _add_fields(self, reports: Reports, weight: Weights) -> None:
        ones = equally(reports.clients, reports.num_examples)
        fields: dict[str, Tree] = {}
        for name, value in reports.up._asdict().items():
            weights = ones
            if name in weight:
                by_field = weight_of(weight[name], reports.clients)
                weights = by_field(reports.clients, reports.num_examples)
            fields[name] = trees.weighted_sum(value, weights)
        total = type(reports.up)(**fields)
        if self._total is None:
            self._total = total
        else:
            trees.map(torch.Tensor.add_, self._total, total)
        self._count(reports.clients, ones)

    def add(self, reports: Reports, weights: Tensor) -> None:
        """Single updates, with one weight each, [n]."""
        if len(reports.clients) == 0:
            return
        discounted = weights
        if reports.discount is not None:
            discounted = weights * reports.discount.to(weights)
        if self._total is None:
            self._total = trees.weighted_sum(reports.up, discounted)
        else:
            trees.add_weighted_(self._total, reports.up, discounted)
        counted = discounted if self._counts_discount else weights
        self._count(reports.clients, counted)

    def add_sum(self, clients: Tensor, total: Tree, weights: Tensor) -> None:
        """The weighted sum of the updates of these clients, made elsewhere."""
        if self._total is None:
            self._total = trees.map(torch.clone, total)
        else:
            trees.map(torch.Tensor.add_, self._total, total)
        self._count(clients, weights)

    def _count(self, clients: Tensor, weights: Tensor) -> None:
        self._clients.append(clients)
        # In float64: a float32 sum is off by up to 6e-8 of a step.
        self._weight = self._weight.to(weights.device) + weights.double().sum()

    def mean(self, zeros: Callable[[], Tree]) -> Mean:
        """The sum so far; `zeros()` is a message of zeros, for a sum of nothing."""
        if self._total is None:
            return Mean(zeros, self._weight, torch.empty(0, dtype=torch.int64))
        total = self._total
        return Mean(lambda: total, self._weight, torch.cat(self._clients))
