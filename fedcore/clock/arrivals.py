"""`arrivals.parquet`: a row for each piece of work, when it was sent and was back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Arrival(NamedTuple):
    """One piece of work of one client."""

    update: int  # the round, or server update, that it came to, from 1 on
    order: int  # of its arrival in the run, from 0 on
    client: int
    version: int  # the server updates before the model that it started from
    function: str
    sent_us: int  # microseconds since the run's start
    back_us: int  # -1 where it never came
    outcome: str  # "" usable; else the kind of reason
    bytes_down: int
    bytes_up: int
    steps: int
    work_us: int  # by the device's own clock; 0 in a simulation


class Arrivals:
    """The rows of one run."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[Arrival] = []

    def add(self, arrivals: list[Arrival]) -> None:
        self.rows += arrivals

    def write(self, number: int) -> None:
        pass

    def cut(self, number: int) -> None:
        pass

    def merge(self) -> None:
        pass
