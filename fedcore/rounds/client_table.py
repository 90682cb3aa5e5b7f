"""`clients.parquet`: a row for each round, client function and client.

A client that was left out of a round has a row too, with the reason in `left_out`.

A run writes the table in pieces. `clients/000012.parquet` holds the rows from the piece
before it up to round 12, so that a checkpoint costs as much as is new in it. When a run
ends or is stopped, `merge` joins the pieces to the one file `clients.parquet`; after a
kill they stay, and `read_clients` reads both. A resumed run drops the rows of rounds
that it runs again (`cut`), and goes on from there.
"""

from __future__ import annotations

import io
import logging
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.storage.checkpoint import replacing, write_atomically
from fedcore.storage.faults import writing

if TYPE_CHECKING:
    import pyarrow as pa

    from fedcore.engines.readout import Readout
    from fedcore.messages.aggregation.aggregator import Aggregated
    from fedcore.rounds.tally import Tally

log = logging.getLogger("fedcore")

TABLE = "clients.parquet"
PIECES = "clients"
ROW_GROUP = 2**17  # rows that are in memory at a time while pieces are joined


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
        import pyarrow.parquet as pq

        rows = bisect_right(self._rounds, number)
        if rows == 0:
            return
        file = self.folder / PIECES / _piece_name(int(self._rounds[rows - 1]))
        with writing(file.parent):
            file.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        pq.write_table(self._first(rows), content, compression="zstd")
        write_atomically(file, content.getvalue())
        del self._rounds[:rows], self._functions[:rows], self._left_out[:rows]
        for column in self._numbers.values():
            del column[:rows]
        for flags in self._flags.values():
            del flags[:rows]

    def cut(self, number: int) -> None:
        """Drop the rows after round `number` from disk, as those rounds are run again.

        A file that cannot be read is put aside, with a warning: it costs its own rows.
        """
        import pyarrow as pa

        for file in [*_pieces(self.folder), self.folder / TABLE]:
            if not file.exists():
                continue
            try:
                _cut_file(file, number)
            except (OSError, pa.ArrowException) as error:
                aside = file.replace(file.with_name(f"{file.name}.damaged"))
                message = "%s cannot be read (%s): its rows are left out; it is now %s"
                log.warning(message, file, error, aside.name)

    def merge(self) -> None:
        """Join the pieces to `clients.parquet`; where that fails, they stay."""
        import pyarrow as pa

        pieces = _pieces(self.folder)
        if not pieces:
            return
        try:
            _join(self.folder)
            for piece in pieces:
                piece.unlink()
            if not any((self.folder / PIECES).iterdir()):
                (self.folder / PIECES).rmdir()
        except (OSError, pa.ArrowException) as error:
            log.warning("%s: the rows of clients stay in pieces: %s", pieces[0], error)

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
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pc.scalar(True)
    if function is not None:
        wanted &= pc.field("function") == function
    if up_to is not None:
        wanted &= pc.field("round") <= up_to
    tables: list[pa.Table] = []
    for piece in _pieces(folder):
        try:
            tables.append(_read(piece, wanted, columns))
        except FileNotFoundError:
            continue  # joined in this moment, and read below
    if (folder / TABLE).exists():
        joined = _read(folder / TABLE, wanted, columns)
        last = _last_round(folder / TABLE)
        newer = pc.field("round") > last
        tables = [joined, *(table.filter(newer) for table in tables)]
    if not tables:
        return _base_schema().empty_table()
    schema = _common_schema([table.schema for table in tables])
    return pa.concat_tables(_filled(table, schema) for table in tables)


def _read(file: Path, wanted: pa.Expression, columns: Sequence[str] | None) -> pa.Table:
    """The rows of one file that are wanted, in those of `columns` that it has."""
    import pyarrow.parquet as pq

    there = None
    if columns is not None:
        names = pq.read_schema(file).names
        there = [name for name in names if name in {*columns, *_base_schema().names}]
    return pq.read_table(file, columns=there, filters=wanted)


def _pieces(folder: Path) -> list[Path]:
    """The files of the pieces, in order of rounds."""
    return sorted((folder / PIECES).glob("*.parquet"), key=lambda file: int(file.stem))


def _piece_name(last_round: int) -> str:
    return f"{last_round:06d}.parquet"


def _last_round(file: Path) -> int:
    """The largest round in a file, from its footer; 0 for an empty table."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    column = metadata.schema.names.index("round")
    last = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        last = max(last, statistics.max)
    return last


def _cut_file(file: Path, number: int) -> None:
    """Leave the rows up to round `number` in a file, and no file without rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if _last_round(file) <= number:
        return
    rows = pq.read_table(file, filters=pc.field("round") <= number)
    shorter = file
    if file.name != TABLE and len(rows) > 0:
        # A piece is named by its last round; the next one may take the name it had.
        shorter = file.with_name(_piece_name(pc.max(rows["round"]).as_py()))
    if len(rows) > 0:
        with replacing(shorter) as sink:
            pq.write_table(rows, sink, compression="zstd")
    if len(rows) == 0 or shorter != file:
        file.unlink()


def _join(folder: Path) -> None:
    """Replace `clients.parquet` by its rows and those of the newer pieces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = folder / TABLE
    files = _pieces(folder)
    if table.exists():
        last = _last_round(table)  # pieces up to it were joined before a kill
        files = [table, *(file for file in files if int(file.stem) > last)]
    schema = _common_schema([pq.read_schema(file) for file in files])
    with (
        replacing(table) as sink,
        pq.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        waiting: list[pa.Table] = []
        num_waiting = 0
        for rows in _batches(files, schema):
            waiting.append(rows)
            num_waiting += len(rows)
            if num_waiting >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting, num_waiting = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _batches(files: list[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of files one after another, at most ROW_GROUP of them at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(ROW_GROUP):
                yield _filled(pa.Table.from_batches([batch]), schema)


def _base_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("round", pa.int32()),
            ("function", pa.string()),
            ("client", pa.int64()),
            ("num_examples", pa.float64()),
            ("left_out", pa.string()),
        ]
    )


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    """Every column of any of them, in the order in which they appeared."""
    import pyarrow as pa

    plain = [schema.remove_metadata() for schema in schemas]
    return pa.unify_schemas([_base_schema(), *plain])


def _filled(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows with the columns of `schema`; those that they lack are NaN, "" or false."""
    import pyarrow as pa

    empty = {pa.string(): "", pa.bool_(): False}
    columns = []
    for field in schema:
        if field.name in rows.column_names:
            columns.append(rows[field.name])
        else:
            value = pa.scalar(empty.get(field.type, math.nan), field.type)
            columns.append(pa.repeat(value, len(rows)))
    return pa.table(columns, schema=schema)
