"""Layers of factors, as the tests of FedPara build them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedcore.models import LowRank
from fedcore.models.lowrank import (
    FactoredConv2d,
    FactoredLinear,
    Form,
)
from fedcore.types import Params

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
