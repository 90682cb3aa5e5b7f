"""Gradients of factors, and the Jacobian correction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.method import Method, MethodSettings
from fedcore.metrics import squared_error
from fedcore.models import Cnn, LowRank, Mlp, ResNet
from fedcore.models.lowrank import (
    FactoredLinear,
    Form,
    JacobianCorrection,
    lowrank,
)
from fedcore.rounds.loop import run
from fedcore.tasks import build_task
from fedcore.types import Params
from tests.helpers import assert_close, small
from tests.lowrank import DIGITS, FORMS, close, factored, layer_of, values


def with_gradients(layer: Any) -> tuple[Tensor, Tensor, Params]:
    """(W, G, gradients of the factors) for a random G = dL/dW."""
    W = layer.weight
    G = torch.randn(
        W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    W.backward(G)
    return (
        W.detach(),
        G,
        {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
    )


def test_gradients_of_linear_factors_are_the_papers() -> None:
    layer = factored((6, 8), 3)
    _, G, d = with_gradients(layer)
    p = values(layer)
    W1, W2 = p["X1"] @ p["Y1"].T, p["X2"] @ p["Y2"].T
    assert close(d["X1"], (G * W2) @ p["Y1"])
    assert close(d["Y1"], (G * W2).T @ p["X1"])
    assert close(d["X2"], (G * W1) @ p["Y2"])
    assert close(d["Y2"], (G * W1).T @ p["X2"])
    for n in "12":
        assert close(p["X" + n].T @ d["X" + n], (p["Y" + n].T @ d["Y" + n]).T)


@pytest.mark.parametrize("shape", [(6, 8), (4, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_factor_has_the_same_inner_product_with_its_gradient(
    form: Form, shape: tuple[int, ...]
) -> None:
    """<W, G>, for W is linear in each.

    In pFedPara for the second factors without the 1: <W - W1, G>.
    """
    layer = factored(shape, 3, form)
    W, G, d = with_gradients(layer)
    inner = {
        "1": (W * G).sum(),
        "2": ((W - layer.product("1").detach()) * G).sum()
        if form == "pfedpara"
        else (W * G).sum(),
    }
    assert len(d) == (1 if form == "lowrank" else 2) * (2 if len(shape) == 2 else 3)
    for name, gradient in d.items():
        assert (values(layer)[name] * gradient).sum() == pytest.approx(
            inner[name[1]].item(), rel=1e-11
        ), name


@pytest.mark.parametrize(
    ("form", "tanh"), [*((form, False) for form in FORMS), ("fedpara", True)]
)
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 2)], ids=str)
def test_gradients_agree_with_finite_differences(
    shape: tuple[int, ...], form: Form, tanh: bool
) -> None:
    layer = factored(shape, 2, form, tanh=tanh)
    x = torch.randn(
        2, *shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    names = [name for name, _ in layer.named_parameters()]
    assert gradcheck(
        lambda *factors: functional_call(
            layer, dict(zip(names, factors, strict=True)), (x,)
        ),
        [(0.5 * value).requires_grad_() for value in values(layer).values()],
        eps=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("form", FORMS)
def test_no_product_is_formed_twice(form: Form) -> None:
    """Floating-point operations of a step: W_i once on the way, two of its size back.

    And the dense layer's own.
    """
    (m, n, R, B), products = (40, 30, 6, 5), 1 if form == "lowrank" else 2
    layer = layer_of((m, n), R, form)
    x = torch.randn(B, n, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).square().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (products * R * m * n + B * m * n)
    layer, (k, size) = layer_of((m, n, 3, 3), R, form), (9, 8)
    x = torch.randn(B, n, size, size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).square().sum().backward()
    core, whole = n * R * R * k, m * n * R * k
    assert counter.get_total_flops() == 3 * 2 * (
        products * (core + whole) + B * m * n * k * (size - 2) ** 2
    )


# The Jacobian correction


def by_hand(x: list[Tensor], J: Tensor, step: float) -> Tensor:
    """1/2 |W' - (W - eta J)|^2 of a linear layer, with the gradients as they are
    written in the paper."""
    X1, Y1, X2, Y2 = x
    W1, W2 = X1 @ Y1.T, X2 @ Y2.T
    new1 = (X1 - step * (J * W2) @ Y1) @ (Y1 - step * (J * W2).T @ X1).T
    new2 = (X2 - step * (J * W1) @ Y2) @ (Y2 - step * (J * W1).T @ X2).T
    return (new1 * new2 - (W1 * W2 - step * J)).square().sum() / 2


def test_the_jacobian_correction_of_one_weight() -> None:
    """W' = .9^4 = .6561 against .9; nothing where the loss has no gradient."""
    layer = FactoredLinear(
        nn.Linear(1, 1, bias=False), 1, LowRank(form="fedpara")
    ).double()
    for p in layer.parameters():
        p.data.fill_(1.0)
    penalty = JacobianCorrection(layer, 3.0, 0.1)
    x = torch.ones(1, 1, dtype=torch.float64)
    assert penalty(
        lambda p: functional_call(layer, p, (x,)).sum(), values(layer)
    ).item() == pytest.approx(3 * 0.029743605, abs=1e-14)
    assert (
        penalty(
            lambda p: functional_call(layer, p, (0 * x,)).sum(), values(layer)
        ).item()
        == 0
    )


def two_layers() -> tuple[nn.Sequential, Params, Tensor, Tensor]:
    model = nn.Sequential(factored((4, 3), 2), nn.Tanh(), factored((2, 4), 2, seed=1))
    draw = torch.Generator().manual_seed(5)
    x, y = (torch.randn(6, n, dtype=torch.float64, generator=draw) for n in (3, 2))
    return model, {name: 0.5 * p for name, p in values(model).items()}, x, y


def test_the_jacobian_correction_and_its_gradient_are_the_papers() -> None:
    """Over all layers."""
    model, params, x, y = two_layers()

    def loss(p: Params) -> Tensor:
        return squared_error(functional_call(model, p, (x,)), y).mean()

    def expected(p: Params) -> Tensor:
        """With the model written out, and J by PyTorch's own differentiation."""
        factors = [
            [p[f"{i}.{name}"] for name in ("X1", "Y1", "X2", "Y2")] for i in (0, 2)
        ]
        W = [(X1 @ Y1.T) * (X2 @ Y2.T) for X1, Y1, X2, Y2 in factors]
        outputs = torch.tanh(x @ W[0].T + p["0.bias"]) @ W[1].T + p["2.bias"]
        J = torch.autograd.grad(squared_error(outputs, y).mean(), W, create_graph=True)
        return 0.7 * (by_hand(factors[0], J[0], 0.2) + by_hand(factors[1], J[1], 0.2))

    penalty = JacobianCorrection(model, 0.7, 0.2)
    found = grad(lambda p: penalty(loss, p))(params)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = expected(leaves)
    value.backward()
    assert penalty(loss, params).item() == pytest.approx(value.item(), rel=1e-12)
    assert value > 1e-3
    assert_close(
        found,
        {name: p.grad for name, p in leaves.items()},
        1e-12,
        "gradient of the correction",
    )
    batched = vmap(grad(lambda p: penalty(loss, p)))(
        {name: torch.stack([p, 1.1 * p]) for name, p in params.items()}
    )
    assert_close(trees.at(batched, 0), found, 1e-12, "batched over clients")
    assert all(
        layer.change is None for layer in model if isinstance(layer, FactoredLinear)
    )


def test_the_jacobian_correction_acts_in_every_engine_and_at_lambda_zero_not_at_all(
    tmp_path: Path,
) -> None:
    own = {**DIGITS, "lowrank__form": "fedpara", "method__local_lr": 0.1}
    plain, zero, one, batched = (
        run(small("fedavg", **own, **more), tmp_path / str(i))
        for i, more in enumerate(
            [
                {},
                {"lowrank__jacobian": 0.0},
                {"lowrank__jacobian": 1.0},
                {
                    "lowrank__jacobian": 1.0,
                    "engine__name": "vectorised",
                    "engine__chunk": 3,
                },
            ]
        )
    )
    assert zero.params_sha256 == plain.params_sha256 != one.params_sha256
    assert_close(batched.params, one.params, 1e-5, "in chunks and one by one")


class Rateless(Method[MethodSettings]):
    """A method whose clients have no step size of their own."""


def test_the_jacobian_correction_needs_a_step_size() -> None:
    e = Experiment.parse(
        {
            "method": {"name": "tests.test_lowrank_gradients:Rateless"},
            "lowrank": {"form": "fedpara", "jacobian": 1.0},
        }
    )
    with pytest.raises(
        SettingsError,
        match=r'lowrank\.jacobian = 1\.0: it needs the local_lr that "tests.*" has not',
    ):
        build_task(e)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "settings",
    [Mlp(hidden=(32,)), Cnn(), ResNet(depth=10, width=16, groups=2)],
    ids=lambda s: s.name,
)
def test_gradients_batched_over_clients_are_those_of_each_client(
    settings: Mlp | Cnn | ResNet, form: Form
) -> None:
    model = lowrank(
        settings.build((1, 8, 8), 4), LowRank(form=form, gamma=0.2)
    ).double()
    draw = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(2, 3, 1, 8, 8, dtype=torch.float64, generator=draw),
        torch.tensor([[0, 1, 2], [3, 0, 1]]),
    )
    params = {name: torch.stack([p, 1.1 * p]) for name, p in values(model).items()}

    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, p, (x,)), y)

    batched = vmap(grad(loss))(params, x, y)
    for i in range(2):
        assert_close(
            trees.at(batched, i),
            grad(loss)(trees.at(params, i), x[i], y[i]),
            1e-10,
            f"gradient of client {i}",
        )
