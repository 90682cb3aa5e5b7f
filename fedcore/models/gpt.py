"""A small GPT: learned positions, pre-norm blocks, explicit attention."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedcore.models.text import TextShape


class Gpt(BaseModel):
    """A decoder-only transformer for text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["gpt"] = "gpt"
    width: int = Field(96, ge=1, description="d, units of a token's vector")
    layers: int = Field(3, ge=1, description="blocks")
    heads: int = Field(4, ge=1, description="attention heads; they divide width")
    tied: bool = Field(
        False, description="whether the output layer's weight is the embedding's"
    )

    def build_text(self, shape: TextShape) -> nn.Module:
        raise NotImplementedError
