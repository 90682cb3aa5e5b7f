"""What the server reads of a secure sum: the message that all clients sent together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.messages.secure.ask import Ask, SecretTotal
from fedcore.messages.secure.ring import Encoded, values_of
from fedcore.messages.secure.sending import OWN, Noising, cap_of, rule_of
from fedcore.messages.vectors import layout, with_leaves
from fedcore.types import Tree

__all__ = ["Counts", "Recovered", "recovered"]


class Counts(NamedTuple):
    """The clients' own words, summed."""

    weight: int  # their examples, capped, or how many they are
    clipped: int  # entries that were cut off at the reach of the ring
    clients: int
    capped: int  # clients with more examples than count
    with_examples: int

    @classmethod
    def of(cls, total: Encoded) -> Counts:
        """The counts of a sum."""
        return cls(*total.words[:OWN].tolist())


class Recovered(NamedTuple):
    """A sum of messages as a method takes it."""

    message: Tree  # sum_i w_i up_i, like one message
    weight: float  # what a mean divides it by
    counts: Counts
    scalars: dict[str, float]  # by name: the mean over clients with examples
    num_entries: int  # of all vectors of one message
    rounding: float  # what it adds to the norm of one w_i up_i at most


def recovered(
    ask: Ask, shape: Tree, made: SecretTotal, noising: Noising | None = None
) -> Recovered:
    """The sum that was made, of messages like `shape`.

    Clients send scalars without a weight: theirs is the sum times the mean weight.
    """
    total = made.total
    assert total is not None
    counts = Counts.of(total)
    weight = _weight(ask, counts, made.clients)
    if noising is not None:
        weight = noising.divisor
    places, leaves = layout(shape, axes=0), trees.leaves(shape)
    numbers, square = _Pieces(total.numbers), 0.0
    for name, vector in zip(places.names, places.vectors, strict=True):
        ring = ask.ring._replace(cap=cap_of(rule_of(ask.parts, name), ask.ring.cap))
        step = ring.step if noising is None else noising.step
        for place in vector:
            like = leaves[place]
            leaves[place] = (numbers.take(like).double() * step).to(like)
            square += like.numel() * step**2  # an entry is off by one step at most
    numbers.assert_empty()
    words = _Pieces(values_of(total.words[OWN:]))
    paths, logged = list(trees.flatten(shape)), dict[str, float]()
    for place in places.scalars:
        like = leaves[place]
        value = words.take(like)
        if like.numel() == 1 and counts.with_examples and noising is None:
            logged[paths[place]] = float(value) / counts.with_examples
        dtype = like.dtype if like.is_floating_point() else torch.float64
        shared = value * (weight / max(counts.clients, 1))
        leaves[place] = shared.to(like.device, dtype)
    words.assert_empty()
    message = with_leaves(shape, leaves)
    return Recovered(
        message, weight, counts, _named(logged), len(total.numbers), math.sqrt(square)
    )


def _named(values: dict[str, float]) -> dict[str, float]:
    """The scalars that a row of metrics.jsonl has, by the names that it gives them."""
    named = {}
    for path, value in values.items():
        name = path.removeprefix(f"metrics{trees.SEPARATOR}")
        if trees.SEPARATOR not in name:
            named[name] = value
    return named


def _weight(ask: Ask, counts: Counts, clients: list[int]) -> float:
    """What a mean of the whole message divides by."""
    if len(ask.parts) == 1 and ask.parts[0].field == "":
        rule = ask.parts[0].rule
        if isinstance(rule, Tensor):
            rows = torch.searchsorted(ask.clients, torch.tensor(clients))
            return float(rule[rows].double().sum())
    return float(counts.weight)


class _Pieces:
    """A vector that is taken apart from its start."""

    def __init__(self, vector: Tensor) -> None:
        self.rest = vector

    def take(self, like: Tensor) -> Tensor:
        """The next entries, in the shape of `like`."""
        count = like.numel()
        piece, self.rest = self.rest[:count], self.rest[count:]
        return piece.reshape(like.shape)

    def assert_empty(self) -> None:
        assert len(self.rest) == 0, f"{len(self.rest)} numbers more than in a message"
