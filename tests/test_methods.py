"""The papers again, in NumPy: two clients, a few numbers, the arithmetic spelled out.

And the theorem where there is one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedcore import methods
from fedcore.data.federated import Examples, FederatedData, LocalSettings
from fedcore.engines.base import Work
from fedcore.engines.sequential import Sequential
from fedcore.method import data_of
from fedcore.metrics import squared_error
from fedcore.rounds.loop import run
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.tasks import build_task
from tests.helpers import OPTIMIZERS, asking, round_of, small

# Client 0 holds (1, 2), (2, 1) and (3, 0); client 1 holds (1, -1).
# Model w x, loss (w x - y)^2 / 2, w_0 = 0.5, batches of all.
X = [np.array([1.0, 2.0, 3.0]), np.array([1.0])]
Y = [np.array([2.0, 1.0, 0.0]), np.array([-1.0])]
W0, LR, EPOCHS, ROUNDS = 0.5, 0.1, 3, 4


def local(w: float, i: int, mu: float = 0.0) -> float:
    """Three steps of gradient descent on client i's mean loss plus mu/2 (w - w_t)^2."""
    start = w
    for _ in range(EPOCHS):
        w = w - LR * (np.mean((w * X[i] - Y[i]) * X[i]) + mu * (w - start))
    return w


def mean_delta(w: float, mu: float = 0.0) -> float:
    return 3 / 4 * (local(w, 0, mu) - w) + 1 / 4 * (local(w, 1, mu) - w)


def fedavg() -> list[float]:
    w, path = W0, []
    for _ in range(ROUNDS):
        w = w + mean_delta(w)
        path.append(w)
    return path


def fedprox() -> list[float]:
    w, path = W0, []
    for _ in range(ROUNDS):
        w = w + mean_delta(w, mu=0.7)
        path.append(w)
    return path


def fedavgm() -> list[float]:
    w, v, path = W0, 0.0, []
    for _ in range(ROUNDS):
        v = 0.9 * v + mean_delta(w)
        w = w + 0.5 * v
        path.append(w)
    return path


def adaptive(kind: str) -> list[float]:
    w, m, v, tau, path = W0, 0.0, 0.01**2, 0.01, []
    for _ in range(ROUNDS):
        d = mean_delta(w)
        m = 0.8 * m + 0.2 * d
        if kind == "fedadagrad":
            v = v + d**2
        elif kind == "fedadam":
            v = 0.95 * v + 0.05 * d**2
        else:
            v = v - 0.05 * d**2 * np.sign(v - d**2)
        w = w + 0.3 * m / (np.sqrt(v) + tau)
        path.append(w)
    return path


def pfedme() -> list[float]:
    """Both clients count the same, although one holds three examples."""
    lam, personal_lr, w, path = 2.0, 0.05, W0, []
    for _ in range(ROUNDS):
        ends = []
        for x, y in zip(X, Y, strict=True):
            w_i = w
            for _ in range(EPOCHS):
                theta = w_i
                for _ in range(4):
                    slope = np.mean((theta * x - y) * x) + lam * (theta - w_i)
                    theta = theta - personal_lr * slope
                w_i = w_i - LR * lam * (w_i - theta)
            ends.append(w_i)
        w = float(np.mean(ends))
        path.append(w)
    return path


ADAPTIVE = {"server_lr": 0.3, "beta1": 0.8, "tau": 0.01}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "fedavg": ({}, fedavg),
    "fedprox": ({"mu": 0.7}, fedprox),
    "pfedme": ({"lam": 2.0, "personal_lr": 0.05, "inner_steps": 4}, pfedme),
    "fedavgm": ({"server_lr": 0.5, "beta1": 0.9}, fedavgm),
    "fedadagrad": (ADAPTIVE, partial(adaptive, "fedadagrad")),
    "fedadam": ({**ADAPTIVE, "beta2": 0.95}, partial(adaptive, "fedadam")),
    "fedyogi": ({**ADAPTIVE, "beta2": 0.95}, partial(adaptive, "fedyogi")),
}


def trajectory(
    name: str, settings: dict[str, Any], rounds: int = ROUNDS
) -> list[float]:
    x = torch.tensor(np.concatenate(X), dtype=torch.float32)[:, None]
    y = torch.tensor(np.concatenate(Y), dtype=torch.float32)[:, None]
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, W0)
    data = FederatedData(
        Examples(x, y), Examples(x, y), np.arange(4), np.array([0, 3, 4])
    )
    task = Task(model, data, loss=squared_error, metrics={})
    if name in OPTIMIZERS:
        settings = {**OPTIMIZERS[name], **settings}
        name = "fedopt"
    cls = methods.load(name)
    method = cls(methods.settings_of(cls)(name=name, local_lr=LR, **settings))
    params = task.init_params()
    engine = Sequential(
        Work(task, method, LocalSettings(batch_size=4, epochs=EPOCHS), 0),
        StateStore(method.init_client(params), 10**9, Path),
    )
    memory = StateStore(method.init_memory(params), 10**9, Path)
    server, path = method.init_server(params, 2), []
    for t in range(rounds):
        r = round_of(t, range(2), 2, asking(engine, t), memory, task)
        server = method.round(server, r)
        path.append(server.params["weight"].item())
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_method_is_the_papers_arithmetic(name: str) -> None:
    settings, by_hand = CASES[name]
    assert trajectory(name, settings) == pytest.approx(by_hand(), abs=2e-6)


REDUCTIONS = {
    "fedprox": {"mu": 0.0},
    "fedavgm": {"beta1": 0.0, "server_lr": 1.0},
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_in_its_limit_the_method_is_fedavg(name: str) -> None:
    assert trajectory(name, REDUCTIONS[name]) == trajectory("fedavg", {})


def test_with_large_tau_fedadagrad_is_fedavg_with_a_small_step() -> None:
    tau = 1e6  # v starts at tau^2, so the step is Delta server_lr / (2 tau)
    assert trajectory(
        "fedadagrad", {"server_lr": 2 * tau, "tau": tau, "beta1": 0.0}
    ) == pytest.approx(trajectory("fedavg", {}), abs=1e-4)


def test_fedavg_with_one_full_local_step_finds_the_optimum_of_the_population(
    tmp_path: Path,
) -> None:
    e = small(
        "fedavg",
        rounds=60,
        participation__cohort=12,
        local__batch_size=64,
        method__local_lr=0.5,
        holdout=0.0,
        evaluation__every=60,
        engine__name="vectorised",
        engine__chunk=12,
    )
    result = run(e, tmp_path / "r")
    optimum = build_task(e).optimum
    assert optimum is not None
    assert (result.params["weight"] - optimum["weight"]).abs().max().item() < 1e-5


def test_fedavg_with_many_local_steps_misses_it_where_clients_disagree(
    tmp_path: Path,
) -> None:
    """Client drift: the reason why half of the methods here exist.

    There are fewer examples than features, so Hessians differ.
    """
    settings = {
        "participation__cohort": 12,
        "local__batch_size": 64,
        "method__local_lr": 0.2,
        "holdout": 0.0,
    }
    options = {
        "options": {"examples": 3, "features": 5, "heterogeneity": 3.0},
        "rounds": 100,
        "evaluation__every": 100,
        "engine__name": "vectorised",
        "engine__chunk": 12,
    }
    one, many = (
        small("fedavg", **settings, **options),
        small("fedavg", **settings, **options, local__epochs=20),
    )
    optimum = build_task(one).optimum
    assert optimum is not None
    misses = [
        (run(e, tmp_path / str(i)).params["weight"] - optimum["weight"]).norm().item()
        for i, e in enumerate((one, many))
    ]
    assert misses[1] > 10 * misses[0], misses


def test_unknown_methods_are_refused_with_the_nearest_name() -> None:
    from fedcore.errors import SettingsError

    with pytest.raises(SettingsError, match='did you mean "fedavg"'):
        methods.load("fedavgg")
    with pytest.raises(SettingsError, match="cannot import"):
        methods.load("no.such.module:Thing")
    with pytest.raises(SettingsError, match="expected one subclass"):
        methods.load("fedcore.trees:add")


def test_an_engine_runs_no_function_that_is_not_for_clients() -> None:
    with pytest.raises(TypeError, match="on_client"):
        data_of(methods.load("fedavg").round)
