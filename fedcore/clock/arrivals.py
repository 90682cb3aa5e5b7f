"""`arrivals.parquet`: a row for each piece of work, when it was sent and was back.

A run writes the table in pieces (`fedcore.storage.pieces`), in order of arrival. A
client that is too late has a row in its round; in the field it has a second one, of
outcome "late", in the round in which its answer comes after all.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedcore.errors import SettingsError
from fedcore.storage.pieces import Pieces

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LATE", "NEVER", "Arrival", "Arrivals", "Columns", "read_arrivals"]

NAME = "arrivals"
TABLE = f"{NAME}.parquet"
NEVER = -1  # the time of an answer that did not come
LATE = "late"  # outcome of an answer that came after its round
LARGEST = 2**32  # ids of clients are below it, as everywhere


class Arrival(NamedTuple):
    """One piece of work of one client."""

    update: int  # the round, or server update, that it came to, from 1 on
    order: int  # of its arrival in the run, from 0 on
    client: int
    version: int  # the server updates before the model that it started from
    function: str
    sent_us: int  # microseconds since the run's start
    back_us: int  # -1 where it never came
    outcome: str  # "" usable; else the kind of reason
    bytes_down: int
    bytes_up: int
    steps: int
    work_us: int  # by the device's own clock; 0 in a simulation


Columns = dict[str, np.ndarray | list[str]]
"""Pieces of work in order of arrival, by the names of Arrival's fields: int64 [n] for
each of the numbers, n strings for each of the texts."""

TEXTS = ("function", "outcome")
NUMBERS = tuple(name for name in Arrival._fields if name not in TEXTS)


class Arrivals:
    """The rows of one run; those since the last checkpoint are in memory, by column."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run directory; nothing is read or written yet."""
        self.folder = folder
        self._numbers = {name: array("q") for name in NUMBERS}
        self._texts: dict[str, list[str]] = {name: [] for name in TEXTS}

    def add(self, arrivals: Sequence[Arrival]) -> None:
        """The rows of one round, in order of arrival; the work is that of the new."""
        if not arrivals:
            return
        columns: Columns = {}
        for name, values in zip(
            Arrival._fields, zip(*arrivals, strict=True), strict=True
        ):
            is_text = name in TEXTS
            columns[name] = [*values] if is_text else np.array(values, dtype=np.int64)
        self.add_columns(columns)

    def add_columns(self, columns: Columns) -> None:
        """As `add`; the work is not that of each row."""
        for name, numbers in self._numbers.items():
            numbers.frombytes(np.asarray(columns[name], dtype=np.int64).tobytes())
        for name, texts in self._texts.items():
            texts.extend(columns[name])

    def write(self, number: int) -> None:
        """Write a piece with the rows up to round `number` that no piece has yet."""
        updates = self._numbers["update"]
        rows = bisect_right(updates, number)
        if rows == 0:
            return
        _pieces(self.folder).write(self._first(rows), updates[rows - 1])
        for numbers in self._numbers.values():
            del numbers[:rows]
        for texts in self._texts.values():
            del texts[:rows]

    def cut(self, number: int) -> None:
        """Drop the rows after round `number` from disk, as those rounds are run again.

        A file that cannot be read is put aside, with a warning: it costs its own rows.
        """
        _pieces(self.folder).cut(number)

    def merge(self) -> None:
        """Join the pieces to `arrivals.parquet`; where that fails, they stay."""
        _pieces(self.folder).merge()

    def _first(self, rows: int) -> pa.Table:
        """The first rows in memory, as a table."""
        import pyarrow as pa

        columns: dict[str, np.ndarray | list[str]] = {}
        for name in Arrival._fields:
            if name in TEXTS:
                columns[name] = self._texts[name][:rows]
            else:
                columns[name] = np.asarray(self._numbers[name])[:rows].copy()
        return pa.table(columns, schema=_schema())


def read_arrivals(source: Path) -> pa.Table:
    """The recorded work of a run, in order of arrival, with the columns of `Arrival`.

    `source` is a run directory, whether its run has ended, goes on or was killed, or
    the file of one. Raises SettingsError where there is no such table, for other
    columns, and for the first row that no run can have written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.is_dir() or source.name == TABLE:
        folder = source if source.is_dir() else source.parent
        pieces = _pieces(folder)
        files = pieces.files()
        if pieces.table.exists():
            files.append(pieces.table)
    else:
        files, pieces = [source] if source.is_file() else [], None
    if not files:
        raise SettingsError(
            f"{source}: expected {TABLE} of a run, or the directory of a run with a "
            "clock or on devices; there is none"
        )
    try:
        for file in files:
            _refuse_columns(file, pq.read_schema(file))
        # In one thread, and not as a data set: these files are small.
        table = pieces.read() if pieces else pq.ParquetFile(source).read()
        table = table.select(list(Arrival._fields)).cast(_schema())
    except (OSError, pa.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SettingsError(f"{source} cannot be read as {TABLE}: {reason}") from error
    if table.num_rows == 0:
        raise SettingsError(f"{source} has no rows: no work of its run came to its end")
    _refuse_rows(source, table)
    return table


def _refuse_columns(file: Path, schema: pa.Schema) -> None:
    """Raises SettingsError for other columns than ours, or columns of other kinds."""
    import pyarrow as pa

    names = list(Arrival._fields)
    for name in schema.names:
        if name not in names:
            raise SettingsError(
                f'{file}: found a column "{name}", expected {", ".join(names)}: is it '
                f"{TABLE} of a run, and of this fedcore?"
            )
    for name in names:
        if schema.names.count(name) != 1:
            raise SettingsError(
                f'{file}: found {schema.names.count(name)} columns "{name}", expected '
                f"one: is it {TABLE} of a run, and of this fedcore?"
            )
        kind = schema.field(name).type
        is_right = pa.types.is_integer(kind)
        if name in TEXTS:
            is_right = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not is_right:
            expected = "texts" if name in TEXTS else "whole numbers"
            raise SettingsError(
                f'{file}: column "{name}" holds {kind}, expected {expected}'
            )


def _refuse_rows(source: Path, table: pa.Table) -> None:
    """Raises SettingsError for the first row that cannot be."""
    for name in Arrival._fields:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise _bad_row(source, row, f"no {name}, expected one")
    columns = {name: table[name].to_numpy() for name in NUMBERS}
    for name in ("client", "version", "sent_us", "bytes_down", "bytes_up", "steps"):
        _refuse_where(source, columns, name, columns[name] < 0, "0 or above")
    _refuse_where(source, columns, "work_us", columns["work_us"] < 0, "0 or above")
    is_large = columns["client"] >= LARGEST
    _refuse_where(source, columns, "client", is_large, f"an id below {LARGEST}")
    update, order, back = columns["update"], columns["order"], columns["back_us"]
    _refuse_where(source, columns, "update", update < 1, "1 or above")
    falls = np.diff(update, prepend=update[0]) < 0
    _refuse_where(source, columns, "update", falls, "at least that of the row before")
    falls = np.diff(order, prepend=order[0] - 1) <= 0
    _refuse_where(source, columns, "order", falls, "more than in the row before")
    is_newer = columns["version"] >= update
    _refuse_where(source, columns, "version", is_newer, "a number below its update")
    is_early = (back != NEVER) & (back < columns["sent_us"])
    _refuse_where(source, columns, "back_us", is_early, "sent_us or later, or -1")
    is_usable = table["outcome"].to_numpy() == ""
    never = is_usable & (back == NEVER)
    _refuse_where(source, columns, "back_us", never, "a time, as its outcome is usable")


def _refuse_where(
    source: Path,
    columns: dict[str, np.ndarray],
    name: str,
    is_bad: np.ndarray,
    expected: str,
) -> None:
    bad = np.flatnonzero(is_bad)
    if len(bad):
        found = columns[name][bad[0]]
        raise _bad_row(source, int(bad[0]), f"{name} = {found}, expected {expected}")


def _bad_row(source: Path, row: int, problem: str) -> SettingsError:
    return SettingsError(f"{source}: row {row + 1} has {problem}")


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds: dict[str, Callable[[], pa.DataType]] = dict.fromkeys(TEXTS, pa.string)
    return pa.schema([(n, kinds.get(n, pa.int64)()) for n in Arrival._fields])


def _pieces(folder: Path) -> Pieces:
    return Pieces(folder, NAME, "update", _schema())
