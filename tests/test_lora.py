"""Adapters on a model: where they are, what they compute, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.models.lora import LoraLinear, LoraSettings, scales, with_lora
from fedcore.models.vit import Vit
from fedcore.split import split
from fedcore.tasks import build_task
from fedcore.types import Params

FORMS = ["lora", "rslora", "dora"]


def two_layers(**settings: Any) -> nn.Module:
    """5 -> 3 -> 2, with adapters on both layers."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    values = {"rank": 2, "targets": ("0", "2"), **settings}
    return with_lora(dense, LoraSettings(**values))


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def trained_params(model: nn.Module) -> Params:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def vit(**lora: Any) -> nn.Module:
    model = Vit(width=16, depth=2, heads=2).build((1, 8, 8), 10)
    return with_lora(model, LoraSettings(**lora))


# At the start


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("freeze", [None, "A", "B"])
def test_a_model_with_adapters_starts_as_the_model(form: Any, freeze: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    before, x = copy.deepcopy(dense), torch.randn(4, 5)
    settings = LoraSettings(rank=2, targets=("0",), form=form, freeze=freeze)
    model = with_lora(dense, settings)
    tolerance = 1e-6 if form == "dora" else 0  # g / |W| is 1, and W x' in other order
    assert torch.allclose(model(x), before(x), rtol=0, atol=tolerance)
    names = [name for name, _ in before.named_parameters()]
    assert set(names).isdisjoint(trained(model))
    after = dict(model.named_parameters())
    for name, value in before.named_parameters():
        assert torch.equal(value, after[name])


def test_one_factor_is_drawn_by_the_width_of_its_layer_and_the_other_is_zero() -> None:
    dense = nn.Linear(400, 100)
    A, B = _factors(LoraLinear(dense, LoraSettings(rank=8)))
    assert 0.99 / 20 < A.abs().max() <= 1 / 20
    assert A.shape == (8, 400)
    assert torch.equal(B, torch.zeros(100, 8))
    A, B = _factors(LoraLinear(dense, LoraSettings(rank=8, freeze="B")))
    assert 0.99 / 10 < B.abs().max() <= 1 / 10
    assert torch.equal(A, torch.zeros(8, 400))


def _factors(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A, layer.lora_B


def test_only_what_the_settings_say_is_trained() -> None:
    linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    everywhere = [f"blocks.{i}.{name}" for i in range(2) for name in linear]
    both = [
        f"{name}.{factor}" for name in everywhere for factor in ("lora_A", "lora_B")
    ]
    assert trained(vit(rank=2)) == both
    some = trained(vit(rank=2, targets=["qkv", r".*\.0\..*fc1"], freeze="A"))
    assert some == [
        "blocks.0.attn.qkv.lora_B",
        "blocks.0.mlp.fc1.lora_B",
        "blocks.1.attn.qkv.lora_B",
    ]
    with_head = trained(vit(rank=2, train=["output"], targets=["fc1"]))
    assert with_head[-2:] == ["head.weight", "head.bias"]
    assert with_head[-3] == "blocks.1.mlp.fc1.lora_B"


def test_the_output_and_tied_layers_have_no_adapter_unless_they_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[2].weight
    adapted = with_lora(copy.deepcopy(model), LoraSettings(rank=1))
    assert trained(adapted) == ["0.lora_A", "0.lora_B"]
    named = with_lora(model, LoraSettings(rank=1, targets=("2",)))
    assert trained(named) == ["2.lora_A", "2.lora_B"]
    assert named.get_parameter("1.weight") is named.get_parameter("2.weight")


def test_a_model_that_is_one_layer_gets_an_adapter() -> None:
    model = with_lora(nn.Linear(3, 2), LoraSettings(rank=1, targets=(".*",)))
    assert trained(model) == ["lora_A", "lora_B"]
    assert scales(model) == {"": 2.0}


def test_rank_zero_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    assert with_lora(model, LoraSettings()) is model
    assert trained(model) == ["weight", "bias"]


def test_a_model_may_make_its_adapters_itself() -> None:
    class Own(nn.Module):
        def with_adapters(self, settings: LoraSettings) -> nn.Module:
            self.lora_scales = {"layer": 0.5 * settings.rank}
            return self

    model = Own()
    assert with_lora(model, LoraSettings(rank=4)) is model
    assert scales(model) == {"layer": 2.0}


# What it computes


@pytest.mark.parametrize(
    ("form", "alpha", "s"),
    [("lora", None, 2.0), ("lora", 8, 2.0), ("rslora", 8, 4.0), ("lora", 1, 0.25)],
)
def test_a_layer_adds_s_b_a_and_the_change_to_its_weight(
    form: Any, alpha: float | None, s: float
) -> None:
    draw = torch.Generator().manual_seed(1)
    layer = nn.Linear(5, 3).double()
    adapted = LoraLinear(layer, LoraSettings(rank=4, alpha=alpha, form=form))
    for rank in (4, 1, 6):  # s does not follow the factors that are given
        A, B, C, x = (
            torch.randn(shape, generator=draw, dtype=torch.float64)
            for shape in ((rank, 5), (3, rank), (3, 5), (2, 7, 5))
        )
        given = {"lora_A": A, "lora_B": B, "lora_change": C}
        expected = x @ (layer.weight + C + s * B @ A).T + layer.bias
        assert torch.allclose(functional_call(adapted, given, (x,)), expected)


def test_dora_scales_the_rows_of_the_whole_weight() -> None:
    draw = torch.Generator().manual_seed(1)
    layer = nn.Linear(5, 3).double()
    adapted = LoraLinear(layer, LoraSettings(rank=2, form="dora"))
    given = {"lora_A": (2, 5), "lora_B": (3, 2), "lora_magnitude_vector": (3,)}
    p = {
        name: torch.rand(shape, generator=draw).double()
        for name, shape in given.items()
    }
    x = torch.rand(4, 5, generator=draw).double()
    W = layer.weight + 2 * p["lora_B"] @ p["lora_A"]
    unit = W / W.square().sum(1, keepdim=True).sqrt()
    expected = x @ (p["lora_magnitude_vector"][:, None] * unit).T + layer.bias
    assert torch.allclose(functional_call(adapted, p, (x,)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_clients_as_one_batch_have_the_gradients_of_single_ones(form: Any) -> None:
    model, x = two_layers(form=form), torch.rand(4, 5).double()
    names = set(trained(model))
    own = {n: p.detach() for n, p in model.named_parameters() if n in names}
    clients = {n: torch.rand(6, *p.shape).double() + 0.1 for n, p in own.items()}
    change = {"0.lora_change": torch.rand(3, 5).double()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(model, {**params, **change}, (x,))
        return outputs.square().sum()

    batched = vmap(grad(loss))(clients)
    for i in range(6):
        single = grad(loss)({name: value[i] for name, value in clients.items()})
        for name, value in single.items():
            assert torch.allclose(batched[name][i], value), name


def test_a_frozen_weight_in_half_precision_takes_small_changes_in_float32() -> None:
    dense = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(dense.weight)
    layer = LoraLinear(dense, LoraSettings(rank=1))
    assert layer.lora_A.dtype == layer.lora_change.dtype == torch.float32
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    # Eight additions of 2^-9, each below what bfloat16 can tell from 1 by itself.
    change = torch.full((1, 2), 8 * 2.0**-9)
    moved = functional_call(layer, {"lora_change": change}, (x,))
    assert moved.item() == pytest.approx(2 + 16 * 2**-9, abs=2**-7)
    assert moved.item() > 2
    # One of them, where the inputs let the weight's own products cancel.
    x, change = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0**-9, -(2.0**-9)]])
    moved = functional_call(layer, {"lora_change": change}, (x.bfloat16(),))
    assert moved.item() == 2**-8
    assert moved.dtype == torch.bfloat16


def test_changes_of_weights_are_in_no_state_dict() -> None:
    assert not any("change" in name for name in two_layers().state_dict())


@pytest.mark.slow  # the import of peft
@pytest.mark.parametrize("form", FORMS)
def test_layers_compute_what_those_of_peft_do(form: Any) -> None:
    peft = pytest.importorskip("peft")
    own = two_layers(form=form, alpha=6)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["0", "2"],
        use_rslora=form == "rslora",
        use_dora=form == "dora",
    )
    theirs = peft.get_peft_model(dense, config)
    draw, x = torch.Generator().manual_seed(2), torch.rand(4, 5).double()
    values = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            value = torch.rand(parameter.shape, generator=draw).double()
            parameter.data = value
            short = name.removeprefix("base_model.model.").removesuffix(".weight")
            values[short.replace(".default", "")] = value
    assert set(values) == set(trained(own))
    theirs(x).square().sum().backward()
    slopes = grad(lambda p: functional_call(own, p, (x,)).square().sum())(values)
    assert torch.allclose(functional_call(own, values, (x,)), theirs(x))
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").removesuffix(".weight")
            slope = slopes[short.replace(".default", "")]
            assert torch.allclose(slope, parameter.grad), name


# What is refused


class Reads(nn.Module):
    """An attention that uses the weight of its output layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)
        self.block = nn.TransformerEncoderLayer(4, 1, 8)
        self.last = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["fc9"], 'no linear layer is called "fc9"'),
        (["out_proj"], "NonDynamicallyQuantizableLinear reads"),
        (["linear1"], "TransformerEncoderLayer reads"),
        ([], "no linear layer but its output"),
    ],
)
def test_targets_on_which_no_adapter_would_act_are_refused(
    targets: Any, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        with_lora(Reads(), LoraSettings(rank=1, targets=targets))


def test_a_rank_that_a_layer_has_not_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with pytest.raises(SettingsError, match=r'rank = 7: the layer "0" is \[4, 6\], an'):
        with_lora(model, LoraSettings(rank=7))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with_lora(copy.deepcopy(model), LoraSettings(rank=6, targets=["0"], freeze="A"))


@pytest.mark.parametrize("setting", [{"freeze": "A"}, {"train": ["output"]}])
def test_without_adapters_nothing_is_frozen(setting: Any) -> None:
    with pytest.raises(ValidationError, match="with rank = 0 there are no adapters"):
        LoraSettings(**setting)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        LoraSettings(rank=1, targets=("(",))
    with pytest.raises(SettingsError, match='the part "fc9"'):
        vit(rank=1, train=["fc9"])
    with pytest.raises(SettingsError, match=r"lora.rank = 2.*optimum"):
        build_task(
            Experiment.parse(
                {"method": "fedavg", "task": "least-squares", "lora": {"rank": 2}}
            )
        )


def test_the_last_adapter_is_not_the_output_of_the_model() -> None:
    params = trained_params(vit(rank=1))
    for part in ("output", "input"):
        with pytest.raises(SettingsError, match=f'the part "{part}": no parameter'):
            split(params, [part])
    trained = trained_params(vit(rank=1, train=["output"]))
    assert not any("lora_" in name for name in split(trained, ["output"])[1])
