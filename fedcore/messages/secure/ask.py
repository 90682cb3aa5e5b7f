"""A secure sum as it is asked for, and what becomes of it: one form for all engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from fedcore.messages.secure.ring import Encoded, Ring
from fedcore.reports import Reports
from fedcore.types import ClientFunction, Tree

__all__ = ["Ask", "MaskingEngine", "Part", "SecretTotal"]

Rule = Literal["examples", "equally"] | Tensor
"""Weights by the client's own number of examples, all the same, or by the server.

A tensor [n] float64 has one weight for each of the clients that are asked.
"""


class Part(NamedTuple):
    """One field of a message, with the rule of its weights."""

    field: str  # "" for the whole message
    rule: Rule


class Ask(NamedTuple):
    """What clients are asked to add up."""

    fn: ClientFunction
    clients: Tensor  # [n] int64, ascending: those that hear of it
    down: Tree
    t: int
    parts: tuple[Part, ...]
    ring: Ring
    news: str | None = None  # the method's function that makes news of a message
    # [n] int64: t 2^16 + k of the memory that each of `clients` has to start from,
    # -1 for none yet; None where nothing is remembered.
    moments: Tensor | None = None


@dataclass
class SecretTotal:
    """The sum that was recovered, and whose messages are in it."""

    total: Encoded | None = None  # None: nobody's
    clients: list[int] = field(default_factory=list)  # ascending
    moment: int = -1  # t 2^16 + k, under which clients have stored what they remember
    bytes_up: int = 0  # that all clients sent for it, over all exchanges

    def add(self, message: Encoded) -> None:
        """Add what one client sends, not masked or unmasked."""
        if self.total is None:
            self.total = Encoded(message.numbers.clone(), message.words.clone())
        else:
            self.total.add_(message)


@runtime_checkable
class MaskingEngine(Protocol):
    """An engine whose clients mask what they send: it never holds one message."""

    def secret_sum(self, ask: Ask, into: SecretTotal) -> Iterator[Reports]:
        """Let clients add up what is asked for.

        Yields failures, and reports of nobody as a pause. Raises TooFewReports where
        too few clients stay to the end, and nothing can be read.
        """
        ...
