"""Synchronous rounds in which those answer who answered in a recorded run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Columns
from fedcore.clock.replay import Recorded, ReplayPlan
from fedcore.engines.base import Engine, Work
from fedcore.errors import SettingsError
from fedcore.method import evaluates
from fedcore.reports import Reports
from fedcore.rounds.participation import Process
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
    now_of,
    recorded,
    share,
)
from fedcore.types import ClientFunction, Tree


class ReplayedRounds(Timing):
    """The exchanges of a recording, one after another."""

    usual = frozenset(("timeout",))

    def __init__(
        self,
        plan: ReplayPlan,
        work: Work,
        engine: Engine,
        deadline: int | None,
        has_windows: bool,
    ) -> None:
        """With `has_windows` a cohort was drawn among those who were there.

        deadline: of the recorded run, in microseconds.
        """
        self._deadline = deadline
        self._plan, self._work, self._engine = plan, work, engine
        self._has_windows, self._shapes = has_windows, Shapes(work)

    def begin(self, t: int, kept: Kept) -> None:
        self._t, self._order = t, int(kept.get("order", 0))
        self._now = self._begin = now_of(kept)
        self._calls = Counter[str]()  # exchanges of this round, by client function
        self._exchanges: list[Exchanged] = []
        self._late: list[tuple[ClientFunction, Tensor, Tree]] = []
        self._asked, self._left_out = set[int](), set[int]()

    def cohort(self, process: Process, t: int, state: Tree) -> tuple[Tensor, Tree]:
        if self._has_windows:
            return torch.from_numpy(self._plan.cohort(t)), state
        return process.sample(t, state)

    def ask(
        self, fn: ClientFunction, clients: Tensor, down: Tree, absent: frozenset[int]
    ) -> Asked:
        if evaluates(fn) or len(clients) == 0:
            return super().ask(fn, clients, down, absent)
        done = self._plan.exchange(self._t, fn.__name__, self._calls[fn.__name__])
        self._calls[fn.__name__] += 1
        self._refuse_others(fn, clients, absent, done)
        end = done.end
        if self._deadline is not None and "timeout" in done.left_out.values():
            end = max(end, int(done.sent.max()) + self._deadline)
        self._now = max(self._now, end)
        self._asked.update(done.asked.tolist())
        self._left_out.update(done.left_out)
        sizes = trees.nbytes(down), self._shapes.nbytes(fn, down, self._t)
        steps = self._work.steps(fn, done.asked)
        self._exchanges.append(
            Exchanged(
                fn.__name__,
                done.asked,
                done.sent,
                done.back,
                *sizes,
                steps,
                done.left_out,
            )
        )
        if len(done.moved) and keeps_state(self._engine):
            self._late.append((fn, torch.from_numpy(done.moved), down))
        silent = [i for i, kind in done.left_out.items() if kind == "dropout"]
        there = sorted(set(done.asked.tolist()) - set(silent))
        left_out = {i: kind for i, kind in done.left_out.items() if i not in silent}
        return Asked(torch.from_numpy(done.reported), there, len(there), left_out)

    def _refuse_others(
        self,
        fn: ClientFunction,
        clients: Tensor,
        absent: frozenset[int],
        done: Recorded,
    ) -> None:
        """Raises SettingsError where other clients are asked than in the recording."""
        here = clients.numpy()
        gone, more = np.setdiff1d(done.asked, here), np.setdiff1d(here, done.asked)
        more = more[~np.isin(more, [*absent])]
        if len(gone) == len(more) == 0:
            return
        if len(gone):
            client, problem = int(gone[0]), "was asked there, and is not here,"
        else:
            client, problem = int(more[0]), "was not asked there"
        raise SettingsError(
            f"{self._plan.file}: round {self._t + 1}: client {client} {problem} for "
            f"{fn.__name__}: give the preset, the settings and the seed of the "
            "recorded run"
        )

    def late_work(self) -> Iterator[Reports]:
        for fn, clients, down in self._late:
            yield from self._engine.each(fn, clients, down, self._t)
        self._late = []

    def end(self, tally: Tally) -> Spent:
        arrivals, order = list[Columns](), self._order
        worked = wasted = room = 0
        for each in self._exchanges:
            arrivals.append(recorded(each, tally, self._t, order))
            order += len(each.clients)
            sent, end = int(each.sent.min(initial=self._now)), self._now
            back = np.where(each.back < 0, end, np.minimum(each.back, end))
            took = back - each.sent
            is_late = np.isin(each.clients, [*each.late])
            worked += int(took.sum())
            wasted += int(took[is_late].sum())
            room += len(took) * (end - sent)
        self._now += self._plan.server_us
        self._now = max(self._now, self._plan.time(self._t))
        row = {
            "time_s": self._now / SECOND,
            "idle": share(room - worked, room),
            "late_share": share(len(self._left_out), len(self._asked)),
            "wasted_share": share(wasted, worked),
        }
        kept = {"now": torch.tensor(self._now), "order": torch.tensor(order)}
        return Spent(row, kept, [], arrivals)
