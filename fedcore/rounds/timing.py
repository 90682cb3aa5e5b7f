"""When things happen in a run: on a simulated clock, in the field, or not at all.

A round opens its time (`begin`), its doors ask it who answers in time (`ask`), and it
closes with the columns and records of the round (`end`). Nothing that it keeps from
round to round is in it, but in tensors that are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival
from fedcore.clock.durations import Durations
from fedcore.clock.exchange import exchange
from fedcore.clock.settings import Synchronous
from fedcore.clock.windows import Windows
from fedcore.engines.base import Engine, Work
from fedcore.engines.message_shape import message_shape
from fedcore.errors import RunError
from fedcore.method import evaluates
from fedcore.reports import Reports
from fedcore.rounds.participation import Process, UniformProcess
from fedcore.rounds.tally import Tally
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment

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


class _Exchange(NamedTuple):
    """One exchange of a synchronous round, as it is recorded."""

    fn: str
    clients: np.ndarray
    sent: int
    back: np.ndarray  # -1: never
    bytes_down: int
    bytes_up: int
    steps: np.ndarray
    late: dict[int, str]


class ClockedRounds(Timing):
    """Synchronous rounds on a simulated clock (specification: docs/time.md)."""

    usual = frozenset(("timeout",))

    def __init__(
        self,
        experiment: Experiment,
        work: Work,
        engine: Engine,
        durations: Durations,
        windows: Windows | None,
    ) -> None:
        clock, schedule = experiment.clock, experiment.schedule
        assert isinstance(schedule, Synchronous)
        self._work, self._engine, self._windows = work, engine, windows
        self._durations = durations
        self._deadline = microseconds(schedule.deadline_s)
        self._goal, self._finishes = schedule.goal, clock.stragglers == "finish"
        self._server_us = round(clock.server_s * SECOND)
        self._shapes = Shapes(work)
        self._pending: list[tuple[ClientFunction, Tensor, Tree]] = []

    def begin(self, t: int, kept: Kept) -> None:
        self._t, self._now, self._order = t, now_of(kept), int(kept.get("order", 0))
        self._busy: dict[int, int] = {}
        for client, until in kept.get("busy", NOBODY).tolist():
            self._busy[client] = until
        self._worked = self._wasted = self._room = 0
        self._asked, self._late = set[int](), set[int]()
        self._exchanges: list[_Exchange] = []
        self._pending = []

    def cohort(self, process: Process, t: int, state: Tree) -> tuple[Tensor, Tree]:
        if self._windows is None:
            return process.sample(t, state)
        there = self._windows.all_there(process.population, self._now)
        while len(there) == 0:
            opening = self._windows.next_opening(self._now)
            assert opening is not None, "a file of windows has one at least"
            self._now = opening
            there = self._windows.all_there(process.population, self._now)
        if isinstance(process, UniformProcess):
            return torch.from_numpy(process.among(t, there)), state
        cohort, state = process.sample(t, state)
        return cohort[torch.isin(cohort, torch.from_numpy(there))], state

    def ask(
        self, fn: ClientFunction, clients: Tensor, down: Tree, absent: frozenset[int]
    ) -> Asked:
        if evaluates(fn) or len(clients) == 0:  # an evaluation takes no time
            return super().ask(fn, clients, down, absent)
        for _ in self.late_work():  # a client ends its work before it begins another
            pass
        ids, begin = clients.numpy(), self._now
        steps = self._work.steps(fn, ids)
        bytes_down, bytes_up = (
            trees.nbytes(down),
            self._shapes.nbytes(fn, down, self._t),
        )
        works = self._durations.of(ids, self._t, steps, bytes_down, bytes_up)
        waits = np.zeros_like(works)
        for place, client in enumerate(ids.tolist()):
            if client in self._busy:
                waits[place] = max(self._busy[client] - begin, 0)
        finish, lost = begin + waits + works, frozenset[int]()
        if self._windows is not None:
            finish, is_lost = self._windows.ends(ids, begin + waits, works)
            lost = frozenset(ids[is_lost].tolist())
        done = exchange(
            ids,
            finish - begin,
            deadline=self._deadline,
            goal=self._goal,
            silent=absent,
            lost=lost,
            finishes=self._finishes,
        )
        self._now = begin + done.time
        for client, rest in done.busy.items():
            self._busy[client] = self._now + rest
        self._worked += done.worked
        self._wasted += done.wasted
        self._room += len(ids) * done.time
        self._asked.update(ids.tolist())
        self._late.update(done.late)
        back = np.where(np.isin(ids, [*absent, *lost]), -1, finish)
        if not self._finishes:
            back[np.isin(ids, [*done.late])] = -1
        self._exchanges.append(
            _Exchange(
                fn.__name__, ids, begin, back, bytes_down, bytes_up, steps, done.late
            )
        )
        self._note_late_work(fn, [i for i in done.late if i not in lost], down)
        there = [client for client in ids.tolist() if client not in absent]
        reported = torch.from_numpy(done.reported)
        return Asked(reported, there, len(there), done.late)

    def _note_late_work(
        self, fn: ClientFunction, clients: list[int], down: Tree
    ) -> None:
        """A late client's state moves all the same, where it has one."""
        states = self._engine.states
        keeps_state = states is not None and not states.is_stateless
        if clients and self._finishes and keeps_state:
            self._pending.append((fn, torch.tensor(sorted(clients)), down))

    def late_work(self) -> Iterator[Reports]:
        for fn, clients, down in self._pending:
            yield from self._engine.each(fn, clients, down, self._t)
        self._pending = []

    def end(self, tally: Tally) -> Spent:
        self._now += self._server_us
        row = {
            "time_s": self._now / SECOND,
            "idle": share(self._room - self._worked, self._room),
            "late_share": share(len(self._late), len(self._asked)),
            "wasted_share": share(self._wasted, self._worked),
        }
        arrivals: list[Arrival] = []
        for each in self._exchanges:
            arrivals += self._recorded(each, tally, len(arrivals))
        busy = [pair for pair in sorted(self._busy.items()) if pair[1] > self._now]
        kept = {
            "now": torch.tensor(self._now),
            "order": torch.tensor(self._order + len(arrivals)),
            "busy": torch.tensor(busy, dtype=torch.int64).reshape(-1, 2),
        }
        return Spent(row, kept, arrivals)

    def _recorded(self, each: _Exchange, tally: Tally, done: int) -> list[Arrival]:
        """The rows of one exchange, in order of arrival, after `done` of the round."""
        arrivals: list[Arrival] = []
        never = np.iinfo(np.int64).max
        order = np.lexsort((each.clients, np.where(each.back < 0, never, each.back)))
        for place in order.tolist():
            client, back = int(each.clients[place]), int(each.back[place])
            outcome = each.late.get(client, tally.failed.get(client, ""))
            arrivals.append(
                Arrival(
                    self._t + 1,
                    self._order + done + len(arrivals),
                    client,
                    self._t,
                    each.fn,
                    each.sent,
                    back,
                    outcome.split(":")[0],
                    each.bytes_down,
                    each.bytes_up if back >= 0 else 0,
                    int(each.steps[place]),
                    0,
                )
            )
        return arrivals


NOBODY = torch.empty(0, 2, dtype=torch.int64)


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
