"""The vectors that a message is made of, as attacks, bounds and rules see it.

Each field that is a dict of floating-point tensors is one vector a client. A 0-d field
(a loss, a counter), and a dict of metrics, are scalars.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.types import Tree


class Layout(NamedTuple):
    """Places in `trees.leaves(message)`."""

    vectors: list[list[int]]
    scalars: list[int]
    names: list[str]  # of the vectors: their fields

    def others(self, count: int) -> list[int]:
        """The places of `count` leaves that are in no vector."""
        inside = set(itertools.chain.from_iterable(self.vectors))
        return [place for place in range(count) if place not in inside]


def layout(message: Tree, axes: int = 1) -> Layout:
    """The vectors and scalars of a message whose tensors have `axes` client axes.

    >>> layout({"w": torch.zeros(3, 2), "b": torch.zeros(3)})
    Layout(vectors=[[0, 1]], scalars=[], names=[''])
    >>> layout(({"w": torch.zeros(3, 2)}, torch.zeros(3)))
    Layout(vectors=[[0]], scalars=[1], names=['0'])
    """
    found = Layout([], [], [])
    _collect(message, "", axes, itertools.count(), found)
    return found


def _collect(
    tree: Tree, name: str, axes: int, places: Iterator[int], found: Layout
) -> None:
    if isinstance(tree, dict):
        floating = []
        for leaf in trees.leaves(tree):
            place = next(places)
            if leaf.is_floating_point():
                floating.append(place)
        if name == "metrics":
            found.scalars.extend(floating)
        elif floating:
            found.vectors.append(floating)
            found.names.append(name)
    elif isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", map(str, range(len(tree))))
        for field, branch in zip(names, tree, strict=True):
            inner = f"{name}{trees.SEPARATOR}{field}" if name else field
            _collect(branch, inner, axes, places, found)
    else:
        place = next(places)
        if tree.ndim == axes:
            found.scalars.append(place)
        elif tree.is_floating_point():
            found.vectors.append([place])
            found.names.append(name)


def matrix(leaves: list[Tensor]) -> Tensor:
    """The rows of one vector, [n, d], from its leaves [n, ...]."""
    n = len(leaves[0])
    return torch.cat([x.reshape(n, -1) for x in leaves], dim=1)


def with_rows(leaves: list[Tensor], rows: Tensor, values: Tensor) -> list[Tensor]:
    """The leaves [n, ...] with these rows replaced by `values`, [d] or [m, d]."""
    sizes = [x[0].numel() for x in leaves]
    replaced = []
    for x, piece in zip(leaves, torch.split(values, sizes, dim=-1), strict=True):
        x = x.contiguous().clone()  # rows may be one row in memory
        places = rows.to(x.device)
        x[places] = piece.to(x).reshape(*piece.shape[:-1], *x.shape[1:])
        replaced.append(x)
    return replaced


def with_leaves(message: Tree, leaves: list[Tensor]) -> Tree:
    """A tree like `message` that has these leaves."""
    pieces = iter(leaves)
    return trees.map(lambda _: next(pieces), message)
