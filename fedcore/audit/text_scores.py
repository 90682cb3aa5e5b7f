"""Scores of text: the tokens that were found, and whose windows were no members.

A part of the comparison of findings with the truth.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks.tokens import Tokens
from fedcore.audit.observe import Truth
from fedcore.audit.results import LabelResult

__all__ = ["non_members", "token_result"]


def token_result(tokens: Tokens, truth: Truth | None, public: Truth) -> LabelResult:
    """The tokens found, as the part of audit.json about labels has it.

    Where there is a truth its `accuracy` is F1 = 2 PR / (P + R) of the set of tokens,
    and `chance` that of the tokens that public text lets one expect in as much text.
    """
    result: LabelResult = {
        "ok": True,
        "kind": "tokens",
        "mode": "recovered",
        "source": tokens.source,
        "found": int(tokens.found.sum()),
    }
    if truth is None:
        return result
    size = len(tokens.found)
    real = _counts(truth, tokens.are_inputs, size)
    usual = _counts(public, tokens.are_inputs, size)
    share = usual / usual.sum().clamp(min=1)
    expected = (share * real.sum()).round() > 0
    scores, guess = _scores(tokens.found, real > 0), _scores(expected, real > 0)
    result["accuracy"], result["chance"] = scores["f1"], guess["f1"]
    result["precision"], result["recall"] = scores["precision"], scores["recall"]
    above = (scores["f1"] - guess["f1"]) / max(1 - guess["f1"], 1e-9)
    result["grade"] = metrics.letter(max(0.0, above))
    return result


def _counts(text: Truth, are_inputs: bool, size: int) -> Tensor:
    """How often each token occurs as an input, or as a target; float64 [V].

    What has no target is padding, and no input.
    """
    is_real = text.y >= 0
    ids = text.x[is_real] if are_inputs else text.y[is_real]
    return torch.bincount(ids, minlength=size).double()


def _scores(found: Tensor, real: Tensor) -> dict[str, float]:
    """Precision, recall and their harmonic mean of sets, bool [V] each."""
    both = float((found & real).sum())
    precision = both / max(float(found.sum()), 1.0)
    recall = both / max(float(real.sum()), 1.0)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"precision": precision, "recall": recall, "f1": f1}


def non_members(
    truth: Truth, pool: Truth, most: int, draw: np.random.Generator
) -> Truth | str:
    """Windows that were not trained on, `most` at most; or why there are none.

    `pool` are the client's own windows, where it has any that it did not train on:
    those of others would be told apart by who wrote them. Windows that are among the
    trained ones as well are no candidates.
    """
    members = {row.numpy().tobytes() for row in truth.x}
    rows = []
    for number in draw.permutation(len(pool.y)).tolist():
        if pool.x[number].numpy().tobytes() not in members:
            rows.append(number)
    if not rows:
        return "neither the client nor the test set has text that it did not train on"
    chosen = torch.tensor(sorted(rows[:most]))
    return Truth(*trees.at((pool.x, pool.y), chosen))
