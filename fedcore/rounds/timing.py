"""When things happen in a run: on a simulated clock, in the field, or not at all.

A round opens its time (`begin`), its doors ask it who answers in time (`ask`), and it
closes with the columns and records of the round (`end`). Nothing that it keeps from
round to round is in it, but in tensors that are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival, Columns
from fedcore.engines.base import Engine, Work
from fedcore.engines.message_shape import message_shape
from fedcore.errors import RunError
from fedcore.reports import Reports
from fedcore.rounds.participation import Process
from fedcore.rounds.tally import Tally
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

if TYPE_CHECKING:
    pass

SECOND = 1_000_000  # microseconds

Kept = dict[str, Tensor]
"""Tensors of a run's time that are in its checkpoint, by name."""


class Asked(NamedTuple):
    """The clients of one call of a client function."""

    clients: Tensor  # that the engine is to run, ascending
    members: list[int]  # who counts as asked in this round
    messages: int  # sent to clients
    left_out: dict[int, str]  # members that are not waited for, with the reason


class Spent(NamedTuple):
    """The time of a round."""

    row: dict[str, Any]  # columns of metrics.jsonl
    kept: Kept
    arrivals: list[Arrival]
    exchanges: Sequence[Columns] = ()  # arrivals that are in columns from the start


class Timing:
    """No clock: everybody that is there answers, in no time."""

    # Whether answers of a call come from a buffer, and not from one call of the engine.
    is_buffering = False
    # Whether a client's work of another round may answer in this one.
    is_buffered = False
    # Reasons to leave a client out that are to be expected.
    usual: frozenset[str] = frozenset()

    def stores(self) -> dict[str, StateStore]:
        """Rows that are in the checkpoint, by the name of their part."""
        return {}

    def begin(self, t: int, kept: Kept) -> None:
        """Open round t after a round that left `kept`."""

    def cohort(self, process: Process, t: int, state: Tree) -> tuple[Tensor, Tree]:
        """(the cohort of round t, the process's state after it)."""
        return process.sample(t, state)

    def ask(
        self, fn: ClientFunction, clients: Tensor, down: Tree, absent: frozenset[int]
    ) -> Asked:
        """Whose answers are waited for; those in `absent` never give any."""
        if absent:
            is_there = [client not in absent for client in clients.tolist()]
            clients = clients[is_there]
        return Asked(clients, clients.tolist(), len(clients), {})

    def answers(self, fn: ClientFunction, down: Tree) -> Iterator[Reports]:
        """Reports of the buffer, by the version that they started from and client."""
        raise NotImplementedError

    def late_work(self) -> Iterator[Reports]:
        """Let clients whose answers are not waited for end their work."""
        yield from ()

    def end(self, tally: Tally) -> Spent:
        """Close the round whose counts these are."""
        return Spent({}, {}, [])


class Exchanged(NamedTuple):
    """One exchange of a synchronous round, as it is recorded; n clients."""

    fn: str
    clients: np.ndarray  # [n] ids, ascending
    sent: np.ndarray  # [n], microseconds
    back: np.ndarray  # [n], -1: never
    bytes_down: int
    bytes_up: int
    steps: np.ndarray  # [n]
    late: dict[int, str]  # clients that were not waited for, with the reason


LATE = ("timeout", "not needed", "unavailable")  # kinds of reasons of the clock


def recorded(each: Exchanged, tally: Tally, t: int, first: int) -> Columns:
    """The rows of an exchange of round t, in order of arrival, from `first` on."""
    never, n = np.iinfo(np.int64).max, len(each.clients)
    order = np.lexsort((each.clients, np.where(each.back < 0, never, each.back)))
    clients, back = each.clients[order], each.back[order]
    return {
        "update": np.full(n, t + 1),
        "order": np.arange(first, first + n),
        "client": clients,
        "version": np.full(n, t),
        "function": [each.fn] * n,
        "sent_us": each.sent[order],
        "back_us": back,
        "outcome": _outcomes(each, clients, tally),
        "bytes_down": np.full(n, each.bytes_down),
        "bytes_up": np.where(back >= 0, each.bytes_up, 0),
        "steps": each.steps[order],
        "work_us": np.zeros(n, dtype=np.int64),
    }


def _outcomes(each: Exchanged, clients: np.ndarray, tally: Tally) -> list[str]:
    """The outcome of each client's work: "", or the kind of reason that it is lost."""
    outcomes = [""] * len(clients)
    if not each.late and not tally.failed:  # of most rounds
        return outcomes
    for place, client in enumerate(clients.tolist()):
        reason = each.late.get(client, "")
        if not reason and tally.failed_in.get(client, each.fn) == each.fn:
            failure = tally.failed.get(client, "")
            if failure.split(":")[0] not in LATE:  # that was in another exchange
                reason = failure
        outcomes[place] = reason.split(":")[0]
    return outcomes


def keeps_state(engine: Engine) -> bool:
    """Whether clients keep anything between rounds, in this engine."""
    return engine.states is not None and not engine.states.is_stateless


class Shapes:
    """Bytes of messages to the server, before anybody has sent one."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._found: dict[Any, int] = {}

    def nbytes(self, fn: ClientFunction, down: Tree, t: int) -> int:
        """Bytes of one client's message. Raises RunError where there is none."""
        sent = tuple((path, x.shape) for path, x in trees.flatten(down).items())
        key = fn.__name__, sent
        if key not in self._found:
            try:
                message = message_shape(self._work, fn, down, t)
            except Exception as error:
                raise RunError(
                    "the clock needs the size of a message, and the server cannot run "
                    f"{fn.__name__} on an example of its own: {error}"
                ) from error
            self._found[key] = trees.nbytes(message)
        return self._found[key]


def now_of(kept: Kept) -> int:
    """Microseconds since the run's start, as of the last round."""
    return int(kept.get("now", 0))


def microseconds(seconds: float | None) -> int | None:
    """Whole microseconds; None stays None."""
    return None if seconds is None else round(seconds * SECOND)


def share(part: int, whole: int) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0
