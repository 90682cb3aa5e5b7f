"""Counts of one round."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fedcore.engines.readout import Readout
from fedcore.errors import RunError
from fedcore.method import evaluates
from fedcore.types import ClientFunction, Tree


class Exchange(NamedTuple):
    """Work that a client was asked for, and why nothing came of it."""

    fn: ClientFunction
    down: Tree
    client: int
    reason: str  # "" where its update arrived


@dataclass
class Tally:
    """Counts of one round. A client counts once, however often it was asked."""

    asked: set[int]
    # Clients add noise, so that their scalars say nothing, and are not logged.
    hides_scalars: bool = False
    reported: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)  # client -> reason
    bytes_down: int = 0
    bytes_up: int = 0
    is_skipped: bool = False
    is_broken: bool = False  # the server's state after the round was not finite
    # By scalar: its sum, and the clients in it.
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    # The first exchange of the round that failed, or the first at all.
    exchange: Exchange | None = None
    # By client function: the clients that sent a message.
    senders: dict[str, set[int]] = field(default_factory=dict)

    def add(self, fn: ClientFunction, readout: Readout) -> None:
        """Count the clients that answered to `fn`, or failed in it."""
        clients = readout.clients.tolist()
        self.bytes_up += readout.nbytes
        for client, reason in readout.failed.items():
            self.failed[client] = reason.split(":")[0]
        if not readout.has_message:  # work without a message is no report
            return
        if not evaluates(fn):
            # Messages that did not arrive may have been read by others.
            senders = self.senders.setdefault(fn.__name__, set())
            senders.update(clients, readout.failed)
        self.asked.update(clients)
        self.reported.update(clients)
        # A client without examples has no loss, and counts in no mean of losses.
        has_examples = readout.num_examples > 0
        is_whole = bool(has_examples.all())
        for name, column in readout.metrics.items():
            values = column if is_whole else column[has_examples]
            if len(values):
                total, n = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + float(values.sum()), n + len(values)

    def remember(self, fn: ClientFunction, down: Tree, readout: Readout) -> None:
        """Keep the first exchange that failed, for the advice to the user."""
        if self.exchange is not None and self.exchange.reason:
            return
        for client, reason in readout.failed.items():
            self.exchange = Exchange(fn, down, client, reason)
            return
        if self.exchange is None and len(readout.clients):
            self.exchange = Exchange(fn, down, int(readout.clients[0]), "")

    def refuse_twice(self, fn: ClientFunction, clients: Tensor) -> None:
        """Raises RunError where a client is asked for the same message again.

        Noise has a key of function, round and client: the difference of two messages of
        one key would be bare.
        """
        again = self.senders.get(fn.__name__, set()).intersection(clients.tolist())
        if again:
            raise RunError(
                f"defence.noise_multiplier: the method asks client {min(again)} for "
                f'"{fn.__name__}" twice in one round, with the same noise in both '
                "messages; give the second request a client function of its own"
            )

    def messages(self, before: Tensor) -> Tensor:
        """Messages of each client so far, int64; [0] where they are not counted."""
        after = before.clone()
        if len(before):
            for senders in self.senders.values():
                after[[client for client in senders if 0 <= client < len(before)]] += 1
        return after

    def row(self) -> dict[str, Any]:
        """The round's counts, as metrics.jsonl has them."""
        dropped = Counter(self.failed.values())
        if self.is_broken:
            dropped["server not finite"] += 1
        row: dict[str, Any] = {
            "cohort": len(self.asked),
            "reports": len(self.reported),
            "dropped": dict(dropped),
            "skipped": self.is_skipped,
        }
        for name, (total, n) in self.sums.items():
            row[f"train_{name}"] = total / n
        return row | {"bytes_down": self.bytes_down, "bytes_up": self.bytes_up}
