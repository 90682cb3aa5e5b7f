"""Settings of text: how it is cut into tokens, windows and clients."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["TextSettings"]


class TextSettings(BaseModel):
    """How a text task makes examples of text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Literal["next", "label"] = Field(
        "next",
        description="next: every token is predicted from those before it; label: one "
        "class a text",
    )
    tokens: str = Field(
        "characters",
        min_length=1,
        description="characters or bpe (of the base text), bytes, or the folder of a "
        "tokenizer of Hugging Face; with a base, the one that it has",
    )
    vocabulary: int = Field(
        512, ge=257, le=2**20, description="bpe: entries of the vocabulary"
    )
    length: int = Field(
        64, ge=1, le=2**17, description="L, tokens of an example; longer text is cut"
    )
    base: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of all characters, by clients in order of appearance, that "
        "a base model is pretrained on; these clients take no part",
    )
    least: int = Field(
        0,
        ge=0,
        description="next: characters that a client has at least; smaller ones take "
        "no part, and are tested on as unseen clients",
    )
    classes: int | None = Field(
        None,
        ge=2,
        description='target = "label": classes; shakespeare: the largest roles, '
        "default 10; texts: default those of the data, needed on a device",
    )

    @model_validator(mode="after")
    def _has_classes(self) -> TextSettings:
        if self.classes is not None and self.target != "label":
            raise ValueError(
                f'classes = {self.classes}: target = "{self.target}" has none; set '
                'target = "label", or leave classes out'
            )
        return self
