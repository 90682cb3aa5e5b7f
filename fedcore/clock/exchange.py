"""A synchronous exchange: whose answers are waited for, and the time that it takes.

    S    the clients that are asked          d_i  time from the start to i's answer
    D    deadline                            k    goal, answers that are enough
    R    the first k of S, by (d_i, i), with d_i <= D
    T    its time: d of the k-th of R; D where fewer come

Several exchanges of a round follow one another; D and k hold for each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["NOT_NEEDED", "UNAVAILABLE", "Exchange", "exchange", "too_late"]

# The word before the colon is counted; server/post.py has the same for devices.
NOT_NEEDED = "not needed: the round had the reports that it asked for"
UNAVAILABLE = "unavailable: the client was gone before its work was done"

_SECOND = 1_000_000  # microseconds


class Exchange(NamedTuple):
    """What becomes of those that are asked; times in microseconds."""

    reported: np.ndarray  # R, ids, ascending
    late: dict[int, str]  # the reason for each other client but the silent ones
    time: int  # T
    worked: int  # sum over S of min(d_i, T)
    wasted: int  # the part of it that is in no report
    busy: dict[int, int]  # client -> time after T at which it is done, if it goes on


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
    """The exchange with `clients` (ids [n]), whose work takes `durations` (int64 [n]).

    Times are in microseconds from its start. The silent work and never answer. The work
    of the lost is lost at their duration, when they go away. Who is late works on after
    T where `finishes`.

    >>> ids, d = np.array([0, 1, 2]), np.array([2, 3, 7])
    >>> nobody = frozenset()
    >>> exchange(ids, d, deadline=5, goal=None, silent=nobody, lost=nobody,
    ...          finishes=True)[1:]
    ({2: 'timeout: no answer within 5e-06 s'}, 5, 10, 5, {2: 2})
    """
    if len(clients) == 0:
        return Exchange(clients.astype(np.int64), {}, 0, 0, 0, {})
    never = list(silent | lost)
    is_in_time = ~np.isin(clients, never) if never else np.ones(len(clients), bool)
    if deadline is not None:
        is_in_time &= durations <= deadline
    enough = len(clients) if goal is None else min(goal, len(clients))
    order = np.lexsort((clients, durations))
    first = order[is_in_time[order]][:enough]
    if len(first) == enough:
        time = int(durations[first[-1]])
    elif deadline is not None:
        time = deadline
    else:  # the server hears of those that go away
        time = int(durations.max())
    has_reported = np.zeros(len(clients), bool)
    has_reported[first] = True
    work = np.minimum(durations, time)
    left = np.flatnonzero(~has_reported)
    late, busy = _left_out(clients[left], durations[left], time, deadline, silent, lost)
    return Exchange(
        reported=np.sort(clients[first]).astype(np.int64),
        late=late,
        time=time,
        worked=int(work.sum()),
        wasted=int(work[~has_reported].sum()),
        busy=busy if finishes else {},
    )


def _left_out(
    clients: np.ndarray,
    durations: np.ndarray,
    time: int,
    deadline: int | None,
    silent: frozenset[int],
    lost: frozenset[int],
) -> tuple[dict[int, str], dict[int, int]]:
    """(reasons of the late, time after `time` that each works on) of the others."""
    after_deadline = NOT_NEEDED if deadline is None else too_late(deadline / _SECOND)
    late: dict[int, str] = {}
    busy: dict[int, int] = {}
    for client, duration in zip(clients.tolist(), durations.tolist(), strict=True):
        if client in lost:
            late[client] = UNAVAILABLE
        elif client not in silent:
            is_over = deadline is not None and duration > deadline
            late[client] = after_deadline if is_over else NOT_NEEDED
        if duration > time:
            busy[client] = duration - time
    return late, busy


def too_late(seconds: float) -> str:
    """The reason of a client that has not answered within so many seconds."""
    return f"timeout: no answer within {seconds:g} s"
