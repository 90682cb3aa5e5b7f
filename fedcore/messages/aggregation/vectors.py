"""The parts of a message: vectors, each with a rule of its own, and scalars.

A field of a NamedTuple is a scalar where it is 0-d, as in `fedcore.messages.defence`;
every other field is one vector, whatever tensors it holds. So SCAFFOLD's change of the
model and change of its control variate are two vectors, none of which can hide behind
the scale of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore import trees
from fedcore.types import Tree

WHOLE = ""  # the name of a message that is one vector


def parts(up: Tree) -> dict[str, Tree]:
    """The fields of a message; one that is no NamedTuple is a part of its own.

    >>> parts({"w": torch.zeros(3, 2)}).keys()
    dict_keys([''])
    """
    if hasattr(up, "_asdict"):
        fields: dict[str, Tree] = up._asdict()
        return fields
    return {WHOLE: up}


def is_scalar(part: Tree) -> bool:
    """Whether a part, stacked over clients, is one number a client."""
    return isinstance(part, Tensor) and part.ndim == 1


def vectors(up: Tree) -> dict[str, list[Tensor]]:
    """The floating leaves of each vector of a stacked message, [n, ...] each.

    >>> from fedcore.types import Model
    >>> vectors(Model({"w": torch.zeros(3, 2), "steps": torch.zeros(3).long()}))
    {'params': [tensor([[0., 0.],
            [0., 0.],
            [0., 0.]])]}
    """
    found: dict[str, list[Tensor]] = {}
    for name, part in parts(up).items():
        if is_scalar(part):
            continue
        leaves = [x for x in trees.leaves(part) if x.is_floating_point()]
        if leaves:
            found[name] = leaves
    return found


def norms(up: Tree) -> Tensor:
    """The L2 norm of every client's message over all its vectors, float64 [n]."""
    squares: list[Tensor] = []
    for leaves in vectors(up).values():
        for x in leaves:
            squares.append(x.double().square().flatten(1).sum(1))
    return torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(0)
