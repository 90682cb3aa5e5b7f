"""FedAU, FedStale, FedVARP and MIFA against their equations, by hand and in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore.rounds.participation import Bernoulli
from fedcore.types import Reports, Round
from tests.helpers import Server, assert_close, redirected, slow
from tests.participation import (
    MEMORY,
    OMEGA,
    SEQUENCE,
    Told,
    bernoulli_limit,
    fractions,
    in_groups,
    no_counts,
    ones,
    primed,
    recursion,
    rows,
    zeros,
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
    without = Server(name, 3, w=zeros(2), **settings)
    with_it = Server(name, 4, w=zeros(2), **settings)
    for t in range(60):
        deltas = {i: draw.standard_normal(2) for i in range(3) if draw.random() < 0.4}
        a, b = (s.round(deltas, [0.4] * s.population) for s in (without, with_it))
        assert_close(a * 3, b * 4, 1e-12, f"{name}, round {t}")


ANSWERS_COUNT = [
    *NEVER,
    ("fedavg", {"weighting": "participating"}),
    ("fedavg", {"weighting": "examples"}),
    ("fedvarp", {}),
    ("fedvarp", {"weighting": "known"}),
    ("scaffold", {}),
]


@pytest.mark.parametrize(("name", "settings"), ANSWERS_COUNT)
def test_a_client_that_was_asked_and_does_not_answer_counts_as_absent(
    name: str, settings: dict[str, Any]
) -> None:
    draw, rates = np.random.default_rng(16), [0.5, 0.9, 0.4, 0.2]
    plain, lossy = (Server(name, 4, w=zeros(2), **settings) for _ in range(2))
    for t in range(12):
        present = np.flatnonzero(draw.random(4) < 0.6)
        deltas = {int(i): draw.standard_normal(2) for i in present}
        absent = sorted(set(range(4)) - set(deltas))
        expected = plain.round(deltas, rates)
        step = lossy.round(deltas, rates, lost=absent)
        assert torch.equal(step, expected), f"round {t}"


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

        return redirected(r, each)

    server.method = Told(server.method, change)
    return server


def weighted(w1: float, w2: float) -> float:
    return (w1 * 0.9 - w2 * 0.1) / (w1 * 0.9 + w2 * 0.1)


def cut_off(cutoff: int) -> float:
    return weighted(bernoulli_limit(0.9, cutoff), bernoulli_limit(0.1, cutoff))


THEOREM = [
    slow("fedavg", {"weighting": "all"}, 0.8, weighted(1, 1)),
    slow("fedavg", {"weighting": "known"}, 0.0, weighted(1 / 0.9, 1 / 0.1)),
    ("fedau", {}, 0.0, weighted(1 / 0.9, 1 / 0.1)),
    slow("fedau", {"cutoff": 50}, 0.0026, cut_off(50)),
    slow("fedau", {"cutoff": 20}, 0.0647, cut_off(20)),
    slow("fedau", {"cutoff": 10}, 0.2112, cut_off(10)),
    ("fedau", {"cutoff": 5}, 0.4189, cut_off(5)),
    slow("fedau", {"cutoff": 2}, 0.6780, cut_off(2)),
    slow("fedau", {"cutoff": 1}, 0.8, cut_off(1)),
]


@pytest.mark.parametrize(("name", "settings", "expected", "formula"), THEOREM)
def test_unequal_participation_moves_the_optimum_by_what_the_weights_leave(
    name: str, settings: dict[str, Any], expected: float, formula: float
) -> None:
    """f = (x - 1)^2 / 2 with rate 0.9, (x + 1)^2 / 2 with rate 0.1.

    There are 500 clients of each instead of very many rounds.
    """
    assert formula == pytest.approx(expected, abs=5e-5)
    pairs, rounds = 500, 3000
    centres, rates = np.repeat([1.0, -1.0], pairs), np.repeat([0.9, 0.1], pairs)
    server = one_step(
        Server(name, 2 * pairs, w=zeros(), **settings), centres, gamma=0.1
    )
    process, mean = Bernoulli(p=tuple(rates)).process(2 * pairs, 7, no_counts), 0.0
    for t in range(rounds):
        cohort, _ = process.sample(t, {})
        server.round(dict.fromkeys(cohort.tolist(), ()), rates.tolist())
        mean += server.w.item() * (t >= 1000) / (rounds - 1000)
    assert mean == pytest.approx(expected, abs=0.004)


def test_the_mean_over_participants_misses_the_optimum_by_a_known_amount() -> None:
    """It ends at 0.80 / 0.91.

    Two clients: both, the first, the second or none come in the proportions
    9 : 81 : 1 : 9, in blocks of 100 shuffled rounds.
    """
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
    """Integer updates and N = 8, so that sums are exact in any order.

    FedAU's weights are integers here, too.
    """
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
    order = draw.permutation(n)  # client i is called order[i]
    p = draw.uniform(0.2, 1, n)
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

        return redirected(r, each)

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


# Late, gone for long, never: every method against NumPy, and by hand


class Oracle:
    """The methods as in the table of Wang and Ji, and FedStale's box.

    omega is computed by recursion, q as c / (s + 1).
    """

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

    def omega(self) -> list[float]:
        histories = self.history.T.tolist()
        last = [recursion(history, self.cutoff)[-1] for history in histories]
        return [float(omega) for omega, _, _ in last]

    def round(self, deltas: dict[int, np.ndarray]) -> np.ndarray:
        s, n, y = sorted(deltas), self.n, self.y.copy()
        total = np.zeros_like(self.x)
        match self.kind:
            case "participating":
                u = sum((deltas[i] for i in s), total) / max(len(s), 1)
            case "all":
                u = sum((deltas[i] for i in s), total) / n
            case "known":
                u = sum((deltas[i] / self.p[i] for i in s), total) / n
            case "fedau":
                omega = self.omega()
                u = sum((omega[i] * deltas[i] for i in s), total) / n
            case "fedvarp":
                u = y.mean(0) + sum((deltas[i] - y[i] for i in s), total) / max(
                    len(s), 1
                )
            case "mifa":
                u = np.array([deltas.get(i, y[i]) for i in range(n)]).mean(0)
            case "fedstale known" | "fedstale estimated":
                is_known = self.kind == "fedstale known"
                q = self.p if is_known else [1 / x for x in self.omega()]
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
    """Client 1 first comes in round 100, client 2 is away in rounds 40 to 139.

    Client 3 never comes, and some rounds are empty. The mean over participants is
    formed with reciprocals in float32, all else in the model's float64.
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


# Client 0 always sends 1. Client 1 first comes in round 100 and sends 4, is away for
# 100 rounds, and sends 3 in round 201.
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
