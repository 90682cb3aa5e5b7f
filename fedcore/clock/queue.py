"""The buffered schedule: who works on which version, and whose answers are in."""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """A piece of work in flight; times in microseconds since the run's start."""

    finish: int
    n: int  # running number of pieces of work that were given out
    client: int
    version: int  # the model that it starts from, by the number of server updates
    slot: int  # where what it will bring waits; -1 before that
    sent: int


class Arrived(NamedTuple):
    """Work that has come to its end."""

    item: Item
    outcome: str  # "" usable; dropout, unavailable and stale do not fill the buffer


class Update(NamedTuple):
    """What happens up to one server update."""

    sent: list[int]  # clients that get this version, ascending
    arrived: list[Arrived]  # ascending by version and client
    now: int
