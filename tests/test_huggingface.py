"""Models of Hugging Face: by their own names, batched over clients, recorded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap

from fedcore.checks.trials import drawing
from fedcore.errors import SettingsError
from fedcore.frozen import frozen_sha256
from fedcore.local import local_sgd, steps_run_by
from fedcore.models.base import load_base, save_base
from fedcore.models.huggingface import HuggingFace
from fedcore.models.lora import LoraSettings, scales, with_lora
from fedcore.models.text import TextShape
from fedcore.speed import recording
from fedcore.speed.recording import Recorder
from fedcore.speed.rewriting import rewrite
from fedcore.task import Task
from fedcore.types import Batches, Params
from tests.helpers import assert_close
from tests.pretrained import (
    CLASSES,
    DECODERS,
    ENCODERS,
    LENGTH,
    PAD,
    TARGETS,
    VOCABULARY,
    Peeking,
    built,
    configuration,
    rows,
    saved,
    task,
)

SHAPE = TextShape(VOCABULARY, LENGTH, PAD)
FAST = ("llama", "gpt2", "bert")
KINDS = [
    kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow)
    for kind in (*DECODERS, *ENCODERS)
]
ADAPTED = LoraSettings(rank=2, alpha=3)


def classes_of(kind: str) -> int | None:
    return CLASSES if kind in ENCODERS else None


def trained(model: nn.Module) -> Params:
    """Its trainable parameters, moved at random, so that no factor is zero."""
    draw, params = torch.Generator().manual_seed(1), {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            noise = torch.randn(value.shape, generator=draw)
            params[name] = value.detach() + 0.3 * noise
    return params


def step_of(whole: Task) -> tuple[Params, Recorder, Params]:
    """(a local step of all clients in one batch, its recorder, one by one)."""
    params = trained(whole.model)
    x, y = whole.data.x.unflatten(0, (6, 1, 4)), whole.data.y.unflatten(0, (6, 1, 4))
    batches = Batches(x, y, torch.ones(6, 1, 4))

    def step(batches: Batches) -> Params:
        return local_sgd(whole.loss, params, batches, 0.1).params

    recorder = Recorder("the loss")
    with steps_run_by(recorder):
        together = vmap(step)(batches)
    alone = [step(Batches(x[i], y[i], torch.ones(1, 4))) for i in range(6)]
    stacked = {}
    for name in params:
        stacked[name] = torch.stack([one[name] for one in alone])
    return together, recorder, stacked


# Batched over clients, and recorded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [LoraSettings(), ADAPTED], ids=["whole", "lora"])
def test_clients_in_one_batch_are_recorded_and_step_as_one_by_one(
    kind: str, settings: LoraSettings
) -> None:
    model = with_lora(built(kind), settings)
    together, recorder, alone = step_of(task(model, classes_of(kind)))
    assert_close(together, alone, 2e-5, kind)
    moved = [(together[n] - v).abs().max() for n, v in trained(model).items()]
    assert max(moved) > 1e-3
    (kept,) = recorder._recordings.values()
    assert kept.code is not None, f"{kind} reads values"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_frozen_layers_see_one_large_product(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward: the rows of all clients times a weight of the base."""
    products: list[tuple[str, list[torch.Size]]] = []

    def noted(graph: fx.Graph, *more: Any) -> None:
        for node in graph.nodes:
            if "mm." in str(node.target):
                shapes = [a.meta["val"].shape for a in node.all_input_nodes]
                products.append((str(node.target), shapes))
        rewrite(graph, *more)

    monkeypatch.setattr(recording, "rewrite", noted)
    model = with_lora(built(kind), ADAPTED)
    whole, params = task(model, classes_of(kind)), trained(model)
    clients = {name: torch.stack([value] * 6) for name, value in params.items()}
    x, y = whole.data.x.unflatten(0, (6, 1, 4)), whole.data.y.unflatten(0, (6, 1, 4))

    def step(params: Params, batches: Batches) -> Params:
        return local_sgd(whole.loss, params, batches, 0.1).params

    with steps_run_by(Recorder("the loss")):
        vmap(step)(clients, Batches(x, y, torch.ones(6, 1, 4)))
    weights, layers = set(), list(scales(model))
    for layer in layers:
        weights.add(tuple(sorted(model.get_parameter(f"{layer}.weight").shape)))
    large = 0
    for target, shapes in products:
        *_, left, right = shapes
        if left[0] == 6 * 4 * LENGTH and tuple(sorted(right)) in weights:
            large += 1
            assert "bmm" not in target
    # Forward and backward; but nothing goes back to the layers that see the input, at
    # most three, and BERT's pooler sees the first token alone.
    assert large >= 2 * len(layers) - (5 if kind == "bert" else 3)


def test_a_model_that_reads_values_is_not_recorded() -> None:
    """So that the assertion above says something."""
    whole = task(Peeking(built("llama")), None)
    params = trained(whole.model)
    recorder, x, y = Recorder("the loss"), whole.data.x[None], whole.data.y[None]
    with steps_run_by(recorder):
        local_sgd(whole.loss, params, Batches(x, y, torch.ones(1, 24)), 0.1)
    (kept,) = recorder._recordings.values()
    assert kept.code is None


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_loss_nor_gradients(kind: str) -> None:
    """Whatever stands where there is no token."""
    whole = task(built(kind), classes_of(kind))
    x, y = whole.data.x[:6], whole.data.y[:6]
    model: Any = whole.model
    params, ones = trained(model), torch.ones(6)
    if model.is_causal:
        other = torch.where(x == PAD, 3, x)
        before = grad(whole.loss)(params, x, y, ones)
        # Only the last entries of rows are padded: 7 and later.
        assert_close(grad(whole.loss)(params, other, y, ones), before, 0.0, kind)
        return
    short = x[::3, :7]
    outputs, shorter = whole.predict(params, x[::3]), whole.predict(params, short)
    assert_close(outputs, shorter, 1e-4, kind)


# Names


@pytest.mark.parametrize("kind", FAST)
def test_parameters_have_the_names_of_the_model_itself(kind: str) -> None:
    model: Any = built(kind)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in model.inner.named_parameters()]
    adapted = with_lora(model, LoraSettings(rank=2))
    frozen = [n for n, p in adapted.named_parameters() if not p.requires_grad]
    assert frozen == names
    factors = [n for n, p in adapted.named_parameters() if p.requires_grad]
    layers = [name.removesuffix(".lora_A") for name in factors[::2]]
    assert factors[1::2] == [f"{layer}.lora_B" for layer in layers]
    assert list(scales(adapted)) == layers
    assert {f"{layer}.weight" for layer in layers} <= set(names)


def test_tied_weights_are_one_parameter() -> None:
    model: Any = built("gpt2")
    params = trained(model)
    assert "lm_head.weight" not in params
    ids = rows(None).x[:2]
    params["transformer.wte.weight"] = torch.zeros(VOCABULARY, 16)
    assert functional_call(model, params, (ids,)).abs().max() == 0


def test_copies_have_their_own_change(same_models: None) -> None:
    model = with_lora(built("llama"), LoraSettings(rank=2, targets=("q_proj",)))
    ids, name = rows(None).x[:2], "model.layers.0.self_attn.q_proj.lora_change"
    before = model(ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.get_buffer(name)
        parent = copied.get_submodule(name.rpartition(".")[0])
        parent.lora_change = torch.ones(16, 16)
        assert (copied(ids) - before).abs().max() > 0.01
        assert torch.equal(model(ids), before)


# Adapters


def product(model: nn.Module, ids: Tensor, params: Params) -> Tensor:
    outputs: Tensor = functional_call(model, params, (ids,))
    return outputs


@pytest.mark.parametrize("kind", FAST)
def test_adapters_add_s_b_a_and_the_change_to_the_weight(kind: str) -> None:
    """Also where a layer has its weight transposed (GPT-2), and is not square."""
    model: Any = built(kind)
    ids = rows(None).x[:3]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    whole, own_names = copy.deepcopy(model), set(weights)
    adapted = with_lora(model, ADAPTED)
    assert torch.equal(adapted(ids), whole(ids))  # B = 0
    params = trained(adapted)
    draw, change = torch.Generator().manual_seed(2), {}
    shapes = set()
    for layer, scale in scales(adapted).items():
        assert scale == 1.5
        B, A = params[f"{layer}.lora_B"], params[f"{layer}.lora_A"]
        C = torch.randn(len(B), A.shape[1], generator=draw) * 0.1
        change[f"{layer}.lora_change"] = C
        total = scale * B @ A + C
        shapes.add(total.shape)
        name = f"{layer}.weight"
        assert name in own_names
        is_transposed = kind == "gpt2"
        weights[name] = weights[name] + (total.T if is_transposed else total)
    assert any(m != n for m, n in shapes)
    expected = product(whole, ids, weights)
    assert_close(product(adapted, ids, {**params, **change}), expected, 1e-4, kind)
    # Factors of another rank, and the same scale.
    for name in params:
        params[name] = params[name][:1] if "lora_A" in name else params[name][:, :1]
    assert product(adapted, ids, params).shape == expected.shape


@pytest.mark.parametrize("form", ["rslora", "dora", "ia3", "hra"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_other_forms_batch_over_clients(form: Any, kind: str) -> None:
    settings = LoraSettings(rank=2, form=form, targets=tuple(TARGETS[kind]))
    model = built(kind)
    ids = rows(None).x[:3]
    before = model(ids)
    adapted = with_lora(model, settings)
    assert_close(adapted(ids), before, 1e-4, form)
    together, recorder, alone = step_of(task(adapted, classes_of(kind)))
    assert_close(together, alone, 1e-4, form)
    assert not any("default" in name for name in together)
    (kept,) = recorder._recordings.values()
    assert kept.code is not None


@pytest.mark.parametrize("freeze", ["A", "B"])
def test_the_frozen_factor_is_drawn_and_the_other_starts_at_zero(freeze: Any) -> None:
    model = with_lora(built("llama"), LoraSettings(rank=2, freeze=freeze))
    for name, value in model.named_parameters():
        if ".lora_" in name:
            is_frozen = name.endswith(f"lora_{freeze}")
            assert value.requires_grad != is_frozen
            assert bool(value.any()) == is_frozen


def test_the_head_trains_where_it_is_asked_for() -> None:
    model = with_lora(built("bert"), LoraSettings(rank=2, train=("output",)))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trainable
    assert len(trainable) == 2 + 2 * len(scales(model))


# What is refused


@pytest.mark.parametrize(
    "form", ["loha", "randlora", "oft", "fourierft", "pissa", "vera", "lokr", "boft"]
)
def test_forms_that_cannot_be_batched_are_refused_by_name(form: Any) -> None:
    with pytest.raises(ValueError, match=f'"{form}" does not work here'):
        LoraSettings(rank=2, form=form)


def test_forms_of_peft_alone_are_refused_for_other_models() -> None:
    with pytest.raises(SettingsError, match="only models of Hugging Face have it"):
        with_lora(
            nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
            LoraSettings(rank=2, form="ia3"),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 5}, "it has 5 tokens and the text has ids up to 16"),
        ({"max_position_embeddings": 7}, "reads 7 tokens at most"),
        ({"sliding_window": 4}, "looks back 4 tokens"),
        ({"hidden_sizes": 3}, 'it has no setting "hidden_sizes"'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        built("mistral", **settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "an encoder with a decoder"),
        ({"model_type": "lama"}, "transformers cannot make it"),
        ({"model_type": "distilbert"}, "transformers cannot make it"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        HuggingFace(config=config).build_text(SHAPE)


def test_a_target_that_is_no_layer_is_refused() -> None:
    with pytest.raises(SettingsError, match='no linear layer is called "qkv"'):
        with_lora(built("llama"), LoraSettings(rank=2, targets=("qkv",)))
    with pytest.raises(SettingsError, match="whose weight another layer reads"):
        with_lora(built("gpt2"), LoraSettings(rank=2, targets=("lm_head",)))


def test_dropout_is_off_in_configuration_and_layers() -> None:
    for kind, settings in {
        "llama": {"attention_dropout": 0.5},
        "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "bert": {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5},
    }.items():
        model: Any = built(kind, **settings)
        assert {getattr(model.inner.config, key) for key in settings} == {0.0}
        assert drawing(task(model, classes_of(kind))) is None
        ids = rows(None).x[:2]
        assert torch.equal(model.train()(ids), model(ids))


# From a folder


def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "llama")
    settings = HuggingFace(path=folder)
    one, other = settings.build_text(SHAPE), settings.build_text(SHAPE)
    for name, value in one.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name
    with pytest.raises(SettingsError, match="it has 17 tokens and the text has ids"):
        settings.build_text(TextShape(30, LENGTH, 29))
    padded = settings.build_text(TextShape(VOCABULARY + 1, LENGTH, VOCABULARY))
    ids = torch.full((1, LENGTH), VOCABULARY)
    ids[0, :3] = 1
    assert padded(ids).shape == (1, LENGTH, VOCABULARY + 1)
    with pytest.raises(SettingsError, match=r"there is no config\.json"):
        HuggingFace(path=tmp_path).build_text(SHAPE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_is_kept_and_found_again(kind: str, tmp_path: Path) -> None:
    """Under the names of the model, tied weights once; one byte changed is another."""
    one, other = built(kind), built(kind)
    save_base(tmp_path / "base", one, "{}", {})
    load_base(other, tmp_path / "base")
    for name, value in one.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name
    first, second = with_lora(one, ADAPTED), with_lora(other, ADAPTED)
    assert frozen_sha256(first) == frozen_sha256(second) != ""
    frozen = next(p for p in second.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.view(-1).view(torch.uint8)[0] ^= 1
    assert frozen_sha256(first) != frozen_sha256(second)


def test_a_classifier_of_a_folder_has_a_new_head(tmp_path: Path) -> None:
    folder = saved("bert", tmp_path / "bert", num_classes=2)
    shape = TextShape(VOCABULARY, LENGTH, PAD, 2)
    model = HuggingFace(path=folder).build_text(shape)
    assert model(rows(None).x[:4]).shape == (4, 2)


def test_a_configuration_needs_a_kind() -> None:
    with pytest.raises(ValueError, match="config has no model_type"):
        HuggingFace(config={"hidden_size": 4})
    assert configuration("llama")["model_type"] == "llama"
