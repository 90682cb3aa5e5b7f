"""The shape of a text model's inputs and outputs, and what its parts share."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["TextModel", "TextShape", "mean_of_tokens"]


class TextShape(NamedTuple):
    """A text model maps token ids, int64 [B, L], to logits.

    [B, L, vocabulary] for next tokens, [B, num_classes] for classes of whole texts.
    """

    vocabulary: int  # ids are in 0 .. vocabulary - 1, `pad` among them
    length: int  # L, tokens at most
    pad: int  # the id that fills up a row at its end, and stands for no token
    num_classes: int | None = None  # None: next tokens


@runtime_checkable
class TextModel(Protocol):
    """Settings that a text model is built from."""

    name: str

    def build_text(self, shape: TextShape) -> nn.Module:
        """The model, with weights drawn from PyTorch's generator."""
        ...


def mean_of_tokens(states: Tensor, ids: Tensor, pad: int) -> Tensor:
    """The mean of states [B, L, d] over the tokens that are not padding, [B, d].

    Zero for a text without a token.
    """
    is_real = (ids != pad).to(states.dtype)[..., None]
    total = (states * is_real).sum(1)
    return total / is_real.sum(1).clamp(min=1)
