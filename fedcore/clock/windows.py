"""A stand-in, until its part is handed in: replace this file."""

from __future__ import annotations
from typing import Any
import numpy as np


class Windows:
    @classmethod
    def of(cls, settings: Any) -> Windows:
        return cls()

    def all_there(self, population: int, now: int) -> np.ndarray:
        return np.arange(population)

    def next_opening(self, now: int) -> int | None:
        return None

    def ends(
        self, clients: np.ndarray, begin: np.ndarray, durations: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return begin + durations, np.zeros(len(clients), dtype=bool)
