"""Counts of one round."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fedcore.engines.readout import Readout
from fedcore.errors import RunError
from fedcore.messages.aggregation.aggregator import Aggregated
from fedcore.messages.secure.reading import Recovered
from fedcore.method import evaluates
from fedcore.types import ClientFunction, Tree

LISTED = 20
"""Clients that a row of metrics.jsonl names for one reason, at most."""

WEIGHTED = 100
"""Clients whose weights a row has one by one, at most; clients.parquet has all."""


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
    is_secret: bool = False  # of messages nothing is known but sums
    reported: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)  # client -> kind of reason
    failed_in: dict[int, str] = field(default_factory=dict)  # client -> function
    # (client, version that its work started from) -> kind of reason
    failed_work: dict[tuple[int, int | None], str] = field(default_factory=dict)
    again: int = 0  # reports of clients beside their first one, of other versions
    reasons: dict[str, str] = field(default_factory=dict)  # kind -> the first in full
    # Clients whose message was longer than the bound on its norm, and those whose
    # number of examples was above the cap.
    clipped: set[int] = field(default_factory=set)
    capped: set[int] = field(default_factory=set)
    # By client function and vector (a field of its message): what the rule made of it.
    aggregation: dict[tuple[str, str], Aggregated] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    is_skipped: bool = False
    is_broken: bool = False  # the server's state after the round was not finite
    # By vector of a message: its norm before any bound, one number a client.
    norms: dict[str, array[float]] = field(default_factory=dict)
    # By scalar: the values of clients with examples, one number a client.
    values: dict[str, array[float]] = field(default_factory=dict)
    # By client function: the secure sum of its messages.
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)  # of scalars in such sums
    # The first exchange of the round that failed, or the first at all.
    exchange: Exchange | None = None
    # By client function: the messages of each client.
    senders: dict[str, Counter[int]] = field(default_factory=dict)

    @property
    def num_reports(self) -> int:
        """Reports, where a client may have several: of several versions."""
        return len(self.reported) + self.again

    def add(
        self,
        fn: ClientFunction,
        readout: Readout,
        versions: Mapping[int, int] | None = None,
    ) -> None:
        """Count the clients that answered to `fn`, or failed in it.

        `versions` of the model that each one got, where they may be older ones.
        """
        clients = readout.clients.tolist()
        self.bytes_up += readout.nbytes
        for client, reason in readout.failed.items():
            kind = reason.split(":")[0]
            self.failed[client], self.failed_in[client] = kind, fn.__name__
            version = None if versions is None else versions[client]
            self.failed_work[client, version] = kind
            self.reasons.setdefault(kind, reason)
        if not readout.has_message:  # work without a message is no report
            return
        if not evaluates(fn):
            # Messages that did not arrive may have been read by others.
            senders = self.senders.setdefault(fn.__name__, Counter())
            senders.update([*clients, *readout.failed])
        self.asked.update(clients)
        if versions is not None:
            self.again += len(self.reported.intersection(clients))
        self.reported.update(clients)
        # A client without examples has no loss, and counts in no median of losses.
        has_examples = readout.num_examples > 0
        is_whole = bool(has_examples.all())
        for name, column in readout.metrics.items():
            values = column if is_whole else column[has_examples]
            if len(values):
                self.values.setdefault(name, array("d")).extend(values.tolist())

    def leave_out(self, fn: ClientFunction, reasons: dict[int, str]) -> None:
        """Count clients whose answers are not waited for.

        They send them all the same, later.
        """
        for client, reason in reasons.items():
            kind = reason.split(":")[0]
            self.failed[client], self.failed_in[client] = kind, fn.__name__
            self.reasons.setdefault(kind, reason)
        self.senders.setdefault(fn.__name__, Counter()).update([*reasons])

    def add_norms(self, norms: dict[str, Tensor]) -> None:
        """Norms of clients' vectors, [n], by name."""
        for name, values in norms.items():
            self.norms.setdefault(name, array("d")).extend(values.tolist())

    def add_sum(self, function: str, total: Recovered, guarded: dict[str, int]) -> None:
        """Note what is known of a secure sum beside the sum, and what guards it."""
        counts = total.counts
        entries = max(total.num_entries * counts.clients, 1)
        self.sums[function] = {
            "clients": counts.clients,
            **guarded,
            "weight": total.weight,
            "clipped": counts.clipped / entries,
            "capped": counts.capped,
        }
        if not self.hides_scalars:
            self.means.update(total.scalars)

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
        senders = self.senders.get(fn.__name__, Counter())
        again = senders.keys() & set(clients.tolist())
        if again:
            raise RunError(
                f"noise for privacy: the method asks client {min(again)} for "
                f'"{fn.__name__}" twice in one round, with the same noise in both '
                "messages; give the second request a client function of its own"
            )

    def messages(self, before: Tensor) -> Tensor:
        """Messages of each client so far, int64; [0] where they are not counted."""
        after = before.clone()
        if len(before):
            for senders in self.senders.values():
                for client, number in senders.items():
                    if 0 <= client < len(before):
                        after[client] += number
        return after

    def row(self) -> dict[str, Any]:
        """The round's counts, as metrics.jsonl has them."""
        dropped = Counter(self.failed.values())
        if self.is_broken:
            dropped["server not finite"] += 1
        row: dict[str, Any] = {
            "cohort": len(self.asked) + self.again,
            "reports": self.num_reports,
            "dropped": dict(dropped),
            "skipped": self.is_skipped,
        }
        if self.failed:
            row["left_out"] = self._left_out()
        for name, clients in (("clipped", self.clipped), ("capped", self.capped)):
            if clients:
                row[name] = first_clients(clients)
                row[f"num_{name}"] = len(clients)
        for (function, vector), aggregated in self.aggregation.items():
            row.setdefault("weights", {})[f"{function}.{vector}"] = listed(aggregated)
        for name, values in self.norms.items():
            low, median, high = quantiles(values)
            spread = {"p10": low, "median": median, "p90": high}
            row.setdefault("update_norm", {})[name] = spread
        for name, values in self.values.items():
            low, median, high = quantiles(values)
            row[f"train_{name}"] = median
            row[f"train_{name}_spread"] = {"p10": low, "p90": high}
        for name, mean in self.means.items():
            row[f"train_{name}"] = mean
        if self.sums:
            row["secure"] = self.sums
        return row | {"bytes_down": self.bytes_down, "bytes_up": self.bytes_up}

    def _left_out(self) -> dict[str, list[int]]:
        """The first clients that were left out, by reason; `dropped` counts them."""
        clients: dict[str, list[int]] = {}
        for client, kind in self.failed.items():
            clients.setdefault(kind, []).append(client)
        return {kind: first_clients(several) for kind, several in clients.items()}


def first_clients(clients: Iterable[int]) -> list[int]:
    """The clients with the lowest ids, as many as a row names.

    >>> first_clients({9, 4})
    [4, 9]
    """
    return sorted(clients)[:LISTED]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lowest tenth's bound, the median, and the highest tenth's, of clients.

    Each client counts the same, whatever number of examples it claims: so one that lies
    moves them no further than to an honest client's value. The mean would be its own.

    >>> low, median, high = quantiles([0.5, 0.6, 0.7, 0.8, 1e30])
    >>> print(f"{low:.2f} {median:.2f}")
    0.54 0.70
    """
    ordered = np.asarray(values, dtype=np.float64)
    # Not a number is no small loss.
    ordered = np.sort(np.where(np.isnan(ordered), np.inf, ordered))
    low, median, high = (_quantile(ordered, share) for share in (0.1, 0.5, 0.9))
    return low, median, high


def _quantile(ordered: np.ndarray, share: float) -> float:
    """Linear between the two values around it; NumPy's is NaN beside an infinity."""
    place = share * (len(ordered) - 1)
    number = int(place)
    rest = place - number
    value = float(ordered[number])
    if rest == 0:
        return value
    return value + rest * (float(ordered[number + 1]) - value)


def listed(aggregated: Aggregated) -> dict[str, Any]:
    """Weights as a row of metrics.jsonl has them: one by one where they are few.

    The ids that follow are of clients without any weight.
    """
    clients, weights, norm_ratios, distances = aggregated
    unused = clients[weights == 0].tolist()
    row: dict[str, Any] = {"unused": first_clients(unused), "num_unused": len(unused)}
    if len(clients) <= WEIGHTED:
        row["clients"] = clients.tolist()
        columns = {
            "weight": weights,
            "norm_ratio": norm_ratios,
            "distance": distances,
        }
        for name, column in columns.items():
            row[name] = [float(f"{value:.4g}") for value in column.tolist()]
    return row
