"""Adapters of peft in a model of Hugging Face, by the names that ours have.

    lora, rslora, dora     <layer>.lora_A [r, n], <layer>.lora_B [m, r]
    dora                   <layer>.lora_magnitude_vector [m] as well
    ia3                    <layer>.ia3_l [m], by which outputs are multiplied
    hra                    <layer>.hra_u [n, r], reflections of the inputs

peft's own parts of names (`base_layer`, `default`, `weight`) are left out of them. s is
a constant of a layer, and so is what `lora_change` is added to: `fedcore.models.lora`.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.errors import SettingsError
from fedcore.models.huggingface import installed
from fedcore.models.lora import LoraSettings, chosen_layers, refuse_rank, scale_of
from fedcore.models.transformer import PretrainedText, place
from fedcore.split import split

__all__ = ["with_peft"]

ADAPTER = "default"  # peft's name of the one adapter that there is
LOW_RANK = ("lora", "rslora", "dora")


def with_peft(model: PretrainedText, settings: LoraSettings) -> PretrainedText:
    """The model with peft's adapters; its own parameters are frozen.

    But those of `settings.train`. The inner model is changed in place. Draws from
    torch's generator. Raises SettingsError for targets that are no linear layers, and
    where peft refuses them.
    """
    peft = installed("peft", f'lora.rank = {settings.rank} of model.name = "hf"')
    inner, config = model.inner, getattr(model.inner, "config", None)
    targets = _targets(inner, settings)
    if settings.form in LOW_RANK:
        for target in targets:
            layer: Any = inner.get_submodule(target)
            m, n = layer.weight.shape
            if not isinstance(layer, nn.Linear):  # Conv1D has it the other way round
                m, n = n, m
            refuse_rank(settings, target, m, n)
    own: dict[str, Tensor] = dict(model.named_parameters())
    trained = split(own, settings.train)[1]
    is_trained = {id(own[name]): own[name].requires_grad for name in trained}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what it corrects by itself
            adapters = _config(peft, settings, targets)
            peft.inject_adapter_in_model(adapters, inner, ADAPTER)
    except Exception as error:  # it may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        kind = getattr(config, "model_type", type(inner).__name__)
        raise SettingsError(
            f'lora.form = "{settings.form}": peft cannot adapt {kind}: {reason}; '
            "name other layers in lora.targets, or another form"
        ) from error
    names = _names(inner)
    for name, parameter in inner.named_parameters():
        if name in names and _is_of_adapter(name, names[name]):
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(is_trained.get(id(parameter), False))
    scales: dict[str, float] = {}
    if settings.form in LOW_RANK:
        scales = dict.fromkeys(targets, scale_of(settings))
    adapted = PretrainedText(
        inner,
        model.shape,
        is_causal=model.is_causal,
        names=names,
        lora_scales=scales,
    )
    if settings.form in LOW_RANK:
        for target in targets:
            layer = inner.get_submodule(target)
            _start(layer, settings)
            if settings.form != "dora":
                _add_change(adapted, target, layer)
    return adapted


def _targets(inner: nn.Module, settings: LoraSettings) -> list[str]:
    """Names of the layers that get adapters, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    linear = []
    for name, layer in inner.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            linear.append(name)
    return chosen_layers(
        linear, settings.targets, _reader(inner), _outputs(inner, linear)
    )


def _reader(inner: nn.Module) -> Callable[[str], str | None]:
    """What else reads the weight of a layer, by the layer's name."""
    uses = Counter(id(p) for _, p in inner.named_parameters(remove_duplicate=False))

    def reader(name: str) -> str | None:
        weight = inner.get_submodule(name).weight
        return "another layer" if uses[id(weight)] > 1 else None

    return reader


def _outputs(inner: nn.Module, linear: list[str]) -> set[str]:
    """Layers that read out, by name: outside the body that all heads share."""
    body = str(getattr(inner, "base_model_prefix", ""))
    if not hasattr(inner, body):
        return set(linear[-1:])
    return {name for name in linear if not name.startswith(f"{body}.")}


def _config(peft: Any, settings: LoraSettings, targets: list[str]) -> Any:
    """peft's settings."""
    rank, form = settings.rank, settings.form
    if form in LOW_RANK:
        return peft.LoraConfig(
            r=rank,
            lora_alpha=scale_of(settings) * rank,
            lora_dropout=0.0,
            target_modules=targets,
            use_dora=form == "dora",
            bias="none",
        )
    if form == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=[])
    return peft.HRAConfig(r=rank, target_modules=targets)


def _names(inner: nn.Module) -> dict[str, str]:
    """Names of parameters without what peft puts in, by those with it."""
    names = {}
    for name, _ in inner.named_parameters():
        parts = name.split(".")
        if ADAPTER in parts:
            parts = parts[: parts.index(ADAPTER)]
        elif "base_layer" in parts:
            parts.remove("base_layer")
        names[name] = ".".join(parts)
    return names


def _is_of_adapter(name: str, stripped: str) -> bool:
    """Whether peft has made the parameter of this name."""
    return name.startswith(f"{stripped}.{ADAPTER}")


@torch.no_grad()
def _start(layer: Any, settings: LoraSettings) -> None:
    """Draw the factors as ours are, and freeze one where that is asked for."""
    A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    m, n = len(B), A.shape[1]
    if settings.freeze == "B":
        A.zero_()
        B.uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m))
    else:
        A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n))
        B.zero_()
    A.requires_grad_(settings.freeze != "A")
    B.requires_grad_(settings.freeze != "B")


class AddChange:
    """A hook of a frozen layer that adds x C' to what it gives.

    An object, so that copies of the model keep to their own buffers.
    """

    def __init__(self, holder: nn.Module) -> None:
        self.holder = holder

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        change = self.holder.lora_change
        assert isinstance(change, Tensor)
        if change.ndim == 0:
            return y
        return y + functional.linear(args[0], change.to(y.dtype))


def _add_change(model: nn.Module, name: str, layer: Any) -> None:
    """Give an adapted layer the buffer `lora_change`, [m, n] also for Conv1D."""
    like = layer.lora_A[ADAPTER].weight.new_zeros(())
    holder = place(model, f"{name}.lora_change", like)
    layer.get_base_layer().register_forward_hook(AddChange(holder))
