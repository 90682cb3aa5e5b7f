"""The recurrent model of LEAF's Shakespeare (Caldas et al., arXiv 1812.01097)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedcore.models.text import TextShape


class CharLstm(BaseModel):
    """An embedding, LSTM layers and an output layer over tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["char-lstm"] = "char-lstm"
    embedding: int = Field(8, ge=1, description="units of a token's vector")
    hidden: int = Field(256, ge=1, description="units of a layer")
    layers: int = Field(2, ge=1, description="recurrent layers")

    def build_text(self, shape: TextShape) -> nn.Module:
        raise NotImplementedError
