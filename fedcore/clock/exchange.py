"""A stand-in, until its part is handed in: replace this file."""

from __future__ import annotations
from typing import NamedTuple
import numpy as np


class Exchange(NamedTuple):
    reported: np.ndarray
    late: dict[int, str]
    time: int
    worked: int
    wasted: int
    busy: dict[int, int]


def exchange(
    clients: np.ndarray,
    durations: np.ndarray,
    *,
    deadline: int | None,
    goal: int | None,
    silent: frozenset[int],
    lost: frozenset[int],
    finishes: bool,
) -> Exchange:
    pairs = sorted((d, c) for d, c in zip(durations.tolist(), clients.tolist()))
    g = goal or len(pairs)
    ok = [
        (d, c)
        for d, c in pairs
        if c not in silent and c not in lost and (deadline is None or d <= deadline)
    ][:g]
    T = ok[-1][0] if len(ok) == g else (deadline or pairs[-1][0])
    rep = {c for _, c in ok}
    late = {
        c: (
            "timeout: no answer in time"
            if deadline and d > deadline
            else "not needed: x"
        )
        for d, c in pairs
        if c not in rep and c not in silent
    }
    worked = sum(min(d, T) for d, _ in pairs)
    wasted = sum(min(d, T) for d, c in pairs if c not in rep)
    return Exchange(
        np.array(sorted(rep), dtype=np.int64),
        late,
        T,
        worked,
        wasted,
        {c: d - T for d, c in pairs if c in late and d > T} if finishes else {},
    )
