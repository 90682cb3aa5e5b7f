"""Questions that every rule asks about the nodes of a graph."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from fedcore.speed import functorch as ops

VIEWS = frozenset({ops.VIEW, ops.UNSAFE_VIEW})


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of the tensor that a node stands for; (-1,) where it is none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else (-1,)


def size_of(node: Any) -> int:
    """The number of elements."""
    return math.prod(shape_of(node))
