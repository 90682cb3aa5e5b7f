"""A watch over the rounds of a run: clients that fail, and losses that jump."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedcore.rounds.client_table import read_clients
from fedcore.rounds.history import History, Row
from fedcore.rounds.observer import NOTES, Notes
from fedcore.rounds.tally import LISTED, Tally, first_clients
from fedcore.rounds.trouble import FAILING, NO_FAULT, failing_clients

__all__ = ["Jump", "Watch", "clients_text"]

log = logging.getLogger("fedcore")

NOTICED = 0.01
"""Part of the first test loss that a rise must have to be a jump, however small the
loss before: near an optimum it may rise tenfold and mean nothing."""


class Jump(NamedTuple):
    """A test loss that is far above that of the evaluation before."""

    number: int  # the round in which it was found
    since: int  # the round of the evaluation before
    before: float
    after: float | None  # None where it is not finite
    # Clients that reported since, or in this round where those are more than LISTED.
    clients: list[int]
    num_clients: int
    is_all: bool  # whether they are all since the evaluation before
    factor: float  # checkpoint.jump

    def field(self) -> dict[str, Any]:
        """The jump as a row of metrics.jsonl has it."""
        return {
            "since": self.since,
            "from": self.before,
            "clients": self.clients,
            "num_clients": self.num_clients,
        }

    def text(self) -> str:
        """The jump in one line."""
        rise = "a number that is not finite"
        if self.after is not None:
            rise = f"{self.after:.4g}, {self.after / self.before:.3g} times as much"
        when = f"since round {self.since}" if self.is_all else f"in round {self.number}"
        who = clients_text(self.clients, self.num_clients)
        return (
            f"round {self.number}: THE TEST LOSS JUMPED from {self.before:.4g} in "
            f"round {self.since} to {rise} (checkpoint.jump = {self.factor:g}); "
            f"reports {when}: {who}"
        )

    def advice(self, folder: Path, rounds: list[int], remedy: str) -> str:
        """As `text`, and how to go back in `folder` to one of the `rounds` kept.

        `remedy` is what bears liars from there on.
        """
        before = [number for number in rounds if number <= self.since]
        back = "no checkpoint from before it is there: start a new run"
        if before:
            back = f"go back: fedcore run --resume {folder} --round {before[-1]}"
        return f"{self.text()}; {back}, {remedy}"


class Watch:
    """Counts over the rounds of one run, and what the user is told of them."""

    def __init__(
        self, notes: Notes, jump: float, usual: frozenset[str] = frozenset()
    ) -> None:
        """`jump` is the factor between two test losses from which on they jump.

        Clients that are left out for a `usual` reason are counted, and not named.
        """
        self._notes, self._factor, self._usual = notes, jump, usual
        # Clients left out of their last round: how often in a row, and why.
        self._failing: dict[int, tuple[int, str]] = {}
        self._told: set[tuple[int, str]] = set()
        # Clients that reported since the last evaluation; when they are more than
        # LISTED, those of the last round count alone.
        self._since: set[int] = set()
        self._last: frozenset[int] = frozenset()

    def resume(self, folder: Path, history: History) -> None:
        """Take up the counts of a run that goes on after the rounds in `history`."""
        import pyarrow as pa

        rounds = len(history)
        if rounds == 0:
            return
        try:
            self._failing = failing_clients(folder, rounds)
            table = read_clients(folder, up_to=rounds, columns=["round"])
        except (OSError, pa.ArrowException) as error:
            log.warning("who failed before round %d is not known: %s", rounds, error)
            return
        since = int(history.last_row("test_loss").get("round", 0))
        recent = table.filter(_reported_after(since))
        self._reported(recent["client"].to_pylist())

    def close_round(self, number: int, tally: Tally) -> dict[str, Any]:
        """Count a round, and tell of it; the fields that its row gets."""
        self._tell(number, tally)
        self._last = frozenset(tally.reported)
        self._reported(tally.reported)
        newly = self._count(tally)
        if newly:
            kinds = sorted({self._failing[client][1] for client in newly})
            self._notes.once(
                f"failing {newly[0]}",
                f"round {number}: left out {FAILING} times in a row, and failing: "
                f"{clients_text(first_clients(newly), len(newly))} "
                f"({', '.join(kinds)})",
            )
        failing: list[dict[str, Any]] = []
        for client, (streak, kind) in self._failing.items():
            if streak >= FAILING:
                failing.append({"client": client, "rounds": streak, "reason": kind})
        if not failing:
            return {}
        failing.sort(key=lambda entry: (-entry["rounds"], entry["client"]))
        return {"failing": failing[:LISTED], "num_failing": len(failing)}

    def _count(self, tally: Tally) -> list[int]:
        """Enter a round's clients; those that are failing from this round on."""
        newly = []
        faults = _faults(tally.failed)
        for client in tally.reported.difference(faults):
            self._failing.pop(client, None)
        for client, kind in faults.items():
            streak = self._failing.get(client, (0, ""))[0] + 1
            self._failing[client] = (streak, kind)
            if streak == FAILING:
                newly.append(client)
        return sorted(newly)

    def _tell(self, number: int, tally: Tally) -> None:
        """Name all clients of a kind of reason where one is new in it."""
        kinds: dict[str, list[int]] = {}
        for client, kind in _faults(tally.failed).items():
            if kind not in self._usual:
                kinds.setdefault(kind, []).append(client)
        for kind, clients in kinds.items():
            reason = tally.reasons.get(kind, kind)
            self._name(number, kind, clients, f"left out: {reason}")
        cap = "claimed more examples than aggregation.max_examples"
        self._name(number, "capped", sorted(tally.capped), cap)
        if tally.clipped:
            clipped = clients_text(first_clients(tally.clipped), len(tally.clipped))
            message = (
                f"round {number}: messages longer than aggregation.clip: {clipped}"
            )
            self._notes.once("clipped", message)

    def _name(self, number: int, kind: str, clients: list[int], what: str) -> None:
        is_new = any((client, kind) not in self._told for client in clients)
        if not is_new or len(self._told) >= NOTES * LISTED:
            return
        self._told.update((client, kind) for client in clients)
        # One client alone was named when its report came.
        if len(clients) > 1 or kind == "capped":
            who = clients_text(first_clients(clients), len(clients))
            text = f"round {number}: {who}: {what}"
            self._notes.once(f"{kind} {first_clients(clients)}", text)

    def _reported(self, clients: Iterable[int]) -> None:
        for client in clients:
            if len(self._since) > LISTED:
                return
            self._since.add(client)

    def jump(self, row: Row, history: History) -> Jump | None:
        """The jump of the test loss in this round; `history` is that before it."""
        if "test_loss" not in row:
            return None
        since, last = self._since, self._last
        self._since = set()
        before_row = history.last_row("test_loss")
        before, after = before_row.get("test_loss"), row["test_loss"]
        if before is None or before <= 0:  # no factor between such losses
            return None
        if history.evaluated.get("test_loss") is None and after is None:
            return None  # it was told
        first = next(filter(None, (row.get("test_loss") for row in history)))
        if after is not None:
            is_noticed = after - before >= NOTICED * abs(first)
            if after < self._factor * before or not is_noticed:
                return None
        is_all = len(since) <= LISTED
        clients = since if is_all else last
        return Jump(
            row["round"],
            before_row["round"],
            before,
            after,
            first_clients(clients),
            len(clients),
            is_all,
            self._factor,
        )


def _faults(failed: Mapping[int, str]) -> dict[int, str]:
    """The clients that were left out for a reason of their own, by id."""
    faults = {}
    for client, kind in sorted(failed.items()):
        if kind not in NO_FAULT:
            faults[client] = kind
    return faults


def _reported_after(number: int) -> Any:
    """The rows of reports after round `number`."""
    import pyarrow.compute as pc

    return (pc.field("round") > number) & (pc.field("left_out") == "")


def clients_text(clients: list[int], num: int) -> str:
    """Clients by name, the first of `num`.

    >>> clients_text([3, 7, 9], 12)
    'clients 3, 7, 9 and 9 more'
    >>> clients_text([3], 1)
    'client 3'
    """
    names = ", ".join(map(str, clients))
    if num == 1:
        return f"client {names}"
    more = f" and {num - len(clients):,} more" if num > len(clients) else ""
    return f"clients {names}{more}" if clients else "no client"
