"""The graph of a secure sum: who shares masks with whom, and how many have to stay.

    n  clients    k  neighbours of each    t  shares that unmask    a  that collude

Everybody is everybody's neighbour in cohorts of up to 128. In larger ones clients stand
in a ring, in an order that a hash gives, and each has k / 2 neighbours to each side
(Bell et al., CCS 2020). Whoever has t shares of a client's secret can take its mask
off; each holder gives one of two secrets, so nobody gets both where 2 t > k + 1 + a.

The rule for rings is that of Google's federated-compute, on hypergeometric tails: the
chance that a client is exposed, or that the ring falls apart, is below 2^-40, and the
chance that a sum cannot be unmasked below 2^-20.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, comb, fsum, isfinite
from typing import NamedTuple

import numpy as np

from fedcore.messages.secure.primitives import digest

__all__ = [
    "LEAST",
    "Degree",
    "degree",
    "degree_rule",
    "graph_fault",
    "lists_fault",
    "neighbours_of",
    "threshold",
    "tolerated",
    "weights_fault",
]

LEAST = 3  # clients in a sum: of two, each knows the other's part
COMPLETE = 128  # clients up to which everybody is everybody's neighbour
NEIGHBOURS = 100  # of each client in larger cohorts
LOST = 0.1  # share of the clients that a ring's threshold allows to leave


class Degree(NamedTuple):
    """Neighbours, and the lowest and highest threshold that do, of a ring."""

    k: int
    lowest: int
    highest: int


def degree(n: int, wanted: int | None = None) -> int:
    """k, neighbours of each of `n` clients; `wanted` as `secure.neighbours` has it.

    >>> degree(10), degree(128), degree(1000), degree(1000, 37), degree(10, 37)
    (9, 127, 100, 38, 9)
    """
    if wanted is None:
        wanted = n - 1 if n <= COMPLETE else NEIGHBOURS
    even = wanted + wanted % 2  # half of them to each side
    return min(even, n - 1)


@lru_cache(maxsize=4096)
def threshold(n: int, k: int | None = None) -> int:
    """t for `n` clients with `k` neighbours each, as `degree` has them.

    Two thirds of a complete graph. In a ring as many as are there but once in 2^20 sums
    where a tenth of all clients leaves.

    >>> [threshold(n) for n in (3, 4, 5, 10, 30, 64, 100, 1000)]
    [2, 3, 4, 7, 20, 43, 67, 70]
    """
    k = degree(n, k)
    if k >= n - 1:
        return max(2, ceil(2 * (k + 1) / 3))
    return max(2, _stay(n, k, int(LOST * n)))


def tolerated(k: int, t: int) -> int:
    """a, clients near a victim that may collude with a server that lies.

    >>> tolerated(2, 2), tolerated(9, 7), tolerated(99, 67)
    (0, 3, 33)
    """
    return 2 * t - k - 2


def graph_fault(n: int, k: int, t: int) -> str | None:
    """Why `n` clients with `k` neighbours and a threshold `t` are not safe; or None."""
    if n < LEAST:
        return f"a sum of {n} clients: expected at least {LEAST}"
    if not 0 < k < n or (k < n - 1 and k % 2):
        return f"{k} neighbours of {n} clients: expected {n - 1}, or fewer and even"
    if k < n - 1 and k < _least_degree(n):
        return (
            f"{k} neighbours in a ring of {n} clients: expected at least "
            f"{_least_degree(n)}"
        )
    if not k + 1 < 2 * t <= 2 * (k + 1):
        return (
            f"a threshold of {t} among {k + 1} clients: expected more than half of "
            "them, and not more than all"
        )
    return None


def neighbours_of(ids: Sequence[int], k: int, seed: bytes) -> dict[int, list[int]]:
    """The neighbours of each client, ascending; an even `k`, or all.

    The order of the ring is that of digests of `seed` and id.

    >>> neighbours_of([3, 5, 8], 2, b"")
    {3: [5, 8], 5: [3, 8], 8: [3, 5]}
    """
    if k >= len(ids) - 1:
        return {client: [other for other in ids if other != client] for client in ids}
    ring = sorted(ids, key=lambda client: digest(seed, client))
    reach = range(-(k // 2), k // 2 + 1)
    near = {}
    for place, client in enumerate(ring):
        around = {ring[(place + step) % len(ring)] for step in reach}
        near[client] = sorted(around - {client})
    return near


def weights_fault(weights: Sequence[float], least: float, cap: float) -> str | None:
    """Why weights that a server chose would show too much of a client; or None.

    `least` is the effective number of clients, (sum w)^2 / sum w^2, that there has to
    be; `cap` the largest weight that the ring can carry.

    >>> weights_fault([1.0, 1.0, 1.0, 5.0], 2, 8)
    'one client has a weight of 5 in a sum of 8: expected at most a third'
    """
    for weight in weights:
        if not isfinite(weight) or not 0 <= weight <= cap:
            return f"a weight of {weight:g}: expected 0 to {cap:g}"
    total, largest = fsum(weights), max(weights, default=0.0)
    slack = 1e-9  # for rounding, where all are the same
    if total <= 0 or 3 * largest > total * (1 + slack):
        return (
            f"one client has a weight of {largest:g} in a sum of {total:g}: "
            "expected at most a third"
        )
    effective = total / largest * total / fsum(w * (w / largest) for w in weights)
    if effective < least * (1 - slack):
        return (
            f"the weights are those of {effective:.1f} clients: "
            f"expected at least {least:g}"
        )
    return None


def lists_fault(
    lists: Sequence[Sequence[float]], is_one_field: bool, least: float, cap: float
) -> str | None:
    """Why lists of weights that a server chose would show too much; or None.

    Fields of a message may say the same of a client, and do in FedVARP: whoever has two
    sums of it, sum_i u_i x_i and sum_i v_i x_i, has sum_i (u_i - r v_i) x_i for every r
    as well, where most clients may be gone. So no client has more than a third of such
    a sum either. Without `is_one_field` there are fields that are weighed equally.

    >>> lists_fault([[2.0, 2.0, 2.0, 1.0]], True, 3, 8) is None
    True
    >>> fault = lists_fault([[2.0, 2.0, 2.0, 1.0]], False, 3, 8)
    >>> fault[:30]
    'of two sums with other weights'
    """
    for weights in lists:
        fault = weights_fault(weights, least, cap)
        if fault is not None:
            return fault
    if not lists:
        return None
    columns = {tuple(weights) for weights in lists}
    if not is_one_field:
        columns.add((1.0,) * len(lists[0]))
    if len(columns) > 2:
        return f"{len(columns)} lists of weights for one message: expected at most two"
    if len(columns) == 2 and _isolates(*map(np.array, sorted(columns))):
        return (
            "of two sums with other weights the difference could be that of one "
            "client: ask more clients, of whom more have the same weight"
        )
    return None


def _isolates(u: np.ndarray, v: np.ndarray) -> bool:
    """Whether some u - r v has more than a third of its sum at one client.

    The share of a client is largest where another one's part is zero: it is enough to
    look at the ratios u_i / v_i, of which there are few where weights are.
    """
    slack = 1e-9
    inside = v > 0
    for ratio in np.unique(u[inside] / v[inside]):
        left = np.abs(u - ratio * v)
        left[left <= slack * np.maximum(u, ratio * v)] = 0.0  # rounding alone
        if 3 * left.max() > left.sum() * (1 + slack):
            return True
    return False


def degree_rule(
    n: int, colluding: float, lost: float, is_active: bool = True
) -> Degree | None:
    """The smallest ring of `n` clients that is safe; None where no ring is.

    `colluding` and `lost` are shares of the clients; `is_active` whether the server may
    lie.

    >>> degree_rule(1000, 0.05, 0.1)
    Degree(k=78, lowest=52, highest=52)
    """
    for k in range(2, n - 1, 2):
        found = _ring(n, k, int(colluding * n + 1e-9), int(lost * n + 1e-9), is_active)
        if found is not None:
            return found
    return None


def _ring(n: int, k: int, colluding: int, lost: int, is_active: bool) -> Degree | None:
    bad = colluding + lost
    # Two runs of k / 2 that are all gone cut a ring; there are n (n - k - 1) / 2 pairs.
    if n * (n - k - 1) * comb(bad, k) << 41 >= 2 * comb(n, k):
        return None
    near = 0  # colluding clients near one client, but for a chance of 2^-41 / n
    more = comb(n, k) - _ways(n, colluding, k, 0)
    while more * n << 41 > comb(n, k):
        near += 1
        more -= _ways(n, colluding, k, near)
    # A server that lies gets both secrets of a client where 2 t <= near + k.
    lowest = max(2, (ceil((near + k - 1.25) / 2) if is_active else near) + 1)
    highest = _stay(n, k, lost)
    return Degree(k, lowest, highest) if lowest <= highest else None


def _stay(n: int, k: int, lost: int) -> int:
    """Neighbours of a client that stay, but for a chance of 2^-20 / n."""
    fewer, stay = 0, 0
    while True:
        fewer += _ways(n, n - lost, k, stay)  # with `stay` or fewer
        if fewer * n << 20 >= comb(n, k):
            return stay
        stay += 1


def _ways(n: int, marked: int, k: int, number: int) -> int:
    """Ways to draw k of n with `number` of the `marked`: exact, tails are tiny."""
    return comb(marked, number) * comb(n - marked, k - number)


@lru_cache(maxsize=256)
def _least_degree(n: int) -> int:
    """Neighbours below which a ring is not safe, even where nobody colludes."""
    found = degree_rule(n, 0.0, LOST)
    return n - 1 if found is None else found.k
