"""FedPara, pFedPara and low rank (Hyeon-Woo et al., ICLR 2022): what the equations say, the paper's sizes, and federated runs."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings
from fedcore.models import Cnn, LowRank, Mlp, ResNet, Vit
from fedcore.models.lowrank import (
    FactoredConv2d,
    FactoredLinear,
    Form,
    JacobianCorrection,
    layers,
    lowrank,
    rank_of,
    size_of,
)
from fedcore.models.vit import Prefix
from fedcore.reports import Reports, RunningSum
from fedcore.rounds.loop import Loop, run
from fedcore.split import split
from fedcore.task import Task, squared_error
from fedcore.tasks import TASKS, build_task
from fedcore.types import Batches, Params
from tests.helpers import assert_close, equal, loop_of, small

FORMS: list[Form] = ["fedpara", "pfedpara", "lowrank"]
Factored = FactoredLinear | FactoredConv2d


def layer_of(
    shape: tuple[int, ...], rank: int, form: Form = "fedpara", tanh: bool = False
) -> Any:
    """As it is built, for a dense weight of this shape."""
    s = LowRank(form=form, tanh=tanh)
    if len(shape) == 2:
        return FactoredLinear(nn.Linear(shape[1], shape[0]), rank, s)
    return FactoredConv2d(nn.Conv2d(shape[1], shape[0], (shape[2], shape[3])), rank, s)


def factored(
    shape: tuple[int, ...],
    rank: int,
    form: Form = "fedpara",
    seed: int = 0,
    tanh: bool = False,
) -> Any:
    """The same with all parameters standard normal, in float64."""
    layer, draw = layer_of(shape, rank, form, tanh), torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=draw)
    return layer


def values(layer: nn.Module) -> Params:
    return {name: p.detach() for name, p in layer.named_parameters()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance)


# What a weight is


def test_a_linear_weight_is_the_product_of_face_splitting_matrices() -> None:
    """(X1 . X2)(Y1 . Y2)', "." the row-wise Kronecker product: inner size R^2."""
    layer = factored((7, 9), 3)
    X, Y = (
        (
            layer.get_parameter(f"{f}1")[:, :, None]
            * layer.get_parameter(f"{f}2")[:, None, :]
        ).flatten(1)
        for f in "XY"
    )
    assert X.shape == (7, 9)
    assert close(layer.weight, X @ Y.T)


@hypothesis(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_inner_ranks_multiply_up_to_the_sides_whatever_the_shape(
    m: int, n: int, r1: int, r2: int
) -> None:
    """Proposition 1, and the constructive form behind it, in which the inner size is r1 r2."""
    layer, other = factored((m, n), r1), factored((m, n), r2, seed=1)
    layer.X2, layer.Y2 = other.X2, other.Y2
    X, Y = (
        (
            layer.get_parameter(f"{f}1")[:, :, None]
            * layer.get_parameter(f"{f}2")[:, None, :]
        ).flatten(1)
        for f in "XY"
    )
    assert X.shape == (m, r1 * r2)
    assert close(layer.weight, X @ Y.T, 1e-11)
    assert int(torch.linalg.matrix_rank(layer.weight, rtol=1e-10)) == min(r1 * r2, m, n)


@hypothesis(deadline=None)
@given(*[st.integers(1, 8)] * 2, *[st.integers(1, 3)] * 3, st.sampled_from(FORMS))
def test_the_weight_of_a_convolution_is_the_sum_over_its_core_whatever_the_shape(
    outputs: int, inputs: int, k1: int, k2: int, rank: int, form: Form
) -> None:
    """Proposition 3: both unfoldings by channels have rank R^2 at most, in pFedPara R (R + 1), in plain low rank R."""
    layer = factored((outputs, inputs, k1, k2), rank, form)
    p = values(layer)
    one, two = (
        torch.einsum("abhw,oa,ib->oihw", p["T" + n], p["X" + n], p["Y" + n])
        for n in ("11" if form == "lowrank" else "12")
    )
    assert close(
        layer.weight,
        {"fedpara": one * two, "pfedpara": one * (two + 1), "lowrank": one}[form],
        1e-11,
    )
    bound = rank * {"fedpara": rank, "pfedpara": rank + 1, "lowrank": 1}[form]
    for mode in (0, 1):
        assert (
            int(
                torch.linalg.matrix_rank(
                    layer.weight.transpose(0, mode).flatten(1), rtol=1e-10
                )
            )
            <= bound
        )


def test_the_other_forms_of_a_linear_weight() -> None:
    p = values(factored((7, 9), 3))
    one, two = p["X1"] @ p["Y1"].T, p["X2"] @ p["Y2"].T
    assert close(factored((7, 9), 3, "pfedpara").weight, one * (two + 1))
    assert close(factored((7, 9), 3, tanh=True).weight, one.tanh() * two.tanh())
    low = factored((7, 9), 3, "lowrank")
    assert {name for name, _ in low.named_parameters()} == {"X1", "Y1", "bias"}
    assert close(low.weight, one)


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_of_a_convolution_is_the_loops_written_out(form: Form) -> None:
    layer, R = factored((4, 3, 2, 3), 2, form), 2
    p = {name: value.numpy() for name, value in values(layer).items()}
    found = layer.weight.detach().numpy()
    for o, i, h, w in np.ndindex(4, 3, 2, 3):
        W = [
            sum(
                p["T" + n][a, b, h, w] * p["X" + n][o, a] * p["Y" + n][i, b]
                for a, b in product(range(R), repeat=2)
            )
            for n in ("1" if form == "lowrank" else "12")
        ]
        expected = {
            "fedpara": W[0] * W[-1],
            "pfedpara": W[0] * (W[-1] + 1),
            "lowrank": W[0],
        }[form]
        assert found[o, i, h, w] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_of_one_pixel_with_the_identity_as_core_is_the_linear_layer(
    form: Form,
) -> None:
    dense, layer = factored((5, 6), 3, form), factored((5, 6, 1, 1), 3, form)
    core = torch.eye(3, dtype=torch.float64)[:, :, None, None]
    layer.load_state_dict(
        values(dense) | {name: core for name in values(layer) if name.startswith("T")}
    )
    x = torch.randn(
        2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    assert close(layer.weight[:, :, 0, 0], dense.weight)
    assert close(layer(x[:, :, None, None])[:, :, 0, 0], dense(x))


def test_tanh_keeps_every_weight_between_minus_one_and_one() -> None:
    for shape in ((20, 30), (6, 5, 3, 3)):
        W = factored(shape, 4, tanh=True).weight
        assert 0.9 < W.abs().max() <= 1
        assert factored(shape, 4).weight.abs().max() > 10


def test_the_identity_is_represented_without_rounding() -> None:
    """R = 8, 2,048 parameters: a matrix of rank 16, which has as many, is at least .75 away from it (relative, squared)."""
    n, R = 64, 8
    i, a = torch.arange(n)[:, None], torch.arange(R)
    layer = FactoredLinear(nn.Linear(n, n, bias=False), R, LowRank(form="fedpara"))
    for name in ("X1", "Y1", "X2", "Y2"):
        layer.get_parameter(name).data = (
            (i // R if name[1] == "1" else i % R) == a
        ).float()
    assert torch.equal(layer.weight, torch.eye(n))
    assert sum(p.numel() for p in layer.parameters()) == 2048


@pytest.mark.parametrize(
    ("shape", "rank", "form", "expected"),
    [
        ((100, 100), 10, "fedpara", [100]),
        ((100, 100), 9, "fedpara", [81]),
        ((64, 32), 6, "fedpara", [32]),
        ((64, 32), 5, "fedpara", [25]),
        ((256, 256), 16, "fedpara", [256]),
        ((256, 256), 32, "lowrank", [32]),
        ((64, 64), 4, "pfedpara", [20]),  # R (R + 1)
        ((30, 30), 2, "pfedpara", [6]),
        ((16, 16, 3, 3), 4, "fedpara", [16, 16]),
        ((16, 16, 3, 3), 3, "fedpara", [9, 9]),
        ((4, 9, 3, 3), 3, "fedpara", [4, 9]),
        ((64, 3, 3, 3), 2, "fedpara", [4, 3]),
        ((16, 16, 3, 3), 3, "lowrank", [3, 3]),
    ],
)
def test_random_factors_attain_the_rank_that_the_propositions_allow(
    shape: tuple[int, ...], rank: int, form: Form, expected: list[int]
) -> None:
    for seed in range(1 if shape[0] == 256 else 5):
        W = factored(shape, rank, form, seed).weight.detach()
        unfoldings = [W.transpose(0, mode).flatten(1) for mode in range(len(expected))]
        assert [int(torch.linalg.matrix_rank(u)) for u in unfoldings] == expected, (
            f"seed {seed}"
        )


@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 3, 2)], ids=str)
def test_changes_of_gauge_leave_the_weight_as_it_is(shape: tuple[int, ...]) -> None:
    layer = factored(shape, 3)
    before = layer.weight
    A = torch.randn(
        3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    c = 1.7  # W1 c and W2 / c
    if len(shape) == 2:
        layer.X1.data, layer.Y1.data = (
            c * layer.X1 @ A,
            layer.Y1 @ torch.linalg.inv(A).T,
        )
        layer.Y2.data = layer.Y2 / c
    else:
        layer.X1.data, layer.T1.data = (
            layer.X1 @ A,
            c * torch.einsum("ab,bchw->achw", torch.linalg.inv(A), layer.T1),
        )
        layer.T2.data = layer.T2 / c
    assert not close(layer.X1, factored(shape, 3).X1, 0.1)
    assert close(layer.weight, before, 1e-11)


def test_the_mean_of_factors_is_not_the_mean_of_weights() -> None:
    """Two clients with W = 1 each, in another gauge: their mean has W = 1.125. Hence all start from one seed."""
    layer = factored((1, 1), 1)
    factors = {"X1": [1.0, 2.0], "Y1": [1.0, 0.5], "X2": [1.0, 1.0], "Y2": [1.0, 1.0]}
    clients = {
        name: torch.tensor(pair)[:, None, None] for name, pair in factors.items()
    }
    total = RunningSum()
    total.add(Reports(torch.arange(2), clients, torch.ones(2)), torch.ones(2))
    mean = total.mean(dict).value
    found = []
    for params in (trees.at(clients, 0), trees.at(clients, 1), mean):
        layer.load_state_dict(params, strict=False)
        found.append(layer.weight.item())
    assert found == [1, 1, 1.125]


# Gradients


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
    """<W, G>, for W is linear in each; in pFedPara for the second factors without the 1: <W - W1, G>."""
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
    """Floating-point operations of a step: W_i once on the way, two of its size back; and the dense layer's own."""
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
    """1/2 |W' - (W - eta J)|^2 of a linear layer, with the gradients as they are written in the paper."""
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


def test_the_jacobian_correction_is_the_papers_over_all_layers_and_so_is_its_gradient() -> (
    None
):
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
            "method": {"name": "tests.test_lowrank:Rateless"},
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


# Ranks and sizes


def spec_ranks(shape: tuple[int, ...]) -> tuple[int, int]:
    """(r_min, r_max) by the formulas in closed form."""
    m, n, k = shape[0], shape[1], math.prod(shape[2:])
    largest = (
        (math.isqrt((m + n) ** 2 + 2 * k * k * m * n) - m - n) // (2 * k)
        if len(shape) > 2
        else m * n // (2 * (m + n))
    )
    return min(math.ceil(math.sqrt(m)), math.ceil(math.sqrt(n))), largest


SIDES = st.integers(1, 300)
SHAPES = st.tuples(SIDES, SIDES) | st.tuples(
    SIDES, SIDES, st.integers(1, 5), st.integers(1, 5)
)


@hypothesis(deadline=None)  # the first layer on the meta device takes a second
@given(SHAPES, st.integers(1, 9))
def test_layers_have_the_parameters_that_are_counted_for_them(
    shape: tuple[int, ...], rank: int
) -> None:
    m, n, k = shape[0], shape[1], math.prod(shape[2:])
    fedpara = 2 * rank * (m + n + rank * k) if len(shape) > 2 else 2 * rank * (m + n)
    for form, expected in zip(FORMS, (fedpara, fedpara, fedpara // 2), strict=True):
        with torch.device("meta"):
            layer = layer_of(shape, rank, form)
        assert (
            size_of(shape, rank, form)
            == expected
            == sum(p.numel() for p in layer.parameters()) - m
        )


@given(SHAPES)
def test_the_largest_rank_is_the_last_that_is_not_larger_than_dense(
    shape: tuple[int, ...],
) -> None:
    least, largest = spec_ranks(shape)
    dense = math.prod(shape)
    assert (
        size_of(shape, largest, "fedpara")
        <= dense
        < size_of(shape, largest + 1, "fedpara")
    )
    assume(size_of(shape, least, "fedpara") < dense)
    assert rank_of(shape, 1.0) == largest
    assert rank_of(shape, 0.0) == least
    assert least**2 >= min(shape[:2]), "full rank is possible"


@given(SHAPES, st.integers(0, 20).map(lambda n: n / 20))
def test_gamma_goes_from_the_least_rank_to_the_largest(
    shape: tuple[int, ...], gamma: float
) -> None:
    least, largest = spec_ranks(shape)
    expected = max(1, round((1 - gamma) * least + gamma * largest))
    assume(
        size_of(shape, least, "fedpara")
        < math.prod(shape)
        != size_of(shape, expected, "fedpara")
    )
    assert rank_of(shape, gamma) == expected


@pytest.mark.parametrize(
    ("shape", "least", "largest", "sizes"),
    [
        ((64, 64, 3, 3), 8, 38, (3_200, 35_720, 36_864)),
        ((128, 128, 3, 3), 12, 77, (8_736, 146_146, 147_456)),
        ((256, 256, 3, 3), 16, 154, (20_992, 584_584, 589_824)),
        ((512, 512, 3, 3), 23, 309, (56_626, 2_351_490, 2_359_296)),
        ((256, 256), 16, 64, (16_384, 65_536, 65_536)),
    ],
)
def test_ranks_and_sizes_of_the_papers_layers(
    shape: tuple[int, ...], least: int, largest: int, sizes: tuple[int, int, int]
) -> None:
    assert (
        (rank_of(shape, 0.0), rank_of(shape, 1.0))
        == spec_ranks(shape)
        == (least, largest)
    )
    assert (
        *(size_of(shape, rank, "fedpara") for rank in (least, largest)),
        math.prod(shape),
    ) == sizes


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(10, 32), (2, 2), (1, 1), (3, 200)], ids=str)
def test_a_layer_that_full_rank_would_not_make_smaller_stays_dense_whatever_gamma(
    shape: tuple[int, ...], gamma: float
) -> None:
    """10 outputs of 32 inputs: full rank takes R = 4 and 336 parameters, for 320; R = 3 would allow rank 9 alone."""
    assert rank_of(shape, gamma) == 0


@pytest.mark.parametrize("gamma", [0.94, 0.98, 1.0])
def test_the_rank_does_not_fall_as_gamma_grows(gamma: float) -> None:
    assert (
        rank_of((64, 64), gamma) == 16
    )  # round(8 + 8 gamma): as many parameters as dense, and not more


VGG = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def vgg(classes: int, gamma: float | None) -> tuple[int, list[int | None]]:
    """(parameters, ranks) of the paper's VGG16 with GroupNorm, whose last three layers are kept; without memory for its weights."""

    def build() -> nn.Module:
        convolutions: list[nn.Module] = []
        for inputs, outputs in pairwise([3, *VGG]):
            convolutions += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(2, outputs),
                nn.ReLU(),
            ]
        head = nn.Sequential(
            nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, classes)
        )
        return nn.ModuleDict({"body": nn.Sequential(*convolutions), "head": head})

    with torch.device("meta"):
        model = build()
        if gamma is not None:
            lowrank(model, LowRank(form="fedpara", gamma=gamma, keep=(r"head\..+",)))
        found = layers(build(), model)
    return sum(layer.size for layer in found), [
        layer.rank for layer in found if layer.rank is not None
    ]


@pytest.mark.parametrize(
    ("gamma", "millions", "paper"),
    [
        (None, 15.254, 15.25),
        (0.1, 1.545, 1.55),
        (0.2, 2.325, 2.33),
        (0.3, 3.305, 3.31),
        (0.4, 4.440, 4.45),
        (0.5, 5.791, 5.79),
        (0.6, 7.331, 7.33),
        (0.7, 9.002, 9.01),
        (0.8, 10.895, 10.90),
        (0.9, 12.918, 12.92),
    ],
)
def test_vgg16_has_the_papers_number_of_parameters_at_every_gamma(
    gamma: float | None, millions: float, paper: float
) -> None:
    size, _ = vgg(10, gamma)
    assert round(size / 1e6, 3) == millions
    assert size / 1e6 == pytest.approx(
        paper, abs=0.011
    )  # which rounding of R the paper has is not said
    assert vgg(100, gamma)[0] == size + 46_170


def test_vgg16_has_the_papers_ranks_and_every_convolution_is_factored() -> None:
    assert vgg(10, None) == (15_253_578, [])
    assert vgg(10, 0.0) == (925_720, [2, 8, 8, 12, 12, 16, 16, 16, 23, 23, 23, 23, 23])
    assert vgg(10, 0.1)[1] == [2, 11, 13, 18, 22, 30, 30, 36, 52, 52, 52, 52, 52]


@pytest.mark.parametrize(
    ("classes", "ranks", "sent", "ratio"),
    [(62, [56, 16], 63_328, 3.42), (10, [56, 4], 59_304, 3.43)],
)
def test_pfedpara_sends_the_papers_fraction_of_its_model(
    classes: int, ranks: list[int], sent: int, ratio: float
) -> None:
    dense, model = (Mlp(hidden=(256,)).build((1, 28, 28), classes) for _ in range(2))
    lowrank(model, LowRank(form="pfedpara", gamma=0.5))
    assert [layer.rank for layer in layers(dense, model)] == ranks
    shared, personal = split(values(model), ["factors"])
    matrices = [p.numel() for name, p in shared.items() if not name.endswith("bias")]
    assert sum(matrices) == sent == sum(p.numel() for p in personal.values())
    assert (
        round(
            sum(
                p.numel()
                for name, p in values(dense).items()
                if name.endswith("weight")
            )
            / sent,
            2,
        )
        == ratio
    )


def test_the_baseline_of_low_rank_has_as_many_parameters() -> None:
    for shape in ((64, 64), (128, 64), (200, 784), (64, 32, 3, 3), (256, 256, 3, 3)):
        for gamma in (0.0, 0.5):
            with torch.device("meta"):
                dense = (
                    nn.Linear(shape[1], shape[0])
                    if len(shape) == 2
                    else nn.Conv2d(shape[1], shape[0], 3)
                )
                layer: Any = lowrank(dense, LowRank(form="lowrank", gamma=gamma))
            rank, R, budget = (
                layer.X1.shape[1],
                rank_of(shape, gamma),
                size_of(shape, rank_of(shape, gamma), "fedpara"),
            )
            assert (
                size_of(shape, rank, "lowrank")
                <= budget
                < size_of(shape, rank + 1, "lowrank")
            )
            assert len(shape) > 2 or rank == 2 * R


# The start


@pytest.mark.parametrize("shape", [(200, 784), (64, 64), (64, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_weights_start_with_the_variance_of_he_initialisation(
    form: Form, shape: tuple[int, ...]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [layer_of(shape, rank_of(shape, 0.0), form).weight for _ in range(20)]
    variance = torch.stack(found).square().mean().item()
    assert variance == pytest.approx(2 / math.prod(shape[1:]), rel=0.1)


@pytest.mark.parametrize("shape", [(64, 32), (16, 8, 3, 3)], ids=str)
def test_pfedpara_starts_at_its_shared_product_and_both_parts_learn(
    shape: tuple[int, ...],
) -> None:
    layer: Any = layer_of(shape, 3, "pfedpara")
    assert torch.equal(layer.weight, layer.product("1"))
    layer.weight.square().sum().backward()
    assert layer.X1.grad.any()
    assert layer.Y2.grad.any(), (
        "with X2 at zero, too, the personal part would never move"
    )


def test_biases_stay_and_the_seed_decides_the_rest() -> None:
    dense = nn.Linear(64, 32)
    found = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            found.append(layer_of((32, 64), 4, "fedpara"))
    assert torch.equal(
        FactoredLinear(dense, 4, LowRank(form="fedpara")).bias, dense.bias
    )  # type: ignore[arg-type]
    assert all(
        torch.equal(found[0].get_parameter(n), found[1].get_parameter(n))
        for n in ("X1", "Y1", "X2", "Y2")
    )


# A model with such layers


MODELS: dict[str, Any] = {
    "mlp": Mlp(hidden=(32, 16)),
    "cnn": Cnn(),
    "resnet": ResNet(depth=10, width=16, groups=2, adapter=True),
    "vit": Vit(adapter=4, prefix=Prefix(form="additive", bottleneck=16)),
}


@pytest.mark.parametrize(
    ("form", "tanh"), [*((form, False) for form in FORMS), ("fedpara", True)]
)
@pytest.mark.parametrize("name", MODELS)
def test_composed_once_as_a_dense_model_it_gives_the_same_logits(
    name: str, form: Form, tanh: bool
) -> None:
    model, dense = (MODELS[name].build((1, 16, 16), 10).double() for _ in range(2))
    lowrank(model, LowRank(form=form, gamma=0.2, tanh=tanh)).double()
    weights = {
        f"{n}.weight": m.weight
        for n, m in model.named_modules()
        if isinstance(m, Factored)
    }
    assert len(weights) > 1
    dense.load_state_dict(
        weights | {n: p for n, p in values(model).items() if n in values(dense)}
    )
    x = torch.randn(
        3, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert close(model(x), dense(x), 1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": (2, 1), "dilation": (2, 1)},
        {"bias": False},
    ],
    ids=str,
)
def test_a_convolution_keeps_what_it_does_with_its_weight(
    settings: dict[str, Any],
) -> None:
    dense = nn.Conv2d(8, 16, 3, **settings)
    layer: Any = lowrank(nn.Conv2d(8, 16, 3, **settings), LowRank(form="fedpara"))
    assert type(layer) is FactoredConv2d
    dense.load_state_dict(
        {"weight": layer.weight}
        | {name: p for name, p in values(layer).items() if name == "bias"}
    )
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    assert close(layer(x), dense(x), 1e-5)


@pytest.mark.parametrize(
    "dense", [nn.Linear(64, 32), nn.Conv2d(8, 16, 3)], ids=["linear", "convolution"]
)
def test_factors_have_the_type_of_the_layer(dense: nn.Module) -> None:
    layer = lowrank(dense.double(), LowRank(form="fedpara"))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


def test_only_linear_layers_and_plain_convolutions_are_factored() -> None:
    grouped = nn.Conv2d(64, 64, 3, groups=2)
    model = nn.Sequential(
        nn.Embedding(64, 64),
        nn.LayerNorm(64),
        grouped,
        nn.Linear(64, 64),
        nn.Linear(64, 2),
    )
    before = [*model]
    assert lowrank(model, LowRank(form="dense")) is model
    assert [*model] == before
    assert lowrank(model, LowRank(form="fedpara")) is model
    assert [new is old for new, old in zip(model, before, strict=True)] == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert isinstance(
        lowrank(nn.Linear(64, 64), LowRank(form="fedpara")), FactoredLinear
    )
    assert isinstance(
        lowrank(nn.Linear(64, 64), LowRank(form="fedpara", keep=("output",))), nn.Linear
    )


def test_without_settings_layers_become_fedparas_of_the_given_gamma() -> None:
    for gamma in (0.0, 0.5):
        dense, model = (
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
            for _ in range(2)
        )
        found = layers(dense, lowrank(model, gamma=gamma))
        R = rank_of((128, 64), gamma)
        assert found == [
            ("0", 64 * 128 + 128, 2 * R * 192 + 128, R),
            ("2", 258, 258, None),
        ]
        assert isinstance(model[0], FactoredLinear)
        assert model[0].form == "fedpara"


def test_what_others_read_or_may_do_with_a_weight_stays_dense() -> None:
    tied, reflecting = nn.Linear(64, 64), nn.Conv2d(64, 64, 3, padding_mode="reflect")
    embedding, output = nn.Embedding(64, 64), nn.Linear(64, 64)
    output.weight = embedding.weight
    normed = parametrizations.weight_norm(nn.Linear(64, 64))
    model = nn.ModuleList(
        [tied, nn.Linear(64, 64), tied, reflecting, embedding, output, normed]
    )
    before = [*model]
    lowrank(model, LowRank(form="fedpara"))
    assert [new is old for new, old in zip(model, before, strict=True)] == [
        True,
        False,
        True,
        True,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_of_pytorchs_transformer_works_with_factors(training: bool) -> None:
    """It reads the weights of its layers itself, on a path of its own outside of training."""
    layer = lowrank(
        nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True),
        LowRank(form="fedpara"),
    ).train(training)
    assert isinstance(layer.linear1, FactoredLinear)
    assert isinstance(layer.get_submodule("self_attn.out_proj"), nn.Linear)
    with torch.no_grad():
        assert layer(torch.ones(2, 5, 64)).isfinite().all()


@pytest.mark.parametrize(("name", "value"), [("tanh", True), ("jacobian", 1.0)])
def test_the_papers_extras_are_of_fedpara_alone(name: str, value: float) -> None:
    with pytest.raises(
        ValidationError,
        match=f'{name} is of the form "fedpara", not of "pfedpara"; leave it out',
    ):
        LowRank.model_validate({"form": "pfedpara", name: value})


def test_parts_of_a_model_are_found_by_name_in_its_factors_too() -> None:
    settings = Vit(width=64, mlp=128, prefix=Prefix(form="additive", bottleneck=32))
    dense, model = (settings.build((1, 16, 16), 60) for _ in range(2))
    lowrank(model, LowRank(form="pfedpara", gamma=0.2))
    kinds = {"X1", "Y1", "X2", "Y2"}
    assert (
        model.get_submodule("blocks.0.attn.prefix.up").get_parameter("X1") is not None
    )
    for part in ("input", "output", "norm", "attention", "mlp", "prefix"):
        modules = {name.rpartition(".")[0] for name in split(values(dense), [part])[1]}
        assert {
            name.rpartition(".")[0] for name in split(values(model), [part])[1]
        } == modules, part
    shared, personal = split(values(model), ["factors"])
    assert {name.rpartition(".")[2] for name in personal} == {
        "X2",
        "Y2",
        "T2",
    }  # the embedding of patches is a convolution
    assert not {name.rpartition(".")[2] for name in shared} & {"X2", "Y2", "T2"}
    assert kinds <= {name.rpartition(".")[2] for name in values(model)}


# Federated runs


DIGITS: dict[str, Any] = {
    "task": "digits",
    "options": {},
    "population": 12,
    "partition__alpha": 0.5,
    "model__name": "mlp",
    "model__hidden": [32],
    "local__batch_size": 16,
    "rounds": 3,
}


def identical(e: Experiment) -> Task:
    """Two layers of factors in float64; every client holds the same nine examples."""
    draw, n = np.random.default_rng(1), e.population or 1
    rows = Examples(
        torch.from_numpy(draw.standard_normal((9, 12))),
        torch.from_numpy(draw.standard_normal((9, 4))),
    )
    s = LowRank(form=e.options["form"])
    model = nn.Sequential(
        FactoredLinear(nn.Linear(12, 6), 2, s),
        nn.Tanh(),
        FactoredLinear(nn.Linear(6, 4), 2, s),
    ).double()
    return Task(
        model,
        FederatedData(rows, rows, np.tile(np.arange(9), n), np.arange(n + 1) * 9),
        loss=squared_error,
        metrics={},
    )


def everybody(form: Form, population: int, folder: Path, batch: int) -> Loop:
    """FedAvg on `identical`, everybody in every round, four local steps."""
    settings = {
        "participation__cohort": None,
        "participation__fraction": 1.0,
        "holdout": 0.0,
        "local__steps": 4,
    }
    task = {
        "task": "tests.test_lowrank:identical",
        "options": {"form": form},
        "population": population,
    }
    return loop_of(small("fedavg", **settings, **task, local__batch_size=batch), folder)


@pytest.mark.parametrize("form", FORMS)
def test_one_client_in_every_round_is_sgd_on_the_factors(
    form: Form, tmp_path: Path
) -> None:
    loop = everybody(form, 1, tmp_path, batch=4)
    model = build_task(loop.experiment).model
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for t in range(3):
        plan = trees.at(
            loop.task.data.batches(
                np.array([0]), "train", loop.experiment.local, loop.experiment.seed, t
            ),
            0,
        )
        for x, y, mask in zip(*plan, strict=True):
            sgd.zero_grad()
            ((squared_error(model(x), y) * mask).sum() / mask.sum()).backward()
            sgd.step()
        loop.round()
    assert not equal(loop.state.server.params, loop.task.init_params())
    # not bit for bit: clients send y - x, and x + (y - x) is rounded; the weight of the client, 1, is a quotient of float32
    assert_close(
        loop.state.server.params, values(model), 1e-8, f"{form} with one client"
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_equal_factors_is_what_each_client_has(
    form: Form, tmp_path: Path
) -> None:
    found = [everybody(form, n, tmp_path / str(n), batch=64) for n in (1, 4)]
    for loop in found:
        loop.round()
    assert_close(
        found[1].state.server.params,
        found[0].state.server.params,
        1e-12,
        f"four equal clients and one, {form}",
    )


@pytest.mark.parametrize(
    "method", ["fedavg", "fedprox", "fedadam", "scaffold", "fedau"]
)
def test_methods_train_factors_as_they_train_weights(
    method: str, tmp_path: Path
) -> None:
    rates = {"method__server_lr": 0.03} if method == "fedadam" else {}
    e = small(
        method,
        **DIGITS,
        **{"method__local_lr": 0.1, **rates},
        lowrank__form="fedpara",
        local__epochs=4,
    )
    loop = loop_of(e, tmp_path / "s")
    start = loop.task.test(loop.task.init_params())["loss"]
    one = loop.run()
    assert {name for name in one.params if name.startswith("1.")} == {
        "1.X1",
        "1.Y1",
        "1.X2",
        "1.Y2",
        "1.bias",
    }
    assert one.dropped == {}
    assert one.final["test_loss"] < 0.95 * start
    batched = run(
        e.model_copy(
            update={
                "engine": e.engine.model_copy(update={"name": "vectorised", "chunk": 3})
            }
        ),
        tmp_path / "v",
    )
    assert_close(
        batched.params, one.params, 1e-5, f"{method}, in chunks and one by one"
    )


def test_every_factor_is_sent_both_ways_and_nothing_else(tmp_path: Path) -> None:
    """2 C 4 P bytes a round, and of each client its training loss."""
    P = 2 * 6 * (64 + 32) + 32 + (32 * 10 + 10)  # R = 6; the output layer stays dense
    row = loop_of(
        small("fedavg", **DIGITS, lowrank__form="fedpara"), tmp_path / "f"
    ).round()
    assert (row["bytes_down"], row["bytes_up"]) == (5 * 4 * P, 5 * 4 * (P + 1))
    own = {"lowrank__form": "pfedpara", "method__personal": ["factors"]}
    row = loop_of(small("fedsim", **DIGITS, **own), tmp_path / "p").round()
    half = P - 6 * (64 + 32)  # X2 and Y2 stay: half of the factors
    assert (row["bytes_down"], row["bytes_up"]) == (5 * 4 * half, 5 * 4 * (half + 1))


@pytest.mark.parametrize(
    "model",
    [{}, {"model__name": "cnn", "model__hidden": None}],
    ids=["linear", "convolutions"],
)
def test_pfedpara_shares_the_first_product_and_clients_keep_the_second(
    model: dict[str, Any], tmp_path: Path
) -> None:
    settings = {k: v for k, v in {**DIGITS, **model}.items() if v is not None}
    loop = loop_of(
        small(
            "fedsim", **settings, lowrank__form="pfedpara", method__personal=["factors"]
        ),
        tmp_path,
    )
    states = loop.engine.states
    assert states is not None
    start = states.get(0).v
    assert {name.rpartition(".")[2] for name in start} == (
        {"X2", "Y2", "T2"} if model else {"X2", "Y2"}
    )
    assert (
        start.keys() | loop.state.server.params.keys() == loop.task.init_params().keys()
    )
    assert not start.keys() & loop.state.server.params.keys()
    cohort = set(loop.process.sample(0, loop.state.participation)[0].tolist())
    before = loop.state.server.params
    loop.round()
    after = {i: trees.map(torch.clone, states.get(i).v) for i in range(12)}
    assert {i for i in range(12) if not equal(after[i], start)} == cohort
    assert not equal(loop.state.server.params, before)
    away = set(range(12)) - set(
        loop.process.sample(1, loop.state.participation)[0].tolist()
    )
    loop.round()
    assert all(equal(states.get(i).v, after[i]) for i in away), (
        "a round that a client sits out changed its own factors"
    )


def frozen(e: Experiment) -> Task:
    """pFedPara whose second product is at zero and stays there: X2 and Y2 have each other in their gradients."""
    task = TASKS["digits"](e)
    lowrank(task.model, LowRank(form="pfedpara", gamma=0.5))
    for name, p in task.model.named_parameters():
        if name.endswith("X2"):
            p.data.zero_()
    return task


def first_alone(e: Experiment) -> Task:
    """The same without the second factors: low rank, of rank R."""
    task = frozen(e)
    for layer in task.model.modules():
        if isinstance(layer, FactoredLinear):
            layer.form = "lowrank"
            del layer.X2, layer.Y2
    return task


def test_pfedpara_with_its_second_product_at_zero_is_fedavg_on_the_first(
    tmp_path: Path,
) -> None:
    tasks = {
        name: {**DIGITS, "task": f"tests.test_lowrank:{name}"}
        for name in ("frozen", "first_alone")
    }
    personal = loop_of(
        small("fedsim", **tasks["frozen"], method__personal=["factors"]), tmp_path / "p"
    )
    shared = loop_of(small("fedavg", **tasks["first_alone"]), tmp_path / "s")
    for _ in range(3):
        personal.round()
        shared.round()
    assert equal(personal.state.server.params, shared.state.server.params)
    assert personal.engine.states is not None
    assert not any(
        v.any() for i in range(12) for v in personal.engine.states.get(i).v.values()
    )


def test_a_task_that_knows_its_optimum_takes_no_factors() -> None:
    with pytest.raises(
        SettingsError,
        match=r'lowrank\.form = "fedpara": least-squares knows its optimum',
    ):
        build_task(small("fedavg", lowrank__form="fedpara"))


# The capacity that the propositions promise


def federated_regression(form: Form, target: Tensor) -> float:
    """Relative squared error of W, of 2,048 parameters, for y = W* x: 10 clients of 200 examples, 5 a round, 150 rounds."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: Any = layer_of((64, 64), 8 if form == "fedpara" else 16, form)
    layer.bias = None
    assert sum(p.numel() for p in layer.parameters()) == 2048
    x = torch.randn(10, 200, 64, generator=draw)
    y = x @ target.T

    def loss(p: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = (functional_call(layer, p, (x,)) - y).square().sum(1).mean() / 2
        return found

    params = values(layer)
    for t in range(150):
        cohort = torch.randperm(10, generator=draw)[:5]
        rows = (
            torch.rand(5, 5, 200, generator=draw).argsort(-1).view(5, 20, 50)
        )  # five epochs of four batches
        batches = Batches(
            x[cohort[:, None, None], rows],
            y[cohort[:, None, None], rows],
            torch.ones(5, 20, 50),
        )

        def client(b: Batches, t: int = t, params: Params = params) -> Params:
            return local_sgd(loss, params, b, 0.02 * 0.992**t, momentum=0.9).params

        params = trees.map(lambda p: p.mean(0), vmap(client)(batches))
    layer.load_state_dict(params)
    return float(
        (layer.weight.detach() - target).square().sum() / target.square().sum()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("target", "bound"), [("identity", 0.05), ("orthogonal", 0.4)])
def test_fedpara_fits_a_matrix_of_full_rank_that_low_rank_of_its_size_cannot(
    target: str, bound: float
) -> None:
    draw = torch.Generator().manual_seed(1)
    W = (
        torch.eye(64)
        if target == "identity"
        else torch.linalg.qr(torch.randn(64, 64, generator=draw))[0]
    )
    assert (
        federated_regression("lowrank", W) >= 0.75
    )  # rank 16 of 64 equal singular values
    assert federated_regression("fedpara", W) < bound
