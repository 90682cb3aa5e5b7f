"""FedLAW's server step in NumPy, softmax regression in float64, and a server alone.

w_k  model of client k   n_k  its number of examples
lam, gam  weights and shrinking factor   x, r  what parametrises them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedcore.strategies import fedlaw
from torch import Tensor, nn

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import PerExample, cross_entropy
from fedcore.reports import Reports
from fedcore.rng import rng
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.types import Params
from tests.helpers import round_of

CLASSES = 3
FEATURES = 4
kinds = pytest.mark.parametrize("kind", ["exp", "quad"])
optimizers = pytest.mark.parametrize("optimizer", ["adam", "sgd"])


def task_of(
    model: nn.Module, proxy: Examples, loss: PerExample = cross_entropy
) -> Task:
    """A task with this proxy set, and nothing else to it."""
    n = len(proxy.x)
    return Task(
        model,
        FederatedData(proxy, proxy, np.arange(n), np.array([0, n])),
        loss=loss,
        metrics={},
        proxy=proxy,
    )


def softmax_task(examples: int = 10) -> Task:
    draw = np.random.default_rng(0)
    x, y = (
        draw.standard_normal((examples, FEATURES)),
        draw.integers(0, CLASSES, examples),
    )
    return task_of(
        nn.Linear(FEATURES, CLASSES, dtype=torch.float64),
        Examples(torch.from_numpy(x), torch.from_numpy(y)),
    )


def flat(params: Params) -> np.ndarray:
    return np.concatenate([p.double().numpy().ravel() for p in params.values()])


def tree(vector: np.ndarray, like: Params) -> Params:
    pieces = torch.from_numpy(vector).split([p.numel() for p in like.values()])
    return {
        name: piece.reshape(p.shape).to(p.dtype)
        for (name, p), piece in zip(like.items(), pieces, strict=True)
    }


class Lab:
    """The server alone: clients 0, 1, ... send what leads to given models."""

    def __init__(
        self,
        task: Task | None = None,
        seed: int = 0,
        t: int = 0,
        w: float = 0.0,
        **settings: Any,
    ) -> None:
        self.task, self.seed, self.t = task or softmax_task(), seed, t
        self.method = fedlaw.FedLAW(fedlaw.Settings(name="fedlaw", **settings))
        params = self.task.init_params()
        self.state = self.method.init_server(
            {name: torch.full_like(p, w) for name, p in params.items()}, 10
        )
        self.memory = StateStore(self.method.init_memory(params), 10**9, Path)
        self.proxy = [v.numpy() for v in self.task.proxy]
        self.asked: list[Any] = []
        self.sent: list[Any] = []

    def round(
        self,
        models: np.ndarray,
        n: np.ndarray | Sequence[float],
        groups: Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray:
        """One round with `models` [m, d] of clients with `n` examples: the new w [d].

        Reports come in `groups`. `gam` and `lam` are read off the new model, because
        w = sum_k gam lam_k w_k has one solution where the w_k are linearly independent.
        """
        deltas = trees.stack(
            [trees.sub(tree(w, self.state.params), self.state.params) for w in models]
        )

        def each(fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
            self.asked.append(fn)
            for ids in map(
                torch.tensor, [range(len(models))] if groups is None else groups
            ):
                self.sent.append(
                    fedlaw.Up(trees.at(deltas, ids), torch.zeros(len(ids)))
                )
                yield Reports(
                    ids, self.sent[-1], torch.tensor(n, dtype=torch.float32)[ids]
                )

        cohort = range(len(models))
        r = round_of(self.t, cohort, 10, each, self.memory, self.task, self.seed)
        self.state = self.method.round(self.state, r)
        self.log, self.t = r.log, self.t + 1
        w = flat(self.state.params)
        effective = np.linalg.lstsq(models.T, w, rcond=None)[0]
        self.gam, self.lam = effective.sum(), effective / effective.sum()
        return w


def cohort(
    m: int = 3, seed: int = 1, d: int = CLASSES * (FEATURES + 1)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Models [m, d], example counts [m] and their shares [m]."""
    draw = np.random.default_rng(seed)
    models, n = draw.standard_normal((m, d)), draw.integers(1, 30, m).astype(float)
    return models, n, n / n.sum()


# The server step of section (c), in NumPy


def loss_and_gradient(
    u: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of softmax regression, and its gradient [d]."""
    cut = CLASSES * FEATURES
    logits = x @ u[:cut].reshape(CLASSES, FEATURES).T + u[cut:]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(CLASSES)[y]) / len(x)
    return float(-np.log(p[np.arange(len(x)), y]).mean()), np.concatenate(
        [(error.T @ x).ravel(), error.sum(0)]
    )


def start(shares: np.ndarray, kind: str, tau: float = 1.0) -> np.ndarray:
    """(x, r) before the first step, [m + 1]."""
    m = len(shares)
    return (
        np.append(tau * np.log(shares), 0.0)
        if kind == "exp"
        else np.append(np.full(m, m**-0.5), 1.0)
    )


def mixture(v: np.ndarray, kind: str, tau: float = 1.0) -> tuple[np.ndarray, float]:
    lam = np.exp(v[:-1] / tau) if kind == "exp" else v[:-1] ** 2
    return lam / lam.sum(), float(np.exp(v[-1]) if kind == "exp" else v[-1] ** 2)


def server_step(
    lab: Lab, models: np.ndarray, fixed: np.ndarray, t: int = 0, **changed: Any
) -> tuple[np.ndarray, float, int]:
    """(lam, gam, steps) by the settings of `lab`, except those that are `changed`.

    lam is `fixed` where it is not learned.
    """
    s, (px, py) = lab.method.s.model_copy(update=changed), lab.proxy
    kind, tau = s.parametrisation, s.temperature
    v = start(fixed, kind, tau)
    a, b, steps = np.zeros_like(v), np.zeros_like(v), 0

    def now() -> tuple[np.ndarray, float]:
        lam, gam = mixture(v, kind, tau)
        return (lam if s.learn_lambda else fixed), (gam if s.learn_gamma else s.gamma)

    for epoch in range(s.server_epochs):
        rate = s.server_lr * 0.5 ** (epoch // 20)
        order = rng(lab.seed, "proxy", t, epoch).permutation(len(px))
        for rows in np.split(order, range(s.server_batch, len(px), s.server_batch)):
            lam, gam = now()
            scores = (
                models @ loss_and_gradient(gam * lam @ models, px[rows], py[rows])[1]
            )  # <G, w_k>
            mean = lam @ scores
            slope = lam / tau if kind == "exp" else 2 * v[:-1] / (v[:-1] @ v[:-1])
            g = np.append(
                gam * slope * (scores - mean),
                mean * (gam if kind == "exp" else 2 * v[-1]),
            )
            g *= np.append(np.full(len(lam), s.learn_lambda), s.learn_gamma)
            steps += 1
            if s.server_optimizer == "adam":
                a, b = 0.5 * a + 0.5 * g, 0.999 * b + 0.001 * g**2
                v = v - rate * (a / (1 - 0.5**steps)) / (
                    np.sqrt(b / (1 - 0.999**steps)) + 1e-8
                )
            else:
                a = 0.9 * a + g
                v = v - rate * a
            if s.gamma_bounds is not None:
                v[-1] = np.clip(
                    v[-1], *(np.log if kind == "exp" else np.sqrt)(s.gamma_bounds)
                )
    return *now(), steps
