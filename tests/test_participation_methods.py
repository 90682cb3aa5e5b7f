"""FedAU, FedStale, FedVARP and MIFA against their equations: by hand, in fractions, in NumPy, and each other in their limits.

Symbols as in the papers. Here Delta = local - global, and a step goes along +U.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import intervals, trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.rng import rng
from fedcore.rounds.loop import run
from fedcore.rounds.participation import Bernoulli, Cyclic, Markov, Process
from fedcore.task import Task, squared_error
from fedcore.types import Reports, Round
from tests.helpers import Server, assert_close, loop_of, small

MEMORY = ["fedstale", "fedvarp", "mifa"]
NO_COUNTS: Callable[[], np.ndarray] = lambda: np.empty((0, 0))  # noqa: E731  rates are given, so no class counts are asked for


def zeros(d: int = 1) -> Any:
    """A model of d numbers in float64, in which fractions of small integers come out correctly rounded."""
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
    """Its clients hold this many examples each."""
    n = int(sum(sizes))
    nothing = Examples(torch.zeros(n, 1), torch.zeros(n, 1))
    data = FederatedData(nothing, nothing, np.arange(n), np.cumsum([0, *sizes]))
    task = Task(nn.Linear(1, 1, bias=False), data, loss=squared_error, metrics={})
    server.method = Told(server.method, lambda r: replace(r, task=task))
    return server


def in_groups(server: Server, groups: Callable[[list[int]], list[list[int]]]) -> Server:
    """Updates arrive in these groups, in this order."""

    def change(r: Round) -> Round:
        def each(fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
            one = {int(p.clients[0]): p.up for p in r.each(fn, clients, down)}
            for group in filter(None, groups(list(one))):
                up = trees.map(lambda *xs: torch.cat(xs), *[one[i] for i in group])
                yield Reports(torch.tensor(group), up, torch.ones(len(group)))

        return replace(r, each=each)

    server.method = Told(server.method, change)
    return server


def rows(server: Server) -> Tensor:
    """What the server remembers, [N, d]."""
    return server.memory.gather(torch.arange(server.population))["w"].clone()


def primed(server: Server, memory: Sequence[Any]) -> Server:
    """It remembers these updates, one a client, and its model is zero."""
    server.round(
        {i: np.atleast_1d(h) for i, h in enumerate(memory)}, [1.0] * server.population
    )
    server.state = server.state._replace(params=trees.zeros_like(server.state.params))
    return server


# FedAU: weights from intervals

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
    """omega_0 .. omega_T by the code, [T + 1, n], for who took part: [T, n] or [T] of 0 and 1."""
    history = np.asarray(history, dtype=bool)
    history = history.reshape(len(history), -1)
    everybody, x, found = (
        torch.arange(history.shape[1]),
        intervals.start(history.shape[1]),
        [],
    )
    for t, present in enumerate(history):
        found.append(intervals.omega(x, everybody, t, cutoff).numpy())
        x = intervals.after(x, [torch.from_numpy(np.flatnonzero(present))], t, cutoff)
    return np.stack(
        [*found, intervals.omega(x, everybody, len(history), cutoff).numpy()]
    )


def recursion(
    history: Sequence[int], cutoff: int | None = None
) -> list[tuple[Fraction, int, int]]:
    """(omega_t, M, s) for t = 0 .. T: the paper's running mean, in exact fractions, for one client."""
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
    """The factor that an update gets in the round after `before`, from the step that the model makes; N = 1."""
    server = Server(name, 1, w=zeros(), **settings)
    for present in before:
        server.round({0: [0.0]} if present else {})
    return server.round({0: [1.0]}).item()


@pytest.mark.parametrize("cutoff", OMEGA)
def test_the_intervals_of_the_example_have_the_means_worked_by_hand(
    cutoff: int | None,
) -> None:
    expected = fractions(OMEGA[cutoff])
    assert [omega for omega, _, _ in recursion(SEQUENCE, cutoff)] == expected
    assert omegas(SEQUENCE, cutoff)[:, 0].tolist() == [float(x) for x in expected]


@pytest.mark.parametrize("cutoff", OMEGA)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedau", {}), ("fedstale", {"beta": 0.0, "rates": "estimated"})],
)
def test_an_update_is_multiplied_by_the_weight_of_its_round(
    name: str, settings: dict[str, Any], cutoff: int | None
) -> None:
    """For FedStale, 1 / q: q = 1, 1, 1, 1/3, 1/3, 2/5, 1/2, 1/2, 1/2, 1/2, 2/5 without cut-off."""
    found = [
        weight_in(name, SEQUENCE[:t], cutoff=cutoff, **settings)
        for t in range(len(SEQUENCE) + 1)
    ]
    assert found == [float(x) for x in fractions(OMEGA[cutoff])]


def test_the_estimated_rate_is_participations_over_the_rounds_up_to_the_last() -> None:
    """q(t) = c / (s + 1) with c participations so far, the last in round s; 1 before the first. It is in (0, 1]."""
    draw = np.random.default_rng(0)
    for p in (0.1, 0.5, 0.9):
        history = (draw.random(25) < p).astype(int)
        for t in range(len(history) + 1):
            came = np.flatnonzero(history[:t])
            q = Fraction(len(came), int(came[-1]) + 1) if len(came) else Fraction(1)
            assert 0 < q <= 1
            assert weight_in(
                "fedstale", history[:t].tolist(), beta=0.0, rates="estimated"
            ) == float(1 / q), (p, t)


@pytest.mark.parametrize("cutoff", [None, 1, 2, 3, 7])
def test_a_client_that_always_comes_has_weight_one(cutoff: int | None) -> None:
    assert (omegas(np.ones(40), cutoff) == 1.0).all()
    for t in (0, 1, 2, 17):
        assert weight_in("fedau", [1] * t, cutoff=cutoff) == 1.0
        assert (
            weight_in("fedstale", [1] * t, beta=0.0, rates="estimated", cutoff=cutoff)
            == 1.0
        )  # q = 1 exactly


def test_a_client_that_never_came_has_weight_one_or_the_cutoff_once_that_is_reached() -> (
    None
):
    assert (omegas(np.zeros(200)) == 1.0).all()
    assert omegas(np.zeros(7), 3)[:, 0].tolist() == [1, 1, 1, 3, 3, 3, 3, 3]
    for cutoff in (1, 2, 5, 50):
        assert omegas(np.zeros(120), cutoff)[:, 0].tolist() == [1.0] * cutoff + [
            float(cutoff)
        ] * (121 - cutoff)
    assert [weight_in("fedau", [0] * t, cutoff=3) for t in range(8)] == [
        1,
        1,
        1,
        3,
        3,
        3,
        3,
        3,
    ]


def test_a_regular_client_gets_its_period_as_weight() -> None:
    for m in (1, 2, 4, 9):
        history = [t % m == m - 1 for t in range(5 * m + 3)]
        assert (omegas(history)[m:] == m).all(), (
            f"present in rounds {m - 1}, {2 * m - 1}, ..."
        )
        early = [
            t % m == 0 for t in range(5 * m + 1)
        ]  # present in rounds 0, m, 2m, ...
        found = omegas(early)[:, 0]
        for j in range(1, 7):
            after_j = [t for t in range(len(found)) if sum(early[:t]) == j]
            assert all(
                found[t] == float(Fraction(1 + (j - 1) * m, j)) for t in after_j
            ), (m, j)
    assert omegas([1, 0, 0, 0, 1])[:, 0].tolist() == [1, 1, 1, 1, 1, 5 / 2]


CYCLES = [
    (10, 90, 50, Fraction(100, 11)),
    (2, 98, 50, Fraction(100, 3)),
    (10, 90, 90, Fraction(100, 11)),
    (10, 90, 91, Fraction(10)),
    (10, 90, None, Fraction(10)),
    (2, 98, None, Fraction(50)),
    (3, 7, 3, Fraction(10, 5)),
    (1, 9, 1, Fraction(1)),
]


@pytest.mark.parametrize(("a", "b", "cutoff", "expected"), CYCLES)
def test_after_whole_cycles_the_weight_is_rounds_over_closed_intervals(
    a: int, b: int, cutoff: int | None, expected: Fraction
) -> None:
    assert expected == Fraction(a + b, a + (b // cutoff if cutoff else 0))
    history = ([0] * b + [1] * a) * 4
    assert omegas(history, cutoff)[a + b :: a + b, 0].tolist() == [float(expected)] * 4


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
    """The mean of 1 / omega has far less bias than that of omega: it counts intervals, and clients have equally many rounds."""
    return float(1 / np.mean(1 / x))


def bernoulli_limit(p: float, cutoff: float) -> float:
    return (1 - (1 - p) ** cutoff) / p


def markov_limit(p: float, cutoff: int, q: float) -> float:
    q01, q10 = q, q * (1 / p - 1)
    if q10 > 1:
        q01, q10 = q01 / q10, 1.0
    a, b = q10 * (1 - q01) ** (cutoff - 1), (1 - q01) ** cutoff
    return 1 / (p * (1 + a / (1 - b)))


@pytest.mark.parametrize(
    ("p", "limit", "deviation"), [(0.1, 9.9485, 9.21), (0.02, 31.7915, 17.77)]
)
def test_under_bernoulli_participation_the_weight_goes_to_the_limit(
    p: float, limit: float, deviation: float
) -> None:
    length = np.minimum(
        np.arange(1, 100_000), 50
    )  # of an interval: geometric, cut off at 50
    chance = p * (1 - p) ** np.arange(len(length))
    assert (length * chance).sum() == pytest.approx(bernoulli_limit(p, 50), rel=1e-9)
    assert bernoulli_limit(p, 50) == pytest.approx(limit, abs=5e-5)
    assert math.sqrt(
        (length**2 * chance).sum() - bernoulli_limit(p, 50) ** 2
    ) == pytest.approx(deviation, abs=5e-3)

    rounds = 4000
    found = simulated(Bernoulli(mean=p).process(2000, 1, NO_COUNTS), rounds, [50, None])
    assert harmonic(found[50]) == pytest.approx(limit, rel=0.01)
    assert harmonic(found[None]) == pytest.approx(1 / p, rel=0.02)
    # A mean over `rounds / limit` intervals has the deviation of one divided by the root of that.
    assert found[50].std() * math.sqrt(rounds / limit) == pytest.approx(
        deviation, rel=0.06
    )


def test_under_markov_participation_the_weight_goes_to_the_limit() -> None:
    assert markov_limit(0.1, 50, 0.05) == pytest.approx(9.620, abs=5e-4)
    assert markov_limit(0.1, 10, 0.05) == pytest.approx(5.859, abs=5e-4)
    found = simulated(
        Markov(mean=0.1, q=0.05).process(1000, 1, NO_COUNTS), 5000, [50, 10]
    )
    assert harmonic(found[50]) == pytest.approx(9.620, rel=0.01)
    assert harmonic(found[10]) == pytest.approx(5.859, rel=0.01)


def test_a_markov_client_without_memory_has_the_bernoulli_limit() -> None:
    for p, cutoff in itertools.product((0.05, 0.1, 0.5, 0.9), (1, 2, 10, 50)):
        assert markov_limit(p, cutoff, q=p) == pytest.approx(
            bernoulli_limit(p, cutoff), rel=1e-12
        )
    found = simulated(Markov(mean=0.2, q=0.2).process(1000, 1, NO_COUNTS), 2000, [10])
    assert harmonic(found[10]) == pytest.approx(bernoulli_limit(0.2, 10), rel=0.01)


MEANS = {
    None: "1 1 5/4 3/2 27/16 29/16",
    2: "1 1 3/2 3/2 3/2 3/2",
    3: "1 1 5/4 7/4 7/4 7/4",
}


@pytest.mark.parametrize("cutoff", MEANS)
def test_the_mean_weight_over_all_histories_is_exact(cutoff: int | None) -> None:
    """p = 1/2: all 32 histories of five rounds are equally likely. Each is a client."""
    found = omegas(np.array(list(itertools.product([0, 1], repeat=5))).T, cutoff)
    means = [
        sum(Fraction(x).limit_denominator(1000) for x in row) / 32
        for row in found.tolist()
    ]
    assert means == fractions(MEANS[cutoff])


def random_histories(n: int = 300, rounds: int = 90) -> np.ndarray:
    """[T, n], rare clients and frequent ones."""
    draw = np.random.default_rng(5)
    return draw.random((rounds, n)) < draw.choice([0.0, 0.02, 0.1, 0.3, 0.7, 1.0], n)


@pytest.mark.parametrize("cutoff", [None, 1, 2, 3, 5, 50])
def test_recursion_and_both_closed_forms_agree_to_the_last_bit(
    cutoff: int | None,
) -> None:
    """The running mean in fractions; (t - s) / M of the server's counters; and (c, e) of a client that hears of its own rounds."""
    histories = random_histories()
    found = omegas(histories, cutoff)
    for i, history in enumerate(histories.T):
        c, e = 0, 0
        for t, (omega, m, s) in enumerate(recursion(history.tolist(), cutoff)):
            server = (t - s) / m if m else 1.0
            g = t - e
            mc, sc = (c, g) if cutoff is None else (c + g // cutoff, g % cutoff)
            client = (t - sc) / mc if mc else 1.0
            assert found[t, i] == server == client == float(omega), (i, t)
            if t < len(history) and history[t]:
                c, e = mc + 1, t + 1


@pytest.mark.parametrize("cutoff", [None, 1, 2, 3, 5, 50])
def test_weights_keep_their_bounds_and_a_cutoff_never_lowers_them(
    cutoff: int | None,
) -> None:
    histories = random_histories()
    found = omegas(histories, cutoff)
    t = np.arange(len(found))[:, None]
    assert (found >= 1).all()
    assert (found <= np.maximum(t, 1)).all()
    assert cutoff is None or (found <= cutoff).all()
    absent = ~histories
    assert (found[1:][absent] >= found[:-1][absent]).all(), (
        "a round of absence lowered a weight"
    )
    for i, history in enumerate(histories.T):
        for t, (omega, m, s) in enumerate(recursion(history.tolist(), cutoff)):
            assert m == 0 or m * omega == t - s
            assert m == 0 or round(m * found[t, i]) == t - s


def test_a_weight_rises_in_a_long_absence_only_with_a_cutoff() -> None:
    for m, expected in (
        (1, Fraction(60, 11)),
        (2, Fraction(110, 12)),
        (4, Fraction(15)),
    ):
        history = [1] * 10 + [0] * 50 * m
        assert omegas(history, 50)[-1, 0] == float(expected)
        assert weight_in("fedau", history, cutoff=50) == float(expected)
        assert weight_in("fedau", history) == 1.0


def test_a_participation_in_the_round_that_reaches_the_cutoff_closes_one_interval() -> (
    None
):
    assert omegas([0, 0, 1, 1], 3)[:, 0].tolist() == [
        1,
        1,
        1,
        3,
        2,
    ]  # two intervals, 3 and 1; three would give 4/3


@pytest.mark.parametrize("cutoff", [None, 3, 50])
def test_the_future_and_other_clients_do_not_change_a_weight(
    cutoff: int | None,
) -> None:
    histories = random_histories(60, 80)
    found, other = omegas(histories, cutoff), random_histories(60, 80)[::-1]
    for t0 in (0, 1, 40, 79):
        changed = np.concatenate([histories[:t0], other[t0:]])
        assert (omegas(changed, cutoff)[: t0 + 1] == found[: t0 + 1]).all(), (
            "rounds from t0 on changed a weight of t <= t0"
        )
    mixed = histories.copy()
    mixed[:, 1:] = other[:, 1:]
    assert (omegas(mixed, cutoff)[:, 0] == found[:, 0]).all(), (
        "client 0 depends on other clients"
    )
    order = np.random.default_rng(0).permutation(60)
    assert (omegas(histories[:, order], cutoff) == found[:, order]).all(), (
        "permuted clients have not permuted weights"
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedau", {}), ("fedstale", {"beta": 0.0, "rates": "estimated"})],
)
def test_who_else_comes_in_a_round_does_not_change_its_weights(
    name: str, settings: dict[str, Any]
) -> None:
    def step(cohort: Sequence[int]) -> float:
        server = Server(name, 3, w=zeros(), **settings)
        for present in SEQUENCE:
            server.round({i: [0.0] for i in ([0, 2] if present else [1])})
        return server.round({i: [1.0 if i == 0 else 0.0] for i in cohort}).item()

    assert (
        step([0])
        == step([0, 1])
        == step([0, 1, 2])
        == pytest.approx(5 / 2 / 3, rel=1e-15)
    )


# One round with all numbers, and the first round


def sends(server: Server, rates: list[float] | None = None) -> float:
    return server.round({0: [4.0], 2: [-1.0]}, rates).item()


P4 = [1 / 2, 1.0, 1 / 4, 1 / 10]


def test_one_round_of_four_clients_is_the_arithmetic_of_each_method() -> None:
    """N = 4, S = {0, 2}, Delta = 4 and -1, y = (2, 0, 2, -2), omega = (2, 1, 3, 5)."""
    assert sends(Server("fedavg", 4, weighting="participating")) == 1.5
    assert sends(Server("fedavg", 4, weighting="all")) == 0.75
    assert sends(Server("fedavg", 4, weighting="known"), P4) == 1.0
    fedau = Server("fedau", 4, w=zeros())
    for t in range(30):  # periods of 2, 1, 3 and 5 rounds, which 30 rounds hold whole
        fedau.round(
            {
                i: [0.0]
                for i, period in enumerate((2, 1, 3, 5))
                if t % period == period - 1
            }
        )
    assert sends(fedau) == 1.25
    for name, expected in (("fedvarp", 0.0), ("mifa", 0.25)):
        server = primed(Server(name, 4), [2.0, 0.0, 2.0, -2.0])
        assert sends(server) == expected, name
        assert rows(server)[:, 0].tolist() == [4.0, 0.0, -1.0, -2.0], name


def test_in_the_first_round_nothing_is_remembered() -> None:
    everything = [
        ("all", "fedau", {}),
        ("all", "mifa", {}),
        ("participating", "fedvarp", {}),
        ("known", "fedvarp", {"weighting": "known"}),
    ]
    for weighting, name, settings in everything:
        expected = sends(Server("fedavg", 4, weighting=weighting), P4)
        assert sends(Server(name, 4, **settings), P4) == expected, (
            f"{name}, first round: expected that of {weighting}"
        )


@pytest.mark.parametrize("cutoff", [None, 2])
def test_an_empty_round_moves_nothing_and_counts(cutoff: int | None) -> None:
    server = Server("fedau", 1, w=zeros(), cutoff=cutoff)
    steps = [server.round(ones([0]) if present else {}).item() for present in SEQUENCE]
    expected = [
        float(x) * present
        for x, present in zip(fractions(OMEGA[cutoff]), SEQUENCE, strict=False)
    ]
    assert steps == pytest.approx(expected, abs=1e-14)
    assert [
        step for step, present in zip(steps, SEQUENCE, strict=True) if not present
    ] == [0.0] * 6
    for weighting in ("all", "known", "participating"):
        assert (
            Server("fedavg", 2, weighting=weighting).round({}, [0.5, 0.5]).item() == 0.0
        )


NEVER = [
    ("fedau", {}),
    ("fedau", {"cutoff": 5}),
    ("fedavg", {"weighting": "all"}),
    ("fedavg", {"weighting": "known"}),
    ("mifa", {}),
    ("fedstale", {"rates": "known", "beta": 0.5}),
    ("fedstale", {"rates": "estimated", "beta": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), NEVER)
def test_a_client_that_never_comes_changes_only_the_divisor(
    name: str, settings: dict[str, Any]
) -> None:
    draw = np.random.default_rng(2)
    without, with_it = (
        Server(name, 3, w=zeros(2), **settings),
        Server(name, 4, w=zeros(2), **settings),
    )
    for t in range(60):
        deltas = {i: draw.standard_normal(2) for i in range(3) if draw.random() < 0.4}
        a, b = (s.round(deltas, [0.4] * s.population) for s in (without, with_it))
        assert_close(a * 3, b * 4, 1e-12, f"{name}, round {t}")


# The theorem in one dimension


def one_step(server: Server, centres: np.ndarray, gamma: float) -> Server:
    """Client n has f_n = (x - centre_n)^2 / 2 and takes one local step."""
    at = torch.from_numpy(centres)

    def change(r: Round) -> Round:
        def each(fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
            delta = gamma * (at[clients][:, None] - down.params["w"])
            if len(clients):
                yield Reports(
                    clients,
                    server.up(delta={"w": delta}, loss=torch.zeros(len(clients))),
                    torch.ones(len(clients)),
                )

        return replace(r, each=each)

    server.method = Told(server.method, change)
    return server


def weighted(w1: float, w2: float) -> float:
    return (w1 * 0.9 - w2 * 0.1) / (w1 * 0.9 + w2 * 0.1)


THEOREM = [
    ("fedavg", {"weighting": "all"}, 0.8, weighted(1, 1)),
    ("fedavg", {"weighting": "known"}, 0.0, weighted(1 / 0.9, 1 / 0.1)),
    ("fedau", {}, 0.0, weighted(1 / 0.9, 1 / 0.1)),
    *[
        (
            "fedau",
            {"cutoff": k},
            x,
            weighted(bernoulli_limit(0.9, k), bernoulli_limit(0.1, k)),
        )
        for k, x in (
            (50, 0.0026),
            (20, 0.0647),
            (10, 0.2112),
            (5, 0.4189),
            (2, 0.6780),
            (1, 0.8),
        )
    ],
]


@pytest.mark.parametrize(("name", "settings", "expected", "formula"), THEOREM)
def test_unequal_participation_moves_the_optimum_by_what_the_weights_leave(
    name: str, settings: dict[str, Any], expected: float, formula: float
) -> None:
    """f = (x - 1)^2 / 2 with rate 0.9, (x + 1)^2 / 2 with rate 0.1: 500 clients of each instead of very many rounds."""
    assert formula == pytest.approx(expected, abs=5e-5)
    pairs, rounds = 500, 3000
    centres, rates = np.repeat([1.0, -1.0], pairs), np.repeat([0.9, 0.1], pairs)
    server = one_step(
        Server(name, 2 * pairs, w=zeros(), **settings), centres, gamma=0.1
    )
    process, mean = Bernoulli(p=tuple(rates)).process(2 * pairs, 7, NO_COUNTS), 0.0
    for t in range(rounds):
        cohort, _ = process.sample(t, {})
        server.round(dict.fromkeys(cohort.tolist(), ()), rates.tolist())
        mean += server.w.item() * (t >= 1000) / (rounds - 1000)
    assert mean == pytest.approx(expected, abs=0.004)


def test_the_mean_over_participants_misses_the_optimum_by_a_known_amount() -> None:
    """0.80 / 0.91. Two clients; both, one or none come in the proportions 9 : 81 : 1 : 9, in blocks of 100 shuffled rounds."""
    server = one_step(
        Server("fedavg", 2, w=zeros(), weighting="participating"),
        np.array([1.0, -1.0]),
        gamma=0.02,
    )
    block: list[list[int]] = [[0]] * 81 + [[1]] + [[0, 1]] * 9 + [[]] * 9
    draw, path = np.random.default_rng(0), []
    for _ in range(60):
        for which in draw.permutation(100):
            server.round(dict.fromkeys(block[which], ()))
            path.append(server.w.item())
    assert np.mean(path[1000:]) == pytest.approx(0.80 / 0.91, abs=0.002)


# FedStale: the worked round, its mean and variance over all outcomes

A, P, H, DELTA = (
    (2, 1, 1),
    (1.0, 0.5, 0.25),
    (1.0, 2.0, -1.0),
    (3.0, -1.0, 4.0),
)  # examples, so a = (1/2, 1/4, 1/4)
SUBSETS = [s for n in range(4) for s in itertools.combinations(range(3), n)]


def example(beta: float) -> Server:
    return primed(
        with_examples(
            Server("fedstale", 3, beta=beta, rates="known", weights="examples"), A
        ),
        H,
    )


def worked(beta: float, subset: Sequence[int]) -> float:
    return example(beta).round({i: [DELTA[i]] for i in subset}, P).item()


def test_the_worked_round_of_fedstale_comes_out_to_the_last_digit() -> None:
    assert [worked(beta, [0, 2]) for beta in (0.0, 0.5, 1.0)] == [5.5, 6.125, 6.75]
    assert worked(0.5, []) == 0.375
    assert worked(0.5, [0, 1, 2]) == 5.125
    server = example(0.5)
    assert server.state.h["w"].item() == 0.75
    server.round({0: [3.0], 2: [4.0]}, P)
    assert server.state.h["w"].item() == 3.0
    assert rows(server)[:, 0].tolist() == [3.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("beta", "variance"), [(0.0, "3.0625"), (0.5, "4.046875"), (1.0, "5.25")]
)
def test_the_step_of_fedstale_is_unbiased_and_beta_decides_its_variance(
    beta: float, variance: str
) -> None:
    outcomes = []
    for subset in SUBSETS:
        chance = math.prod(
            Fraction(p) if i in subset else 1 - Fraction(p) for i, p in enumerate(P)
        )
        outcomes.append((chance, Fraction(worked(beta, subset))))
    mean = sum(chance * u for chance, u in outcomes)
    assert sum(chance for chance, _ in outcomes) == 1
    assert mean == Fraction("2.25")
    assert sum(chance * (u - mean) ** 2 for chance, u in outcomes) == Fraction(variance)


def stale(beta: float, n: int, **settings: Any) -> Server:
    """FedStale with a beta that its settings may refuse."""
    server = Server("fedstale", n, w=zeros(2), rates="known", **settings)
    server.method = type(server.method)(
        server.method.s.model_copy(update={"beta": beta})
    )
    return server


@pytest.mark.parametrize("beta", [-0.5, 0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("n", [1, 4, 6])
def test_mean_and_variance_of_fedstale_are_the_formulas_over_all_outcomes(
    n: int, beta: float
) -> None:
    """E[U] = sum a_i Delta_i; Var(U) = sum a_i^2 (1 - p_i) / p_i |Delta_i - beta h_i|^2."""
    draw = np.random.default_rng(n)
    h, delta, p = (
        draw.standard_normal((n, 2)),
        draw.standard_normal((n, 2)),
        draw.uniform(0.1, 1, n),
    )
    sizes = draw.integers(1, 9, n)
    a = sizes / sizes.sum()
    mean, second = np.zeros(2), 0.0
    for present in itertools.product([False, True], repeat=n):
        server = primed(with_examples(stale(beta, n, weights="examples"), sizes), h)
        u = server.round({i: delta[i] for i in np.flatnonzero(present)}, p).numpy()
        chance = np.prod(np.where(present, p, 1 - p))
        mean, second = mean + chance * u, second + chance * (u**2).sum()
    assert mean == pytest.approx(a @ delta, abs=1e-12)
    variance = (a**2 * (1 - p) / p * ((delta - beta * h) ** 2).sum(1)).sum()
    assert second - (mean**2).sum() == pytest.approx(variance, rel=1e-9, abs=1e-12)


def test_the_step_of_fedstale_is_linear_in_beta() -> None:
    draw = np.random.default_rng(3)
    h, delta, p = (
        draw.standard_normal((5, 2)),
        draw.standard_normal((5, 2)),
        draw.uniform(0.05, 1, 5),
    )
    for subset in ([], [2], [0, 3], [0, 1, 2, 3, 4]):
        u = {
            b: primed(stale(b, 5), h).round({i: delta[i] for i in subset}, p)
            for b in (0.0, 0.2, 0.5, 0.9, 1.0)
        }
        for b, found in u.items():
            assert_close(
                found, (1 - b) * u[0.0] + b * u[1.0], 1e-12, f"beta {b}, S = {subset}"
            )


def numpy_step(
    beta: float, h: np.ndarray, delta: np.ndarray, p: np.ndarray, subset: Sequence[int]
) -> np.ndarray:
    """The reading client by client: absent beta a h; present (a/q) Delta - beta a (1/q - 1) h."""
    a, u = 1 / len(h), np.zeros(h.shape[1])
    for i in range(len(h)):
        u += (
            a / p[i] * delta[i] - beta * a * (1 / p[i] - 1) * h[i]
            if i in subset
            else beta * a * h[i]
        )
    return u


def test_fedstale_is_the_same_client_by_client() -> None:
    draw = np.random.default_rng(4)
    for _ in range(20):
        h, delta, p = (
            draw.standard_normal((5, 2)),
            draw.standard_normal((5, 2)),
            draw.uniform(0.05, 1, 5),
        )
        beta, subset = draw.random(), np.flatnonzero(draw.random(5) < 0.5).tolist()
        found = (
            primed(stale(beta, 5), h).round({i: delta[i] for i in subset}, p).numpy()
        )
        assert found == pytest.approx(numpy_step(beta, h, delta, p, subset), abs=1e-12)


def test_with_beta_zero_the_memory_does_not_matter() -> None:
    draw = np.random.default_rng(5)
    fresh, filled = (
        Server("fedstale", 4, w=[0.0, 0.0], beta=0.0, rates="known") for _ in range(2)
    )
    filled.memory.put(
        torch.arange(4),
        {"w": torch.from_numpy(100 * draw.standard_normal((4, 2))).float()},
    )
    filled.memory.commit()
    filled.state = filled.state._replace(
        h={"w": torch.from_numpy(100 * draw.standard_normal(2))}
    )
    for t in range(30):
        deltas = {i: draw.standard_normal(2) for i in range(4) if draw.random() < 0.4}
        for server in (fresh, filled):
            server.round(deltas, [0.4, 0.3, 0.2, 0.9])
        assert torch.equal(fresh.w, filled.w), f"round {t}"


def test_with_beta_zero_the_memory_does_not_matter_in_a_run(tmp_path: Path) -> None:
    found = []
    for i in range(2):
        loop = loop_of(
            small("fedstale", participation=SOME, rounds=8, **QUICK, method__beta=0.0),
            tmp_path / str(i),
        )
        if i:
            noise = torch.from_numpy(rng(0, "memory").standard_normal((12, 1, 5)))
            loop.memory.put(torch.arange(12), {"weight": noise.float()})
            loop.memory.commit()
            loop.state = loop.state._replace(
                server=loop.state.server._replace(h={"weight": noise[0]})
            )
        found.append(loop.run().params["weight"])
        loop.close()
    assert torch.equal(found[0], found[1])


def test_a_round_in_which_everybody_comes_for_the_first_time_is_the_same_for_every_beta() -> (
    None
):
    draw = np.random.default_rng(6)
    deltas = {i: draw.standard_normal(3) for i in range(5)}
    for settings in ({"rates": "known"}, {"rates": "estimated"}):
        steps = [
            Server("fedstale", 5, w=[0.0] * 3, beta=b, **settings).round(
                deltas, [0.3] * 5
            )
            for b in (0.0, 0.3, 0.7, 1.0)
        ]
        assert all(torch.equal(step, steps[0]) for step in steps), settings


def test_fedstale_with_beta_one_is_fedvarp_for_cohorts_of_one_size() -> None:
    """v = mean over S of (Delta - y) + mean of all y; here in NumPy, and by strategies/fedvarp.py."""
    n, m, draw = 7, 3, np.random.default_rng(7)
    fedstale, fedvarp = (
        Server("fedstale", n, w=zeros(2), beta=1.0, rates="known"),
        Server("fedvarp", n, w=zeros(2)),
    )
    y, w = np.zeros((n, 2)), np.zeros(2)
    for t in range(40):
        cohort = draw.choice(n, m, replace=False)
        delta = draw.standard_normal((n, 2))
        w = w + y.mean(0) + (delta[cohort] - y[cohort]).mean(0)
        y[cohort] = delta[cohort]
        for server in (fedstale, fedvarp):
            server.round({i: delta[i] for i in cohort}, [m / n] * n)
            assert server.w.numpy() == pytest.approx(w, abs=1e-12), (
                f"{type(server.method).__name__}, round {t}"
            )


@pytest.mark.parametrize("name", MEMORY)
def test_memory_holds_the_last_update_of_each_client_bit_for_bit(name: str) -> None:
    draw, n = np.random.default_rng(8), 6
    server, last = Server(name, n, w=[0.0] * 3), torch.zeros(n, 3)
    for t in range(40):
        deltas = {
            i: draw.standard_normal(3) for i in range(n - 1) if draw.random() < 0.3
        }  # the last client never comes
        server.round(deltas)
        for i, delta in deltas.items():
            last[i] = torch.tensor(delta, dtype=torch.float32)
        assert rows(server).shape == (n, 3)
        assert torch.equal(rows(server), last), f"round {t}"
    assert (rows(server)[-1] == 0).all()


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_running_sum_is_the_sum_over_the_memory(dtype: Any, weights: str) -> None:
    sizes, draw = np.array([1, 5, 2, 2, 7, 3]), np.random.default_rng(9)
    server = with_examples(
        Server("fedstale", 6, w=np.zeros(20, dtype=dtype), weights=weights), sizes
    )
    a = torch.from_numpy(
        sizes / sizes.sum() if weights == "examples" else np.full(6, 1 / 6)
    )
    for t in range(600):
        server.round(
            {
                i: draw.standard_normal(20).astype(dtype)
                for i in range(6)
                if draw.random() < 0.5
            }
        )
        if t == 0:
            continue
        again = a @ rows(server).double()
        difference = (
            (server.state.h["w"].double() - again).norm() / again.norm()
        ).item()
        assert difference <= 1e-12, f"round {t}: relative difference {difference:.1e}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedstale", {"beta": 1.0, "rates": "known"}), ("fedvarp", {})],
)
def test_updates_that_repeat_have_no_participation_variance_with_beta_one(
    name: str, settings: dict[str, Any]
) -> None:
    h = np.random.default_rng(10).standard_normal((4, 3)).astype(np.float32)
    steps = []
    for subset in itertools.chain.from_iterable(
        itertools.combinations(range(4), n) for n in range(5)
    ):
        server = primed(Server(name, 4, w=[0.0] * 3, **settings), h)
        mean = trees.leaves(server.state[1])[0].float()  # H
        steps.append(server.round({i: h[i] for i in subset}, [0.5, 0.3, 0.1, 0.7]))
        assert torch.equal(steps[-1], mean), subset
    assert steps[0].numpy() == pytest.approx(h.mean(0), abs=1e-6)


def test_at_a_stationary_point_beta_one_stands_still_and_beta_zero_does_not() -> None:
    h = [[3.0], [-5.0], [1.0], [1.0]]  # sums to zero
    for subset in itertools.chain.from_iterable(
        itertools.combinations(range(4), n) for n in range(5)
    ):
        still, moves = (
            primed(Server("fedstale", 4, beta=b, rates="known"), h) for b in (1.0, 0.0)
        )
        for _ in range(3):
            assert (
                still.round({i: h[i] for i in subset}, [0.5, 0.25, 0.125, 1.0]).item()
                == 0.0
            ), subset
        expected = (
            sum(
                h[i][0] / p
                for i, p in enumerate([0.5, 0.25, 0.125, 1.0])
                if i in subset
            )
            / 4
        )
        assert (
            moves.round({i: h[i] for i in subset}, [0.5, 0.25, 0.125, 1.0]).item()
            == expected
        )
        assert (expected == 0) == (subset == ()), subset
    everybody = Server("fedstale", 4, beta=0.0, rates="known")
    assert everybody.round(dict(enumerate(h)), [1.0] * 4).item() == 0.0


ORDERS: dict[str, Callable[[list[int]], list[list[int]]]] = {
    "backwards": lambda ids: [[i] for i in reversed(ids)],
    "all at once": lambda ids: [ids],
    "in pairs": lambda ids: [ids[k : k + 2] for k in range(0, len(ids), 2)],
    "shuffled and in threes": lambda ids: (
        lambda s: [s[k : k + 3] for k in range(0, len(s), 3)]
    )(ids[1::2] + ids[::2]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["fedau", *MEMORY])
def test_the_order_and_the_grouping_of_updates_change_nothing(
    name: str, order: str
) -> None:
    """Integer updates and N = 8, so that sums are exact in any order; FedAU's weights here are integers too."""
    settings = {
        "fedstale": {"rates": "known", "beta": 0.5},
        "fedau": {"cutoff": 1},
        "fedvarp": {"weighting": "known"},
    }.get(name, {})
    plain, other = (Server(name, 8, w=zeros(2), **settings) for _ in range(2))
    in_groups(other, ORDERS[order])
    draw = np.random.default_rng(11)
    for t in range(15):
        deltas = {
            i: draw.integers(-9, 9, 2).astype(float)
            for i in range(8)
            if draw.random() < 0.6
        }
        for server in (plain, other):
            server.round(deltas, [0.5, 0.25, 1.0, 0.125, 0.5, 0.25, 1.0, 0.5])
        assert torch.equal(plain.w, other.w), f"round {t}"
        if name in MEMORY:
            assert torch.equal(rows(plain), rows(other)), f"round {t}"


@pytest.mark.parametrize("name", ["fedau", *MEMORY])
def test_other_names_for_clients_change_only_whose_row_is_whose(name: str) -> None:
    draw, n = np.random.default_rng(12), 6
    settings = {"fedstale": {"rates": "known"}}.get(name, {})
    order, p = (
        draw.permutation(n),
        draw.uniform(0.2, 1, n),
    )  # client i is called order[i]
    renamed_p = np.empty(n)
    renamed_p[order] = p
    plain, renamed = (Server(name, n, w=zeros(2), **settings) for _ in range(2))
    for t in range(30):
        deltas = {i: draw.standard_normal(2) for i in range(n) if draw.random() < 0.5}
        plain.round(deltas, p)
        renamed.round({int(order[i]): delta for i, delta in deltas.items()}, renamed_p)
        assert_close(plain.w, renamed.w, 1e-12, f"round {t}")
        if name in MEMORY:
            assert torch.equal(rows(plain), rows(renamed)[torch.from_numpy(order)])


@pytest.mark.parametrize("name", ["fedau", *MEMORY])
def test_the_server_neither_changes_nor_keeps_what_clients_sent(name: str) -> None:
    draw, sent = np.random.default_rng(13), []

    def change(r: Round) -> Round:
        def each(fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
            for p in r.each(fn, clients, down):
                sent.append((p.up.delta["w"], p.up.delta["w"].clone()))
                yield p

        return replace(r, each=each)

    server, deltas = Server(name, 3, w=[0.0] * 2), draw.standard_normal((3, 3, 2))
    server.method = Told(server.method, change)
    for t in range(3):
        server.round({i: deltas[t, i] for i in range(3)})
        assert all(torch.equal(tensor, copy) for tensor, copy in sent), (
            "an update was written to"
        )
        kept, w = rows(server) if name in MEMORY else torch.zeros(0), server.w.clone()
        for tensor, _ in sent:
            tensor.fill_(99.0)  # as a client that trains again
        assert torch.equal(server.w, w)
        assert name not in MEMORY or torch.equal(rows(server), kept), (
            "the memory is the client's own buffer"
        )
        sent.clear()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_an_empty_round_of_fedstale_goes_along_the_memory_and_leaves_it(
    beta: float,
) -> None:
    server = primed(
        Server("fedstale", 3, w=[0.0], beta=beta, server_lr=0.5, rates="known"),
        [4.0, -1.0, 9.0],
    )
    for _ in range(3):
        assert server.round({}, P).item() == 0.5 * beta * 4.0  # H = 12 / 3
    assert server.state.h["w"].item() == 4.0
    assert rows(server)[:, 0].tolist() == [4.0, -1.0, 9.0]


def test_scaled_updates_scale_the_step() -> None:
    draw = np.random.default_rng(14)
    script = [
        {i: draw.standard_normal(2) for i in range(4) if draw.random() < 0.5}
        for _ in range(20)
    ]
    p = [0.5, 0.3, 0.9, 1.0]

    def end(factor: float, server_lr: float = 1.0) -> Tensor:
        server = Server("fedstale", 4, w=zeros(2), server_lr=server_lr, rates="known")
        for deltas in script:
            server.round({i: factor * delta for i, delta in deltas.items()}, p)
        return server.w

    assert torch.equal(end(8.0), 8 * end(1.0))  # a power of two: to the last bit
    assert_close(end(-0.3), -0.3 * end(1.0), 1e-12, "Delta times -0.3")
    for eta_c in (0.1, 5e-3):
        assert_close(
            end(1 / eta_c, server_lr=eta_c),
            end(1.0),
            1e-12,
            f"Delta / eta_c with eta_s eta_c, eta_c = {eta_c}",
        )


# Late, gone for long, never: every method against NumPy, and by hand


class Oracle:
    """The methods as in the table of Wang and Ji, and FedStale's box; omega by recursion, q as c / (s + 1)."""

    def __init__(
        self,
        kind: str,
        n: int,
        d: int,
        p: np.ndarray,
        beta: float = 0.0,
        cutoff: int | None = None,
    ) -> None:
        self.kind, self.n, self.p, self.beta, self.cutoff = kind, n, p, beta, cutoff
        self.x, self.y, self.history = (
            np.zeros(d),
            np.zeros((n, d)),
            np.zeros((0, n), dtype=int),
        )

    def round(self, deltas: dict[int, np.ndarray]) -> np.ndarray:
        s, n, y = sorted(deltas), self.n, self.y.copy()
        omega = [
            float(recursion(self.history[:, i].tolist(), self.cutoff)[-1][0])
            for i in range(n)
        ]
        total = np.zeros_like(self.x)
        match self.kind:
            case "participating":
                u = sum((deltas[i] for i in s), total) / max(len(s), 1)
            case "all":
                u = sum((deltas[i] for i in s), total) / n
            case "known":
                u = sum((deltas[i] / self.p[i] for i in s), total) / n
            case "fedau":
                u = sum((omega[i] * deltas[i] for i in s), total) / n
            case "fedvarp":
                u = y.mean(0) + sum((deltas[i] - y[i] for i in s), total) / max(
                    len(s), 1
                )
            case "mifa":
                u = np.array([deltas.get(i, y[i]) for i in range(n)]).mean(0)
            case "fedstale known" | "fedstale estimated":
                q = self.p if self.kind == "fedstale known" else [1 / x for x in omega]
                u = (
                    self.beta * y.mean(0)
                    + sum(((deltas[i] - self.beta * y[i]) / q[i] for i in s), total) / n
                )
        for i in s:
            self.y[i] = deltas[i]
        self.history = np.vstack([self.history, [i in deltas for i in range(n)]])
        self.x = self.x + u
        return self.x


KINDS: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "participating": [("fedavg", {"weighting": "participating"}, {})],
    "all": [("fedavg", {"weighting": "all"}, {})],
    "known": [("fedavg", {"weighting": "known"}, {})],
    "fedau": [("fedau", {"cutoff": k}, {"cutoff": k}) for k in (None, 50, 7, 1)],
    "fedvarp": [("fedvarp", {}, {})],
    "mifa": [("mifa", {}, {})],
    "fedstale known": [
        ("fedstale", {"rates": "known", "beta": b}, {"beta": b})
        for b in (0.0, 0.5, 1.0)
    ],
    "fedstale estimated": [
        (
            "fedstale",
            {"rates": "estimated", "beta": 0.5, "cutoff": k},
            {"beta": 0.5, "cutoff": k},
        )
        for k in (None, 50)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_with_clients_late_gone_and_never_seen_the_path_is_numpys(kind: str) -> None:
    """Client 1 first comes in round 100, client 2 is gone for rounds 40 to 139, client 3 never comes; some rounds are empty.

    The mean over participants is formed with reciprocals in float32, all else in the model's float64.
    """
    draw, n, rounds = np.random.default_rng(15), 4, 190
    present = draw.random((rounds, n)) < 0.5
    present[:100, 1], present[40:140, 2], present[:, 3] = False, False, False
    present[100, 1] = present[39, 2] = present[140, 2] = True
    delta, p = draw.standard_normal((rounds, n, 2)), np.array([0.5, 0.25, 0.3, 0.1])
    assert (~present.any(1)).sum() > 10
    tolerance = 1e-6 if kind == "participating" else 1e-11
    for name, settings, options in KINDS[kind]:
        server, oracle = (
            Server(name, n, w=zeros(2), **settings),
            Oracle(kind, n, 2, p, **options),
        )
        for t in range(rounds):
            deltas = {int(i): delta[t, i] for i in np.flatnonzero(present[t])}
            server.round(deltas, p)
            expected = oracle.round(deltas)
            assert server.w.numpy() == pytest.approx(
                expected, rel=tolerance, abs=tolerance
            ), f"{name} {settings}, round {t}"


# Client 0 always sends 1. Client 1 first comes in round 100 and sends 4, is away for 100 rounds, and sends 3 in round 201.
# The steps of rounds 99, 100, 101 and 201; N = 2, p = (1, 1/4).
BY_HAND = [
    ("fedavg", {"weighting": "participating"}, (1, 2.5, 1, 2)),
    ("fedavg", {"weighting": "all"}, (0.5, 2.5, 0.5, 2)),
    (
        "fedavg",
        {"weighting": "known"},
        (0.5, 8.5, 0.5, 6.5),
    ),  # (1 + 4 x 4) / 2, (1 + 4 x 3) / 2
    ("fedau", {}, (0.5, 2.5, 0.5, 152)),  # omega: 1 for the first, 101 for the second
    (
        "fedau",
        {"cutoff": 50},
        (0.5, 100.5, 0.5, 60.8),
    ),  # 100 / 2, then (50 + 50 + 1 + 50 + 50) / 5
    (
        "fedvarp",
        {},
        (0.5, 2.5, 2.5, 2),
    ),  # 0.5 + 4 / 2; then mean y = 2.5; 2.5 + (3 - 4) / 2
    (
        "fedvarp",
        {"weighting": "known"},
        (0.5, 8.5, 2.5, 0.5),
    ),  # 0.5 + 4 x 4 / 2; 2.5; 2.5 + 4 (3 - 4) / 2
    ("mifa", {}, (0.5, 2.5, 2.5, 2)),
    (
        "fedstale",
        {"rates": "known", "beta": 0.5},
        (0.5, 8.5, 1.5, 3.5),
    ),  # absent: 0.5 + beta 4 / 2; back: 1.5 + 4 (3 - 2) / 2
    (
        "fedstale",
        {"rates": "estimated", "beta": 0.5},
        (0.5, 2.5, 1.5, 52),
    ),  # q = 1, then 1/101
    ("fedstale", {"rates": "estimated", "beta": 0.0}, (0.5, 2.5, 0.5, 152)),
]


@pytest.mark.parametrize(("name", "settings", "expected"), BY_HAND)
def test_a_client_that_comes_late_and_drops_out_counts_as_worked_by_hand(
    name: str, settings: dict[str, Any], expected: tuple[float, ...]
) -> None:
    server = Server(name, 2, w=zeros(), **settings)
    steps = []
    for t in range(202):
        if name in MEMORY:
            assert rows(server)[1].item() == (0.0 if t <= 100 else 4.0), (
                f"before round {t}"
            )
        steps.append(
            server.round(
                {0: [1.0], **{100: {1: [4.0]}, 201: {1: [3.0]}}.get(t, {})}, [1.0, 0.25]
            ).item()
        )
    assert [steps[t] for t in (99, 100, 101, 201)] == pytest.approx(expected, abs=1e-11)
    assert steps[102:201] == pytest.approx([expected[2]] * 99, abs=1e-11)


# The methods in their limits, with clients that train

QUICK: dict[str, Any] = {
    "checkpoint__seconds": 1e9,
    "evaluation__every": 1000,
    "evaluation__clients": 0,
}
RATES = [1.0, 0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4, 0.8, 0.05, 0.25]
SOME = {"name": "bernoulli", "p": RATES}
ALL = {"name": "bernoulli", "mean": 1.0}
RARE = {"name": "bernoulli", "mean": 0.06}  # about half of the rounds are empty
ENGINES = ["sequential", "vectorised"]


End = Callable[..., Tensor]


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory) -> End:
    """The model after ten rounds. No experiment is run twice."""
    known: dict[str, Tensor] = {}

    def of(name: str, participation: dict[str, Any], **settings: Any) -> Tensor:
        key = repr((name, participation, sorted(settings.items())))
        if key not in known:
            e = small(
                name, participation=participation, **{"rounds": 10, **QUICK, **settings}
            )
            known[key] = run(e, tmp_path_factory.mktemp("run") / "r").params["weight"]
        return known[key]

    return of


def assert_same(a: Tensor, b: Tensor, engine: str, what: str) -> None:
    if engine == "sequential":
        assert torch.equal(a, b), (
            f"{what}: differ by {(a - b).abs().max().item():.1e}, expected the same bits"
        )
    assert_close(a, b, 1e-6, what)


def on(engine: str) -> dict[str, Any]:
    return {
        "engine__name": engine,
        **({"engine__chunk": 4} if engine == "vectorised" else {}),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_zero_is_fedavg_with_known_rates(
    end: End, engine: str
) -> None:
    expected = end("fedavg", SOME, method__weighting="known", **on(engine))
    assert_same(
        end("fedstale", SOME, method__beta=0.0, method__rates="known", **on(engine)),
        expected,
        engine,
        "beta 0",
    )
    assert (
        expected - end("fedavg", SOME, method__weighting="all", **on(engine))
    ).abs().max() > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_one_is_fedvarp_with_known_rates(
    end: End, engine: str
) -> None:
    expected = end("fedvarp", SOME, method__weighting="known", **on(engine))
    assert_same(
        end("fedstale", SOME, method__beta=1.0, method__rates="known", **on(engine)),
        expected,
        engine,
        "beta 1",
    )
    assert (
        expected
        - end("fedstale", SOME, method__beta=0.0, method__rates="known", **on(engine))
    ).abs().max() > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_zero_and_estimated_rates_is_fedau(
    end: End, engine: str
) -> None:
    for cutoff in ({}, {"method__cutoff": 2}):
        expected = end("fedau", SOME, **cutoff, **on(engine))
        assert_same(
            end("fedstale", SOME, method__beta=0.0, **cutoff, **on(engine)),
            expected,
            engine,
            f"beta 0, {cutoff}",
        )


UNIFORM = {"name": "uniform", "cohort": 5}


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_one_is_fedvarp_for_uniform_cohorts(
    end: End, engine: str
) -> None:
    fedstale = end(
        "fedstale", UNIFORM, method__beta=1.0, method__rates="known", **on(engine)
    )
    assert_close(fedstale, end("fedvarp", UNIFORM, **on(engine)), 1e-6, "q = M / N")


PROCESSES: dict[str, dict[str, Any]] = {
    "bernoulli": SOME,
    "rare": RARE,
    "markov": {"name": "markov", "p": RATES, "q": 0.3},
    "cyclic": {"name": "cyclic", "mean": 0.3, "cycle": 6},
    "uniform": UNIFORM,
    "dropout": {"name": "uniform", "dropout": 0.5},
}


@pytest.mark.parametrize("process", PROCESSES)
def test_fedau_with_cutoff_one_is_fedavg_over_all_whoever_comes(
    end: End, process: str
) -> None:
    expected = end(
        "fedavg", PROCESSES[process], method__weighting="all", method__server_lr=1.3
    )
    assert_same(
        end("fedau", PROCESSES[process], method__cutoff=1, method__server_lr=1.3),
        expected,
        "sequential",
        process,
    )


def test_fedau_with_cutoff_one_is_fedavg_over_all_batched(end: End) -> None:
    expected = end("fedavg", SOME, method__weighting="all", **on("vectorised"))
    assert_same(
        end("fedau", SOME, method__cutoff=1, **on("vectorised")),
        expected,
        "vectorised",
        "cut-off 1",
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_when_everybody_comes_fedau_is_fedavg(end: End, engine: str) -> None:
    expected = end("fedau", ALL, **on(engine))
    for weighting in ("participating", "all", "known"):
        assert_same(
            end("fedavg", ALL, method__weighting=weighting, **on(engine)),
            expected,
            engine,
            weighting,
        )
    for cutoff in (1, 3):
        assert_same(
            end("fedau", ALL, method__cutoff=cutoff, **on(engine)),
            expected,
            engine,
            f"cut-off {cutoff}",
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "weighting"),
    [("mifa", None), ("fedvarp", "participating"), ("fedvarp", "known")],
)
def test_when_everybody_comes_memory_changes_only_rounding(
    end: End, name: str, weighting: str | None, engine: str
) -> None:
    options = {} if weighting is None else {"method__weighting": weighting}
    fedavg = end("fedavg", ALL, method__weighting="participating", **on(engine))
    assert_close(end(name, ALL, **options, **on(engine)), fedavg, 1e-6, name)


def uneven(e: Experiment) -> Task:
    """Least squares, twelve clients with 1 to 9 examples each."""
    sizes = np.array([1, 9, 4, 2, 7, 3, 3, 8, 1, 5, 6, 2])
    draw, n = rng(e.seed, "uneven"), sizes.sum()
    x = draw.standard_normal((n, 3), dtype=np.float32)
    w = np.repeat(
        draw.standard_normal((len(sizes), 3), dtype=np.float32), sizes, axis=0
    )
    examples = Examples(
        torch.from_numpy(x), torch.from_numpy((x * w).sum(1, keepdims=True))
    )
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = FederatedData(examples, examples, np.arange(n), np.cumsum([0, *sizes]))
    return Task(model, data, loss=squared_error, metrics={})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rates", ["known", "estimated"])
def test_when_everybody_comes_fedstale_is_fedavg_by_examples_for_every_beta(
    end: End, rates: str, engine: str
) -> None:
    """Up to rounding: beta H and the beta h_i cancel, but in float32."""
    task = {"task": f"{__name__}:uneven", "options": {}, **on(engine)}
    fedavg = end("fedavg", ALL, method__weighting="examples", **task)
    assert (
        fedavg - end("fedavg", ALL, method__weighting="all", **task)
    ).abs().max() > 0.01
    for beta in (0.0, 0.3, 1.0):
        found = end(
            "fedstale",
            ALL,
            method__weights="examples",
            method__beta=beta,
            method__rates=rates,
            **task,
        )
        assert_close(found, fedavg, 1e-6, f"beta {beta}")


def test_fedstale_sends_what_fedavg_sends_and_remembers_one_model_a_client_and_one_more(
    tmp_path: Path,
) -> None:
    fedstale = run(small("fedstale", participation=SOME, **QUICK), tmp_path / "a")
    fedavg = run(small("fedavg", participation=SOME, **QUICK), tmp_path / "b")
    for key in ("cohort", "bytes_down", "bytes_up"):
        assert [row[key] for row in fedstale.history] == [
            row[key] for row in fedavg.history
        ], key
    assert fedstale.bytes_up > 0
    loop = loop_of(
        small("fedstale", participation=ALL, rounds=2, **QUICK), tmp_path / "c"
    )
    loop.run()
    n, d, server = 12, 5, loop.state.server
    numbers = len(loop.memory.row_of) * sum(
        x.numel() for x in trees.leaves(loop.memory.initial)
    )
    numbers += (
        sum(x.numel() for x in trees.leaves(server) if x.is_floating_point()) - d
    )  # less the model itself
    integers = [x.numel() for x in trees.leaves(server) if not x.is_floating_point()]
    loop.close()
    assert (numbers, integers) == ((n + 1) * d, [n, n])


def test_clients_late_gone_and_never_seen_in_a_recorded_trace(
    tmp_path: Path, end: End
) -> None:
    """Client 0 always, 1 from round 100 on, 2 in rounds 0 and 101, 3 never."""
    lines = [
        " ".join(
            str(i)
            for i, here in enumerate([True, t >= 100, t in (0, 101), False])
            if here
        )
        for t in range(103)
    ]
    file = tmp_path / "trace.txt"
    file.write_text("\n".join(lines) + "\n")
    options = {"population": 4, "rounds": 103, "local__batch_size": 11}
    trace = {"name": "trace", "file": str(file)}
    fedavg = end("fedavg", trace, method__weighting="all", **options)
    assert torch.equal(end("fedau", trace, method__cutoff=1, **options), fedavg)
    assert (end("fedau", trace, **options) - fedavg).abs().max() > 1e-3

    # Intervals: of client 1 101, 1, 1, or 50, 50, 1, 1, 1; of client 2 1, 101, or 1, 50, 50, 1.
    for cutoff, weights in (
        (None, (1, 103 / 3, 102 / 2, 1)),
        (50, (1, 103 / 5, 102 / 4, 50)),
    ):
        settings = {} if cutoff is None else {"method__cutoff": cutoff}
        loop = loop_of(
            small("fedau", participation=trace, **options, **QUICK, **settings),
            tmp_path / str(cutoff),
        )
        loop.run()
        loop.close()
        found = intervals.omega(
            loop.state.server.intervals, torch.arange(4), 103, cutoff
        )
        assert found.tolist() == list(weights)


# Who comes: the processes themselves


def attendance(process: Process, rounds: int) -> np.ndarray:
    """[rounds, population], 1 = took part."""
    found, state = np.zeros((rounds, process.population), dtype=bool), process.start()
    for t in range(rounds):
        cohort, state = process.sample(t, state)
        found[t, cohort.numpy()] = True
    return found


def test_markov_clients_come_at_their_rate_and_switch_as_often_as_defined() -> None:
    """q = 0.05: (q01, q10) = (0.05, 0.45) at p = 0.1, (1/49, 1) at p = 0.02 (q10 would be 2.45), q10 = 0 at p = 1."""
    each, rounds = 100, 8000
    expected = {
        0.1: (0.05, 0.45),
        0.02: (1 / 49, 1.0),
        0.5: (0.05, 0.05),
        1.0: (math.nan, 0.0),
    }
    process = Markov(p=tuple(np.repeat(list(expected), each)), q=0.05).process(
        4 * each, 3, NO_COUNTS
    )
    found = attendance(process, rounds)
    for k, (p, (q01, q10)) in enumerate(expected.items()):
        mine = found[:, k * each : (k + 1) * each]
        assert mine.mean() == pytest.approx(p, rel=0.02), f"rate of p = {p}"
        before, now = mine[:-1], mine[1:]
        assert before[~before].size == 0 or now[~before].mean() == pytest.approx(
            q01, rel=0.03
        ), f"q01 of p = {p}"
        assert 1 - now[before].mean() == pytest.approx(q10, rel=0.03), f"q10 of p = {p}"


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 1.0])
def test_markov_clients_come_at_their_rate_and_switch_as_often_from_the_first_round_on(
    p: float,
) -> None:
    """The start is stationary, and its draws are not those of round 0."""
    n = 20_000
    first, second = attendance(Markov(mean=p, q=0.05).process(n, 9, NO_COUNTS), 2)
    q10 = min(0.05 * (1 / p - 1), 1.0)
    allowed = 5 * math.sqrt(p * (1 - p) / n)
    assert first.mean() == pytest.approx(p, abs=allowed)
    assert second.mean() == pytest.approx(p, abs=allowed)
    assert (first & ~second).mean() == pytest.approx(
        p * q10, abs=5 * math.sqrt(p * q10 / n)
    )


def test_the_mean_interval_of_markov_clients_is_one_over_their_rate() -> None:
    for p in (0.02, 0.1, 0.5, 1.0):
        found = simulated(
            Markov(mean=p, q=0.05).process(300, 4, NO_COUNTS), 5000, [None]
        )
        assert harmonic(found[None]) == pytest.approx(1 / p, rel=0.02), p


def test_cyclic_clients_come_in_one_block_of_every_cycle() -> None:
    """a = max(1, round(100 p)), half to even; a of every a + b rounds from the first on; p = 1 rests one round of 101."""
    rates, active = (
        [0.1, 0.02, 0.001, 0.125, 0.375, 0.99, 1.0],
        [10, 2, 1, 12, 38, 99, 100],
    )
    each = 40
    found = attendance(
        Cyclic(p=tuple(np.repeat(rates, each)), cycle=100).process(
            each * len(rates), 5, NO_COUNTS
        ),
        420,
    )
    for k, a in enumerate(active):
        b = max(1, 100 - a)
        for mine in found[:, k * each : (k + 1) * each].T.astype(int):
            first = int(mine.argmax())
            assert 0 <= first < b
            windows = np.convolve(mine[first:], np.ones(a + b, dtype=int), "valid")
            assert (windows == a).all(), (
                f"p = {rates[k]}: {set(windows.tolist())} of {a + b} rounds, expected {a}"
            )
            assert mine[first : first + a].all()
            assert not mine[first + a : first + a + b].any()


def test_cyclic_clients_start_at_every_round_of_their_absence_alike() -> None:
    """The first block begins uniformly in rounds 0 .. b - 1, so that the rate of round 0 is 1 / b and not p."""
    found = attendance(Cyclic(mean=0.1, cycle=100).process(9000, 6, NO_COUNTS), 90)
    first = np.bincount(found.argmax(0), minlength=90)
    assert len(first) == 90
    assert (
        (first - 100) ** 2 / 100
    ).sum() < 140  # chi-square with 89 degrees of freedom: 1 in 2000 is above
    assert found[0].mean() == pytest.approx(1 / 90, abs=0.005)


def test_bernoulli_clients_come_at_their_rate_independently() -> None:
    found = attendance(
        Bernoulli(p=tuple(np.repeat([0.02, 0.1, 0.9], 200))).process(600, 8, NO_COUNTS),
        3000,
    )
    for k, p in enumerate((0.02, 0.1, 0.9)):
        mine = found[:, k * 200 : (k + 1) * 200]
        assert mine.mean() == pytest.approx(p, rel=0.02)
        allowed = 5 * p / math.sqrt(mine.size)  # five standard deviations
        assert (mine[1:] & mine[:-1]).mean() == pytest.approx(p * p, abs=allowed), (
            "round after round"
        )
        assert (mine[:, 1:] & mine[:, :-1]).mean() == pytest.approx(
            p * p, abs=allowed
        ), "client beside client"
