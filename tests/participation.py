"""Servers that are told what arrives, and the weights of FedAU by recursion.

Symbols as in the papers. Here Delta = local - global, and a step goes along +U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcore import intervals, trees
from fedcore.method import Round
from fedcore.reports import Reports
from fedcore.rounds.participation import Process
from tests.helpers import Server, redirected

MEMORY = ["fedstale", "fedvarp", "mifa"]


def no_counts() -> np.ndarray:
    """The label counts of a process whose rates are given: not to be asked for."""
    return np.empty((0, 0))


def zeros(d: int = 1) -> Any:
    """A model of d numbers in float64, which rounds fractions of integers correctly."""
    return np.zeros(d)


def ones(clients: Sequence[int]) -> dict[int, list[float]]:
    return {int(i): [1.0] for i in clients}


class Told:
    """A method that is told something else of each round than `Server` tells it."""

    def __init__(self, method: Any, change: Callable[[Round], Round]) -> None:
        self.method, self.change = method, change

    def round(self, state: Any, r: Round) -> Any:
        return self.method.round(state, self.change(r))


def with_examples(server: Server, sizes: Sequence[int]) -> Server:
    """Its clients hold, and report, this many examples each."""
    server.sizes = list(sizes)
    return server


def in_groups(server: Server, groups: Callable[[list[int]], list[list[int]]]) -> Server:
    """Updates arrive in these groups, in this order."""

    def change(r: Round) -> Round:
        def each(fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
            one = {int(p.clients[0]): p.up for p in r.each(fn, clients, down)}
            for group in filter(None, groups(list(one))):
                up = trees.map(lambda *xs: torch.cat(xs), *[one[i] for i in group])
                num_examples = torch.tensor([float(server.sizes[i]) for i in group])
                yield Reports(torch.tensor(group), up, num_examples)

        return redirected(r, each)

    server.method = Told(server.method, change)
    return server


def rows(server: Server) -> Tensor:
    """What the server remembers, [N, d]."""
    remembered = server.memory.gather(torch.arange(server.population))
    last: Tensor = getattr(remembered, "h", remembered)["w"]  # FedStale's has more
    return last.clone()


def primed(server: Server, memory: Sequence[Any]) -> Server:
    """It remembers these updates, one a client, and its model is zero."""
    server.round(
        {i: np.atleast_1d(h) for i, h in enumerate(memory)}, [1.0] * server.population
    )
    server.state = server.state._replace(params=trees.zeros_like(server.state.params))
    return server


SEQUENCE = [0, 0, 1, 0, 1, 1, 0, 0, 0, 1]  # rounds in which the client takes part
OMEGA = {
    None: "1 1 1 3 3 5/2 2 2 2 2 5/2",
    4: "1 1 1 3 3 5/2 2 2 2 2 5/2",
    3: "1 1 1 3 3 5/2 2 2 2 9/4 2",
    2: "1 1 2 3/2 3/2 5/3 3/2 3/2 8/5 8/5 5/3",
    1: "1 1 1 1 1 1 1 1 1 1 1",
}


def fractions(text: str) -> list[Fraction]:
    return [Fraction(word) for word in text.split()]


def omegas(history: Any, cutoff: int | None = None) -> np.ndarray:
    """omega_0 .. omega_T by the code, [T + 1, n].

    `history` says who took part: [T, n] or [T] of 0 and 1.
    """
    history = np.asarray(history, dtype=bool)
    history = history.reshape(len(history), -1)
    rounds, population = history.shape
    everybody, x = torch.arange(population), intervals.start(population)
    by_round = []
    for t, present in enumerate(history):
        by_round.append(intervals.omega(x, everybody, t, cutoff).numpy())
        x = intervals.after(x, [torch.from_numpy(np.flatnonzero(present))], t, cutoff)
    by_round.append(intervals.omega(x, everybody, rounds, cutoff).numpy())
    return np.stack(by_round)


def recursion(
    history: Sequence[int], cutoff: int | None = None
) -> list[tuple[Fraction, int, int]]:
    """(omega_t, M, s) of one client for t = 0 .. T: the paper's running mean, exact."""
    omega, m, s = Fraction(1), 0, 0
    found = [(omega, m, s)]
    for present in history:
        s += 1
        if present or s == cutoff:
            omega = Fraction(s) if m == 0 else (m * omega + s) / (m + 1)
            m, s = m + 1, 0
        found.append((omega, m, s))
    return found


def weight_in(name: str, before: Sequence[int], **settings: Any) -> float:
    """The weight of an update in the round after `before`; N = 1."""
    server = Server(name, 1, w=zeros(), **settings)
    for present in before:
        server.round({0: [0.0]} if present else {})
    return server.round({0: [1.0]}).item()


def simulated(
    process: Process, rounds: int, cutoffs: Sequence[int | None]
) -> dict[int | None, np.ndarray]:
    """omega of every client after so many rounds, by cut-off."""
    everybody, state = torch.arange(process.population), process.start()
    xs = {k: intervals.start(process.population) for k in cutoffs}
    for t in range(rounds):
        cohort, state = process.sample(t, state)
        xs = {k: intervals.after(x, [cohort], t, k) for k, x in xs.items()}
    return {k: intervals.omega(x, everybody, rounds, k).numpy() for k, x in xs.items()}


def harmonic(x: np.ndarray) -> float:
    """One over the mean of 1 / omega, which has far less bias than the mean of omega.

    It counts intervals, and clients have equally many rounds.
    """
    return float(1 / np.mean(1 / x))


def bernoulli_limit(p: float, cutoff: float) -> float:
    return (1 - (1 - p) ** cutoff) / p


def markov_limit(p: float, cutoff: int, q: float) -> float:
    q01, q10 = q, q * (1 / p - 1)
    if q10 > 1:
        q01, q10 = q01 / q10, 1.0
    a, b = q10 * (1 - q01) ** (cutoff - 1), (1 - q01) ** cutoff
    return 1 / (p * (1 + a / (1 - b)))


QUICK: dict[str, Any] = {
    "checkpoint__seconds": 1e9,
    "evaluation__every": 1000,
    "evaluation__clients": 0,
}
RATES = [1.0, 0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4, 0.8, 0.05, 0.25]
SOME = {"name": "bernoulli", "p": RATES}
ALL = {"name": "bernoulli", "mean": 1.0}
RARE = {"name": "bernoulli", "mean": 0.06}  # about half of the rounds are empty
