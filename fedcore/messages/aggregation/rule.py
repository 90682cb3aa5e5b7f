"""One round's rows become one: the rule, with what is done before it.

There are two families. A weight rule sees the Gram matrix G of the rows alone and says
how much each row weighs; a column rule looks at every column by itself. What is done
before is a matrix A, and the rule sees the rows of Y = A X: a weight rule through
A G A^T, so that Y is never made, and a column rule a block of columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.messages.aggregation import before, column_rules, weight_rules
from fedcore.messages.aggregation.gram import (
    Array,
    double,
    gram,
    row_squares,
    squared_distances_to,
    squared_norms,
)
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.rng import rng

WEIGHT_RULES = frozenset(
    (
        "krum",
        "multi_krum",
        "geometric_median",
        "centred_clipping",
        "dnc",
        "caf",
        "fltrust",
    )
)
GEOMETRIC_MEDIAN_STEPS = 8
CENTRED_CLIPPING_STEPS = 3


class Outcome(NamedTuple):
    """The result of a rule, and what it made of every row."""

    value: Tensor  # [d], of the rows' dtype
    weights: Tensor  # [n] float64, of each row in the value; NaN in most column rules
    norms: Tensor  # [n] float64, |x_i|
    distances: Tensor  # [n] float64, |x_i - value|
    memory: Tensor  # [d], kept for the next round by centred clipping; else [0]


class Rule:
    """A rule as the settings have it. It keeps nothing between rounds itself."""

    def __init__(self, settings: AggregationSettings, seed: int) -> None:
        self.settings, self._seed = settings, seed

    @property
    def needs_reference(self) -> bool:
        """Whether it takes an update of the server's own, the `reference`."""
        return self.settings.rule == "fltrust"

    def least(self, f: int) -> int:
        """The least number of rows with which it works, whatever f of them are.

        >>> Rule(AggregationSettings(rule="krum", byzantine=2), seed=0).least(2)
        7
        >>> halves = AggregationSettings(rule="median", byzantine=2, before="bucketing")
        >>> Rule(halves, seed=0).least(2)
        9
        """
        rule, ahead = self.settings.rule, self.settings.before
        if f == 0:
            return 1
        if rule == "bulyan":
            need = 4 * f + 3
        elif rule in ("krum", "multi_krum"):
            need = 2 * f + 3
        elif rule in ("mean", "fltrust") and ahead in ("none", "bucketing"):
            need = 1
        else:
            need = 2 * f + 1
        if ahead == "bucketing":
            # The least n with ceil(n / s) >= need: f rows are in f buckets at most.
            return self.settings.bucket * (need - 1) + 1
        return need

    def aggregate(
        self,
        rows: Rows,
        f: int,
        weights: Tensor | None,
        key: tuple[int, ...],
        memory: Tensor,
        reference: Tensor | None,
    ) -> Outcome:
        """The rows as one. Fewer than `least(f)` are for the caller to turn away.

        `weights` [n] are relative; without, rows weigh the same. `key` is the round and
        the number of the function, for the permutation of buckets. `memory` is that of
        the outcome before, or [0] at first, and `reference` [d] is FLTrust's g0.
        """
        assert rows.n > 0, "no rows"
        alphas = np.full(rows.n, 1.0 / rows.n)
        if weights is not None:
            alphas = weights.double().cpu().numpy()
            alphas = alphas / alphas.sum()
        one = _OneCall(self.settings, rows, f, alphas)
        one.measure(self._extra(rows, memory, reference))
        if self.settings.before == "bucketing":
            one.mix_buckets(rng(self._seed, "buckets", *key).permutation(rows.n))
        else:
            one.mix()
        return one.outcome()

    def _extra(
        self, rows: Rows, memory: Tensor, reference: Tensor | None
    ) -> Tensor | None:
        """A further row of the Gram matrix, [1, d]."""
        if self.settings.rule == "fltrust":
            assert reference is not None, "fltrust without an update of the server"
            return reference.reshape(1, rows.d).cpu()
        if self.settings.rule == "centred_clipping":
            if memory.numel() == 0:
                return torch.zeros((1, rows.d), dtype=rows.dtype)
            return memory.reshape(1, rows.d).cpu()
        return None


def aggregate(
    matrix: Tensor,
    settings: AggregationSettings,
    f: int,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    key: tuple[int, ...] = (),
    memory: Tensor | None = None,
    reference: Tensor | None = None,
) -> Outcome:
    """The rows of one matrix [n, d] as one, as `Rule.aggregate` makes it.

    >>> rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [900.0, -900.0]])
    >>> aggregate(rows, AggregationSettings(rule="median"), f=1).value
    tensor([2., 1.])
    """
    rule = Rule(settings, seed)
    kept = torch.zeros(0, dtype=matrix.dtype) if memory is None else memory
    return rule.aggregate(Rows.of(matrix), f, weights, key, kept, reference)


class _OneCall:
    """One aggregation: measure the rows, mix them, weigh them or take columns."""

    def __init__(
        self, settings: AggregationSettings, rows: Rows, f: int, alphas: Array
    ) -> None:
        self.settings, self.rows, self.f = settings, rows, f
        self.alphas = alphas  # of the rows, then of the mixed rows; they sum to one
        self.gram: Array | None = None  # of the rows, and of `extra`
        self.extra: Tensor | None = None
        self.squares: Array | None = None  # squared norms of the rows
        self.mixing: Array | None = None  # A [m, n]

    def measure(self, extra: Tensor | None) -> None:
        """What the rule and what is before it need to know of the rows."""
        rule, ahead = self.settings.rule, self.settings.before
        if rule in WEIGHT_RULES or rule == "bulyan" or ahead == "nnm":
            self.extra = extra
            self.gram = gram(self.rows, extra)
            self.squares = np.diagonal(self.gram)[: self.rows.n].copy()
        elif ahead in ("clip", "arc") or rule == "sign":
            self.squares = squared_norms(self.rows)

    def mix(self) -> None:
        """Set A for what is done before the rule, but for buckets."""
        ahead, n = self.settings.before, self.rows.n
        if ahead == "nnm":
            assert self.gram is not None
            self.mixing = before.nearest_neighbour_mixing(self.gram[:n, :n], self.f)
        elif ahead in ("clip", "arc"):
            assert self.squares is not None
            norms = np.sqrt(self.squares)
            if ahead == "clip":
                factors = before.clip_factors(norms, float(np.median(norms)))
            else:
                factors = before.arc_factors(norms, self.f)
            self.mixing = np.diag(factors)

    def mix_buckets(self, order: np.ndarray) -> None:
        """Set A for means of buckets, rows in this order."""
        self.mixing = before.buckets(order, self.settings.bucket)
        self.alphas = np.full(len(self.mixing), 1.0 / len(self.mixing))

    @property
    def m(self) -> int:
        """The number of mixed rows, those that the rule sees."""
        return self.rows.n if self.mixing is None else len(self.mixing)

    def outcome(self) -> Outcome:
        if self.settings.rule in WEIGHT_RULES:
            return self._weighted()
        if self.settings.rule == "mean":
            weights = self.alphas if self.mixing is None else self.alphas @ self.mixing
            return self._by_columns(lambda block: weights @ double(block), weights)
        if self.settings.rule == "bulyan":
            taken = weight_rules.bulyan_taken(self._mixed_gram(), self.f)
            weights = np.zeros(self.m)
            weights[taken] = 1.0 / len(taken)
            keep = len(taken) - 2 * self.f
            chosen = sorted(taken)
            if self.mixing is not None:
                weights = weights @ self.mixing

            def bulyan(block: Tensor) -> Array:
                columns = self._columns(block)[:, chosen]
                return column_rules.nearest_mean(columns, keep)

            return self._by_columns(bulyan, weights)
        unknown = np.full(self.rows.n, np.nan)
        return self._by_columns(self._column_rule(), unknown)

    def _column_rule(self) -> Callable[[Tensor], Array]:
        """The column rule of the settings, on a block of the rows."""
        rule, f, alphas = self.settings.rule, self.f, self.alphas

        def of_block(block: Tensor) -> Array:
            columns = self._columns(block)
            if rule == "median":
                return column_rules.median(columns, alphas)
            if rule == "trimmed_mean":
                return column_rules.trimmed_mean(columns, f, alphas)
            if rule == "meamed":
                return column_rules.nearest_mean(columns, columns.shape[1] - f)
            assert rule == "sign", f"no rule {rule}"
            return column_rules.sign_vote(columns, self._sign_step())

        return of_block

    def _sign_step(self) -> float:
        """tau, or the median over rows of the root mean square of an entry."""
        if self.settings.tau is not None:
            return self.settings.tau
        assert self.squares is not None
        return float(np.median(np.sqrt(self.squares / self.rows.d)))

    def _columns(self, block: Tensor) -> column_rules.Columns:
        """A block of the mixed rows, transposed."""
        kind = torch.float64 if block.dtype == torch.float64 else torch.float32
        if self.mixing is not None:
            block = torch.from_numpy(self.mixing @ double(block))
        transposed: column_rules.Columns = block.to(kind).t().contiguous().numpy()
        return transposed

    def _by_columns(self, rule: Callable[[Tensor], Array], weights: Array) -> Outcome:
        """The outcome of a rule on blocks, in one pass."""
        rows = self.rows
        value = torch.empty(rows.d, dtype=rows.dtype)
        norms, distances = np.zeros(rows.n), np.zeros(rows.n)
        start = 0
        for block in rows.blocks():
            stop = start + block.shape[1]
            result = rule(block)
            value[start:stop] = torch.from_numpy(result)
            values = double(block)
            norms += row_squares(values)
            distances += row_squares(values - result)
            start = stop
        return _outcome(value, weights, norms, distances)

    def _weighted(self) -> Outcome:
        """The outcome of a weight rule: its weights, and one pass for their sum."""
        rows, n = self.rows, self.rows.n
        assert self.gram is not None
        assert self.squares is not None
        chosen = self._weights()
        weights = chosen[: self.m]
        if self.mixing is not None:
            weights = weights @ self.mixing
        # What the rule gives to v, a row of its own; FLTrust gives g0 nothing.
        rest = chosen[self.m :]
        combined = np.zeros(len(self.gram))
        combined[:n] = weights
        combined[n : n + len(rest)] = rest
        value = torch.empty(rows.d, dtype=rows.dtype)
        start = 0
        for block in rows.blocks():
            stop = start + block.shape[1]
            result = weights @ double(block)
            if len(rest):
                assert self.extra is not None
                result += rest @ double(self.extra[:, start:stop])
            value[start:stop] = torch.from_numpy(result)
            start = stop
        distances = squared_distances_to(self.gram, combined)[:n]
        outcome = _outcome(value, weights, self.squares, distances)
        if self.settings.rule == "centred_clipping":
            outcome = outcome._replace(memory=value.clone())
        return outcome

    def _weights(self) -> Array:
        """The weights of the mixed rows, and of v for centred clipping."""
        rule, f, mixed = self.settings.rule, self.f, self._mixed_gram()
        if rule == "krum":
            return weight_rules.krum(mixed, f)
        if rule == "multi_krum":
            return weight_rules.multi_krum(mixed, f)
        if rule == "dnc":
            return weight_rules.dnc(mixed, f)
        if rule == "caf":
            return weight_rules.caf(mixed, f)
        if rule == "fltrust":
            return weight_rules.fltrust(mixed)
        if rule == "centred_clipping":
            steps = self.settings.iterations or CENTRED_CLIPPING_STEPS
            return weight_rules.centred_clipping(mixed, self.settings.tau, steps)
        assert rule == "geometric_median", f"no rule {rule}"
        steps = self.settings.iterations or GEOMETRIC_MEDIAN_STEPS
        inner, square = self._start_products()
        return weight_rules.geometric_median_from(
            mixed, self.alphas, inner, square, steps
        )

    def _mixed_gram(self) -> Array:
        """A G A^T; a row of the server's own, v or g0, is not mixed."""
        assert self.gram is not None
        if self.mixing is None:
            return self.gram
        mixing = self.mixing
        own = len(self.gram) - self.rows.n
        if own:
            (m, n) = mixing.shape
            mixing = np.zeros((m + own, n + own))
            mixing[:m, :n] = self.mixing
            mixing[m:, n:] = np.eye(own)
        product = mixing @ self.gram @ mixing.T
        return (product + product.T) / 2

    def _start_products(self) -> tuple[Array, float]:
        """Of the median of each column, where the geometric median starts: inner
        products with the mixed rows, and with itself."""
        inner, square = np.zeros(self.rows.n), 0.0
        for block in self.rows.blocks():
            start = column_rules.median(self._columns(block), self.alphas)
            inner += double(block) @ start
            square += float(start @ start)
        if self.mixing is not None:
            inner = self.mixing @ inner
        return inner, square


def _outcome(
    value: Tensor, weights: Array, squares: Array, squared_distances: Array
) -> Outcome:
    return Outcome(
        value,
        torch.from_numpy(weights),
        torch.from_numpy(np.sqrt(squares)),
        torch.from_numpy(np.sqrt(squared_distances)),
        torch.zeros(0, dtype=value.dtype),
    )
