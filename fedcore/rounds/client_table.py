"""`clients.parquet`: a row for each round, client function and client that reported.

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
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.storage.checkpoint import replacing, write_atomically
from fedcore.storage.faults import writing

if TYPE_CHECKING:
    import pyarrow as pa

    from fedcore.engines.readout import Readout

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
        self._numbers = {"client": array("d"), "num_examples": array("d")}

    def add(self, number: int, function: str, readout: Readout) -> None:
        """The rows of one report, of round `number` (from 1 on).

        The work is that of the new rows, however many there are already.
        """
        before, n = len(self._rounds), len(readout.clients)
        self._rounds.extend([number] * n)
        self._functions.extend([function] * n)
        columns = {"client": readout.clients, "num_examples": readout.num_examples}
        # A client without examples has no loss: not a number, rather than 0.
        is_empty = readout.num_examples == 0
        columns |= readout.metrics
        if bool(is_empty.any()):
            for name, values in readout.metrics.items():
                columns[name] = values.double().masked_fill(is_empty, math.nan)
        for name, values in columns.items():
            if name not in self._numbers:
                self._numbers[name] = array("d", [math.nan]) * before
            self._numbers[name].extend(values.tolist())
        for column in self._numbers.values():
            if len(column) == before:
                column.extend([math.nan] * n)

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
        del self._rounds[:rows], self._functions[:rows]
        for column in self._numbers.values():
            del column[:rows]

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
        columns["client"] = columns["client"].astype(np.int64)
        return pa.table(columns)


def read_clients(
    folder: Path, function: str | None = None, up_to: int | None = None
) -> pa.Table:
    """The rows of a run directory, whether its run has ended, goes on or was killed.

    Columns: round (from 1 on), function, client, num_examples, and one a metric, NaN
    where a client did not report it, or has no example. `function` and round `up_to`
    select rows. Raises OSError or pyarrow's ArrowException for a file that cannot be
    read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = pc.scalar(True)
    if function is not None:
        wanted &= pc.field("function") == function
    if up_to is not None:
        wanted &= pc.field("round") <= up_to
    tables: list[pa.Table] = []
    for piece in _pieces(folder):
        try:
            tables.append(pq.read_table(piece, filters=wanted))
        except FileNotFoundError:
            continue  # joined in this moment, and read below
    if (folder / TABLE).exists():
        joined = pq.read_table(folder / TABLE, filters=wanted)
        last = _last_round(folder / TABLE)
        newer = pc.field("round") > last
        tables = [joined, *(table.filter(newer) for table in tables)]
    if not tables:
        return _base_schema().empty_table()
    schema = _common_schema([table.schema for table in tables])
    return pa.concat_tables(_filled(table, schema) for table in tables)


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
        ]
    )


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    """Every column of any of them, in the order in which they appeared."""
    import pyarrow as pa

    plain = [schema.remove_metadata() for schema in schemas]
    return pa.unify_schemas([_base_schema(), *plain])


def _filled(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows with the columns of `schema`; those that they lack are NaN."""
    import pyarrow as pa

    absent = pa.array(np.full(len(rows), np.nan))
    columns = []
    for name in schema.names:
        columns.append(rows[name] if name in rows.column_names else absent)
    return pa.table(columns, schema=schema)
