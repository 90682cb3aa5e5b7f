"""Synchronous rounds on a simulated clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Columns
from fedcore.clock.durations import Durations
from fedcore.clock.exchange import exchange
from fedcore.clock.settings import Synchronous
from fedcore.clock.windows import Windows
from fedcore.engines.base import Engine, Work
from fedcore.method import evaluates
from fedcore.reports import Reports
from fedcore.rounds.participation import Process, UniformProcess
from fedcore.rounds.tally import Tally
from fedcore.rounds.timing import (
    SECOND,
    Asked,
    Exchanged,
    Kept,
    Shapes,
    Spent,
    Timing,
    keeps_state,
    microseconds,
    now_of,
    recorded,
    share,
)
from fedcore.types import ClientFunction, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment

NOBODY = torch.empty(0, 2, dtype=torch.int64)


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
        self._exchanges: list[Exchanged] = []
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
        sizes = trees.nbytes(down), self._shapes.nbytes(fn, down, self._t)
        works = self._durations.of(ids, self._t, steps, *sizes)
        waits = self._waits(ids)
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
            Exchanged(
                fn.__name__,
                ids,
                np.full(len(ids), begin),
                back,
                *sizes,
                steps,
                done.late,
            )
        )
        self._note_late_work(fn, [i for i in done.late if i not in lost], down)
        there = [client for client in ids.tolist() if client not in absent]
        reported = torch.from_numpy(done.reported)
        return Asked(reported, there, len(there), done.late)

    def _waits(self, ids: np.ndarray) -> np.ndarray:
        """Microseconds until each client has done what it was late with."""
        waits = np.zeros(len(ids), dtype=np.int64)
        if self._busy:
            for place, client in enumerate(ids.tolist()):
                waits[place] = max(self._busy.get(client, 0) - self._now, 0)
        return waits

    def _note_late_work(
        self, fn: ClientFunction, clients: list[int], down: Tree
    ) -> None:
        """A late client's state moves all the same, where it has one."""
        if clients and self._finishes and keeps_state(self._engine):
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
        arrivals, order = list[Columns](), self._order
        for each in self._exchanges:
            arrivals.append(recorded(each, tally, self._t, order))
            order += len(each.clients)
        busy = [pair for pair in sorted(self._busy.items()) if pair[1] > self._now]
        kept = {
            "now": torch.tensor(self._now),
            "order": torch.tensor(order),
            "busy": torch.tensor(busy, dtype=torch.int64).reshape(-1, 2),
        }
        return Spent(row, kept, [], arrivals)
