"""A robust rule in the place of the mean: what it makes of the messages of a call."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.errors import TooFewReports
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Outcome, Rule, aggregate
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.messages.aggregation.vectors import is_scalar, parts, vectors
from fedcore.reports import Mean, Reports
from fedcore.types import Tree

Kept = dict[str, Tensor]
"""What a rule keeps from round to round, by client function and vector."""


Trial = Callable[[str, Tensor], Tensor]
"""(name of a vector, rows [n, d] in order of clients) -> the rule's result [d]."""


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
        self._columns: dict[str, list[Tensor]] = {}  # of small values, by path
        self._clients: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, reports: Reports, weights: Tensor) -> None:
        """Single updates, with the weight that the method gives each, [n]."""
        if len(reports.clients) == 0:
            return
        found = vectors(reports.up)
        if self.like is None:
            self.like = trees.map(lambda x: x[0].cpu().clone(), reports.up)
            self._make_rows(found)
        for name, leaves in found.items():
            self.rows[name].put(reports.clients, leaves)
        for path, column in _small(reports.up).items():
            self._columns.setdefault(path, []).append(column.cpu())
        self._clients.append(reports.clients)
        self._weights.append(weights.double().cpu())

    def _make_rows(self, found: dict[str, list[Tensor]]) -> None:
        for name, leaves in found.items():
            dimension = sum(x[0].numel() for x in leaves)
            dtype = leaves[0].dtype
            for x in leaves:
                dtype = torch.promote_types(dtype, x.dtype)
            share = self._memory // len(found)
            self.rows[name] = Rows(
                self._asked, dimension, dtype, share, self._make_folder
            )

    @property
    def clients(self) -> Tensor:
        """Those whose message is here, ascending."""
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
        """A message with these vectors, by name; what is small is the median."""
        medians = {}
        for path, columns in self._columns.items():
            medians[path] = _median(torch.cat(columns))
        fields = {}
        for name, part in parts(self.like).items():
            value = values.get(name)
            pieces = iter(()) if value is None else iter(_pieces(value, part))
            flat = {}
            for path, leaf in trees.flatten(part).items():
                whole = _path(name, path)
                flat[path] = medians[whole] if whole in medians else next(pieces)
                flat[path] = flat[path].view(leaf.shape).to(leaf.dtype)
            fields[name] = trees.unflatten(flat, part)
        return (
            type(self.like)(**fields) if hasattr(self.like, "_asdict") else fields[""]
        )

    def close(self) -> None:
        """Remove what is on disk."""
        for rows in self.rows.values():
            rows.close()


def _path(name: str, path: str) -> str:
    return f"{name}{trees.SEPARATOR}{path}"


def _small(up: Tree) -> dict[str, Tensor]:
    """The scalars and whole numbers of a stacked message, which are in no vector."""
    small = {}
    for name, part in parts(up).items():
        for path, x in trees.flatten(part).items():
            if is_scalar(part) or not x.is_floating_point():
                small[_path(name, path)] = x
    return small


def _pieces(value: Tensor, part: Tree) -> tuple[Tensor, ...]:
    """The leaves of a vector, flat."""
    sizes = [x.numel() for x in trees.leaves(part) if x.is_floating_point()]
    return torch.split(value, sizes)


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
        weights = gathered.weights if self.settings.weights == "method" else None
        own = (
            {}
            if reference is None
            else vectors(trees.map(lambda x: x[None], reference))
        )
        outcomes: dict[str, Outcome] = {}
        remembered: Kept = {}
        for name, rows in gathered.rows.items():
            key = _key(function, name)
            g0 = torch.cat([x.flatten() for x in own[name]]) if own else None
            memory = kept.get(key, torch.empty(0))
            draw = (t, zlib.crc32(key.encode()))
            outcome = self.rule.aggregate(rows, f, weights, draw, memory, g0)
            outcomes[name] = outcome
            if len(outcome.memory):
                remembered[key] = outcome.memory
        values = {name: outcome.value for name, outcome in outcomes.items()}
        weight = gathered.weights.sum()
        total = trees.map(lambda x: x * weight.to(x.dtype), gathered.tree(values))
        mean = Mean(lambda: total, weight, gathered.clients)
        aggregated = {}
        for name, outcome in outcomes.items():
            aggregated[name] = _aggregated(gathered.clients, outcome)
        return Verdict(mean, aggregated, remembered)

    def trial(self, function: str, t: int, asked: int, kept: Kept) -> Trial:
        """The rule as one who knows it tries it out, with all clients counting alike.

        It remembers nothing of that.
        """

        def tried(name: str, matrix: Tensor) -> Tensor:
            key, f = _key(function, name), self.settings.f(asked)
            memory = kept.get(key, torch.empty(0))
            draw = (t, zlib.crc32(key.encode()))
            outcome = aggregate(
                matrix, self.settings, f, seed=self._seed, key=draw, memory=memory
            )
            return outcome.value

        return tried


def _key(function: str, name: str) -> str:
    return f"{function}{trees.SEPARATOR}{name}"


def _aggregated(clients: Tensor, outcome: Outcome) -> Aggregated:
    median = outcome.norms.median().clamp(min=1e-300)  # all may be zero
    return Aggregated(
        clients, outcome.weights, outcome.norms / median, outcome.distances
    )
