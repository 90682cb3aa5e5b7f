"""`clients.parquet`: a row for each round, client function and client.

A client that was left out of a round has a row too, with the reason in `left_out`.

A run writes the table in pieces (`fedcore.storage.pieces`).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.storage.pieces import Pieces

if TYPE_CHECKING:
    import pyarrow as pa

    from fedcore.engines.readout import Readout
    from fedcore.messages.aggregation.aggregator import Aggregated
    from fedcore.rounds.tally import Tally


class ClientTable:
    """The rows of one run; those since the last checkpoint are in memory, by column."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run directory; nothing is read or written yet."""
        self.folder = folder
        # Arrays grow in place. A small tensor kept of every report would instead hold
        # on to the large freed ones around it.
        self._rounds = array("d")
        self._functions: list[str] = []
        self._left_out: list[str] = []  # the kind of reason; "" for a report
        self._flags: dict[str, array[int]] = {}  # such as "clipped": 0 or 1
        self._numbers = {"client": array("d"), "num_examples": array("d")}

    def add(
        self,
        number: int,
        function: str,
        readout: Readout,
        versions: Mapping[int, int] | None = None,
    ) -> None:
        """The rows of one report, of round `number` (from 1 on).

        `versions` of the model that each one got, where they may be older ones.

        The work is that of the new rows, however many there are already.
        """
        n = len(readout.clients)
        columns = {"client": readout.clients, "num_examples": readout.num_examples}
        # A client without examples has no loss: not a number, rather than 0.
        is_empty = readout.num_examples == 0
        columns |= readout.metrics
        if bool(is_empty.any()):
            for name, values in readout.metrics.items():
                columns[name] = values.double().masked_fill(is_empty, math.nan)
        numbers = {name: values.tolist() for name, values in columns.items()}
        if versions is not None:
            numbers["version"] = [versions[i] for i in readout.clients.tolist()]
        self._extend(number, [function] * n, [""] * n, numbers)

    def close_round(self, number: int, tally: Tally) -> None:
        """Enter what is known of round `number` when all reports are in.

        A row for each client that was left out; and for those that reported whether
        they were clipped or capped, and what a rule made of their messages. Of a round
        whose sums were secret there is no row at all.
        """
        if tally.is_secret:
            return
        first = bisect_left(self._rounds, number)
        for name, clients in (("clipped", tally.clipped), ("capped", tally.capped)):
            if clients:
                self._flag(name, clients, first)
        named: set[str] = set()
        for (function, vector), aggregated in tally.aggregation.items():
            # The first vector of a message, most often the only one, has plain names.
            suffix = f"_{vector}" if function in named else ""
            named.add(function)
            self._weigh(function, suffix, aggregated, first)
        left_out = sorted(tally.failed)
        functions = [tally.failed_in.get(client, "") for client in left_out]
        reasons = [tally.failed[client] for client in left_out]
        self._extend(number, functions, reasons, {"client": left_out})

    def _extend(
        self,
        number: int,
        functions: list[str],
        left_out: list[str],
        numbers: Mapping[str, Sequence[float]],
    ) -> None:
        """New rows of a round; columns that are not given are NaN, flags are 0."""
        before, n = len(self._rounds), len(functions)
        self._rounds.extend([number] * n)
        self._functions.extend(functions)
        self._left_out.extend(left_out)
        for name, values in numbers.items():
            self._column(name, before).extend(values)
        for column in self._numbers.values():
            if len(column) == before:
                column.extend([math.nan] * n)
        for flags in self._flags.values():
            flags.extend([0] * n)

    def _column(self, name: str, rows: int) -> array[float]:
        """The numbers of this name; NaN in `rows` rows where they are new."""
        if name not in self._numbers:
            self._numbers[name] = array("d", [math.nan]) * rows
        return self._numbers[name]

    def _flag(self, name: str, clients: Set[int], first: int) -> None:
        """Set the flag in the rows of these clients, from row `first` on."""
        rows = len(self._rounds)
        flags = self._flags.setdefault(name, array("b", [0]) * rows)
        ids = self._numbers["client"]
        for row in range(first, rows):
            flags[row] = int(ids[row]) in clients

    def _weigh(
        self, function: str, suffix: str, aggregated: Aggregated, first: int
    ) -> None:
        """Enter weights in the rows of a client function, from row `first` on."""
        rows, ids = len(self._rounds), self._numbers["client"]
        row_of: dict[int, int] = {}
        for row in range(first, rows):
            if self._functions[row] == function:
                row_of[int(ids[row])] = row
        columns = {
            "weight": aggregated.weights,
            "norm_ratio": aggregated.norm_ratios,
            "distance": aggregated.distances,
        }
        clients = aggregated.clients.tolist()
        for name, values in columns.items():
            column = self._column(f"{name}{suffix}", rows)
            for client, value in zip(clients, values.tolist(), strict=True):
                if client in row_of:
                    column[row_of[client]] = value

    def write(self, number: int) -> None:
        """Write a piece with the rows up to round `number` that no piece has yet."""
        rows = bisect_right(self._rounds, number)
        if rows == 0:
            return
        _pieces(self.folder).write(self._first(rows), int(self._rounds[rows - 1]))
        del self._rounds[:rows], self._functions[:rows], self._left_out[:rows]
        for column in self._numbers.values():
            del column[:rows]
        for flags in self._flags.values():
            del flags[:rows]

    def cut(self, number: int) -> None:
        """Drop the rows after round `number` from disk, as those rounds are run again.

        A file that cannot be read is put aside, with a warning: it costs its own rows.
        """
        _pieces(self.folder).cut(number)

    def merge(self) -> None:
        """Join the pieces to `clients.parquet`; where that fails, they stay."""
        _pieces(self.folder).merge()

    def _first(self, rows: int) -> pa.Table:
        """The first rows in memory, as a table."""
        import pyarrow as pa

        columns: dict[str, Any] = {
            "round": np.asarray(self._rounds)[:rows].astype(np.int32),
            "function": self._functions[:rows],
        }
        for name, column in self._numbers.items():
            columns[name] = np.asarray(column)[:rows].copy()
        columns["left_out"] = self._left_out[:rows]
        for name, flags in self._flags.items():
            columns[name] = np.asarray(flags)[:rows].astype(bool)
        columns["client"] = columns["client"].astype(np.int64)
        return pa.table(columns)


def read_clients(
    folder: Path,
    function: str | None = None,
    up_to: int | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The rows of a run directory, whether its run has ended, goes on or was killed.

    Columns: round (from 1 on), function, client, num_examples, left_out (the reason, ""
    for a report), and one a metric, NaN where a client did not report it, or has no
    example. Where there was any: clipped, capped, and of a rule the client's weight,
    norm_ratio (to the median norm) and distance to the result. `function` and round
    `up_to` select rows, `columns` those columns that are there. Raises OSError or
    pyarrow's ArrowException for a file that cannot be read.
    """
    import pyarrow.compute as pc

    wanted = pc.scalar(True)
    if function is not None:
        wanted &= pc.field("function") == function
    if up_to is not None:
        wanted &= pc.field("round") <= up_to
    return _pieces(folder).read(wanted, columns)


def _pieces(folder: Path) -> Pieces:
    import pyarrow as pa

    columns = [
        ("round", pa.int32()),
        ("function", pa.string()),
        ("client", pa.int64()),
        ("num_examples", pa.float64()),
        ("left_out", pa.string()),
    ]
    return Pieces(folder, "clients", "round", pa.schema(columns))
