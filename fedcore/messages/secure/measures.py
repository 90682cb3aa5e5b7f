"""Measures over clients of which only sums can be read.

A client sends for each measure m of its n held-out examples 26 words:

    0  1 where m is defined      1  m               2, 3  m^2, high and low half
    4  n                         5  n m             6..   1 in the bin of m

m is in units of 2^-20, and so exact to that are mean, deviation and the mean over all
examples. Percentiles, and the mean of the worst tenth, are known to a bin. A measure of
a whole set (F1, perplexity) also sends its states, whose sums give it for all examples
exactly; its own value has the words above. What is not defined for a client counts
nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedcore.messages.secure.ring import LARGEST, SCALE, values_of, words_of
from fedcore.metrics import is_higher_better

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["BINS", "Measures", "Summary", "bin_of", "edges"]

BINS = 20
VALUES = 6 + BINS  # words of one measure
HALF = 40  # bits of the low half of m^2


class Summary(NamedTuple):
    """One measure over the clients for which it is defined."""

    clients: int
    mean: float
    std: float
    pooled: float  # over all their examples
    bins: list[int]  # clients in each
    is_higher_better: bool

    def statistics(self, percentiles: Sequence[int]) -> dict[str, float]:
        """Mean, deviation, percentiles, the mean of the worst tenth, and the pooled.

        Clients of one bin are taken to be spread evenly in it.
        """
        if self.clients == 0:
            return {"pooled": self.pooled}
        values = spread_evenly(self.bins, self.is_higher_better)
        shares = torch.tensor(percentiles, dtype=torch.float64) / 100
        quantiles = torch.quantile(values, shares).tolist()
        statistics = {"mean": self.mean, "std": self.std}
        for percent, quantile in zip(percentiles, quantiles, strict=True):
            statistics[f"p{percent}"] = quantile
        worst = -(-len(values) // 10)
        if self.is_higher_better:
            statistics["worst_tenth"] = values[:worst].mean().item()
        else:
            statistics["worst_tenth"] = values[-worst:].mean().item()
        statistics["pooled"] = self.pooled
        return statistics


class Measures:
    """The words of a task's measures, on clients and on the server."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def words(
        self, metrics: Mapping[str, Tensor], num_examples: float, n_max: int
    ) -> Tensor:
        """The words of one client's answer, int64 [s].

        `metrics` are its means and states, `num_examples` whole. Sums of `n_max`
        clients fit into their words.
        """
        most = 2 ** (63 - n_max.bit_length()) - 1
        pieces = []
        for name, value in self._values(metrics).items():
            is_higher = self._is_higher(name)
            pieces.append(_words_of(value, int(num_examples), is_higher, most))
        for key in self._states(metrics):
            state = metrics[key].detach().reshape(-1).cpu()
            if state.is_floating_point():
                state = words_of(state, most / SCALE)
            pieces.append(state.long().clamp(-most, most))
        words = torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
        return words if num_examples > 0 else torch.zeros_like(words)

    def read(self, shape: Mapping[str, Tensor], words: Tensor) -> dict[str, Summary]:
        """Each measure over the clients of a sum of words; `shape` is like metrics."""
        sums: list[int] = words.tolist()
        place = 0
        columns: dict[str, list[int]] = {}
        for name in self._values(shape):
            columns[name] = sums[place : place + VALUES]
            place += VALUES
        states: dict[str, Tensor] = {}
        for key in self._states(shape):
            like = shape[key]
            piece = words[place : place + like.numel()]
            place += like.numel()
            total = values_of(piece) if like.is_floating_point() else piece
            states[key] = total.reshape(like.shape)
        assert place == len(words), f"{len(words)} words of measures, read {place}"
        summaries = {}
        for name, column in columns.items():
            summary = _summary(column, self._is_higher(name))
            whole = self._task.set_metrics.get(name)
            if whole is not None and set(whole.keys.values()) <= states.keys():
                summary = summary._replace(pooled=whole.value(states))
            summaries[name] = summary
        return summaries

    def _is_higher(self, name: str) -> bool:
        return self._task.measures.get(name, is_higher_better(name))

    def _values(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """Each measure of one client, where `metrics` holds the states of some."""
        states = set(self._states(metrics))
        values = {}
        for name, value in metrics.items():
            if name not in states:
                values[name] = float(value)
        for name, whole in self._task.set_metrics.items():
            keys = list(whole.keys.values())
            if states.issuperset(keys):
                values[name] = whole.value({key: metrics[key] for key in keys})
        return values

    def _states(self, metrics: Mapping[str, Tensor]) -> list[str]:
        """The keys of states of whole sets' measures, in order."""
        keys: list[str] = []
        for whole in self._task.set_metrics.values():
            own = list(whole.keys.values())
            if metrics.keys() >= set(own):  # else the method measures in its own way
                keys += own
        return keys


def _words_of(value: float, num_examples: int, is_higher: bool, most: int) -> Tensor:
    """The words of one measure of one client, int64 [VALUES]."""
    words = [0] * VALUES
    if not math.isnan(value):
        units = round(max(-LARGEST, min(LARGEST, value)) * SCALE)
        square = units * units
        words[:4] = [1, units, square >> HALF, square & (2**HALF - 1)]
        products = num_examples * units
        words[4:6] = [num_examples, max(-most, min(most, products))]
        words[6 + bin_of(value, is_higher)] = 1
    return torch.tensor(words, dtype=torch.int64)


def _summary(sums: list[int], is_higher: bool) -> Summary:
    count, total, high, low, examples, products = sums[:6]
    if count == 0:
        return Summary(0, math.nan, math.nan, math.nan, sums[6:], is_higher)
    squares = (high << HALF) + low
    # Whole numbers: the difference of two large ones is exact.
    variance = (count * squares - total * total) / (count * SCALE) ** 2
    pooled = products / (examples * SCALE) if examples else math.nan
    mean = total / (count * SCALE)
    return Summary(count, mean, math.sqrt(variance), pooled, sums[6:], is_higher)


def bin_of(value: float, is_higher_better: bool) -> int:
    """The bin of a value: 20 of one width in [0, 1], or from 2^-10 on powers of two.

    >>> bin_of(0.5, is_higher_better=True), bin_of(7.0, is_higher_better=True)
    (10, 19)
    >>> bin_of(1.0, is_higher_better=False), bin_of(0.0, is_higher_better=False)
    (10, 0)
    """
    if is_higher_better:
        place = math.floor(max(-1.0, min(2.0, value)) * BINS)
    elif value <= 0:
        place = 0
    elif math.isinf(value):
        place = BINS
    else:
        place = math.frexp(value)[1] - 1 + BINS // 2  # floor(log2 value) + 10
    return max(0, min(BINS - 1, place))


def edges(is_higher_better: bool) -> list[float]:
    """The bounds of the bins, BINS + 1 of them; the outer ones hold all beyond."""
    if is_higher_better:
        return [place / BINS for place in range(BINS + 1)]
    return [0.0] + [2.0 ** (place - BINS // 2) for place in range(1, BINS + 1)]


def spread_evenly(bins: Sequence[int], is_higher_better: bool) -> Tensor:
    """A value for each client of these bins, ascending, float64 [n].

    >>> spread_evenly([0] * 10 + [2] + [0] * 9, is_higher_better=True)
    tensor([0.5125, 0.5375], dtype=torch.float64)
    """
    bounds = edges(is_higher_better)
    values: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    for place, count in enumerate(bins):
        low, high = bounds[place], bounds[place + 1]
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1)
        values.append(low + (high - low) * shares)
    return torch.cat(values)
