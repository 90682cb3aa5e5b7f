"""FedLAW's server step against its equations, and the invariants of the paper."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from fedcore.strategies import fedlaw
from torch import Tensor, nn

from fedcore import trees
from fedcore.data.federated import Examples
from fedcore.errors import TooFewReports
from fedcore.metrics import squared_error
from tests.fedlaw import (
    CLASSES,
    FEATURES,
    Lab,
    cohort,
    kinds,
    loss_and_gradient,
    mixture,
    optimizers,
    server_step,
    softmax_task,
    start,
    task_of,
    tree,
)


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
    """Those of x sum to zero in "exp" and are orthogonal to x in "quad".

    So a step of SGD tells them from lam alone.
    """
    eta, h = 1e-3, 1e-5
    for seed in range(5):
        models, n, shares = cohort(4, seed)
        if kind == "quad":  # it starts from equal weights
            n, shares = np.ones(4), np.full(4, 0.25)
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
    """f.7 and f.10, which the new model alone cannot show.

    A shift of x in "exp" and a scale of it in "quad" change nothing.
    """
    (models, n, _), draw = cohort(4), np.random.default_rng(5)
    D = torch.from_numpy(models)
    G = torch.from_numpy(draw.standard_normal(models.shape[1]))
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


def test_order_and_grouping_the_unit_of_n_and_the_model_before_do_not_matter() -> None:
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
    shrunk = Lab(task, learn_lambda=False, server_lr=0.05)
    plain = Lab(task, server_epochs=0)
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


def test_the_first_stage_averages_x_from_its_seventh_epoch_on() -> None:
    """From there on the rate is that of SWA; before it, server_lr is next to nothing.

    One state without a move, or 14 states after 0 to 13 moves of at most 0.05 each,
    0.325 in the mean.
    """
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
