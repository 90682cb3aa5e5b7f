"""Attacks on the messages of a round, as formulas over the honest ones.

H [h, d] are honest messages, one a row, mu and sigma their mean and standard deviation
by column (divisor h - 1). All but `gaussian`, and what a client does to a message of
its own, know H: an upper bound on a real adversary. Vectors are float64 [d].

ALIE: Baruch et al., NeurIPS 2019. IPM: Xie et al., UAI 2019. MinMax and MinSum:
Shejwalkar and Houmansadr, NDSS 2021; in closed form here, where the published code
searches. Mimic: Karimireddy et al., ICLR 2022. Optimised ALIE and IPM as in ByzFL's
line search, over both signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["unit", "sign", "std"]

ENTRIES = 2**22  # of H that are held in float64 at once
TRIALS = 20  # of a line search
TINY = 1e-300  # in place of a norm of 0
FIXED = (0.5, 1.5)  # strengths that a line search is compared with


def mean(honest: Tensor) -> Tensor:
    """mu.

    >>> mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.], dtype=torch.float64)
    """
    return honest.mean(0, dtype=torch.float64)


def deviation(honest: Tensor) -> Tensor:
    """sigma; zeros for one honest client.

    >>> deviation(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    if len(honest) == 1:
        return torch.zeros_like(honest[0], dtype=torch.float64)
    return torch.cat([block.std(0) for _, block in _blocks(honest)])


def squared_distances(honest: Tensor) -> Tensor:
    """D_ij = |x_i - x_j|^2, float64 [h, h].

    >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[ 0., 25.],
            [25.,  0.]], dtype=torch.float64)
    """
    h = len(honest)
    products = torch.zeros(h, h, dtype=torch.float64, device=honest.device)
    for _, block in _blocks(honest):
        # Centred, so that close rows far from zero keep their digits. All are honest:
        # no outlier pulls the mean away.
        centred = block - block.mean(0)
        products += centred @ centred.T
    squares = products.diagonal()
    distances = squares[:, None] + squares[None, :] - 2 * products
    return distances.clamp(min=0).fill_diagonal_(0)


def _blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some columns, and the rows in these in float64, [n, b]: no second copy of H."""
    width = max(ENTRIES // len(rows), 1)
    for start in range(0, rows.shape[1], width):
        columns = slice(start, start + width)
        yield columns, rows[:, columns].double()


def _along(rows: Tensor, z: Tensor) -> Tensor:
    """<x_i, z> of every row, float64 [n]."""
    products = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for columns, block in _blocks(rows):
        products += block @ z[columns].double()
    return products


# What all of them send


def alie(honest: Tensor, z: float) -> Tensor:
    """A little is enough: mu + z sigma."""
    return mean(honest) + z * deviation(honest)


def z_max(n: int, f: int) -> float:
    """z with which f of n clients still win over a majority by the paper.

    0 where there is none, since the clients that they need are half of the honest.

    >>> round(z_max(n=50, f=10), 6)
    0.253347
    """
    supporters = max(n // 2 + 1 - f, 1)
    share = (n - f - supporters) / (n - f)
    if share <= 0.5:
        return 0.0
    return NormalDist().inv_cdf(share)


def ipm(honest: Tensor, epsilon: float) -> Tensor:
    """Inner product manipulation: -epsilon mu."""
    return -epsilon * mean(honest)


def gaussian(honest: Tensor, k: float, draw: torch.Generator) -> Tensor:
    """N(0, s^2) in every entry, s = k |mu| / sqrt(d); `draw` is of the CPU."""
    d = honest.shape[1]
    s = k * float(mean(honest).norm()) / math.sqrt(max(d, 1))
    noise = torch.randn(d, generator=draw, dtype=torch.float32).double()
    return noise.to(honest.device) * s


def minmax(honest: Tensor, direction: Direction) -> Tensor:
    """mu + g p, no farther from any honest message than two of these are apart.

    The largest such g: max_i |mu + g p - x_i| <= max_ij |x_i - x_j|.
    """
    mu, p = mean(honest), perturbation(honest, direction)
    a = p.dot(p)
    if a == 0:
        return mu
    farthest = squared_distances(honest).max()
    b = torch.zeros(len(honest), dtype=torch.float64, device=honest.device)
    c = torch.zeros_like(b) - farthest
    for columns, block in _blocks(honest):
        gaps = mu[columns] - block
        b += gaps @ p[columns]
        c += gaps.square().sum(1)
    steps = (-b + (b * b - a * c).clamp(min=0).sqrt()) / a
    return mu + steps.min().clamp(min=0) * p


def minsum(
    honest: Tensor, direction: Direction, reach: Literal["min", "max"] = "min"
) -> Tensor:
    """mu + g p, whose squared distances to honest messages add up to at most S.

    S is the least such sum of an honest message, as in the authors' code. With
    `reach = "max"` it is the largest, as one can read the paper.
    """
    mu, p = mean(honest), perturbation(honest, direction)
    a = p.dot(p)
    if a == 0:
        return mu
    sums = squared_distances(honest).sum(1)
    allowed = sums.min() if reach == "min" else sums.max()
    # V = sum_i |mu - x_i|^2, and the sum for a row i is V + h |mu - x_i|^2 >= V.
    spread = sums.sum() / (2 * len(honest))
    g = ((allowed - spread).clamp(min=0) / (len(honest) * a)).sqrt()
    return mu + g * p


def perturbation(honest: Tensor, direction: Direction) -> Tensor:
    """p of MinMax and MinSum: -mu / |mu|, -sign(mu) or -sigma."""
    if direction == "std":
        return -deviation(honest)
    mu = mean(honest)
    if direction == "sign":
        return -mu.sign()
    return -torch.nn.functional.normalize(mu, dim=0, eps=TINY)


# Against the rule in force


def strongest(
    damage: Callable[[float], float], trials: int = TRIALS
) -> tuple[float, float]:
    """(tau >= 0 that does most damage, this damage), by at most so many trials.

    While it gets better the step doubles; from the first time on that it does not, the
    step shrinks by 0.8 a trial, and tau never goes back below its best.

    >>> tau, _ = strongest(lambda tau: -abs(tau - 30))
    >>> round(tau, 1)
    30.0
    """
    best, most, step = 0.0, damage(0.0), 10.0
    is_growing = True
    for _ in range(trials - 1):
        found = damage(best + step)
        is_better = found > most
        if is_better:
            best, most = best + step, found
        is_growing = is_growing and is_better
        step *= 2.0 if is_growing else 0.8
    return best, most


def optimised(
    vector: Callable[[float], Tensor], damage: Callable[[Tensor], float]
) -> Tensor:
    """The vector(tau) that does most damage, over tau of both signs.

    A line search for each sign, and the strengths that are usual in print.
    """

    def of_sign(sign: int) -> Callable[[float], float]:
        return lambda tau: damage(vector(sign * tau))

    best, most = 0.0, -math.inf
    for sign in (1, -1):
        tau, found = strongest(of_sign(sign))
        if found > most:
            best, most = sign * tau, found
        for fixed in FIXED:
            found = damage(vector(sign * fixed))
            if found > most:
                best, most = sign * fixed, found
    return vector(best)


# Mimic


def mimic_direction(honest: Tensor, z: Tensor, steps: int) -> Tensor:
    """z after one more power step on the honest differences, float64 [d], of norm 1.

    z <- (k z + s / |s|) / (k + 1), s = sum_i <x_i - mu, z> (x_i - mu), after `steps` =
    k others; then of norm 1. Where all honest messages are equal, z stays.
    """
    mu, z = mean(honest), z.double()
    along = _along(honest, z) - mu.dot(z)  # <x_i - mu, z>
    products = [along @ block for _, block in _blocks(honest)]
    s = torch.cat(products) - along.sum() * mu
    if s.norm() == 0:
        return z
    normalise = torch.nn.functional.normalize
    mixed = (steps * z + normalise(s, dim=0, eps=TINY)) / (steps + 1)
    return normalise(mixed, dim=0, eps=TINY)


def mimicked(honest: Tensor, z: Tensor) -> int:
    """The row of H that is farthest along z; the first of equal ones."""
    along = _along(honest, z)
    return int((along == along.max()).nonzero()[0])
