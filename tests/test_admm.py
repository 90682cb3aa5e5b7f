"""ADMM, RERCE-Fed and CLU against their recursions in NumPy, exact and by steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.messages import wire
from fedcore.metrics import squared_error
from fedcore.proximal import quadratic
from fedcore.rounds.loop import run
from fedcore.task import Task
from fedcore.types import Batches, Tree
from tests.admm import (
    ALIKE,
    BATCHED,
    EXACT,
    FEW,
    FIVE,
    NAMES,
    SGD,
    TWO,
    Lab,
    Rounds,
    Some,
    by_steps,
    continual,
    conventional,
    drawn,
    dual_free,
    everybody,
    exact,
    experiment,
    near,
    noisy,
    of_steps,
    problem,
    silent,
    vector,
)
from tests.helpers import answers, loop_of, slow, small

# f.1: the running example, and one method in two forms


@pytest.mark.parametrize(("name", "method"), ALIKE, ids=NAMES)
def test_the_running_example_comes_out_to_the_digit(
    name: str, method: Some, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, name, TWO, everybody(2, 3), {"rho": 2.0, **method})
    w_k = np.array([(0.5, 2.25), (1.625, 2.375), (2.125, 2.4375), (2.34375, 2.46875)])
    z_k = np.array([(-1.75, 1.75), (-2.5, 2.5), (-2.8125, 2.8125)])
    w = [1.375, 2, 2.28125, 2.40625]
    down = w if name == "admm" else [2.75, 2.625, 2.5625]
    for n in range(3):
        up = {
            "admm": w_k[n + 1] + z_k[n] / 2,
            "rerce": w_k[n + 1],
            "clu": 2 * w_k[n + 1] - w_k[n],
        }[name]
        lab.rounds(1)
        near(lab.clients()[:, 0], w_k[n + 1], 1e-14, f"w_k after round {n}")
        near(lab.w, w[n + 1], 1e-14, f"w after round {n}")
        near(lab.sent["downlink", n, 0], down[n], 1e-14, f"sent in round {n}")
        messages = [lab.sent["uplink", n, k][0] for k in (0, 1)]
        near(messages, up, 1e-14, f"messages of round {n}")
        if name == "admm":
            near(lab.clients("z")[:, 0], z_k[n], 1e-14, f"z_k after round {n}")


@pytest.mark.parametrize("task", [FIVE, FEW], ids=["many examples", "few examples"])
@pytest.mark.parametrize("factor", [slow(0.1), 1.0, slow(10.0)])
def test_without_noise_and_with_everybody_three_methods_take_one_path(
    task: Some, factor: float, tmp_path: Path
) -> None:
    """f.1 and f.6."""
    rho, schedule = factor * problem(**task).rho, everybody(task["clients"], 20)
    labs = []
    for name, method in ALIKE:
        settings = {"rho": rho, **method}
        labs.append(Lab(tmp_path / name, name, task, schedule, settings, **BATCHED))
    for n in range(20):
        first, *others = [lab.rounds(1) for lab in labs]
        duals = first.clients("z").sum(0)
        near(duals, 0.0, 1e-12 * max(1.0, rho), f"sum of the duals after round {n}")
        for lab in others:
            near(lab.clients(), first.clients(), 1e-12, f"w_k after round {n}")
            near(lab.w, first.w, 1e-12, f"w after round {n}")


# The recursions of (c)


@exact
@pytest.mark.parametrize("cohort", [5, 2])
@pytest.mark.parametrize("variance", [0.0, 0.01])
def test_each_method_is_its_recursion_in_numpy(
    name: str, method: Some, cohort: int, variance: float, tmp_path: Path
) -> None:
    """Some rounds are empty, one of them the first.

    Not so for the start "paper", which needs C there.
    """
    schedule = [*drawn(5, cohort, 3), [], *drawn(5, cohort, 12, 1)]
    if method.get("start") != "paper":
        schedule.insert(0, [])
    settings = {"rho": 3.0, **method}
    lab = Lab(tmp_path, name, FIVE, schedule, settings, **noisy(variance))
    rounds = []
    for _ in schedule:
        lab.rounds(1)
        match name:
            case "admm":
                rounds.append((lab.w, lab.clients(), lab.clients("z")))
            case "rerce":
                s = lab.w + vector(lab.server.p) / cohort
                rounds.append((lab.w, lab.clients(), s))
            case "clu":
                s = vector(lab.server.s)
                rounds.append((s, lab.clients(), lab.clients("s")))
    oracles = {"admm": conventional, "rerce": dual_free, "clu": continual}
    oracle: Callable[..., Rounds] = oracles[name]
    noise = lab.noise if variance else silent
    parts = ("at the server", "w_k", "z_k, s_k or s")
    for n, expected in enumerate(oracle(lab.q, 3.0, schedule, noise, **method)):
        for part, a, b in zip(parts, rounds[n], expected, strict=True):
            near(a, b, 1e-10, f"{name} {method}, round {n}: {part}")
    if variance:
        added = np.concatenate([lab.noise(*key) for key in lab.sent])
        assert all(torch.equal(x, y) for x, y in lab.scalars), "a loss was disturbed"
        assert len(lab.scalars) == sum(map(len, schedule))
        assert added.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / added.size))


# f.8 to f.10


@pytest.mark.parametrize(
    ("name", "method"), [kind for kind in EXACT if kind[0] != "clu"]
)
def test_starts_are_ridge_or_least_squares_and_absent_clients_keep_every_bit(
    name: str, method: Some, tmp_path: Path
) -> None:
    # Three, six or nine examples for four numbers.
    task = {"clients": 5, "features": 4, "examples": 3, "uneven": 3}
    schedule = [[1], [1, 3], [3]]
    lab = Lab(tmp_path, name, task, schedule, {"rho": 2.0, **method}).rounds(1)
    inverse = lab.q.N(2.0)
    if method.get("start") == "ls":
        inverse = np.linalg.pinv(lab.q.H, hermitian=True)
    before, start = lab.clients(), np.einsum("kij,kj->ki", inverse, lab.q.b)
    near(before[[0, 2, 3, 4]], start[[0, 2, 3, 4]], 1e-12, "start")
    after = lab.rounds(2).clients()
    assert (after != before).any(1).tolist() == [False, True, False, True, False]


def test_a_local_step_keeps_what_the_data_determine_and_copies_the_rest() -> None:
    """f.7: I - rho N = N H, with eigenvalues h / (h + rho) in [0, 1).

    For large weights rho N is the projector onto null(X).
    """
    x = np.random.default_rng(4).standard_normal((3, 5))
    null = np.eye(5) - np.linalg.pinv(x) @ x
    model = nn.Linear(5, 1, bias=False).double()
    y, rho = torch.ones(1, 3, 1, dtype=torch.float64), 0.7
    for weight, away in ((1.0, 1.0), (1e8, 1e-6)):

        def loss(outputs: Tensor, y: Tensor, weight: float = weight) -> Tensor:
            return weight * (outputs[:, 0] - y[:, 0]).square()

        rows = Examples(torch.from_numpy(x), y[0])
        data = FederatedData(rows, rows, np.arange(3), np.array([0, 3]))
        task = Task(model, data, loss=loss, metrics={})
        batches = Batches(rows.x[None], rows.y[None], torch.ones(1, 3))
        J = quadratic(task.loss, task.init_params(), batches, task.weights)
        units = [{"weight": torch.from_numpy(e[None])} for e in np.eye(5)]
        N, H = np.array([vector(J.solve(rho, e)) for e in units]), 2 * weight * x.T @ x
        near(np.eye(5) - rho * N, N @ H, 1e-12 + 1e-14 * weight, "I - rho N, and N H")
        near(N, N.T, 1e-12, "N, and its transpose")
        kept = np.linalg.eigvalsh(np.eye(5) - rho * N)
        assert -1e-7 < kept.min() < kept.max() < 1
        near(rho * N, null, away, f"rho N at weights of {weight:g}, and the projector")
        assert (np.abs(rho * N - null).max() > 0.01) == (weight == 1.0)


def test_an_example_of_size_c_is_in_the_local_problem_c_times() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    rows = Examples(x, y)
    data = FederatedData(rows, rows, np.arange(3), np.array([0, 3]))
    model = nn.Linear(2, 1, bias=False).double()
    task = Task(model, data, squared_error, metrics={}, size=lambda y: y[:, 0])
    batches = Batches(x[None], y[None], torch.ones(1, 3))
    J = quadratic(task.loss, task.init_params(), batches, task.weights)
    # J = sum_i c_i (x_i w - y_i)^2 / 2, with c_i = y_i
    root = y.sqrt()
    best = torch.linalg.lstsq(root * x, root * y).solution.T
    found = J.least_squares(task.init_params())["weight"]
    near(found.numpy(), best.numpy(), 1e-9, "the minimiser, and least squares")
    hessian = J.Q @ torch.diag(J.h) @ J.Q.T
    near(hessian.numpy(), (x.T @ (y * x)).numpy(), 1e-9, "H, and sum c_i x_i x_i'")


@exact
def test_without_noise_and_with_everybody_the_seed_changes_no_bit(
    name: str, method: Some, tmp_path: Path
) -> None:
    shas = set()
    for seed in (0, 1):
        e = experiment(tmp_path, name, FEW, everybody(4, 5), method, seed=seed)
        shas.add(run(e, tmp_path / str(seed)).params_sha256)
    assert len(shas) == 1


def test_what_rerce_sends_is_feddyns_server_model_with_noise_and_all(
    tmp_path: Path,
) -> None:
    alpha, K, L = 2.0, 5, 4
    lab = Lab(
        tmp_path, "rerce", FIVE, everybody(K, 60), {"rho": alpha}, **noisy(0.01)
    ).rounds(60)
    theta, h, g = np.zeros(L), np.zeros(L), np.zeros((K, L))
    for n in range(60):  # FedDyn, Acar et al., ICLR 2021
        near(lab.sent["downlink", n, 0], theta, 1e-12, f"s_{n}")
        received = []
        for k in range(K):
            heard = theta + lab.noise("downlink", n, k)
            own = np.linalg.solve(
                lab.q.H[k] + alpha * np.eye(L), lab.q.b[k] + g[k] + alpha * heard
            )
            g[k] = g[k] - alpha * (own - heard)
            received.append(own + lab.noise("uplink", n, k))
        h = h - alpha * (np.mean(received, axis=0) - theta)
        theta = np.mean(received, axis=0) - h / alpha


TRAFFIC = [
    *[("exact", *kind) for kind in EXACT],
    *[("sgd", name, {}) for name in NAMES],
]


@pytest.mark.parametrize(("solver", "name", "method"), TRAFFIC)
def test_traffic_is_counted_to_the_byte(
    solver: str, name: str, method: Some, tmp_path: Path
) -> None:
    K, C, L = 7, 3, 5
    lab = Lab(
        tmp_path,
        name,
        {"clients": K, "features": L},
        drawn(K, C, 3),
        {"solver": solver, **method},
    )
    rows = [lab.rounds(1).row for _ in range(3)]
    starting = K * L * 8 if solver == "exact" and method.get("start") != "ls" else 0
    for row, extra in zip(rows, (starting, 0, 0), strict=True):
        assert row["bytes_down"] == C * L * 8
        assert row["bytes_up"] - extra in [
            C * (L * 8 + loss) for loss in (4, 8)
        ]  # the loss may be of either precision
    assert rows[1]["reports"] == rows[1]["cohort"] == C
    memory = lab.loop.memory
    kept = len(memory.row_of) * sum(
        x.numel() for x in trees.leaves(memory.initial)
    )  # of single clients, at the server
    if name == "rerce":
        assert (vector(lab.server).size, kept) == (2 * L, 0)
    assert kept <= (0 if method.get("absent") == "zero" else K * L)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cohort", [5, 2])
def test_steps_are_those_of_the_recursion_in_numpy(
    name: str, cohort: int, tmp_path: Path
) -> None:
    schedule = drawn(5, cohort, 15)
    lab = Lab(
        tmp_path,
        name,
        SGD,
        schedule,
        {"solver": "sgd", "rho": 0.7},
        **of_steps(4),
        **noisy(0.01),
    )
    found = [lab.rounds(1).clients() for _ in schedule]
    for n, expected in enumerate(
        by_steps(name, lab.q, 0.7, 0.1, 4, schedule, lab.noise)
    ):
        near(found[n], expected, 1e-10, f"w_k after round {n}")


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_judged_by_the_test_set_and_least_squares_by_the_clients(
    name: str,
) -> None:
    """Only exact solvers measure the clients' own models."""
    found = [
        small(name, method__solver=solver).build_method().personalises()
        for solver in ("sgd", "exact")
    ]
    assert found == [False, True]


# Without an example J_k = 0, so that the minimum has a closed form:
#     rerce, clu   argmin -<g, w> + rho/2 |w - s|^2 = s + g / rho;  then g <- 0
#     admm         z <- z + rho (w - s);  argmin <z, w> + rho/2 |w - s|^2 = s - z / rho
EMPTY_CLIENT = {
    "rerce": {"w": 7.0, "g": 0.0, "sent": 7.0},
    "clu": {"w": 7.0, "g": 0.0, "sent": 2 * 7.0 - 2.0},
    "admm": {"w": -6.0, "z": 3.5, "sent": 1.0},
}


@pytest.mark.parametrize("name", EMPTY_CLIENT)
def test_a_client_without_an_example_goes_where_its_dual_sends_it(
    name: str, tmp_path: Path
) -> None:
    """w = 2, g or z = 3, s = 1, rho = 1/2."""
    e = small(name, task="tests.methods:with_an_empty_client", method__rho=0.5)
    loop, empty = loop_of(e, tmp_path), 11

    def filled(params: Tree, value: float) -> Tree:
        return trees.map(lambda x: torch.full_like(x, value), params)

    params, before = loop.task.init_params(), loop.engine.states.get(empty)
    dual = "z" if name == "admm" else "g"
    values = {"w": filled(params, 2.0), dual: filled(params, 3.0)}
    rows = trees.map(lambda x: x[None], before._replace(**values))
    loop.engine.states.put([empty], rows)
    down_type, _ = wire.schemas(loop.method.train)
    down = down_type(filled(params, 1.0))
    (report,) = answers(loop.engine, loop.method.train, [empty], down, 0)
    after = loop.engine.states.get(empty)
    found = {"w": after.w, dual: getattr(after, dual), "sent": report.up[0]}
    for what, expected in EMPTY_CLIENT[name].items():
        near(vector(found[what]), expected, 1e-6, what)
