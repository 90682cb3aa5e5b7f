"""Rounds of devices, on the clock of the server."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival
from fedcore.clock.queue import Item
from fedcore.clock.settings import Buffered
from fedcore.engines.base import BufferedGrid, FieldEngine, stamp
from fedcore.method import evaluates
from fedcore.reports import Reports
from fedcore.rounds.buffer import Ring, aged, ages
from fedcore.rounds.participation import Process
from fedcore.rounds.tally import Tally
from fedcore.rounds.timing import SECOND, Asked, Kept, Spent, Timing, now_of, share
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree


class FieldRounds(Timing):
    """Synchronous rounds of devices: the engine waits for them itself."""

    def __init__(self, engine: FieldEngine) -> None:
        self._field = engine
        self._zero: int | None = None  # the run's start on the clock of `stamp`

    def begin(self, t: int, kept: Kept) -> None:
        self._t, self._before, self._order = t, now_of(kept), int(kept.get("order", 0))
        if self._zero is None:  # this process goes on where the last one stopped
            self._zero = stamp() - self._before

    def end(self, tally: Tally) -> Spent:
        now, arrivals = self._now(), self._arrived(tally)
        kept = self._kept(now, len(arrivals))
        return Spent({"time_s": now / SECOND}, kept, arrivals)

    def _now(self) -> int:
        assert self._zero is not None, "begin comes first"
        return stamp() - self._zero

    def _arrived(self, tally: Tally) -> list[Arrival]:
        """Work that has ended since the last round, in the run's own time.

        With the outcome of what the server found to be of no use.
        """
        assert self._zero is not None, "begin comes first"
        arrivals: list[Arrival] = []
        for arrival in self._field.arrivals():
            back, version = arrival.back_us, arrival.version
            work = arrival.client, version if self.is_buffered else None
            arrivals.append(
                arrival._replace(
                    outcome=arrival.outcome or tally.failed_work.get(work, ""),
                    order=self._order + len(arrivals),
                    sent_us=arrival.sent_us - self._zero,
                    back_us=back if back < 0 else back - self._zero,
                )
            )
        return arrivals

    def _kept(self, now: int, num_arrivals: int) -> Kept:
        order = torch.tensor(self._order + num_arrivals)
        return {"now": torch.tensor(now), "order": order}


class BufferedField(FieldRounds):
    """Server updates of a buffered schedule; who is done gets work at once."""

    is_buffered = is_buffering = True

    def __init__(self, settings: Buffered, engine: BufferedGrid, ring: Ring) -> None:
        super().__init__(engine)
        self.settings, self._grid, self._ring = settings, engine, ring
        self._last: Kept | None = None
        self._pending: list[Item] = []

    def stores(self) -> dict[str, StateStore]:
        return {"ring": self._ring.store}

    def cohort(self, process: Process, t: int, state: Tree) -> tuple[Tensor, Tree]:
        """Nobody: who works is not drawn by the round."""
        return torch.empty(0, dtype=torch.int64), state

    def begin(self, t: int, kept: Kept) -> None:
        super().begin(t, kept)
        self._size = 0
        if kept is not self._last:  # the first update of this process
            self._ring.restore(kept)
            rows = kept["queue"].tolist() if "queue" in kept else []
            self._pending = [Item(*row) for row in rows]

    def ask(
        self, fn: ClientFunction, clients: Tensor, down: Tree, absent: frozenset[int]
    ) -> Asked:
        if evaluates(fn):
            return super().ask(fn, clients, down, absent)
        nobody = torch.empty(0, dtype=torch.int64)
        return Asked(nobody, [], 0, {})  # known when their answers are in

    def answers(self, fn: ClientFunction, down: Tree) -> Iterator[Reports]:
        t, pending, self._size = self._t, self._pending, trees.nbytes(down)
        self._pending = []
        get, settings = self._ring.get, self.settings
        for reports in self._grid.buffer(fn, down, t, settings, pending, get):
            yield aged(reports, t, reports.versions or {}, settings)
        needed = {item.version for item in self._grid.in_flight()}
        self._ring.keep(t, down, needed)

    def end(self, tally: Tally) -> Spent:
        now, arrivals = self._now(), self._arrived(tally)
        under_way = self._grid.in_flight()
        tally.bytes_down += self._size * len(self._grid.sent())
        tally.asked.update(row.client for row in arrivals if row.outcome != "late")
        wasted = worked = busy = 0
        for arrival in arrivals:
            back = now if arrival.back_us < 0 else arrival.back_us
            worked += back - arrival.sent_us
            busy += max(back - max(arrival.sent_us, self._before), 0)
            if arrival.outcome:
                wasted += back - arrival.sent_us
        assert self._zero is not None
        queue = []
        for item in under_way:
            sent = item.sent - self._zero
            busy += now - max(sent, self._before)
            queue.append([*item._replace(sent=sent)])
        room = self.settings.concurrency * (now - self._before)
        used = [arrival.version for arrival in arrivals if not arrival.outcome]
        left_out = len(arrivals) - len(used)
        row = {
            "time_s": now / SECOND,
            "idle": share(room - busy, room),
            "late_share": share(left_out, len(arrivals)),
            "wasted_share": share(wasted, worked),
            "in_flight": len(under_way),
            **ages(self.settings, self._t, used),
        }
        kept = self._kept(now, len(arrivals))
        kept["queue"] = torch.tensor(queue, dtype=torch.int64).reshape(-1, 6)
        kept["ring"] = self._ring.kept()
        self._last = kept
        return Spent(row, kept, arrivals)
