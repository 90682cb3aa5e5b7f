"""Ranks, sizes and the start of layers of factors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import nn

from fedcore.models import LowRank, Mlp
from fedcore.models.lowrank import (
    FactoredLinear,
    Form,
    layers,
    lowrank,
    rank_of,
    size_of,
)
from fedcore.split import split
from tests.lowrank import FORMS, layer_of, values


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


@hypothesis(deadline=None)
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


@hypothesis(deadline=None)
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
    """10 outputs of 32 inputs: full rank takes R = 4 and 336 parameters, for 320.

    R = 3 would allow rank 9 alone.
    """
    assert rank_of(shape, gamma) == 0


@pytest.mark.parametrize("gamma", [0.94, 0.98, 1.0])
def test_the_rank_does_not_fall_as_gamma_grows(gamma: float) -> None:
    assert (
        rank_of((64, 64), gamma) == 16
    )  # round(8 + 8 gamma): as many parameters as dense, and not more


VGG = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def vgg(classes: int, gamma: float | None) -> tuple[int, list[int | None]]:
    """(parameters, ranks) of the paper's VGG16 with GroupNorm, whose last three
    layers are kept; without memory for its weights."""

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
