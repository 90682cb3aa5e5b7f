"""FedStale: the worked round, its mean and variance over all outcomes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.rng import rng
from tests.helpers import Server, assert_close, loop_of, small
from tests.participation import (
    MEMORY,
    QUICK,
    SOME,
    primed,
    rows,
    with_examples,
    zeros,
)

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
    # The memory holds n_i h_i, and h their mean: H times the mean of the n_i.
    nbar = sum(A) / 3
    assert server.state.h["w"].item() == 0.75 * nbar
    server.round({0: [3.0], 2: [4.0]}, P)
    assert server.state.h["w"].item() == 3.0 * nbar
    assert rows(server)[:, 0].tolist() == [2 * 3.0, 2.0, 4.0]


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
    """Mean and variance of U, by the paper.

    E[U] = sum a_i Delta_i
    Var(U) = sum a_i^2 (1 - p_i) / p_i |Delta_i - beta h_i|^2
    """
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
    """The step client by client.

    An absent one adds beta a h, a present one (a/q) Delta - beta a (1/q - 1) h.
    """
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
    noise = torch.from_numpy(100 * draw.standard_normal((4, 2))).float()
    everybody = torch.arange(4)
    remembered = filled.memory.gather(everybody)
    filled.memory.put(everybody, remembered._replace(h={"w": noise}))
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
            everybody = torch.arange(12)
            remembered = loop.memory.gather(everybody)
            h = {"weight": noise.float()}
            loop.memory.put(everybody, remembered._replace(h=h))
            loop.memory.commit()
            loop.state = loop.state._replace(
                server=loop.state.server._replace(h={"weight": noise[0]})
            )
        found.append(loop.run().params["weight"])
        loop.close()
    assert torch.equal(found[0], found[1])


def test_a_first_round_that_everybody_attends_is_the_same_for_every_beta() -> None:
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
    """v = mean over S of (Delta - y) + mean of all y: in NumPy, and by FedVARP."""
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
    for t in range(150):
        server.round(
            {
                i: draw.standard_normal(20).astype(dtype)
                for i in range(6)
                if draw.random() < 0.5
            }
        )
        if t == 0:
            continue
        again = rows(server).double().mean(0)
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
