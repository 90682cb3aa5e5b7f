"""A robust rule in the place of the mean: what it makes of the messages of a call."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.errors import TooFewReports
from fedcore.messages.aggregation.checks import uses_weights
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Outcome, Rule, aggregate
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.messages.vectors import Layout, layout, with_leaves
from fedcore.reports import Mean, Reports
from fedcore.types import Tree

NOTHING = torch.empty(0)

Kept = dict[str, Tensor]
"""Tensors that a rule keeps from round to round, by client function and vector."""


Trial = Callable[[Tensor, Tensor, int], Tensor]
"""(client ids [n], rows [n, d], number of the vector in the message) -> [d]."""


class Aggregated(NamedTuple):
    """What a rule made of one vector of n clients, in order of `clients`."""

    clients: Tensor  # [n] int64
    weights: Tensor  # [n] in the result, summing to one; NaN where a rule has none
    norm_ratios: Tensor  # [n] norm of the vector over the median norm
    distances: Tensor  # [n] L2 distance to the result


class Verdict(NamedTuple):
    """The result of a rule, and how it came about."""

    mean: Mean
    aggregated: dict[str, Aggregated]  # by vector
    kept: Kept


class Gathered:
    """The messages of one call as they come in: a row for each client and vector."""

    def __init__(
        self, clients: Tensor, memory: int, make_folder: Callable[[], Path]
    ) -> None:
        """`clients` may answer; ascending.

        `memory` bytes of rows are held, and more are in files of `make_folder()`.
        """
        self._asked, self._memory, self._make_folder = clients, memory, make_folder
        self.like: Tree = None  # a message
        self.rows: dict[str, Rows] = {}
        self._columns: dict[int, list[Tensor]] = {}  # in no vector, by place
        self._reported: list[Tensor] = []
        self._clients: list[Tensor] = []  # with a row
        self._weights: list[Tensor] = []

    def add(self, reports: Reports, weights: Tensor) -> None:
        """Single updates, with the weight that the method gives each, [n].

        One of weight zero is in no mean, as that of a client without examples, and in
        no rule.
        """
        self._reported.append(reports.clients)
        counts = weights.cpu() > 0
        if not bool(counts.all()):
            rows = counts.to(reports.num_examples.device)
            up, num_examples = trees.at((reports.up, reports.num_examples), rows)
            reports = Reports(reports.clients[counts], up, num_examples)
        if len(reports.clients) == 0:
            return
        leaves, places = trees.leaves(reports.up), layout(reports.up)
        if self.like is None:
            self.like = trees.at(reports.up, 0)
            self._make_rows(leaves, places)
        for name, vector in zip(places.names, places.vectors, strict=True):
            pieces = [leaves[place] for place in vector]
            self.rows[name].put(reports.clients, pieces)
        for place in places.others(len(leaves)):
            self._columns.setdefault(place, []).append(leaves[place].cpu())
        self._clients.append(reports.clients)
        self._weights.append(weights.double().cpu()[counts])

    def _make_rows(self, leaves: list[Tensor], places: Layout) -> None:
        memory = self._memory // max(len(places.vectors), 1)
        for name, vector in zip(places.names, places.vectors, strict=True):
            pieces = [leaves[place][0] for place in vector]
            dimension = sum(x.numel() for x in pieces)
            dtype = functools.reduce(torch.promote_types, [x.dtype for x in pieces])
            self.rows[name] = Rows(
                self._asked, dimension, dtype, memory, self._make_folder
            )

    @property
    def reported(self) -> Tensor:
        """Those who sent a message, in any order."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *self._reported])

    @property
    def clients(self) -> Tensor:
        """Those whose message has a row, ascending."""
        if not self._clients:
            return torch.empty(0, dtype=torch.int64)
        return torch.cat(self._clients).sort().values

    @property
    def weights(self) -> Tensor:
        """The method's weights in order of client ids, float64 [n]."""
        if not self._weights:
            return torch.empty(0, dtype=torch.float64)
        return torch.cat(self._weights)[torch.cat(self._clients).argsort()]

    def tree(self, values: Mapping[str, Tensor]) -> Tree:
        """A message with these vectors, by name; all else is the median over clients.

        The medians of scalars, and of whole numbers among the tensors.
        """
        leaves, places = trees.leaves(self.like), layout(self.like, axes=0)
        for name, vector in zip(places.names, places.vectors, strict=True):
            sizes = [leaves[place].numel() for place in vector]
            pieces = torch.split(values[name], sizes)
            for place, piece in zip(vector, pieces, strict=True):
                x = leaves[place]
                leaves[place] = piece.view(x.shape).to(x)
        for place, columns in self._columns.items():
            leaves[place] = _median(torch.cat(columns)).to(leaves[place])
        return with_leaves(self.like, leaves)

    def close(self) -> None:
        """Remove what is on disk."""
        for rows in self.rows.values():
            rows.close()


def _median(column: Tensor) -> Tensor:
    """The median over clients: of an even number, the mean of the two in the middle."""
    ordered = column.double().sort(0).values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


class Aggregator:
    """The rule of a run."""

    def __init__(
        self,
        settings: AggregationSettings,
        seed: int,
        make_folder: Callable[[], Path],
    ) -> None:
        self.settings, self.rule = settings, Rule(settings, seed)
        self._seed, self._make_folder = seed, make_folder

    @property
    def needs_reference(self) -> bool:
        """Whether the rule asks for the server's own message."""
        return self.rule.needs_reference

    @property
    def uses_weights(self) -> bool:
        """Whether the method's weights count, and not all clients alike."""
        return uses_weights(self.settings)

    def gather(self, clients: Tensor) -> Gathered:
        """Room for the messages of these clients, ascending."""
        memory = int(self.settings.memory_gb * 1e9)
        return Gathered(clients, memory, self._make_folder)

    def judge(
        self,
        gathered: Gathered,
        function: str,
        t: int,
        asked: int,
        kept: Kept,
        reference: Tree = None,
    ) -> Verdict:
        """What the rule makes of the messages, when all that come are in.

        `asked` clients were asked in round t, whether they are there or not: attackers
        are. `reference` is the server's own message. Raises TooFewReports where the
        rule cannot work with so few.
        """
        f, n = self.settings.f(asked), len(gathered.clients)
        least = self.rule.least(f)
        if n < least:
            raise TooFewReports(
                f'aggregation.rule = "{self.settings.rule}" with f = {f} needs {least} '
                f"usable updates, found {n} of {asked} clients"
            )
        weights = gathered.weights if self.uses_weights else None
        own = _own(reference)
        outcomes: dict[str, Outcome] = {}
        remembered: Kept = {}
        for number, (name, rows) in enumerate(gathered.rows.items()):
            key = _key(function, number)
            memory, g0 = kept.get(key, NOTHING), own[number] if own else None
            draw = (t, zlib.crc32(key.encode()))
            outcome = self.rule.aggregate(rows, f, weights, draw, memory, g0)
            outcomes[name] = outcome
            if len(outcome.memory):
                remembered[key] = outcome.memory
        values = {name: outcome.value for name, outcome in outcomes.items()}
        weight = gathered.weights.sum()
        total = trees.map(lambda x: (x * weight).to(x.dtype), gathered.tree(values))
        mean = Mean(lambda: total, weight, gathered.reported)
        aggregated = {}
        for name, outcome in outcomes.items():
            aggregated[name] = _aggregated(gathered.clients, outcome)
        return Verdict(mean, aggregated, remembered)

    def trial(
        self, function: str, t: int, asked: int, kept: Kept, reference: Tree = None
    ) -> Trial:
        """The rule as one who knows it tries it out, with all clients counting alike.

        It remembers nothing of that. Where it has too few rows to work with, the round
        is skipped: nothing moves.
        """
        own, least = _own(reference), self.rule.least(self.settings.f(asked))

        def tried(clients: Tensor, matrix: Tensor, number: int) -> Tensor:
            if len(matrix) < least:
                return torch.zeros_like(matrix[0])
            key = _key(function, number)
            return aggregate(
                matrix,
                self.settings,
                self.settings.f(asked),
                seed=self._seed,
                key=(t, zlib.crc32(key.encode())),
                memory=kept.get(key, NOTHING),
                reference=own[number] if own else None,
            ).value

        return tried


def _key(function: str, number: int) -> str:
    """The name of a vector of the messages of a client function."""
    return f"{function}{trees.SEPARATOR}{number}"


def _own(reference: Tree) -> list[Tensor]:
    """The vectors [d] of the server's own message."""
    if reference is None:
        return []
    leaves = trees.leaves(reference)
    own = []
    for vector in layout(reference, axes=0).vectors:
        own.append(trees.ravel([leaves[place] for place in vector]))
    return own


def _aggregated(clients: Tensor, outcome: Outcome) -> Aggregated:
    median = outcome.norms.median().clamp(min=1e-300)  # all may be zero
    return Aggregated(
        clients, outcome.weights, outcome.norms / median, outcome.distances
    )
