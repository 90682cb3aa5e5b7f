"""FedLAW against its equations: the server step again in NumPy, softmax regression in float64, and the invariants of the paper.

w_k  model of client k   n_k  its number of examples   lam, gam  weights and shrinking factor   x, r  what parametrises them
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError, TooFewReports
from fedcore.rng import rng
from fedcore.rounds.loop import run
from fedcore.storage.rows import StateStore
from fedcore.task import PerExample, Task, cross_entropy, squared_error
from fedcore.tasks import build_task
from fedcore.types import Batches, Model, Params, Reports
from strategies import fedlaw
from tests.helpers import loop_of, round_of, small

CLASSES, FEATURES = 3, 4
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
    """The server alone: rounds in which clients 0, 1, ... send what leads to these models."""

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
        """One round with `models` [m, d] of clients with `n` examples, in these groups; the new model w [d].

        `gam` and `lam` are read off it: w = sum_k gam lam_k w_k has one solution where the w_k are linearly independent.
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
    """(lam, gam, steps) by the settings of `lab` and what is `changed` in them; lam is `fixed` where it is not learned."""
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


@pytest.mark.parametrize("epochs", [1, 5, 25])  # 25: the rate is halved after 20
@optimizers
@kinds
def test_the_server_step_is_the_papers_arithmetic(
    kind: str, optimizer: str, epochs: int
) -> None:
    models, n, shares = cohort()
    lab = Lab(
        server_epochs=epochs,
        server_batch=4,
        server_lr=0.05,
        server_optimizer=optimizer,
        parametrisation=kind,
        seed=7,
        t=2,
    )
    w = lab.round(models, n)
    lam, gam, steps = server_step(lab, models, shares, t=2)
    assert abs(gam - 1) > 0.01, "too small a step to tell"
    assert np.abs(lam - mixture(start(shares, kind), kind)[0]).max() > 0.001, (
        "too small a step to tell"
    )
    assert w == pytest.approx(gam * lam @ models, abs=1e-9)
    assert lab.lam == pytest.approx(lam, abs=1e-9)
    assert (lab.lam > 0).all()
    assert lab.log["gamma"] == pytest.approx(
        lab.gam, abs=1e-9
    )  # the l1 norm of the effective weights
    assert lab.log["lambda"] == pytest.approx(lam, abs=1e-6)
    assert (
        lab.log["steps"] == steps == 3 * epochs
    )  # 10 examples in batches of 4, 4 and 2


VARIANTS: list[dict[str, Any]] = [
    {"learn_lambda": False},
    {"learn_gamma": False},
    {"gamma_bounds": (0.99, 1.01)},
]
OTHERS: list[dict[str, Any]] = [
    {"temperature": 2.5},
    {"learn_gamma": False, "gamma": 0.9},
]


@pytest.mark.parametrize(
    "settings",
    [*VARIANTS, *({**v, "parametrisation": "quad"} for v in VARIANTS), *OTHERS],
)
@optimizers
def test_so_is_every_variant(optimizer: str, settings: dict[str, Any]) -> None:
    models, n, shares = cohort(4, seed=3)
    lab = Lab(
        server_epochs=6,
        server_batch=4,
        server_lr=0.05,
        server_optimizer=optimizer,
        **settings,
    )
    w = lab.round(models, n)
    lam, gam, _ = server_step(lab, models, shares)
    assert w == pytest.approx(gam * lam @ models, abs=1e-9)
    if not lab.method.s.learn_gamma:
        assert lab.log["gamma"] == settings.get("gamma", 1.0)
        assert (
            (w / gam >= models.min(0) - 1e-12) & (w / gam <= models.max(0) + 1e-12)
        ).all()
    if lab.method.s.gamma_bounds:
        assert abs(gam - 1) == pytest.approx(0.01, abs=1e-9), (
            "no bound was reached: choose tighter ones"
        )


def test_the_worked_example_comes_out_to_the_digit() -> None:
    """In float32: L(u) = |u - (1, 1)|^2 / 2."""
    task = task_of(
        nn.Linear(1, 2, bias=False),
        Examples(torch.ones(1, 1), torch.ones(1, 2)),
        squared_error,
    )
    sgd = Lab(task, server_epochs=1, server_optimizer="sgd", server_lr=1.0)
    adam = Lab(task, server_epochs=1, server_lr=0.01)
    for lab, r, x in (
        (sgd, 0.375, 0.09375),
        (adam, 0.01, 0.01),
    ):  # minus the gradients; the rate
        w = lab.round(np.eye(2), [1, 3])
        odds = np.log(lab.lam / [0.25, 0.75])
        assert np.log(lab.gam) == pytest.approx(r, abs=1e-6)
        assert odds[0] - odds[1] == pytest.approx(2 * x, abs=1e-6)
        assert lab.log["proxy_loss_before"] == 0.3125
        assert lab.log["proxy_loss"] == pytest.approx(
            0.5 * ((w - 1) ** 2).sum(), abs=1e-6
        )
    assert adam.gam == pytest.approx(1.01005, abs=5e-6)
    assert adam.lam == pytest.approx([0.2538, 0.7462], abs=5e-5)


@kinds
def test_gradients_are_central_differences_and_a_step_against_them_lowers_the_loss(
    kind: str,
) -> None:
    """Those of x sum to zero in "exp" and are orthogonal to x in "quad": so a step of SGD tells them from lam alone."""
    eta, h = 1e-3, 1e-5
    for seed in range(5):
        models, n, shares = cohort(4, seed)
        n, shares = (
            (n, shares) if kind == "exp" else (np.ones(4), np.full(4, 0.25))
        )  # where "quad" starts
        lab, v = (
            Lab(
                server_epochs=1,
                server_lr=eta,
                server_optimizer="sgd",
                parametrisation=kind,
            ),
            start(shares, kind),
        )
        lab.round(models, n)

        def value(v: np.ndarray, lab: Lab = lab, models: np.ndarray = models) -> float:
            lam, gam = mixture(v, kind)
            return loss_and_gradient(gam * lam @ models, *lab.proxy)[0]

        expected = np.array(
            [(value(v + step) - value(v - step)) / (2 * h) for step in h * np.eye(5)]
        )
        if kind == "exp":
            moved, u = np.log(lab.lam / shares), shares @ models
            found = np.append(moved - moved.mean(), np.log(lab.gam)) / -eta
            assert expected[-1] == pytest.approx(
                loss_and_gradient(u, *lab.proxy)[1] @ u, abs=1e-8
            )  # dL/dr = <grad L, u>
        else:
            after = np.sqrt(lab.lam) / (v[:-1] @ np.sqrt(lab.lam))
            found = np.append(v[:-1] - after, v[-1] - np.sqrt(lab.gam)) / eta
        assert found == pytest.approx(expected, abs=1e-6)
        assert lab.log["proxy_loss"] < lab.log["proxy_loss_before"]


@kinds
def test_gradients_of_the_variables_themselves_and_what_leaves_the_mixture_alone(
    kind: str,
) -> None:
    """f.7 and f.10, which the new model alone cannot show: a shift of x in "exp" and a scale of it in "quad" change nothing."""
    (models, n, _), draw = cohort(4), np.random.default_rng(5)
    D, G = (
        torch.from_numpy(models),
        torch.from_numpy(draw.standard_normal(models.shape[1])),
    )
    mix = fedlaw.Mixture(
        fedlaw.Settings(name="fedlaw", parametrisation=kind),
        torch.zeros_like(G),
        D,
        torch.from_numpy(n),
    )
    mix.x.add_(torch.from_numpy(draw.uniform(0, 0.3, 4)))
    mix.r.add_(0.2)
    mix.differentiate(G)
    found, h = [*mix.x.grad.tolist(), mix.r.grad.item()], 1e-5

    def slope(entry: Tensor) -> float:
        """Central difference of the linear loss <G, u>, whose gradient in u is G."""
        values = []
        for step in (h, -2 * h):
            entry.add_(step)
            values.append(float(G @ mix.model()))
        entry.add_(h)
        return (values[0] - values[1]) / (2 * h)

    assert found == pytest.approx([slope(entry) for entry in (*mix.x, mix.r)], abs=1e-6)
    along = torch.ones(4, dtype=torch.float64) if kind == "exp" else mix.x
    assert float(mix.x.grad @ along) == pytest.approx(0, abs=1e-12)
    before = mix.model()
    mix.x.copy_(mix.x + 3 if kind == "exp" else mix.x * 3)
    assert (mix.model() - before).abs().max() < 1e-12


# Invariants


@kinds
def test_without_server_steps_the_start_is_the_result(kind: str) -> None:
    """The mean by examples, FedAvg's; "quad" starts from uniform weights."""
    models, n, shares = cohort(5)
    lab = Lab(server_epochs=0, parametrisation=kind)
    assert lab.round(models, n) == pytest.approx(
        (shares if kind == "exp" else np.full(5, 0.2)) @ models, abs=1e-6
    )
    assert lab.log["gamma"] == 1.0


@optimizers
@kinds
def test_one_client_and_equal_ones_are_shrunk_and_no_more(
    kind: str, optimizer: str
) -> None:
    for m in (1, 4):
        models, n, shares = cohort(m)
        models[:] = models[0]
        lab = Lab(parametrisation=kind, server_optimizer=optimizer, server_lr=0.05)
        assert lab.round(models, n) == pytest.approx(
            lab.log["gamma"] * models[0], abs=1e-12
        )
        assert abs(lab.log["gamma"] - 1) > 0.05
        assert lab.log["lambda"] == (
            [1.0]
            if m == 1
            else pytest.approx(shares if kind == "exp" else np.full(4, 0.25), abs=1e-6)
        )
        assert ("coherence" in lab.log) == (m > 1)


def test_order_and_arrival_of_clients_the_unit_of_n_and_the_model_before_do_not_matter() -> (
    None
):
    models, n, _ = cohort(5)
    labs = [Lab(server_batch=4, w=w) for w in (0.0, 0.0, 0.0, 0.0, 3.0)]
    w, order = labs[0].round(models, n), [3, 0, 4, 1, 2]
    assert labs[1].round(models[order], n[order]) == pytest.approx(w, abs=1e-9)
    assert labs[1].log["lambda"] == pytest.approx(labs[0].lam[order], abs=1e-6)
    assert labs[2].round(models, n, groups=[[3, 4], [0], [1, 2]]) == pytest.approx(
        w, abs=1e-9
    )
    assert labs[2].log["lambda"] == labs[0].log["lambda"]  # by ascending id
    assert labs[3].round(models, 10 * n) == pytest.approx(w, abs=1e-9)
    assert labs[4].round(models, n) == pytest.approx(
        w, abs=1e-9
    )  # models are mixed, not deltas


def test_gamma_scales_the_logits_of_a_relu_network_by_its_power() -> None:
    a, b, c = (
        nn.Linear(i, o, bias=False, dtype=torch.float64)
        for i, o in ((FEATURES, 6), (6, 5), (5, CLASSES))
    )
    task = task_of(nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c), softmax_task(40).proxy)
    models, n, _ = cohort(3, d=6 * FEATURES + 30 + 5 * CLASSES)
    shrunk, plain = (
        Lab(task, learn_lambda=False, server_lr=0.05),
        Lab(task, server_epochs=0),
    )
    shrunk.round(models, n)
    plain.round(models, n)
    scaled, logits = (
        task.predict(lab.state.params, task.proxy.x) for lab in (shrunk, plain)
    )
    assert abs(shrunk.gam - 1) > 0.05
    assert (scaled - shrunk.gam**3 * logits).abs().max() < 1e-9
    assert torch.equal(scaled.argmax(1), logits.argmax(1))


def test_neither_the_clients_models_nor_the_proxy_set_are_written_to() -> None:
    (models, n, _), lab = cohort(), Lab()
    kept = lab.task.proxy, lab.state.params
    before = copy.deepcopy(kept)
    lab.round(models, n)
    sent = trees.stack([trees.sub(tree(w, before[1]), before[1]) for w in models])
    for now, then in zip(
        trees.leaves((*kept, lab.sent[0].delta)),
        trees.leaves((*before, sent)),
        strict=True,
    ):
        assert torch.equal(now, then)


def test_the_seed_and_the_round_order_the_minibatches() -> None:
    models, n, _ = cohort()
    found = [
        Lab(seed=seed, t=t, server_batch=3).round(models, n).tolist()
        for seed, t in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert [w == found[0] for w in found] == [True, True, False, False]


def test_nothing_is_kept_of_a_round_but_the_model_and_the_product_of_gamma() -> None:
    (models, n, _), lab, product = cohort(), Lab(server_batch=4), 1.0
    for _ in range(3):
        assert float(lab.state.gamma_product) == pytest.approx(product, rel=1e-9)
        w = lab.round(models, n)
        product *= lab.gam
    assert w == pytest.approx(Lab(server_batch=4, t=2).round(models, n), abs=1e-9)


def test_clients_without_examples_are_left_out_and_nobody_else_is_too_few() -> None:
    (models, n, _), lab, alone = cohort(3), Lab(), Lab()
    assert lab.round(
        np.insert(models, 1, 1e3, axis=0), [n[0], 0, *n[1:]]
    ) == pytest.approx(alone.round(models, n), abs=1e-9)
    assert lab.log["lambda"] == alone.log["lambda"]
    for sizes, groups in (([0, 0, 0], None), (n, [])):
        with pytest.raises(TooFewReports):
            lab.round(models, sizes, groups)


def test_dropout_is_off_while_the_weights_are_fitted() -> None:
    (models, n, _), plain = cohort(), Lab()
    model = nn.Sequential(
        nn.Linear(FEATURES, CLASSES, dtype=torch.float64), nn.Dropout(0.5)
    ).train()
    lab = Lab(task_of(model, plain.task.proxy))
    assert lab.round(models, n) == pytest.approx(plain.round(models, n), abs=1e-12)
    assert lab.log["proxy_loss"] == pytest.approx(plain.log["proxy_loss"], abs=1e-12)


def test_a_parameter_without_dimensions_is_mixed_too() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    lab = Lab(
        task_of(model, Examples(torch.ones(1, 1), torch.ones(1, 1)), squared_error)
    )
    w = lab.round(np.array([[1.0, 2.0], [3.0, -1.0]]), [1, 1])
    assert w == pytest.approx(
        lab.log["gamma"] * np.array(lab.log["lambda"]) @ [[1.0, 2.0], [3.0, -1.0]],
        abs=1e-5,
    )


@pytest.mark.parametrize("epochs", [14, 17])
def test_in_two_stages_gamma_is_learned_for_weights_that_are_fixed_by_then(
    epochs: int,
) -> None:
    models, n, shares = cohort(4)
    lab = Lab(swa=True, server_epochs=epochs, server_lr=0.05)
    w = lab.round(models, n)
    _, gam, steps = server_step(
        lab, models, lab.lam, server_epochs=epochs // 2, learn_lambda=False
    )
    assert w == pytest.approx(gam * lab.lam @ models, abs=1e-9)
    assert lab.log["steps"] == 2 * steps
    assert (
        loss_and_gradient(lab.lam @ models, *lab.proxy)[0]
        < loss_and_gradient(shares @ models, *lab.proxy)[0] - 0.01
    )


def test_the_first_stage_averages_x_from_its_seventh_epoch_on_when_the_rate_is_that_of_swa() -> (
    None
):
    """At a server_lr of nothing: one state of no move, or 14 states of 0 to 13 moves of at most 0.05 each, 0.325 in the mean."""
    models, n, shares = cohort(4)
    for epochs, least, most in ((14, 0.0, 0.06), (40, 0.02, 0.35)):
        lab = Lab(swa=True, server_epochs=epochs, server_lr=1e-6)
        lab.round(models, n)
        assert (
            least <= np.ptp(np.log(lab.lam / shares)) / 2 <= most
        )  # at most the largest move of an x


def test_the_log_says_what_was_done() -> None:
    (models, n, shares), lab = cohort(4), Lab(w=0.5)
    w = lab.round(models, n)
    units = (models - 0.5) / np.linalg.norm(models - 0.5, axis=1, keepdims=True)
    assert lab.log["coherence"] == pytest.approx(
        (units @ units.T)[np.triu_indices(4, 1)].mean(), abs=1e-6
    )
    assert lab.log["lambda_ratio"] == pytest.approx(lab.lam / shares, abs=1e-4)
    assert lab.log["proxy_loss_before"] == pytest.approx(
        loss_and_gradient(shares @ models, *lab.proxy)[0], abs=1e-6
    )
    assert lab.log["proxy_loss"] == pytest.approx(
        loss_and_gradient(w, *lab.proxy)[0], abs=1e-6
    )
    assert lab.log["params_norm"] == pytest.approx(np.linalg.norm(w), abs=1e-6)
    assert [type(lab.log[name]) for name in ("gamma", "lambda", "lambda_ratio")] == [
        float,
        list,
        list,
    ]
    assert "clients" not in lab.log


# Clients, settings and whole runs


@pytest.mark.parametrize("t", [0, 3])
def test_a_client_runs_torchs_sgd_at_the_rate_of_its_round(t: int) -> None:
    (models, n, _), lab = (
        cohort(),
        Lab(t=t, local_lr=0.2, lr_decay=0.8, momentum=0.9, weight_decay=0.1),
    )
    draw, model = np.random.default_rng(0), copy.deepcopy(lab.task.model)
    x, y = (
        torch.from_numpy(draw.standard_normal((5, 4, FEATURES))),
        torch.from_numpy(draw.integers(0, CLASSES, (5, 4))),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2 * 0.8**t, momentum=0.9, weight_decay=0.1
    )
    for xb, yb in zip(x, y, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(xb), yb).backward()
        optimizer.step()
    lab.round(models, n)
    up, _ = lab.asked[0](
        lab.task,
        torch.tensor(float(t)),
        Model(lab.task.init_params()),
        (),
        Batches(x, y, torch.ones(5, 4)),
    )
    expected = flat({name: p.detach() for name, p in model.named_parameters()}) - flat(
        lab.task.init_params()
    )
    assert flat(up.delta) == pytest.approx(
        expected, abs=1e-6
    )  # the rate of a round is in float32


REFUSED = "swa=true gamma=0.9 gamma_bounds=[1.2,0.8] gamma_bounds=[-1,1] server_epochs=-1 server_batch=0 temperature=0"


@pytest.mark.parametrize("setting", REFUSED.split())
def test_settings_that_cannot_be_meant_are_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match=setting.split("=")[0]):
        Experiment.load(
            "fedlaw", ["method.server_epochs=13", f"method.{setting}"]
        )  # 13: too few for swa


PLAIN = {
    "learn_lambda": False,
    "learn_gamma": False,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "lr_decay": 1.0,
}


def digits(
    method: str, settings: dict[str, Any] | None = None, **others: Any
) -> Experiment:
    values = {
        "method": {"name": method, "local_lr": 0.1, **(settings or {})},
        "model": {"name": "mlp", "hidden": [9]},
        "proxy": 50,
    }
    cohort = {
        "population": 10,
        "participation": {"name": "uniform", "cohort": 4},
        "rounds": 3,
        "seed": 1,
    }
    return Experiment.parse(
        {
            **values,
            **cohort,
            "engine": {"name": "sequential", "device": "cpu"},
            **others,
        }
    )


def test_with_nothing_learned_it_is_fedavg_bit_for_bit_or_a_multiple_of_it(
    tmp_path: Path,
) -> None:
    plain = run(digits("fedavg"), tmp_path / "a")
    assert (
        run(digits("fedlaw", PLAIN), tmp_path / "b").params_sha256
        == plain.params_sha256
    )
    once = run(digits("fedavg", rounds=1), tmp_path / "c").params
    scaled = run(
        digits("fedlaw", {**PLAIN, "gamma": 0.9}, rounds=1), tmp_path / "d"
    ).params
    assert flat(scaled) == pytest.approx(0.9 * flat(once), abs=1e-7)


def test_traffic_is_fedavgs_to_the_byte(tmp_path: Path) -> None:
    d = 4 * len(flat(build_task(digits("fedlaw")).init_params()))
    for name in ("fedavg", "fedlaw"):
        row = loop_of(digits(name), tmp_path / name).round()
        assert (row["bytes_down"], row["bytes_up"]) == (4 * d, 4 * (d + 4)), (
            name
        )  # the loss beside the model


def test_a_run_is_reproducible_resumes_and_logs_who_was_mixed(tmp_path: Path) -> None:
    some: dict[str, Any] = {
        "participation": {"name": "uniform", "cohort": 6, "dropout": 0.4},
        "min_reports": 0,
        "rounds": 4,
    }
    whole = run(digits("fedlaw", **some), tmp_path / "whole")
    run(digits("fedlaw", **{**some, "rounds": 2}), tmp_path / "part")
    again = run(digits("fedlaw", **some), resume=tmp_path / "part")
    assert again.params_sha256 == whole.params_sha256
    assert (
        run(digits("fedlaw", **{**some, "seed": 2}), tmp_path / "other").params_sha256
        != whole.params_sha256
    )
    assert len({row["reports"] for row in whole.history}) > 1
    for row in whole.history:
        assert len(row["server_lambda"]) == row["reports"]
        assert sum(row["server_lambda"]) == pytest.approx(1, abs=1e-5)
        assert row["server_steps"] == 20  # 50 examples fit in one batch
        assert row["server_proxy_loss"] < row["server_proxy_loss_before"]
    assert whole.history[-1]["server_params_norm"] == pytest.approx(
        np.linalg.norm(flat(whole.params)), rel=1e-5
    )


def rows_of(x: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in x)


@pytest.mark.parametrize("size", [50, 53])
def test_the_proxy_set_is_balanced_and_nobody_elses(size: int) -> None:
    own, again, other, none = (
        build_task(digits("fedlaw", proxy=p, seed=s))
        for p, s in ((size, 1), (size, 1), (size, 2), (0, 1))
    )
    x, y = own.proxy
    assert len(x) == len(y) == size
    assert set(torch.bincount(y, minlength=10).tolist()) <= {size // 10, -(-size // 10)}
    held, pool = own.data.order, none.data.order
    assert len(set(held.tolist())) == len(held) == len(pool) - size
    assert rows_of(own.data.x[np.setdiff1d(pool, held)]) == rows_of(
        x
    )  # what the clients lost, and no more
    assert torch.equal(own.data.test.x, none.data.test.x)
    assert torch.equal(again.proxy.x, x)
    assert not torch.equal(other.proxy.x, x)


def test_least_squares_has_a_proxy_set_of_its_own(tmp_path: Path) -> None:
    loop = loop_of(small("fedlaw", proxy=7), tmp_path)
    assert len(loop.task.proxy.x) == 7
    assert not rows_of(loop.task.proxy.x) & (
        rows_of(loop.task.data.x) | rows_of(loop.task.data.test.x)
    )
    row = loop.round()
    assert row["server_proxy_loss"] < row["server_proxy_loss_before"]


def test_without_a_proxy_set_nothing_starts(tmp_path: Path) -> None:
    assert Experiment.load("fedlaw").proxy > 0
    for number, make in enumerate((digits, small)):
        with pytest.raises(SettingsError, match="proxy"):
            run(make("fedlaw", proxy=0), tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()


def test_a_cohort_beyond_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=90, total=90)
    )
    with pytest.raises(
        SettingsError
    ) as refused:  # 5 models of 5 numbers take 100 bytes or more
        run(small("fedlaw", proxy=10, engine__device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sizes = set(re.findall(r"[\d.,]+ [kMG]?B\b", str(refused.value)))
    assert sizes > {"90 B"}, f"no bytes needed, or none available, in: {refused.value}"
