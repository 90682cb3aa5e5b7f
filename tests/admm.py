"""ADMM over noisy links (Lari et al., RERCE-Fed), written again in NumPy, and a Lab.

J_k(w) = (y - X w)' W (y - X w)     H_k = 2 X' W X     b_k = 2 X' W y
N_k = (H_k + rho I)^-1     what_k = N_k b_k
admm: local models and duals. rerce: no duals, and absent clients rest. clu: no duals,
and absent clients go on.
Running example, two clients and one number: H = (2, 6), b = (2, 18), rho = 2:
N = (1/4, 1/8), what = (1/2, 9/4), w* = 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.task import Task
from fedcore.types import ClientFunction, Tree
from tests.helpers import loop_of, small

Some = dict[str, Any]
Floats = npt.NDArray[np.float64]
Rounds = Iterator[tuple[Floats, Floats, Floats]]
Schedule = Sequence[Sequence[int]]
Noise = Callable[
    [str, int, int], Floats | float
]  # (start | uplink | downlink, round, client) -> what was added on that link

# The problem: weighted least squares, every client with data of its own

FIVE: Some = {"clients": 5, "features": 4, "examples": 6, "uneven": 2, "draw": 1}
FOUR: Some = {"clients": 4, "features": 3, "examples": 8, "uneven": 1}
FEW: Some = {
    "clients": 4,
    "features": 5,
    "examples": 3,
    "draw": 2,
}  # no client could determine the model alone
TWO: Some = {}  # the running example


class Problem(NamedTuple):
    H: Floats  # [K, L, L]
    b: Floats  # [K, L]
    data: list[tuple[Floats, Floats, Floats]]  # (X, y, diagonal of W) of every client

    @property
    def optimum(self) -> Floats:
        return np.linalg.solve(self.H.sum(0), self.b.sum(0))

    @property
    def rho(self) -> float:
        """The mean eigenvalue of the H_k, with which things converge fast."""
        return float(np.linalg.eigvalsh(self.H).mean())

    def N(self, rho: float) -> Floats:
        return np.asarray(
            np.linalg.inv(self.H + rho * np.eye(self.H.shape[-1])), dtype=np.float64
        )


def problem(
    clients: int = 0,
    features: int = 1,
    examples: int = 5,
    uneven: int = 0,
    draw: int = 0,
    init: float = 0.0,
) -> Problem:
    """Random data; without clients the running example.

    There are as many independent copies of it as features. `init` is the task's.
    """
    r, one, root = np.random.default_rng(draw), np.ones(features), np.sqrt(3.0)
    sizes = [examples + uneven * (k % 3) for k in range(clients)]
    data = [
        (r.standard_normal((n, features)), r.standard_normal(n), r.uniform(0.5, 2.0, n))
        for n in sizes
    ]
    data = data or [
        (np.diag(one), one, one),
        (root * np.diag(one), 3 * root * one, one),
    ]
    return Problem(
        np.array([2 * x.T * w @ x for x, _, w in data]),
        np.array([2 * x.T * w @ y for x, y, w in data]),
        data,
    )


def make_task(e: Experiment) -> Task:
    q = problem(**e.options)
    x, y, weight = (np.concatenate(rows) for rows in zip(*q.data, strict=True))
    examples = Examples(
        torch.from_numpy(x), torch.from_numpy(np.stack([y, weight], axis=1))
    )
    data = FederatedData(
        examples,
        examples,
        np.arange(len(x)),
        np.cumsum([0, *[len(rows) for _, rows, _ in q.data]]),
    )
    model = nn.Linear(x.shape[1], 1, bias=False).double()
    nn.init.constant_(model.weight, e.options.get("init", 0.0))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return y[:, 1] * (outputs[:, 0] - y[:, 0]).square()

    return Task(
        model,
        data,
        loss=loss,
        metrics={},
        optimum={"weight": torch.from_numpy(q.optimum[None])},
    )


# The three methods in NumPy: what is at the server and at the clients after every round


def silent(link: str, n: int, k: int) -> float:
    return 0.0


def conventional(
    q: Problem,
    rho: float,
    schedule: Schedule,
    noise: Noise = silent,
    absent: str = "last",
) -> Rounds:
    """(c.0): w_n+1, w_k, z_k. An absent client counts with its last message or as 0."""
    N, K = q.N(rho), len(q.b)
    what = np.einsum("kij,kj->ki", N, q.b)
    last = np.array([what[k] + noise("start", 0, k) for k in range(K)])
    w, z, mean = what.copy(), np.zeros_like(what), last.mean(0)
    for n, cohort in enumerate(schedule):
        last = last if absent == "last" else np.zeros_like(last)
        for k in cohort:
            heard = mean + noise("downlink", n, k)
            z[k] = z[k] + rho * (w[k] - heard)
            w[k] = what[k] - N[k] @ (z[k] - rho * heard)
            last[k] = w[k] + z[k] / rho + noise("uplink", n, k)
        mean = last.sum(0) / K
        yield mean, w.copy(), z.copy()


def dual_free(
    q: Problem, rho: float, schedule: Schedule, noise: Noise = silent, start: str = "ls"
) -> Rounds:
    """(c.2, c.4): w_n+1, w_k, s_n+1. Cohorts of one size, or nobody."""
    N, K, C = q.N(rho), len(q.b), max(map(len, schedule))
    w = np.einsum(
        "kij,kj->ki", np.linalg.pinv(q.H, hermitian=True) if start == "ls" else N, q.b
    )
    new = (
        np.zeros_like(w[0])
        if start == "ls"
        else np.mean([w[k] + noise("start", 0, k) for k in range(K)], axis=0)
    )
    old = {"ls": 0.0, "paper": 0.0, "corrected": 1 - K / C}[start] * new
    for n, cohort in enumerate(schedule):
        s, received = 2 * new - old, []
        for k in cohort:
            w[k] = w[k] + rho * N[k] @ (s + noise("downlink", n, k) - w[k])
            received.append(w[k] + noise("uplink", n, k))
        if received:
            new, old = np.mean(received, axis=0), new
        yield new, w.copy(), 2 * new - old


def continual(
    q: Problem, rho: float, schedule: Schedule, noise: Noise = silent
) -> Rounds:
    """(c.3): s_n+1, w_k, the last s that each client received."""
    N, K = q.N(rho), len(q.b)
    w = np.einsum("kij,kj->ki", N, q.b)
    last = np.array([2 * w[k] + noise("start", 0, k) for k in range(K)])
    kept, s = np.zeros_like(w), last.mean(0)
    for n, cohort in enumerate(schedule):
        for k in cohort:
            kept[k] = s + noise("downlink", n, k)
        v = w + rho * np.einsum("kij,kj->ki", N, kept - w)
        for k in cohort:
            last[k] = 2 * v[k] - w[k] + noise("uplink", n, k)
        w, s = v, last.mean(0)
        yield s, w.copy(), kept.copy()


# The three methods themselves, round by round

QUICK: Some = {
    "proxy": 0,
    "checkpoint__seconds": 1e9,
    "evaluation__every": 10**6,
    "evaluation__clients": 0,
}
BATCHED: Some = {"engine__name": "vectorised", "engine__chunk": 100}
NAMES = ["admm", "rerce", "clu"]
EXACT = [
    ("admm", {}),
    ("admm", {"absent": "zero"}),
    ("clu", {}),
    *[("rerce", {"start": s}) for s in ("ls", "paper", "corrected")],
]
ALIKE: list[tuple[str, Some]] = [
    ("admm", {}),
    ("rerce", {"start": "paper"}),
    ("clu", {}),
]  # without noise, with everybody
exact = pytest.mark.parametrize(
    ("name", "method"), EXACT, ids=["-".join([n, *m.values()]) for n, m in EXACT]
)


def everybody(clients: int, rounds: int) -> Schedule:
    return [range(clients)] * rounds


def drawn(clients: int, cohort: int, rounds: int, draw: int = 0) -> Schedule:
    r = np.random.default_rng(draw)
    return [r.choice(clients, cohort, replace=False).tolist() for _ in range(rounds)]


def noisy(variance: float) -> Some:
    return {"links__uplink__variance": variance, "links__downlink__variance": variance}


def experiment(
    folder: Path,
    name: str,
    task: Some,
    schedule: Schedule,
    method: Some,
    **settings: Any,
) -> Experiment:
    folder.mkdir(parents=True, exist_ok=True)
    trace = {"name": "trace", "file": str(folder / "trace.txt")}
    (folder / "trace.txt").write_text(
        "".join(" ".join(map(str, cohort)) + "\n" for cohort in schedule)
    )
    values = {
        "task": f"{__name__}:make_task",
        "options": task,
        "population": len(problem(**task).b),
        "participation": trace,
    }
    values |= {
        "rounds": len(schedule),
        **{
            f"method__{key}": value
            for key, value in {"solver": "exact", **method}.items()
        },
    }
    return small(name, **{**values, **QUICK, **settings})


class Lab:
    """A run with this schedule, round by round.

    With the sequential engine it overhears every message, and can add to it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        task: Some,
        schedule: Schedule,
        method: Some,
        **settings: Any,
    ) -> None:
        self.q, self.schedule = problem(**task), schedule
        self.loop = loop_of(
            experiment(folder, name, task, schedule, method, **settings), folder
        )
        self.sent: dict[tuple[str, int, int], Floats] = {}
        self.arrived: dict[tuple[str, int, int], Floats] = {}
        self.add: dict[tuple[str, int, int], float] = {}
        self.scalars: list[tuple[Tensor, Tensor]] = []  # as sent, as arrived
        engine: Any = self.loop.engine
        links, unasked = engine.work.links, set()
        carry = links.carry

        def overheard(
            message: Tree, direction: str, fn: ClientFunction, t: int, client: int
        ) -> Tree:
            arrived = carry(message, direction, fn, t, client)
            if not trees.leaves(message):
                unasked.add(
                    (direction, fn.__name__)
                )  # who answers without having been sent anything: the start
                return arrived
            key = (
                "start" if ("downlink", fn.__name__) in unasked else direction,
                t,
                client,
            )
            arrived = trees.map(
                lambda x: x + self.add.get(key, 0.0) if x.ndim else x, arrived
            )
            self.sent[key], self.arrived[key] = vector(message), vector(arrived)
            self.scalars += [
                (x, y)
                for x, y in zip(
                    trees.leaves(message), trees.leaves(arrived), strict=True
                )
                if x.ndim == 0
            ]
            return arrived

        links.carry = overheard

    def noise(self, link: str, n: int, k: int) -> Floats:
        return self.arrived[link, n, k] - self.sent[link, n, k]

    def rounds(self, count: int) -> Lab:
        for _ in range(count):
            self.row = self.loop.round()
        return self

    @property
    def server(self) -> Any:
        return self.loop.state.server

    @property
    def w(self) -> Floats:
        return vector(self.server.params)

    def clients(self, field: str = "w") -> Floats:
        return np.array(
            [
                vector(getattr(self.loop.stores["clients"].get(k), field))
                for k in range(len(self.q.b))
            ]
        )

    def V(self, rho: float) -> Floats:
        """What every noise-free round of rerce leaves as it was (f.4)."""
        return vector(self.server.p) * rho + np.einsum(
            "kij,kj->i", self.q.H, self.clients()
        )

    def error(self) -> float:
        """Of the client that is farthest from the optimum, relative."""
        return float(
            np.linalg.norm(self.clients() - self.q.optimum, axis=1).max()
            / np.linalg.norm(self.q.optimum)
        )


def vector(tree: Tree) -> Floats:
    """All that has a dimension, in one float64 vector."""
    return np.concatenate(
        [x.double().flatten().numpy() for x in trees.leaves(tree) if x.ndim]
    )


def near(a: Any, b: Any, tolerance: float, what: str) -> None:
    difference = np.abs(np.asarray(a) - np.asarray(b)).max()
    assert difference <= tolerance, (
        f"{what}: differs by {difference:.2e}, allowed {tolerance:.0e}"
    )


SGD: Some = {"clients": 5, "features": 3, "examples": 6, "draw": 3, "init": 0.5}


def by_steps(
    name: str,
    q: Problem,
    rho: float,
    lr: float,
    steps: int,
    schedule: Schedule,
    noise: Noise,
) -> Iterator[Floats]:
    """w_k after every round; g_k is minus the dual in two-variable ADMM."""
    (K, L), d = q.b.shape, 6
    w, kept, last, g = *(np.full((K, L), 0.5) for _ in range(3)), np.zeros((K, L))
    new = old = last.mean(0)
    for n, cohort in enumerate(schedule):
        s = {"admm": new, "rerce": 2 * new - old, "clu": new}[name]
        for k in range(K) if name == "clu" else cohort:
            if k in cohort:
                kept[k] = s + noise("downlink", n, k)
            if name == "admm":
                g[k] -= rho * (w[k] - kept[k])
            x = w[k].copy()
            for _ in range(steps):
                x -= lr * ((q.H[k] @ x - q.b[k]) / d - g[k] + rho * (x - kept[k]))
            if name != "admm":
                g[k] -= rho * (x - kept[k])
            if k in cohort:
                last[k] = {"admm": x - g[k] / rho, "rerce": x, "clu": 2 * x - w[k]}[
                    name
                ] + noise("uplink", n, k)
            w[k] = x
        new, old = (last[list(cohort)] if name == "rerce" else last).mean(0), new
        yield w.copy()


def of_steps(steps: int, **settings: Any) -> Some:
    return {
        "local__batch_size": 6,
        "local__steps": steps,
        "method__local_lr": 0.1,
        **settings,
    }
