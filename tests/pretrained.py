"""Tiny transformers of Hugging Face, and tasks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import cross_entropy
from fedcore.models.huggingface import HuggingFace
from fedcore.models.text import TextShape
from fedcore.task import Task
from fedcore.token_metrics import next_token_loss, num_targets

VOCABULARY, LENGTH, CLASSES = 17, 12, 3
PAD = VOCABULARY - 1
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2}
DISTILLED = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16, "hidden_size": 16}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, **ATTENTION},
    "gpt2": GPT,
    "qwen2": {**WIDE, **ATTENTION},
    "qwen3": {**WIDE, **ATTENTION, "head_dim": 8},
    "gemma2": {**WIDE, **ATTENTION, "head_dim": 8},
    "mistral": {**WIDE, **ATTENTION},
    "phi3": {**WIDE, **ATTENTION},
    "gpt_neox": {**WIDE, "num_attention_heads": 2},
    "opt": {**OPT, "num_hidden_layers": 2, "num_attention_heads": 2},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**WIDE, "num_attention_heads": 2},
    "roberta": {**WIDE, "num_attention_heads": 2},
    "distilbert": DISTILLED,
    "modernbert": {**WIDE, "num_attention_heads": 2},
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value"]}


def configuration(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **{**DECODERS, **ENCODERS}[kind]}


def built(kind: str, num_classes: int | None = None, **settings: Any) -> nn.Module:
    """A tiny model of that kind; `settings` are of its configuration.

    Its weights are drawn wide, so that what it gives depends on all of them.
    """
    if kind in ENCODERS:
        num_classes = num_classes or CLASSES
    shape = TextShape(VOCABULARY, LENGTH, PAD, num_classes)
    model = HuggingFace(config={**configuration(kind), **settings}).build_text(shape)
    return widened(model)


@torch.no_grad()
def widened(model: nn.Module) -> nn.Module:
    """The model with larger weights."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(8 if "embed" in name else 4)
    return model


def rows(num_classes: int | None, examples: int = 24) -> Examples:
    """Random ids, a third of them padded from position 7 on, and targets."""
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.integers(0, PAD, (examples, LENGTH + 1)))
    x, y = ids[:, :-1].clone(), ids[:, 1:].clone()
    x[::3, 7:] = PAD
    y[::3, 7:] = -100
    if num_classes is None:
        return Examples(x, y)
    return Examples(x, x[:, 0] % num_classes)


def task(model: nn.Module, num_classes: int | None) -> Task:
    """Six clients of four rows each."""
    examples = rows(num_classes)
    data = FederatedData(examples, examples, np.arange(24), np.arange(0, 25, 4))
    if num_classes is None:
        return Task(model, data, loss=next_token_loss, size=num_targets)
    return Task(model, data, loss=cross_entropy)


def llama(e: Experiment) -> Task:
    """Next tokens."""
    return task(built("llama"), None)


def bert(e: Experiment) -> Task:
    """Classes."""
    return task(built("bert"), CLASSES)


def saved(kind: str, folder: Path, num_classes: int | None = None) -> Path:
    """The folder of a model as transformers saves it."""
    model: Any = built(kind, num_classes)
    model.inner.save_pretrained(folder)
    return folder


class Peeking(nn.Module):
    """A model that looks at a value to decide what it computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids)
        return logits if bool((ids != PAD).all()) else logits * 1.0
