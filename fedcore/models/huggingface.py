"""Models of Hugging Face's transformers, where the extra `hf` is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from fedcore.models.text import TextShape


class HuggingFace(BaseModel):
    """A transformer from a local folder, or made from a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["hf"] = "hf"
    path: Path | None = Field(
        None, description="folder of a pretrained model: config.json, model.safetensors"
    )
    config: dict[str, Any] = Field(
        {},
        description='or a configuration to make one from: {model_type = "llama", ...}',
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> HuggingFace:
        if (self.path is None) == (not self.config):
            raise ValueError(
                "give path (a folder) or config (such as "
                '{model_type = "llama", hidden_size = 64}), and not both'
            )
        return self

    def build_text(self, shape: TextShape) -> nn.Module:
        raise NotImplementedError
