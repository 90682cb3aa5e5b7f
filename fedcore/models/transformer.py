"""A model of Hugging Face as a module of token ids, with names that are its own.

Its attention is given a mask of its own making, always one of four axes, so that no
value of a tensor decides what is computed: then it batches over clients, and records.

    next tokens    0 where a position is seen by a later one or by itself, else -1e9
    classes        an encoder: 0 where there is a token, else -1e9; a decoder: as above

Parameters are called as in the model itself, without the parts of names that wrappers
put in between: `named` has them first, under these names, and PyTorch ties those that
`inner` has to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.models.lora import LoraSettings
from fedcore.models.text import TextShape

__all__ = ["PretrainedText", "place"]

HIDDEN = -1e9  # is added to the score of what a position may not see


class PretrainedText(nn.Module):
    """Token ids [B, L] to logits [B, L, vocabulary], or [B, num_classes].

    `names` are the names of the inner model's parameters here, by those that they have
    there; one that is left out is called the same. `lora_scales` are the scales of its
    adapters by layer.
    """

    def __init__(
        self,
        inner: nn.Module,
        shape: TextShape,
        *,
        is_causal: bool,
        names: Mapping[str, str] | None = None,
        lora_scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        # The first of a tensor's names is the one that counts.
        for name, parameter in inner.named_parameters():
            place(self, (names or {}).get(name, name), parameter)
        self.inner = inner
        self.shape = shape
        self.is_causal = is_causal
        # OPT counts its positions by a mask of two axes.
        kind = getattr(getattr(inner, "config", None), "model_type", "")
        self.counts_positions = kind == "opt"
        self.lora_scales = dict(lora_scales or {})

    def forward(self, ids: Tensor) -> Tensor:
        more = {}
        if self.counts_positions:
            more["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        outputs: Any = self.inner(
            input_ids=ids,
            attention_mask=self.mask(ids),
            return_dict=True,
            **more,
        )
        logits: Tensor = outputs.logits
        return logits

    def with_adapters(self, settings: LoraSettings) -> PretrainedText:
        """The model with adapters of peft: `fedcore.models.adapters`."""
        from fedcore.models.adapters import with_peft

        return with_peft(self, settings)

    def mask(self, ids: Tensor) -> Tensor:
        """What is added to the scores of attention, [B, 1, L, L]."""
        rows, length = ids.shape
        if self.is_causal:
            hidden = torch.full((length, length), HIDDEN, device=ids.device).triu(1)
            return hidden.expand(rows, 1, length, length)
        hidden = (ids == self.shape.pad).to(torch.get_default_dtype()) * HIDDEN
        return hidden[:, None, None, :].expand(rows, 1, length, length)


class Names(nn.Module):
    """A part of a model's names; it computes nothing."""


def place(root: nn.Module, name: str, tensor: Tensor) -> nn.Module:
    """Register the tensor under a dotted name, which is made: the module that has it.

    A parameter as such, everything else as a buffer that is not saved.
    """
    path, _, last = name.rpartition(".")
    module = root
    for part in filter(None, path.split(".")):
        if part not in module._modules:
            module.add_module(part, Names())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    else:
        module.register_buffer(last, tensor, persistent=False)
    return module
