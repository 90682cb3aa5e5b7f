"""Adapters of low rank on frozen layers: LoRA (Hu et al., ICLR 2022)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedcore.split import Parts

Form = Literal["lora", "rslora", "dora"]


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
    form: Form = Field("lora", description="lora; rslora: alpha / sqrt(rank); dora")
    freeze: Literal["A", "B"] | None = Field(
        None, description="the factor that stays as it was drawn (FFA-LoRA: A)"
    )
    train: Parts = Field(
        (),
        description="parts of the model that are trained beside the adapters, by name "
        "(output, ...) or patterns of parameter names",
    )


def with_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """The model with adapters, its own parameters frozen."""
    raise NotImplementedError
