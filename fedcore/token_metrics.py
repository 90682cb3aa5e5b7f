"""Losses and metrics of next tokens: means over tokens, perplexity, nats a character.

Outputs are logits [B, L, V] of the token that follows each of L tokens, targets y int64
[B, L]; a target below 0, such as -100, is none. A task that gives `size=num_targets`
has means over tokens, not over examples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import SettingsError
from fedcore.metrics import Ratio

__all__ = [
    "nats_a_character",
    "next_token_loss",
    "num_targets",
    "perplexity",
    "token_accuracy",
    "total_nll",
]


def next_token_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood in nats, of each example the mean over its targets, [B].

    0 for an example without a target. Raises SettingsError for shapes other than
    [B, L, V] and [B, L].

    >>> y = torch.tensor([[0, 1, 2], [3, -100, -100]])
    >>> next_token_loss(torch.zeros(2, 3, 4), y)
    tensor([1.3863, 1.3863])
    """
    _check_tokens("next_token_loss", outputs, y)
    return total_nll(outputs, y) / num_targets(y).clamp(min=1)


def token_accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """Share of the targets that are the likeliest token, of each example, [B].

    0 for an example without a target. Raises SettingsError for shapes other than
    [B, L, V] and [B, L].

    >>> outputs = torch.eye(3)[None]
    >>> token_accuracy(outputs, torch.tensor([[0, 2, -100]]))
    tensor([0.5000])
    """
    _check_tokens("token_accuracy", outputs, y)
    is_right = (outputs.argmax(-1) == y) & (y >= 0)
    return is_right.sum(1).to(outputs.dtype) / num_targets(y).clamp(min=1)


def num_targets(y: Tensor) -> Tensor:
    """The number of targets of each example, [B, L] to float32 [B].

    >>> num_targets(torch.tensor([[0, 1, 2], [3, -100, -100]]))
    tensor([3., 1.])
    """
    return (y >= 0).sum(1).float()


def total_nll(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood in nats, of each example the sum over its targets, [B].

    Raises SettingsError for shapes other than [B, L, V] and [B, L].
    """
    _check_tokens("total_nll", outputs, y)
    likely = outputs.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    return -torch.where(y >= 0, likely, 0.0).sum(1)


# Ratios


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _num_targets(outputs: Tensor, y: Tensor) -> Tensor:
    return num_targets(y)


perplexity = Ratio(total_nll, _num_targets, of=_exp, higher_is_better=False)
"""exp(nats a token), of all tokens together; never a mean of perplexities."""


def nats_a_character(characters: Tensor) -> Ratio:
    """Nats over characters, which compares models with other tokens.

    `characters` [V] says how many characters each token stands for. Raises
    SettingsError for a table of another kind.

    >>> measure = nats_a_character(torch.tensor([1, 2, 0]))
    >>> measure.denominators(torch.zeros(1, 3, 3), torch.tensor([[0, 1, -100]]))
    tensor([3.])
    """
    return Ratio(total_nll, _Characters(characters), higher_is_better=False)


class _Characters(nn.Module):
    """Characters of the targets of each example, [B]; pickles and moves to devices."""

    table: Tensor

    def __init__(self, characters: Any) -> None:
        super().__init__()
        table = torch.as_tensor(characters, dtype=torch.float32)
        is_table = table.ndim == 1 and len(table) > 0
        if not is_table or not bool((table.isfinite() & (table >= 0)).all()):
            raise SettingsError(
                f"characters has shape {tuple(table.shape)}: expected one number for "
                "each token of the vocabulary, of the characters it stands for"
            )
        self.register_buffer("table", table)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        # Pretrained models often have more outputs than their tokenizer has tokens.
        if outputs.shape[-1] < len(self.table):
            raise SettingsError(
                f"nats_a_character: outputs of {outputs.shape[-1]} tokens for a table "
                f"of {len(self.table)}: give the characters of each token of the "
                "vocabulary, nats_a_character(characters)"
            )
        return torch.where(y >= 0, self.table[y.clamp(min=0)], 0.0).sum(1)


def _check_tokens(name: str, outputs: Tensor, y: Tensor) -> None:
    is_whole = not y.is_floating_point() and not y.is_complex()
    if outputs.ndim == 3 and outputs.shape[:2] == y.shape and is_whole:
        return
    shape, wanted = tuple(y.shape), tuple(outputs.shape)
    advice = "give a target for each token, int64 [B, L]; -100 where there is none"
    if outputs.ndim == 3 and outputs.shape[::2] == y.shape:
        advice = "tokens of the vocabulary are axis 2, so write outputs.transpose(1, 2)"
    elif not is_whole:
        advice = f"these are {y.dtype}, so write y.long()"
    elif outputs.ndim == 2 and y.ndim == 1:
        advice = "one class an example needs cross_entropy"
    raise SettingsError(
        f"{name}: targets of shape {shape} for outputs of shape {wanted}, expected "
        f"[B, L] for [B, L, V]: {advice}"
    )
