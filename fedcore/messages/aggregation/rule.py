"""One round's rows become one: the rule, with what is done before it.

There are two families. A weight rule sees the Gram matrix G of the rows alone and says
how much each row weighs; a column rule looks at every column by itself. What is done
before is a matrix A, and the rule sees the rows of Y = A X: a weight rule through
A G A^T, so that Y is never made, and a column rule a block of columns at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedcore.messages.aggregation import before, column_rules, weight_rules
from fedcore.messages.aggregation.gram import (
    gram,
    squared_distances_to,
    squared_norms,
    star,
)
from fedcore.messages.aggregation.passes import (
    THREADS,
    Array,
    Piece,
    double,
    over_columns,
    row_squares,
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
MIXES = frozenset(("nnm", "bucketing"))
"""Done before a rule, they make rows that belong to no one client."""

PieceRule = Callable[[int, Piece, Array], Array]
"""(first column, piece [n, b], the same in float64) -> the result [b]."""

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
        self.extra: Tensor | None = None  # [1, d]
        self.norms: Array | None = None  # of the rows
        self.mixing: before.Mixing | None = None

    def measure(self, extra: Tensor | None) -> None:
        """Find what the rule, and what is before it, need to know of the rows."""
        rule, ahead, rows = self.settings.rule, self.settings.before, self.rows
        self.extra = extra
        if rule == "fltrust" and ahead not in MIXES:
            assert extra is not None
            self.gram = star(rows, extra[0])
        elif rule == "centred_clipping" and ahead not in MIXES:
            pass  # a pass for each of a few steps takes less than n^2 products
        elif rule in WEIGHT_RULES or rule == "bulyan" or ahead == "nnm":
            self.gram = gram(rows, extra)
        if self.gram is not None:
            self.norms = np.sqrt(np.diagonal(self.gram)[: rows.n])
        elif ahead in ("clip", "arc") or (rule == "sign" and self.settings.tau is None):
            self.norms = np.sqrt(squared_norms(rows))

    def mix(self) -> None:
        """Set A for what is done before the rule, but for buckets."""
        ahead, n = self.settings.before, self.rows.n
        if ahead == "nnm":
            assert self.gram is not None
            nearest = before.nearest_neighbour_mixing(self.gram[:n, :n], self.f)
            self.mixing = before.Mixing(nearest)
        elif ahead in ("clip", "arc"):
            assert self.norms is not None
            if ahead == "clip":
                bound = float(np.median(self.norms))
                factors = before.clip_factors(self.norms, bound)
            else:
                factors = before.arc_factors(self.norms, self.f)
            self.mixing = before.Mixing(np.diag(factors), factors=factors)

    def mix_buckets(self, order: np.ndarray) -> None:
        """Set A for means of buckets, rows in this order."""
        size = self.settings.bucket
        means = before.buckets(order, size)
        self.mixing = before.Mixing(means, order=order, size=size)
        self.alphas = np.full(len(means), 1.0 / len(means))

    @property
    def m(self) -> int:
        """The number of mixed rows, those that the rule sees."""
        return self.rows.n if self.mixing is None else len(self.mixing.matrix)

    def outcome(self) -> Outcome:
        """The outcome of the rule."""
        rule = self.settings.rule
        if rule == "mean":
            return self._weighted(self.alphas)
        if rule in WEIGHT_RULES:
            return self._weighted(self._weights())
        if rule == "bulyan":
            return self._bulyan()
        unknown = np.full(self.rows.n, np.nan)
        return _in_one_pass(self.rows, self._column_rule(), unknown)

    def _weighted(self, chosen: Array) -> Outcome:
        """The sum of the mixed rows with these weights, and of `extra`."""
        weights, rest = chosen[: self.m], chosen[self.m :]
        if self.mixing is not None:
            weights = weights @ self.mixing.matrix

        def combine(start: int, piece: Piece, values: Array) -> Array:
            result: Array = weights @ values
            if len(rest):
                assert self.extra is not None
                own = self.extra[:, start : start + piece.shape[1]]
                result += rest @ own.double().numpy()
            return result

        outcome = _in_one_pass(self.rows, combine, weights)
        if self.settings.rule == "centred_clipping":
            outcome = outcome._replace(memory=outcome.value.clone())
        return outcome

    def _bulyan(self) -> Outcome:
        """Krum winners, and of each of their columns the mean around its median.

        The weight of a row is its share of the winners.
        """
        taken = sorted(weight_rules.bulyan_taken(self._mixed_gram(), self.f))
        weights = np.zeros(self.m)
        weights[taken] = 1.0 / len(taken)
        if self.mixing is not None:
            weights = weights @ self.mixing.matrix

        def of_piece(start: int, piece: Piece, values: Array) -> Array:
            columns = self._columns(piece, values)[:, taken]
            return column_rules.nearest_mean(columns, len(taken) - 2 * self.f)

        return _in_one_pass(self.rows, of_piece, weights)

    def _column_rule(self) -> PieceRule:
        """The column rule of the settings."""
        rule, f, alphas = self.settings.rule, self.f, self.alphas

        def of_piece(start: int, piece: Piece, values: Array) -> Array:
            columns = self._columns(piece, values)
            if rule == "median":
                return column_rules.median(columns, alphas)
            if rule == "trimmed_mean":
                return column_rules.trimmed_mean(columns, f, alphas)
            if rule == "meamed":
                return column_rules.nearest_mean(columns, columns.shape[1] - f)
            assert rule == "sign", f"no rule {rule}"
            return column_rules.sign_vote(columns, self._sign_step())

        return of_piece

    def _sign_step(self) -> float:
        """tau, or the median over rows of the root mean square of an entry."""
        if self.settings.tau is not None:
            return self.settings.tau
        assert self.norms is not None
        return float(np.median(self.norms)) / math.sqrt(max(self.rows.d, 1))

    def _columns(self, piece: Piece, values: Array) -> column_rules.Columns:
        """A piece of the mixed rows, transposed; `values` are the piece in float64."""
        if self.mixing is not None:
            piece = self.mixing.of(values).astype(piece.dtype)
        return np.ascontiguousarray(piece.T)

    def _weights(self) -> Array:
        """The weights of the mixed rows, and of v for centred clipping."""
        rule, f = self.settings.rule, self.f
        if rule == "centred_clipping":
            return self._clipping_weights()
        mixed = self._mixed_gram()
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
        assert rule == "geometric_median", f"no rule {rule}"
        steps = self.settings.iterations or GEOMETRIC_MEDIAN_STEPS
        products, square = self._start_products()
        return weight_rules.geometric_median_from(
            mixed, self.alphas, products, square, steps
        )

    def _clipping_weights(self) -> Array:
        steps = self.settings.iterations or CENTRED_CLIPPING_STEPS
        distances = self._distances_in_a_pass
        if self.gram is not None:
            distances = functools.partial(squared_distances_to, self._mixed_gram())
        tau = self.settings.tau
        return weight_rules.centred_clipping(self.m, distances, tau, steps)

    def _distances_in_a_pass(self, weights: Array) -> Array:
        """Squared distances of the mixed rows to the sum of them and of `extra`."""
        assert self.extra is not None
        extra = self.extra[0]
        totals = np.zeros((THREADS, self.m))

        def add(thread: int, start: int, piece: Piece) -> None:
            values = double(piece)
            if self.mixing is not None:
                values = self.mixing.of(values)
            own = extra[start : start + piece.shape[1]].double().numpy()
            values -= weights[:-1] @ values + weights[-1] * own
            totals[thread] += row_squares(values)

        over_columns(self.rows, add)
        return cast(Array, totals.sum(axis=0))

    def _mixed_gram(self) -> Array:
        """A G A^T; a row of the server's own, v or g0, is not mixed."""
        assert self.gram is not None
        if self.mixing is None:
            return self.gram
        own = len(self.gram) - self.rows.n
        m, n = self.mixing.matrix.shape
        mixing = np.zeros((m + own, n + own))
        mixing[:m, :n] = self.mixing.matrix
        mixing[m:, n:] = np.eye(own)
        product = mixing @ self.gram @ mixing.T
        # Where long rows cancel out, rounding can make a square negative.
        np.fill_diagonal(product, np.maximum(np.diagonal(product), 0.0))
        return (product + product.T) / 2

    def _start_products(self) -> tuple[Array, float]:
        """Inner products of the start of the geometric median.

        It is the median of each column; they are those with the mixed rows, and with
        itself.
        """
        products, squares = np.zeros((THREADS, self.rows.n)), [0.0] * THREADS

        def add(thread: int, _start: int, piece: Piece) -> None:
            values = double(piece)
            start = column_rules.median(self._columns(piece, values), self.alphas)
            products[thread] += values @ start
            squares[thread] += float(start @ start)

        over_columns(self.rows, add)
        total: Array = products.sum(axis=0)
        if self.mixing is not None:
            total = self.mixing.matrix @ total
        return total, sum(squares)


def _in_one_pass(rows: Rows, rule: PieceRule, weights: Array) -> Outcome:
    """The outcome of a rule that looks at a piece of the columns at a time."""
    value = np.empty(rows.d)
    norms = np.zeros((THREADS, rows.n))
    distances = np.zeros((THREADS, rows.n))

    def add(thread: int, start: int, piece: Piece) -> None:
        values = double(piece)
        result = rule(start, piece, values)
        value[start : start + len(result)] = result
        norms[thread] += row_squares(values)
        values -= result
        distances[thread] += row_squares(values)

    over_columns(rows, add)
    return Outcome(
        torch.from_numpy(value).to(rows.dtype),
        torch.from_numpy(weights),
        torch.from_numpy(np.sqrt(norms.sum(axis=0))),
        torch.from_numpy(np.sqrt(distances.sum(axis=0))),
        torch.zeros(0, dtype=rows.dtype),
    )
