"""Measures that are a function of a ratio of sums, exact over batches and clients.

A client sends both sums, as it sends the states of a metric of torchmetrics; the server
adds them and forms the ratio once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import SettingsError
from fedcore.metrics import Metric, PerExample, Ratio, check_per_example
from fedcore.token_metrics import next_token_loss, num_targets, total_nll

__all__ = ["RatioMetric"]


class RatioMetric:
    """A `Ratio` under a name, with the sums that travel.

    >>> from fedcore.token_metrics import perplexity
    >>> measure = RatioMetric("perplexity", perplexity)
    >>> short = {"perplexity/numerator": 2.0, "perplexity/denominator": 1.0}
    >>> long = {"perplexity/numerator": 3.0, "perplexity/denominator": 3.0}
    >>> both = {name: torch.tensor(short[name] + long[name]) for name in short}
    >>> round(measure.value(both), 4)
    3.4903
    """

    def __init__(self, name: str, metric: Any, loss: PerExample | None = None) -> None:
        """`loss` is the task's, whose values are used where they say the numerators."""
        given = metric if isinstance(metric, Metric) else Metric(metric)
        ratio: Ratio = given.measure
        self.name = name
        self._outputs = given.outputs
        self._numerators, self._denominators = ratio.numerators, ratio.denominators
        self._of = ratio.of
        # What costs most, the softmax over a vocabulary, is then taken once.
        is_nll = ratio.numerators is total_nll and loss is next_token_loss
        self._reuses_loss = is_nll and self._outputs is None
        parts = ("numerator", "denominator")
        self.keys = {part: f"{name}/{part}" for part in parts}

    def to(self, device: torch.device) -> None:
        """Move tables of the measure to the device, in place."""
        for part in (self._numerators, self._denominators):
            if isinstance(part, nn.Module):
                part.to(device)

    def states(
        self, outputs: Tensor, y: Tensor, mask: Tensor, losses: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Both sums over the examples whose mask is 1, float64 0-d.

        `outputs` [B, ...], `y` [B, ...], `mask` [B]; `losses` [B] are the task's.
        """
        if self._outputs is not None:
            outputs = self._outputs(outputs)
        if self._reuses_loss and losses is not None:
            numerators = losses * num_targets(y)
        else:
            numerators = self._numerators(outputs, y)
        denominators = self._denominators(outputs, y)
        sums = {}
        parts = (numerators, denominators)
        for key, values in zip(self.keys.values(), parts, strict=True):
            # Not a product with the mask: a value of padding may be NaN.
            real = torch.where(mask > 0, values.double(), 0.0)
            sums[key] = real.sum()
        return sums

    def value(self, states: dict[str, Tensor]) -> float:
        """The measure that these sums give; NaN where the denominator is 0."""
        above, below = (float(states[key]) for key in self.keys.values())
        if below == 0:
            return math.nan
        return above / below if self._of is None else self._of(above / below)

    def check(self, outputs: Tensor, y: Tensor) -> None:
        """Try both parts on the outputs and targets of a few examples.

        Raises SettingsError where one fails, does not give one value an example, or
        where a denominator is negative or no number.
        """
        if self._outputs is not None:
            outputs = self._outputs(outputs)
        for part in (self._numerators, self._denominators):
            check_per_example(self.name, part, outputs, y)
        below = self._denominators(outputs, y)
        if not bool((below.isfinite() & (below >= 0)).all()):
            raise SettingsError(
                f'the metric "{self.name}" has a denominator of {below.min().item()}, '
                "expected 0 or more"
            )
