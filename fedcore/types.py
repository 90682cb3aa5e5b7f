"""The vocabulary: trees of tensors, what a client reads and keeps, client functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = [
    "Batches",
    "ClientFunction",
    "Memory",
    "Metrics",
    "Model",
    "News",
    "Params",
    "Stateless",
    "Tree",
    "Tuning",
]

Tree = Any
"""A tensor, or a nested NamedTuple or dict of tensors, as pytree flattens them."""

Params = dict[str, Tensor]
"""Parameters by name, as `nn.Module.named_parameters` gives them."""


class Batches(NamedTuple):
    """The examples of one client's work in one round, in the order of their use.

    Padding repeats an example of the same client; zeros where it has none. K is 0 for a
    client without examples that works alone.
    """

    x: Tree  # each tensor [K, B, ...]
    y: Tensor  # [K, B, ...]
    mask: Tensor  # [K, B]  1.0 = a real example, 0.0 = padding


class Tuning(NamedTuple):
    """The examples of one client's fine-tuning: batches to train on, held-out ones."""

    train: Batches
    test: Batches


class Stateless(NamedTuple):
    """The state of a client that keeps nothing between rounds."""


class Model(NamedTuple):
    """The server's parameters: all that a client needs to evaluate."""

    params: Params


class Metrics(NamedTuple):
    """A client's answer to an evaluation: means over its examples, by name."""

    metrics: dict[str, Tensor]  # each 0-d


News = Callable[[Tree, Tree, Tensor], tuple[Tree, Tree]]
"""(up, remembered, num_examples) -> (what is summed, what is remembered then).

Of n clients, every tensor [n, ...]: what an update changes in a sum over all clients,
each of whom is remembered by its last. It runs where the memory is: on the server, or
on each client (n = 1) where the server sees sums alone.
"""

ClientFunction = Callable[..., tuple[Tree, Tree]]
"""(task, t, down, state, batches) -> (up, new state)."""


class Memory(Protocol):
    """Rows that the server keeps of single clients between rounds.

    Before its first write a client's row is `Method.init_memory`. A round that fails or
    is skipped leaves no trace.
    """

    def gather(self, clients: Tensor) -> Tree:
        """Rows stacked, [n, ...], on the task's device."""
        ...

    def put(self, clients: Tensor, rows: Tree) -> None:
        """New rows, stacked [n, ...]; `gather` sees them at once."""
        ...
