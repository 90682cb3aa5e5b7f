"""FedPara, pFedPara and low rank (Hyeon-Woo et al., ICLR 2022): the weights."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import nn

from fedcore import trees
from fedcore.models import LowRank
from fedcore.models.lowrank import (
    FactoredLinear,
    Form,
)
from fedcore.reports import Reports, RunningSum
from tests.lowrank import FORMS, close, factored, values


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
    """Proposition 1, and the constructive form behind it, in which the inner size is
    r1 r2."""
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
    """Proposition 3: both unfoldings by channels have rank R^2 at most, in pFedPara
    R (R + 1), in plain low rank R."""
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
    """R = 8, 2,048 parameters.

    A matrix of rank 16, which has as many, is at least .75 away from it (relative,
    squared).
    """
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
    """Two clients with W = 1 each, in another gauge: their mean has W = 1.125.

    Hence all start from one seed.
    """
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
