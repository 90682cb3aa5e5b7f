"""Models with layers of factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import parametrizations

from fedcore.models import Cnn, LowRank, Mlp, ResNet, Vit
from fedcore.models.lowrank import (
    FactoredConv2d,
    FactoredLinear,
    Form,
    layers,
    lowrank,
    rank_of,
)
from fedcore.models.vit import Prefix
from fedcore.split import split
from tests.lowrank import FORMS, Factored, close, values

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
    """It reads the weights of its layers itself, on a path of its own outside of
    training."""
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
