"""ADMM, RERCE-Fed and CLU: where they end without noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore import trees
from fedcore.rounds.loop import run
from fedcore.tasks import build_task
from fedcore.types import Tree
from tests.admm import (
    BATCHED,
    FIVE,
    FOUR,
    NAMES,
    QUICK,
    SGD,
    TWO,
    Lab,
    drawn,
    everybody,
    near,
    of_steps,
    problem,
)
from tests.helpers import slow, small

# f.2 to f.4: where it ends without noise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("factor", "rounds"), [slow(0.3, 150), (1.0, 80), slow(3.0, 160)]
)
def test_with_everybody_the_optimum_is_reached_for_every_penalty(
    name: str, factor: float, rounds: int, tmp_path: Path
) -> None:
    method = {"rho": factor * problem(**FOUR).rho}
    lab = Lab(tmp_path, name, FOUR, everybody(4, rounds), method, **BATCHED)
    assert lab.rounds(rounds).error() < 1e-10


@pytest.mark.parametrize("name", ["rerce", "clu"])
def test_consensus_stays_where_it_is_for_any_schedule(
    name: str, tmp_path: Path
) -> None:
    """f.3, at a point c that is not the optimum."""
    schedule, c = [range(5), *drawn(5, 2, 6), [], [3], *drawn(5, 4, 4)], 0.75
    lab = Lab(tmp_path, name, FIVE, schedule, {"rho": 2.0}).rounds(1)
    full = {"params": c, "p": 0.0} if name == "rerce" else {"params": c, "s": c}

    def filled(tree: Tree, fields: dict[str, float]) -> Tree:
        return tree._replace(
            **{
                f: trees.map(lambda x, v=v: torch.full_like(x, v), getattr(tree, f))
                for f, v in fields.items()
            }
        )

    lab.loop.state = lab.loop.state._replace(server=filled(lab.server, full))
    clients, memory, ids = lab.loop.stores["clients"], lab.loop.memory, list(range(5))
    clients.put(
        ids,
        filled(clients.gather(ids), {"w": c, "s": c} if name == "clu" else {"w": c}),
    )
    memory.put(
        ids, trees.map(lambda x: torch.full_like(x, c), memory.gather(ids))
    )  # t_k = 2c - c
    clients.commit()
    memory.commit()
    for n in range(1, len(schedule)):
        lab.rounds(1)
        near(lab.w, c, 1e-13, f"w after round {n}")
        near(lab.clients(), c, 1e-13, f"w_k after round {n}")


BY_HAND: dict[
    str, tuple[float, list[float], list[tuple[float, float]], float]
] = {  # V, s_n, (w_1, w_2), limit
    "ls": (20, [0, 1, 4.5], [(0.5, 3), (0.5, 2.5), (2.5, 2.5)], 2.5),
    "corrected": (20, [4.125, 3.25], [(2.3125, 2.25), (2.3125, 2.5)], 2.5),
    "paper": (17.25, [2.75], [], 2.15625),
}


@pytest.mark.parametrize("start", BY_HAND)
def test_with_one_client_at_a_time_the_start_decides_where_it_ends(
    start: str, tmp_path: Path
) -> None:
    V, s, w_k, limit = BY_HAND[start]
    lab = Lab(tmp_path, "rerce", TWO, [[0], [1]] * 30, {"rho": 2.0, "start": start})
    for n in range(60):
        lab.rounds(1)
        near(lab.V(2.0), V, 1e-12, f"V after round {n}")
        if n < len(w_k):
            near(lab.clients()[:, 0], w_k[n], 1e-14, f"w_k after round {n}")
    near([lab.sent["downlink", n, n % 2][0] for n in range(len(s))], s, 1e-14, "s")
    near(lab.clients(), limit, 1e-9, "limit")


@pytest.mark.parametrize("start", ["ls", "corrected", "paper"])
@pytest.mark.parametrize(
    ("C", "rounds"), [slow(1, 450), slow(2, 150), (3, 100), slow(4, 80)]
)
def test_the_limit_is_the_optimum_or_off_by_what_the_start_left_out(
    start: str, C: int, rounds: int, tmp_path: Path
) -> None:
    rho = problem(**FOUR).rho
    method, schedule = {"rho": rho, "start": start}, drawn(4, C, rounds, C)
    lab = Lab(tmp_path, "rerce", FOUR, schedule, method, **BATCHED).rounds(rounds)
    mean = np.einsum("kij,kj->ki", lab.q.N(rho), lab.q.b).mean(0)
    lost = rho * (4 - C) * np.linalg.solve(lab.q.H.sum(0), mean)
    expected = lab.q.optimum - (lost if start == "paper" else 0.0)
    near(lab.clients(), expected, 1e-8, f"{start}, C = {C}")


@pytest.mark.parametrize("start", ["ls", slow("corrected")])
def test_cohorts_of_changing_size_and_dropouts_leave_the_limit_alone(
    start: str, tmp_path: Path
) -> None:
    r, rho = np.random.default_rng(5), problem(**FOUR).rho
    schedule = [
        [],
        [2],
        *[np.flatnonzero(r.random(4) < 0.7).tolist() for _ in range(200)],
    ]
    lab = Lab(
        tmp_path,
        "rerce",
        FOUR,
        schedule,
        {"rho": rho, "start": start},
        participation__dropout=0.3,
    )
    for n in range(len(schedule)):
        near(lab.rounds(1).V(rho), lab.q.b.sum(0), 1e-10, f"V after round {n}")
    assert lab.error() < 1e-8


@pytest.mark.slow
def test_a_cohort_of_one_keeps_v_and_may_diverge_where_clients_hold_few_examples(
    tmp_path: Path,
) -> None:
    """Not in the paper: V is kept for every schedule.

    But with d_k < L a cohort of one need not converge; one of two does.
    """
    task = {"clients": 6, "features": 6, "examples": 4, "draw": 2}
    rho = 0.5 * problem(**task).rho
    labs = []
    for C in (1, 2):
        lab = Lab(tmp_path / str(C), "rerce", task, drawn(6, C, 300), {"rho": rho})
        labs.append(lab.rounds(300))
    one, two = labs
    near(one.V(rho), one.q.b.sum(0), 1e-12 * rho * np.abs(one.clients()).max(), "V")
    assert one.error() > 1.0
    assert two.error() < 1e-3


@pytest.mark.slow
def test_continual_updates_reach_consensus_at_a_point_that_depends_on_who_came(
    tmp_path: Path,
) -> None:
    """f.6."""
    rho = problem(**FOUR).rho
    labs = [
        Lab(
            tmp_path / str(i), "clu", FOUR, drawn(4, 2, 150, i), {"rho": rho}, **BATCHED
        ).rounds(150)
        for i in (0, 1)
    ]
    for lab in labs:
        near(lab.clients(), lab.clients().mean(0), 1e-8, "consensus")
        near(lab.w, lab.clients().mean(0), 1e-8, "the model to evaluate")
    assert np.abs(labs[0].w - labs[1].w).max() > 1e-3


ENDS = [
    slow("rerce", 5, 1, 120),
    slow("rerce", 2, 1, 350),
    ("rerce", 2, 3, 200),
    slow("admm", 5, 3, 150),
    slow("clu", 5, 3, 150),
]


@pytest.mark.parametrize(("name", "cohort", "steps", "rounds"), ENDS)
def test_few_steps_with_tracked_gradients_reach_the_optimum(
    name: str, cohort: int, steps: int, rounds: int, tmp_path: Path
) -> None:
    method = {"solver": "sgd", "rho": 3.0}
    lab = Lab(
        tmp_path,
        name,
        SGD,
        drawn(5, cohort, rounds),
        method,
        **of_steps(steps),
        **BATCHED,
    ).rounds(rounds)
    assert lab.error() < 1e-8
    gradients = (np.einsum("kij,kj->ki", lab.q.H, lab.clients()) - lab.q.b) / 6
    near(
        -lab.clients("z") if name == "admm" else lab.clients("g"),
        gradients,
        1e-7,
        "what is tracked, and the gradient",
    )


@pytest.mark.parametrize("name", ["admm", slow("rerce"), slow("clu")])
def test_the_bundled_task_is_solved_to_1e_8_where_rho_is_like_the_curvature(
    name: str, tmp_path: Path
) -> None:
    """No client can determine the model alone.

    The paper's rho = 1 would take h / rho rounds, which are too many: docs/results.md.
    """
    task = {
        "task": "weighted-least-squares",
        "options": {"examples": [12, 22], "features": 32},
        "holdout": 0.0,
        **QUICK,
        **BATCHED,
    }
    e = small(
        name,
        population=20,
        rounds=200,
        participation__cohort=20,
        method__solver="exact",
        method__rho=3e5,
        **task,
    )
    result = run(e, tmp_path / "run")
    assert result.final["test_distance"] < 1e-8 * float(
        build_task(e).optimum["weight"].norm()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["admm", "rerce", "clu"])
def test_a_client_without_an_example_does_not_hold_the_others_back(
    name: str, tmp_path: Path
) -> None:
    settings = {
        "method__rho": 1.0,
        "participation__cohort": 12,
        "rounds": 200,
        "local__steps": 10,
        "holdout": 0.0,
        "local__batch_size": 11,
    }
    e = small(name, task="tests.methods:with_an_empty_client", **settings)
    assert run(e, tmp_path / "r").final["test_distance"] < 1e-3
