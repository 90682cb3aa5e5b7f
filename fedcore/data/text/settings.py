"""Settings of text: how it is cut into tokens, windows and clients."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
        description="characters, bytes, bpe (trained on the base text), or the folder "
        "of a tokenizer of Hugging Face",
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
        description="share of the characters, by clients in order of appearance, that "
        "the base model is pretrained on; those clients take no part",
    )
    least: int = Field(
        0,
        ge=0,
        description="characters that a client has at least; smaller ones take no "
        "part, and are tested on as unseen clients",
    )
    classes: int = Field(
        10,
        ge=2,
        description='shakespeare with target = "label": largest roles that are told '
        "apart",
    )
