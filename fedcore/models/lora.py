"""Adapters of low rank on frozen layers: LoRA (Hu et al., ICLR 2022).

    W0 [m, n]   weight of a linear layer, frozen     b  its bias, frozen
    A [r, n]    drawn, uniform in +-1 / sqrt n       B [m, r]  zeros at the start
    s           alpha / r; rslora: alpha / sqrt r    C [m, n]  change of W0, see below

    y = x (W0 + C)' + b + s (x A') B'
    dora        g [m], the lengths of W0's rows at the start, is trained as well:
                y = g / |W| x W' + b, W = W0 + C + s B A, with |W| the lengths of its
                rows, held constant in the gradient (Liu et al., ICML 2024, section 4.3)

Parameters are named `<layer>.lora_A` and `<layer>.lora_B`, as peft's without its
prefixes. Of what is not trained nothing travels.
Choice:  s is a constant of the layer, whatever the rank of the factors that it is given
         through `functional_call`, so that clients of several ranks use one scale.
         C is the buffer `lora_change`, for methods that move W0 on the server. A 0-d
         zero is no change; one of shape [m, n] is given through `functional_call`.
         With freeze = "B" it is B that is drawn, in +-1 / sqrt m, and A that is zero.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from fedcore.errors import SettingsError
from fedcore.split import Parts, split

__all__ = [
    "Form",
    "LoraLinear",
    "LoraSettings",
    "chosen_layers",
    "refuse_rank",
    "scale_of",
    "scales",
    "with_lora",
]

Form = Literal["lora", "rslora", "dora", "ia3", "hra"]
OWN = ("lora", "rslora", "dora")  # the others are peft's alone

# Forms of peft that do not work here, and why.
WRITES, OPAQUE = "it writes into a tensor in place", "its gradient is written by hand"
MOVES = "it changes the frozen weights by a decomposition, which machines differ in"
SHARES = "its frozen matrices belong to no layer"
REFUSED = {
    "loha": OPAQUE,
    "randlora": OPAQUE,
    "oft": WRITES,
    "fourierft": WRITES,
    "pissa": MOVES,
    "olora": MOVES,
    "vera": SHARES,
    "lokr": "it draws in every step",
    "boft": "it compiles code of its own when it is loaded",
    "adalora": "it moves ranks between layers by the steps that one machine has done",
}

SHOWN = 12  # names of layers that a message lists whole


class LoraSettings(BaseModel):
    """Which layers get adapters, and of what kind; everything else is frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(
        0, ge=0, description="r of A [r, n] and B [m, r]; 0 = no adapters"
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="the product counts alpha / rank times; default: 2 rank, so that "
        "ranks can be compared",
    )
    targets: tuple[str, ...] = Field(
        (),
        description="layers by the last part of their names, or patterns for whole "
        "names; default: every linear layer but the output",
    )
    form: Form = Field(
        "lora",
        description="lora; rslora: alpha / sqrt(rank); dora; for models of Hugging "
        "Face also ia3, which has no rank, and hra",
    )
    freeze: Literal["A", "B"] | None = Field(
        None, description="the factor that stays as it was drawn (FFA-LoRA: A)"
    )
    train: Parts = Field(
        (),
        description="parts of the model that are trained beside the adapters, by name "
        "(output, ...) or patterns of parameter names; default: nothing, and the "
        'layer of classes where text.target = "label"',
    )

    @field_validator("form", mode="before")
    @classmethod
    def _refuse_form(cls, form: Any) -> Any:
        if isinstance(form, str) and form in REFUSED:
            raise ValueError(
                f'"{form}" does not work here: {REFUSED[form]}; expected '
                f"one of {', '.join(get_args(Form))}"
            )
        return form

    @model_validator(mode="after")
    def _has_factors_to_freeze(self) -> LoraSettings:
        if self.freeze is not None and self.form not in OWN:
            raise ValueError(
                f'freeze = "{self.freeze}": the form "{self.form}" has no A and B; '
                f"leave it out, or use {', '.join(OWN)}"
            )
        return self

    @model_validator(mode="after")
    def _has_adapters(self) -> LoraSettings:
        if self.rank:
            return self
        for name in ("freeze", "train"):
            value = getattr(self, name)
            if value:
                shown = json.dumps(value)
                raise ValueError(
                    f"{name} = {shown}: with rank = 0 there are no adapters, and "
                    "everything is trained; raise rank, or leave it out"
                )
        return self

    @field_validator("targets", mode="before")
    @classmethod
    def _takes_one(cls, targets: Any) -> Any:
        return (targets,) if isinstance(targets, str) else targets

    @field_validator("targets")
    @classmethod
    def _are_patterns(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(
                    f'"{target}" is no regular expression ({error}); expected the last '
                    "part of a layer's name (qkv), or a pattern for whole names"
                ) from error
        return targets


def scale_of(settings: LoraSettings) -> float:
    """s, which the product of the factors is multiplied by.

    >>> scale_of(LoraSettings(rank=8)), scale_of(LoraSettings(rank=4, alpha=4))
    (2.0, 1.0)
    """
    alpha = 2.0 * settings.rank if settings.alpha is None else settings.alpha
    if settings.form == "rslora":
        return alpha / math.sqrt(settings.rank)
    return alpha / settings.rank


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, around the weight and bias of `dense`."""

    lora_change: Tensor
    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, dense: nn.Linear, settings: LoraSettings) -> None:
        nn.Module.__init__(self)  # without a weight of its own, which would be drawn
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias
        self.scale = scale_of(settings)
        rank, m, n = settings.rank, self.out_features, self.in_features
        # Steps would vanish in half precision.
        dtype = torch.promote_types(dense.weight.dtype, torch.float32)
        like = torch.zeros((), dtype=dtype, device=dense.weight.device)
        A, B = like.new_zeros(rank, n), like.new_zeros(m, rank)
        if settings.freeze == "B":
            B.uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m))
        else:
            A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n))
        self.lora_A = nn.Parameter(A, requires_grad=settings.freeze != "A")
        self.lora_B = nn.Parameter(B, requires_grad=settings.freeze != "B")
        self.lora_magnitude_vector = None
        if settings.form == "dora":
            lengths = dense.weight.detach().to(dtype).norm(dim=1)
            self.lora_magnitude_vector = nn.Parameter(lengths)
        self.register_buffer("lora_change", like, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., m] of x [..., n]."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        inputs = x
        if self.lora_change.ndim:
            # Not in a narrower type of the weight's, where a small change is lost.
            weight = weight + self.lora_change
            inputs = x.to(weight.dtype)
            bias = None if bias is None else bias.to(weight.dtype)
        reduced = functional.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scale
        update = functional.linear(reduced, self.lora_B)
        if self.lora_magnitude_vector is None:
            outputs = functional.linear(inputs, weight, bias)
            outputs = outputs + update.to(outputs.dtype)
        else:
            outputs = functional.linear(inputs, weight)
            ratio = self.lora_magnitude_vector / self._lengths(weight)
            outputs = ((outputs + update) * ratio).to(outputs.dtype)
            outputs = outputs if bias is None else outputs + bias
        return outputs.to(x.dtype) if self.lora_change.ndim else outputs

    def _lengths(self, weight: Tensor) -> Tensor:
        """The lengths of the rows of the whole weight, [m], without a gradient."""
        whole = weight + self.scale * (self.lora_B @ self.lora_A)
        lengths: Tensor = whole.detach().norm(dim=1)
        return lengths

    def extra_repr(self) -> str:
        rank = self.lora_A.shape[0]
        return f"{super().extra_repr()}, rank={rank}, scale={self.scale:g}"


def scales(model: nn.Module) -> dict[str, float]:
    """s of each layer with an adapter, by its name.

    A model that makes its adapters itself has them as `lora_scales`.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    >>> scales(with_lora(model, LoraSettings(rank=2, alpha=8)))
    {'0': 4.0}
    """
    own: dict[str, float] | None = getattr(model, "lora_scales", None)
    if own is not None:
        return own
    by_layer = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            by_layer[name] = layer.scale
    return by_layer


def with_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """The model with adapters, in place; its own parameters are frozen.

    But those of `settings.train`, which are trained as they are. A model with a method
    `with_adapters(settings)` makes its adapters itself. Draws from torch's generator.
    Raises SettingsError for a target that no linear layer belongs to, or whose weight
    another module reads, for the adapter would not act there.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> model = with_lora(model, LoraSettings(rank=2))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B']
    >>> model[0].lora_A.shape, model[0].lora_B.shape
    (torch.Size([2, 6]), torch.Size([4, 2]))
    """
    if settings.rank == 0:
        return model
    make = getattr(model, "with_adapters", None)
    if make is not None:
        adapted: nn.Module = make(settings)
        return adapted
    if settings.form not in OWN:
        raise SettingsError(
            f'lora.form = "{settings.form}": only models of Hugging Face have it; '
            f"expected one of {', '.join(OWN)}"
        )
    names = _targets(model, settings.targets)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        refuse_rank(settings, name, layer.out_features, layer.in_features)
    trained = split(dict(model.named_parameters()), settings.train)[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained and parameter.requires_grad)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        adapter = LoraLinear(layer, settings).train(layer.training)
        if not name:
            return adapter
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
    return model


def _targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the layers that get adapters, in the model's order."""
    linear = [n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    unmeant = set(linear[-1:])
    for name in linear:
        if uses[id(model.get_submodule(name).weight)] > 1:
            unmeant.add(name)
    return chosen_layers(linear, targets, partial(_reader, model), unmeant)


def chosen_layers(
    linear: Sequence[str],
    targets: Sequence[str],
    reader: Callable[[str], str | None],
    unmeant: Collection[str],
) -> list[str]:
    """The linear layers, by name, that `targets` mean, in the model's order.

    Without targets all but those that are `unmeant` or whose weight something else
    reads: `reader` names it. Raises SettingsError where a target means no layer, or one
    whose adapter would not act.
    """
    if not targets:
        names = []
        for name in linear:
            if name not in unmeant and reader(name) is None:
                names.append(name)
        if not names:
            raise SettingsError(
                "lora.targets = []: the model has no linear layer but its output "
                f"({_listed(list(linear))}); name the layers that get adapters"
            )
        return names
    chosen: set[str] = set()
    for target in targets:
        members = [name for name in linear if _is_meant(name, target)]
        if not members:
            raise SettingsError(
                f'lora.targets: no linear layer is called "{target}"; expected the '
                "last part of a name, or a pattern for whole names, of "
                f"{_listed(list(linear))}"
            )
        for name in members:
            what = reader(name)
            if what is not None:
                raise SettingsError(
                    f'lora.targets: "{target}" means "{name}", whose weight {what} '
                    "reads by itself, so that an adapter would not act; name others"
                )
        chosen.update(members)
    return [name for name in linear if name in chosen]


def refuse_rank(settings: LoraSettings, name: str, m: int, n: int) -> None:
    """Raise SettingsError for more rank than a layer [m, n] has inputs and outputs.

    Between the smaller and the larger of the two it is of use beside a frozen factor,
    and does no harm elsewhere: one rank serves layers of many sizes.

    >>> refuse_rank(LoraSettings(rank=6), "head", 4, 6)
    """
    if settings.rank > max(m, n):
        raise SettingsError(
            f'lora.rank = {settings.rank}: the layer "{name}" is [{m}, {n}], and can '
            f"use {max(m, n)} at most; lower it, or name other layers in lora.targets"
        )


def _is_meant(name: str, target: str) -> bool:
    """Whether `target` is the last part of the name, or a pattern for all of it."""
    is_last_part = name.rpartition(".")[2] == target
    return is_last_part or re.fullmatch(target, name) is not None


def _reader(model: nn.Module, name: str) -> str | None:
    """The module that uses the weight of this layer without calling the layer."""
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear:
        return f"its class {type(layer).__name__}"
    parent = model.get_submodule(name.rpartition(".")[0])
    # In evaluation these compute a block in one call, from the weights.
    if name and isinstance(parent, nn.TransformerEncoderLayer):
        return type(parent).__name__
    return None


def _listed(names: list[str]) -> str:
    """The names in a line; of many, the first and the last."""
    if len(names) > SHOWN:
        names = [*names[:6], "...", *names[-5:]]
    return ", ".join(name or "(the model itself)" for name in names) or "none"
