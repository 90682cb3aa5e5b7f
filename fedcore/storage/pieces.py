"""A table of a run, written in pieces: Parquet files that are joined at its end.

`clients/000012.parquet` holds the rows from the piece before it up to round 12, so that
a checkpoint costs as much as is new in it. When a run ends or is stopped, `merge` joins
the pieces to the one file `clients.parquet`; after a kill they stay, and `read` reads
both. A resumed run drops the rows of rounds that it runs again (`cut`), and goes on
from there.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.storage.checkpoint import replacing, write_atomically
from fedcore.storage.faults import writing

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("fedcore")

ROW_GROUP = 2**17  # rows that are in memory at a time while pieces are joined


class Pieces:
    """The files of one table in a run directory."""

    def __init__(self, folder: Path, name: str, key: str, base: pa.Schema) -> None:
        """Nothing is read or written yet.

        `name` is that of the folder of pieces, and of the file, `key` the column that
        counts rounds: whole numbers that never fall from a row to the next. `base` are
        the columns that every file has, or gets when it is read.
        """
        self.folder, self.name, self.key, self.base = folder, name, key, base
        self.table = folder / f"{name}.parquet"

    def files(self) -> list[Path]:
        """The files of the pieces, in order of rounds."""
        files = (self.folder / self.name).glob("*.parquet")
        return sorted(files, key=lambda file: int(file.stem))

    def write(self, rows: pa.Table, last: int) -> None:
        """Write a piece of rows up to round `last`."""
        import pyarrow.parquet as pq

        file = self.folder / self.name / _file_name(last)
        with writing(file.parent):
            file.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        pq.write_table(rows, content, compression="zstd")
        write_atomically(file, content.getvalue())

    def cut(self, number: int) -> None:
        """Drop the rows after round `number` from disk, as those rounds are run again.

        A file that cannot be read is put aside, with a warning: it costs its own rows.
        """
        import pyarrow as pa

        for file in [*self.files(), self.table]:
            if not file.exists():
                continue
            try:
                self._cut_file(file, number)
            except (OSError, pa.ArrowException) as error:
                aside = file.replace(file.with_name(f"{file.name}.damaged"))
                message = "%s cannot be read (%s): its rows are left out; it is now %s"
                log.warning(message, file, error, aside.name)

    def merge(self) -> None:
        """Join the pieces to one file; where that fails, they stay."""
        import pyarrow as pa

        pieces = self.files()
        if not pieces:
            return
        try:
            self._join()
            for piece in pieces:
                piece.unlink()
            if not any((self.folder / self.name).iterdir()):
                (self.folder / self.name).rmdir()
        except (OSError, pa.ArrowException) as error:
            message = "%s: the rows of %s stay in pieces: %s"
            log.warning(message, pieces[0], self.name, error)

    def read(
        self,
        wanted: pa.Expression | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The rows that are wanted, whether the run has ended, goes on or was killed.

        Raises OSError or pyarrow's ArrowException for a file that cannot be read.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        tables: list[pa.Table] = []
        for piece in self.files():
            try:
                tables.append(self._read(piece, wanted, columns))
            except FileNotFoundError:
                continue  # joined in this moment, and read below
        if self.table.exists():
            joined = self._read(self.table, wanted, columns)
            newer = pc.field(self.key) > self._last(self.table)
            tables = [joined, *(table.filter(newer) for table in tables)]
        if not tables:
            return self.base.empty_table()
        schema = self._common_schema([table.schema for table in tables])
        return pa.concat_tables(_filled(table, schema) for table in tables)

    def _read(
        self, file: Path, wanted: pa.Expression | None, columns: Sequence[str] | None
    ) -> pa.Table:
        """The rows of one file that are wanted, in those of `columns` that it has."""
        import pyarrow.parquet as pq

        there = None
        if columns is not None:
            names = pq.read_schema(file).names
            there = [name for name in names if name in {*columns, *self.base.names}]
        return pq.read_table(file, columns=there, filters=wanted)

    def _last(self, file: Path) -> int:
        """The largest round in a file, from its footer; 0 for an empty table."""
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(file)
        column = metadata.schema.names.index(self.key)
        last = 0
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            last = max(last, statistics.max)
        return last

    def _cut_file(self, file: Path, number: int) -> None:
        """Leave the rows up to round `number` in a file, and no file without rows."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if self._last(file) <= number:
            return
        rows = pq.read_table(file, filters=pc.field(self.key) <= number)
        shorter = file
        if file != self.table and len(rows) > 0:
            # A piece is named by its last round; the next one may take the name it had.
            shorter = file.with_name(_file_name(pc.max(rows[self.key]).as_py()))
        if len(rows) > 0:
            with replacing(shorter) as sink:
                pq.write_table(rows, sink, compression="zstd")
        if len(rows) == 0 or shorter != file:
            file.unlink()

    def _join(self) -> None:
        """Replace the one file by its rows and those of the newer pieces."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = self.files()
        if self.table.exists():
            last = self._last(self.table)  # pieces up to it were joined before a kill
            newer = [file for file in files if int(file.stem) > last]
            files = [self.table, *newer]
        schema = self._common_schema([pq.read_schema(file) for file in files])
        with (
            replacing(self.table) as sink,
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

    def _common_schema(self, schemas: list[pa.Schema]) -> pa.Schema:
        """Every column of any of them, in the order in which they appeared."""
        import pyarrow as pa

        plain = [schema.remove_metadata() for schema in schemas]
        return pa.unify_schemas([self.base, *plain])


def _file_name(last_round: int) -> str:
    return f"{last_round:06d}.parquet"


def _batches(files: list[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of files one after another, at most ROW_GROUP of them at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(ROW_GROUP):
                yield _filled(pa.Table.from_batches([batch]), schema)


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
