"""Buffered rounds: a server update takes the answers of several versions of the model.

Who works when follows from the clock alone (`fedcore.clock.queue`), before any work is
computed. So the clients that get a version are computed when it is sent, in one call of
the engine, and what they bring waits in a store (`Flight`). Where clients keep state
they are computed when they are back, by version, from a ring of the messages that they
were sent (`Ring`): a client in flight must not have the state that it will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival
from fedcore.clock.queue import Arrived, Item, Update
from fedcore.clock.settings import Buffered
from fedcore.clock.staleness import discount
from fedcore.engines.base import Engine, Work, failure
from fedcore.method import Method, Round, evaluates
from fedcore.reports import Mean, Reports
from fedcore.rounds.participation import Process
from fedcore.rounds.sources import Sizes, Source
from fedcore.rounds.tally import Tally
from fedcore.rounds.timing import SECOND, Asked, Kept, Shapes, Spent, Timing, share
from fedcore.storage.rows import ROWS, StateStore
from fedcore.types import ClientFunction, Stateless, Tree

if TYPE_CHECKING:
    from fedcore.task import Task

LONGEST = 200  # bytes of the reason of a failure that waits


class BufferedRounds(Timing):
    """Server updates of a buffered schedule, in a simulation."""

    is_buffered = True

    def __init__(
        self, settings: Buffered, source: Source, work: Work, engine: Engine
    ) -> None:
        self.settings, self._source = settings, source
        self._work, self._engine = work, engine
        self._shapes = Shapes(work)
        self._last: Kept | None = None
        self.keeps_last_only = False  # of a client's answers in one buffer
        self.piece = ROWS  # reports that are handed on together, at most
        self.flight: Flight | None = None
        self.ring: Ring | None = None

    def stores(self) -> dict[str, StateStore]:
        if self.ring is not None:
            return {"ring": self.ring.store}
        return {} if self.flight is None else {"flight": self.flight.store}

    def cohort(self, process: Process, t: int, state: Tree) -> tuple[Tensor, Tree]:
        """Nobody: who works is not drawn by the round."""
        return torch.empty(0, dtype=torch.int64), state

    def begin(self, t: int, kept: Kept) -> None:
        self._t, self._order = t, int(kept.get("order", 0))
        self._before, self.is_buffering = int(kept.get("now", 0)), False
        self._update = Update([], [], self._before)
        self._fn: ClientFunction | None = None
        if kept is not self._last:
            self._source.begin(kept)
            if self.ring is not None:
                self.ring.restore(kept)
        self._last = None  # until this update has come to its end

    def ask(
        self, fn: ClientFunction, clients: Tensor, down: Tree, absent: frozenset[int]
    ) -> Asked:
        if evaluates(fn):
            return super().ask(fn, clients, down, absent)
        assert self._fn is None, "a buffered method has one exchange"
        self._fn = fn
        self._sizes = Sizes(trees.nbytes(down), self._shapes.nbytes(fn, down, self._t))
        update = self._source.update(self._t, self._work, fn, self._sizes)
        if self.keeps_last_only:
            update = update._replace(arrived=_last_of_each(update.arrived))
        self._update = update
        fresh = []
        for item, outcome in update.arrived:
            if item.version == self._t and not outcome:
                fresh.append(item.client)
        # All that was sent is back, and nothing else: as a synchronous round.
        is_whole = fresh == update.sent and len(fresh) == len(update.arrived)
        self.is_buffering = not is_whole
        members = [arrived.item.client for arrived in update.arrived]
        sent = torch.tensor(update.sent, dtype=torch.int64)
        return Asked(sent, members, len(update.sent), {})

    def answers(self, fn: ClientFunction, down: Tree) -> Iterator[Reports]:
        arrived = []
        for item, outcome in self._update.arrived:
            if outcome:
                lost = failure([item.client], outcome)
                yield lost._replace(versions={item.client: item.version})
            else:
                arrived.append(item)
        if self.ring is not None:
            yield from self._computed_now(self.ring, fn, down, arrived)
        else:
            assert self.flight is not None
            yield from self._computed_before(self.flight, fn, down, arrived)

    def _computed_now(
        self, ring: Ring, fn: ClientFunction, down: Tree, arrived: list[Item]
    ) -> Iterator[Reports]:
        """What clients with a state bring: computed in the state that they are in."""
        for version, items in groupby(arrived, key=lambda item: item.version):
            clients = torch.tensor([item.client for item in items])
            started = down if version == self._t else ring.get(version)
            for reports in self._engine.each(fn, clients, started, version):
                ids = [*reports.clients.tolist(), *reports.failed]
                yield aged(reports, self._t, dict.fromkeys(ids, version), self.settings)
        needed = {item.version for item in self._source.in_flight()}
        ring.keep(self._t, down, needed)

    def _computed_before(
        self, flight: Flight, fn: ClientFunction, down: Tree, arrived: list[Item]
    ) -> Iterator[Reports]:
        """What clients without state bring: it was computed when they were asked."""
        waited = [item for item in arrived if item.version < self._t]
        for items in _pieces(waited, self.piece):
            reports = flight.take([item.slot for item in items])
            versions = {item.client: item.version for item in items}
            yield aged(reports, self._t, versions, self.settings)
        fresh = {item.client for item in arrived if item.version == self._t}
        slot_of: dict[int, int] = {}
        for item in self._source.in_flight():
            if item.version == self._t and item.slot >= 0:
                slot_of[item.client] = item.slot
        useful = sorted(fresh | slot_of.keys())  # others drop out, or are lost
        if not useful:
            return
        for reports in self._engine.each(fn, torch.tensor(useful), down, self._t):
            flight.put(reports, slot_of)
            now = _only(reports, fresh)
            ids = [*now.clients.tolist(), *now.failed]
            yield aged(now, self._t, dict.fromkeys(ids, self._t), self.settings)

    def end(self, tally: Tally) -> Spent:
        update, t = self._update, self._t
        counted = [item for item, outcome in update.arrived if not outcome]
        arrivals = self._recorded(tally)
        wasted = worked = 0
        for arrival, (item, _) in zip(arrivals, update.arrived, strict=True):
            worked += item.finish - item.sent
            if arrival.outcome:
                wasted += item.finish - item.sent
        under_way = self._source.in_flight()
        room = self.settings.concurrency * (update.now - self._before)
        busy = 0
        for item in [*under_way, *[item for item, _ in update.arrived]]:
            end = min(item.finish, update.now)  # it may wait for the server afterwards
            busy += max(end - max(item.sent, self._before), 0)
        row: dict[str, Any] = {
            "time_s": update.now / SECOND,
            "idle": share(room - busy, room),
            "late_share": share(len(arrivals) - len(counted), len(arrivals)),
            "wasted_share": share(wasted, worked),
            "in_flight": len(under_way),
        }
        row |= ages(self.settings, t, [item.version for item in counted])
        kept = self._source.kept()
        kept["order"] = torch.tensor(self._order + len(arrivals))
        if self.ring is not None:
            kept["ring"] = self.ring.kept()
        self._last = kept
        return Spent(row, kept, sorted(arrivals, key=lambda row: row.order))

    def _recorded(self, tally: Tally) -> list[Arrival]:
        """The rows of this update, in the order of `arrived`."""
        update, rows = self._update, list[Arrival]()
        if self._fn is None:
            return rows
        clients = np.array([item.client for item, _ in update.arrived], dtype=np.int64)
        steps = self._work.steps(self._fn, clients).tolist() if len(clients) else []
        times = [(item.finish, item.n) for item, _ in update.arrived]
        place_of = {time: place for place, time in enumerate(sorted(times))}
        for (item, outcome), count in zip(update.arrived, steps, strict=True):
            kind = outcome or tally.failed_work.get((item.client, item.version), "")
            order = self._order + place_of[item.finish, item.n]
            arrival = Arrival(
                self._t + 1,
                order,
                item.client,
                item.version,
                self._fn.__name__,
                item.sent,
                -1 if outcome in ("dropout", "unavailable") else item.finish,
                kind.split(":")[0],
                *self._sizes,
                count,
                0,
            )
            rows.append(arrival)
        return rows


def aged(
    reports: Reports, t: int, versions: Mapping[int, int], settings: Buffered
) -> Reports:
    """The reports with their versions; and their weights, where one of them is old."""
    tau = [t - versions[client] for client in reports.clients.tolist()]
    weights = None
    if any(tau) and settings.staleness != "constant":
        weights = discount(settings, torch.tensor(tau))
    return reports._replace(versions=versions, discount=weights)


def ages(settings: Buffered, t: int, versions: list[int]) -> dict[str, Any]:
    """Columns about the age of the answers in a buffer, of these versions."""
    if not versions:
        return {}
    tau = torch.tensor([t - version for version in versions])
    mean, most = float(tau.double().mean()), int(tau.max())
    return {
        "staleness": {"mean": mean, "max": most},
        "server_discount": float(discount(settings, tau).mean()),
    }


class Flight:
    """What clients bring that are not back yet, a row for each piece of work."""

    def __init__(self, store: StateStore) -> None:
        """`store` has rows as `row_of` makes them, by slot."""
        self.store = store

    @staticmethod
    def row_of(message: Tree) -> dict[str, Tree]:
        """An empty row, for messages like this one."""
        return {
            "client": torch.tensor(0),
            "up": trees.zeros_like(message),
            "num_examples": torch.zeros(()),
            "reason": torch.zeros(LONGEST, dtype=torch.uint8),
        }

    def put(self, reports: Reports, slot_of: dict[int, int]) -> None:
        """Keep the reports, and failures, of clients that have a slot."""
        ids = reports.clients.tolist()
        places = [place for place, client in enumerate(ids) if client in slot_of]
        if places:
            slots = [slot_of[ids[place]] for place in places]
            rows = {
                "client": reports.clients,
                "up": reports.up,
                "num_examples": reports.num_examples,
                "reason": torch.zeros(len(ids), LONGEST, dtype=torch.uint8),
            }
            self.store.put(slots, rows, places)
        for client, reason in reports.failed.items():
            if client not in slot_of:
                continue
            row = dict(self.store.initial)
            text = reason.encode()[:LONGEST]
            row["reason"] = torch.zeros(LONGEST, dtype=torch.uint8)
            row["reason"][: len(text)] = torch.tensor([*text], dtype=torch.uint8)
            row["client"] = torch.tensor(client)
            one = trees.map(lambda x: x[None], row)
            self.store.put([slot_of[client]], one)

    def take(self, slots: list[int]) -> Reports:
        """The reports, and failures, that wait in these slots."""
        rows = self.store.gather(slots)
        ids, reasons = rows["client"].tolist(), rows["reason"].cpu()
        failed = {}
        for place in reasons[:, 0].nonzero().flatten().tolist():
            text = bytes(reasons[place].tolist()).rstrip(b"\0")
            failed[ids[place]] = text.decode(errors="replace")
        up, counts, clients = rows["up"], rows["num_examples"], torch.tensor(ids)
        if failed:
            good = torch.tensor([client not in failed for client in ids])
            clients = clients[good]
            up, counts = trees.at((up, counts), good.to(counts.device))
        return Reports(clients, up, counts, failed)


class Ring:
    """The messages of versions from which work is in flight, by place in a store."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self._places: dict[int, int] = {}  # by version

    def restore(self, kept: Kept) -> None:
        """Go on from what `kept` has of it."""
        rows = kept["ring"].tolist() if "ring" in kept else []
        self._places = dict(rows)

    def kept(self) -> Tensor:
        """Versions and their places, int64 [versions, 2]."""
        return torch.tensor([*self._places.items()], dtype=torch.int64).reshape(-1, 2)

    def keep(self, version: int, down: Tree, needed: Set[int]) -> None:
        """Keep this message, if its version is one of those that are needed."""
        self._places = {v: place for v, place in self._places.items() if v in needed}
        if version not in needed:
            return
        taken = set(self._places.values())
        free = next(place for place in range(len(taken) + 1) if place not in taken)
        self._places[version] = free
        self.store.put([free], trees.map(lambda x: x[None], down))

    def get(self, version: int) -> Tree:
        """The message of a version."""
        return self.store.get(self._places[version])


def _pieces(items: list[Item], size: int) -> Iterator[list[Item]]:
    """The items in their order, so many at a time at most, and no client twice."""
    piece: list[Item] = []
    for item in items:
        if len(piece) == size or any(item.client == other.client for other in piece):
            yield piece
            piece = []
        piece.append(item)
    if piece:
        yield piece


def _only(reports: Reports, fresh: set[int]) -> Reports:
    """The reports, and failures, of clients in `fresh`."""
    ids = reports.clients.tolist()
    places = [place for place, client in enumerate(ids) if client in fresh]
    failed = {i: reason for i, reason in reports.failed.items() if i in fresh}
    if len(places) < len(ids):
        rows = torch.tensor(places, dtype=torch.int64)
        there = rows.to(reports.num_examples.device)
        up, counts = trees.at((reports.up, reports.num_examples), there)
        reports = Reports(reports.clients[rows], up, counts)
    return reports._replace(failed=failed)


def _last_of_each(arrived: list[Arrived]) -> list[Arrived]:
    """The same, where a client's last answer takes the place of those before it."""
    last = {a.item.client: a.item.version for a in arrived if not a.outcome}
    kept = []
    for item, outcome in arrived:
        is_old = not outcome and item.version != last[item.client]
        kept.append(Arrived(item, "superseded" if is_old else outcome))
    return kept


class _Found(Exception):
    """The first exchange of a method's round."""

    def __init__(self, fn: ClientFunction, down: Tree) -> None:
        super().__init__()
        self.fn, self.down = fn, down


class _Probe(Round):
    """A round whose doors do nothing but say what was asked for."""

    def mean(self, fn: Any, clients: Tensor, down: Tree, *_: Any, **__: Any) -> Mean:
        raise _Found(fn, down)

    def each(self, fn: Any, clients: Tensor, down: Tree) -> Iterator[Reports]:
        raise _Found(fn, down)


def first_exchange(
    method: Method[Any], server: Any, task: Task
) -> tuple[ClientFunction, Tree]:
    """(the client function of a method's first exchange, the message that it gets)."""
    nobody = torch.empty(0, dtype=torch.int64)
    memory = _NoMemory()
    probe = _Probe(0, nobody, task.population, task, memory, 0)
    try:
        method.round(server, probe)
    except _Found as found:
        return found.fn, found.down
    raise TypeError(f"{type(method).__name__} asks no client for anything")


class _NoMemory:
    """The memory of a round that comes to nothing."""

    def gather(self, clients: Tensor) -> Tree:
        return Stateless()

    def put(self, clients: Tensor, rows: Tree) -> None:
        pass
