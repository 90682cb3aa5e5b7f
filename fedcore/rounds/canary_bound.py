"""The estimate of a run's real noise from canaries, and the epsilon that it leaves.

After "One-shot empirical privacy estimation" (Andrew, Kairouz, Oh, Oprea, McMahan,
Suriyakumar, ICLR 2024, Algorithms 1 and 2): canaries are random directions, so that one
run holds many of them at nearly right angles, and what a canary does to a release shows
as the cosine between the two.

    c_j   direction of canary j, uniform on the sphere in d dimensions
    R     release of a round: what the observer sees;  g = <c_j, R> / |R|
    x     sqrt(d - 1) g / sqrt(1 - g^2), the score of a canary

Where the canary is not in R, x has Student's t distribution with d - 1 degrees of
freedom, whatever R is (the paper's N(0, 1/d) of g, exactly). Where it is, at length C,
and R = C c_j + rest, then x = sqrt(d - 1) (C + <c_j, rest>) / |rest without c_j|: of
noise alone, N(0, (z C)^2) in every entry, x is noncentral t with mean

    mu = (1 + 3 / (4 d)) / z,

and everything else in the rest makes it smaller. So the mean score measures 1 / z from
below. Its deviation over n scores of rounds with n_t each

    variance(x) / n + (mu^2 / (2 d)) (sum_t n_t^2) / n^2

has a second part, as canaries of one round share the length of one noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedcore.privacy import epsilon_prv
from fedcore.types import Params

__all__ = [
    "Estimate",
    "Scores",
    "Seen",
    "describe",
    "estimate",
    "gaussian_delta",
    "gaussian_epsilon",
    "measured",
    "measured_in",
]

REPORTED, ALARMING = 0.95, 0.999
"""Confidence of the bound that is reported, and of the one that raises an alarm."""


class Scores(NamedTuple):
    """Sums over the scores of canaries, of one round or of several."""

    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    shared: float = 0.0  # the sum over rounds of (scores of the round)^2
    dimensions: int = 0  # d

    @classmethod
    def of(cls, scores: list[float], dimensions: int) -> Scores:
        """The scores of one round."""
        n = len(scores)
        squares = sum(x * x for x in scores)
        return cls(n, sum(scores), squares, float(n * n), dimensions)

    def __add__(self, other: object) -> Scores:
        assert isinstance(other, Scores)
        return Scores(
            self.number + other.number,
            self.total + other.total,
            self.squares + other.squares,
            self.shared + other.shared,
            max(self.dimensions, other.dimensions),
        )

    @classmethod
    def joined(cls, rows: Iterable[dict[str, Any]]) -> Scores:
        """The scores of rounds whose rows of metrics.jsonl these are."""
        together = cls()
        for row in rows:
            if row.get("canary_scores"):
                together += cls(**row["canary_scores"])
        return together


class Seen:
    """A release, as an observer sees it who knows the sums of other updates."""

    def __init__(self, release: Params, known: Sequence[Params] = ()) -> None:
        self._names = sorted(release)
        whole = self.flat(release)
        self._known: list[Tensor] = []  # at right angles, of unit length
        for tree in known:
            vector = self._without_known(self.flat(tree))
            length = float(vector.norm())
            if length > 0:
                self._known.append(vector / length)
        self._release = self._without_known(whole)

    @property
    def dimensions(self) -> int:
        """d, in which the canaries' directions are random."""
        return len(self._release) - len(self._known) - 1

    def flat(self, tree: Params) -> Tensor:
        """The entries of a tree that the release has, [D] float64 on the CPU."""
        pieces = []
        for name in self._names:
            pieces.append(tree[name].detach().reshape(-1).cpu().double())
        return torch.cat(pieces)

    def _without_known(self, vector: Tensor) -> Tensor:
        for known in self._known:
            vector = vector - torch.dot(vector, known) * known
        return vector

    def score(self, direction: Tensor, others: Tensor | None = None) -> float:
        """x = sqrt(d - 1) g / sqrt(1 - g^2), g the cosine with the direction [D].

        Without the part along `others` [D], what the observer knows besides.
        """
        c, release = self._without_known(direction), self._release
        if others is not None:
            beside = self._without_known(others)
            length = float(beside.norm())
            if length > 0:
                beside = beside / length
                c = c - torch.dot(c, beside) * beside
                release = release - torch.dot(release, beside) * beside
        c = c / c.norm()
        along = float(torch.dot(c, release))
        across = float((release - along * c).norm())
        return math.sqrt(self.dimensions - 1) * along / max(across, 1e-300)


class Estimate(NamedTuple):
    """The shift of scores that one release of a canary causes: 1 / z, from below."""

    shift: float  # mu
    deviation: float  # of the estimate

    def at_least(self, confidence: float) -> float:
        """The lower bound of the shift at this confidence; 0 where it is negative."""
        from scipy.stats import norm

        bound = self.shift - float(norm.ppf(confidence)) * self.deviation
        return max(bound, 0.0)


def estimate(scores: Scores) -> Estimate:
    """The shift behind the scores, with a deviation that is never below 1 / sqrt(n).

    >>> scores = Scores.of([1.0, 3.0, 2.0, 2.0], dimensions=10_000)
    >>> found = estimate(scores)
    >>> print(f"{found.shift:.3f} +- {found.deviation:.3f}")
    2.000 +- 0.500
    """
    n, d = scores.number, scores.dimensions
    mean = scores.total / n
    variance = 1.0
    if n > 1:
        variance = max((scores.squares - n * mean**2) / (n - 1), 1.0)
    shift = mean / (1 + 3 / (4 * d))
    common = shift**2 / (2 * d) * scores.shared / n**2
    return Estimate(shift, math.sqrt(variance / n + common))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta of N(0, 1) against N(mu, 1) at this epsilon (Balle and Wang, ICML 2018).

    >>> round(gaussian_delta(1.0, 1.0), 4)
    0.1269
    """
    from scipy.stats import norm

    first = float(norm.cdf(mu / 2 - epsilon / mu))
    tail = epsilon + float(norm.logcdf(-mu / 2 - epsilon / mu))
    return first - math.exp(tail)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of N(0, 1) against N(mu, 1): exact, of a Gaussian mechanism.

    mu is the sensitivity over the deviation of the noise; of T releases of one
    mechanism that of one, times sqrt(T).

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """
    from scipy.optimize import brentq

    if mu <= 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = mu * mu / 2 + 40 * mu
    return float(brentq(lambda e: gaussian_delta(e, mu) - delta, 0.0, high))


def measured_in(
    rows: Sequence[dict[str, Any]], note: Callable[[str, str], None]
) -> dict[str, Any]:
    """The part of the last of a run's rows that canaries have in it.

    Nothing where it has no guarantee, or canaries were in no round yet. An alarm is
    noted, by its kind and text.
    """
    scores = Scores.joined(rows)
    if "privacy" not in rows[-1] or scores.number == 0:
        return {}
    found = measured(scores, rows[-1]["privacy"])
    if found["alarm"]:
        text, meaning = describe(found)
        note("canaries", f"canaries: {text}; {meaning}")
    return {"canaries": found}


def measured(scores: Scores, claimed: dict[str, Any]) -> dict[str, Any]:
    """What canaries say of a guarantee, as a row of metrics.jsonl has it.

    `claimed` is the row's `privacy`: noise multiplier z, rate q, steps and delta, which
    count for what is measured as well. An epsilon is the claimed mechanism's with the
    noise that was measured; None where no accountant finds it. `alarm`: at 99.9 %
    confidence there is less noise than is claimed.
    """
    found = estimate(scores)
    reported, alarming = found.at_least(REPORTED), found.at_least(ALARMING)
    z = claimed["noise_multiplier"]
    epsilons = {
        "epsilon": _epsilon(max(found.shift, 0.0), claimed),
        "epsilon_at_least": _epsilon(reported, claimed),
        "epsilon_at_least_99.9": _epsilon(alarming, claimed),
    }
    return {
        "observations": scores.number,
        "dimensions": scores.dimensions,
        "score": found.shift,
        "score_deviation": found.deviation,
        "noise_multiplier": 1 / found.shift if found.shift > 0 else None,
        "noise_multiplier_at_most": 1 / reported if reported else None,
        **epsilons,
        "confidence": REPORTED,
        "claimed_noise_multiplier": z,
        "claimed_epsilon": _claimed(claimed),
        "alarm": bool(z > 0 and alarming * z > 1),
        "view": claimed["view"],
    }


def _claimed(claimed: dict[str, Any]) -> Any:
    """The smaller epsilon of the accountants, as the row has it."""
    tight = claimed.get("epsilon_prv")
    return claimed["epsilon_rdp"] if tight is None else tight


def _epsilon(shift: float, claimed: dict[str, Any]) -> float | None:
    """The epsilon of the claimed steps with noise 1 / shift."""
    q, steps, delta = claimed["sample_rate"], claimed["steps"], claimed["delta"]
    if shift == 0 or steps == 0:
        return 0.0
    if q == 1:
        return gaussian_epsilon(shift * math.sqrt(steps), delta)
    if claimed.get("epsilon_prv") is None:
        return None  # the slower accountant has its say after the last round
    epsilon, _ = epsilon_prv(1 / shift, q, steps, delta)
    return epsilon


def describe(found: dict[str, Any]) -> tuple[str, str]:
    """(measured epsilon, what it means) of `measured`, for a person."""
    least, claimed = found["epsilon_at_least"], found["claimed_epsilon"]
    text = "epsilon ?" if least is None else f"epsilon >= {least:.4g}"
    noise = found["noise_multiplier"]
    shown = "none found" if noise is None else f"{noise:.3g}"
    told = claimed if isinstance(claimed, str) else f"{claimed:.4g}"
    parts = [
        f"at {found['confidence']:.0%} confidence, claimed {told}",
        f"noise multiplier {shown}, claimed {found['claimed_noise_multiplier']:.3g}",
        f"{found['observations']:,} observations of canaries",
        f"view: {found['view']}",
    ]
    if found["alarm"]:
        parts.insert(0, "ALARM: less noise than is claimed")
    return text, "; ".join(parts)
