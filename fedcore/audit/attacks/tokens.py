"""Tokens of a client's text: which of the vocabulary occur in it at all.

W_i  a token's row of the embedding   U_i, b_i  its row and bias of the output layer
h    mean input of the output layer on public text   p, e_y  output and target
Embedding (default):  a step moves W_i only where token i is among its inputs, so rows
that did not move are of tokens that do not occur. Exact without noise (Melis et al.,
IEEE S&P 2019, section 4.1).
Output layer (where that is not sent, or tied):  the gradient of b is mean(p - e_y),
that of U_i weighs it by what comes in: a token is there where b, or U_i along h, grew.
After the signs of iDLG (Zhao et al. 2020).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fedcore.audit.observe import Observation

__all__ = ["Tokens", "present"]


class Tokens(NamedTuple):
    """The tokens that occur, as far as an update tells."""

    found: Tensor  # bool [V]
    are_inputs: bool  # else they are targets
    source: str  # the parameter that tells it


def present(seen: Observation) -> Tokens:
    """The tokens that occur in the text of the client, or of the M clients together.

    Raises ValueError, with the reason, where the observation does not allow it.
    """
    vocabulary = seen.public.vocabulary
    if vocabulary is None:
        raise ValueError("the targets are no next tokens")
    if vocabulary.table in seen.delta:
        has_moved = (seen.delta[vocabulary.table] != 0).any(1)
        if not has_moved.all():
            return Tokens(has_moved, True, vocabulary.table)
    if vocabulary.bias in seen.delta:
        return Tokens(seen.delta[vocabulary.bias] > 0, False, vocabulary.bias)
    if vocabulary.weight in seen.delta and vocabulary.feature is not None:
        along = seen.delta[vocabulary.weight] @ vocabulary.feature.to(seen.device)
        return Tokens(along > 0, False, vocabulary.weight)
    raise ValueError(
        "neither the embedding nor the output layer left the client, and what the "
        "factors of other layers give away is not attacked"
    )
