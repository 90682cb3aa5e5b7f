"""Tables of numbers in CSV or Parquet files, as the clock reads them.

Nothing in a file is ever run: a pickle, which could run anything, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Floats",
    "Ints",
    "read_numbers",
    "refuse_row",
    "refuse_values",
    "whole_numbers",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_HOW = {".csv": "CSV", ".parquet": "Parquet"}


def read_numbers(setting: str, file: Path, columns: Sequence[str]) -> dict[str, Floats]:
    """The columns of a file that are there, by name: finite numbers, float64 [rows].

    The first row is row 1; empty lines, and that of the names, are not counted.
    `setting` is the name under which the user gave the file. Raises SettingsError for a
    file that is no such table, for columns other than `columns`, and for the first row
    with anything but numbers.
    """
    kind = _HOW.get(file.suffix.lower())
    if kind is None:
        raise SettingsError(
            f"{setting} = {file}: found a file named *{file.suffix}, expected *.csv or "
            "*.parquet; convert it, as docs/device-traces.md does (a pickle is never "
            "read: it can run any code)"
        )
    if not file.is_file():
        raise SettingsError(f"{setting} = {file}: there is no such file")
    try:
        table = _parquet(file) if kind == "Parquet" else _csv(file)
    except Exception as error:  # damaged bytes bring about whatever pyarrow raises
        reason = str(error).strip().partition("\n")[0]
        # Arrow counts the line of the names as a row.
        reason = re.sub(r"Row #(\d+)", lambda row: f"row {int(row[1]) - 1}", reason)
        raise SettingsError(
            f"{setting} = {file}: {reason}; expected {kind} with columns out of "
            f"{', '.join(columns)}"
        ) from error
    names = table.column_names
    _refuse_names(setting, file, names, columns)
    if table.num_rows == 0:
        raise SettingsError(f"{setting} = {file}: found no rows, expected one at least")
    found: dict[str, Floats] = {}
    for name in names:
        found[name] = _numbers(setting, file, name, table.column(name))
        refuse_values(
            setting, file, name, found[name], np.isfinite(found[name]), "a number"
        )
    return found


def _parquet(file: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read()


def _csv(file: Path) -> pa.Table:
    """A table of texts, without the spaces around them."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    # One thread: else an error does not say which row it is about.
    reading = csv.ReadOptions(use_threads=False)
    with csv.open_csv(file, read_options=reading) as stream:
        names = stream.schema.names
    types = dict.fromkeys(names, pa.string())
    converting = csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    table = csv.read_csv(file, read_options=reading, convert_options=converting)
    texts = []
    for column in table.columns:
        texts.append(pc.utf8_trim_whitespace(column))
    stripped = [name.strip().removeprefix("\ufeff") for name in names]
    return pa.table(texts, names=stripped)


def _refuse_names(
    setting: str, file: Path, names: list[str], columns: Sequence[str]
) -> None:
    for name in names:
        if name not in columns:
            raise SettingsError(
                f'{setting} = {file}: found a column "{name}", expected columns out of '
                f"{', '.join(columns)}, named in the first line; rename it or take it "
                "out"
            )
        if names.count(name) > 1:
            raise SettingsError(
                f'{setting} = {file}: found {names.count(name)} columns "{name}", '
                "expected one"
            )


def _numbers(setting: str, file: Path, name: str, column: pa.ChunkedArray) -> Floats:
    """A column as float64 [rows]; NaN where nothing stands."""
    import pyarrow as pa

    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not is_text and not is_number:
        raise SettingsError(
            f'{setting} = {file}: column "{name}" holds {column.type}, expected numbers'
        )
    try:
        numbers: Floats = column.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowInvalid:
        numbers = _read_singly(setting, file, name, column.to_pylist())
    return numbers


def _read_singly(setting: str, file: Path, name: str, texts: list[Any]) -> Floats:
    numbers = np.full(len(texts), np.nan)
    for row, text in enumerate(texts, 1):
        try:
            numbers[row - 1] = float(text)
        except (TypeError, ValueError) as error:
            problem = f'{name} = "{text}", expected a number'
            raise refuse_row(setting, file, row, problem) from error
    return numbers


def refuse_values(
    setting: str, file: Path, name: str, values: Floats, is_good: Any, expected: str
) -> None:
    """Raise SettingsError for the first row where `is_good` (bool [rows]) is false."""
    bad = np.flatnonzero(~is_good)
    if len(bad) > 0:
        problem = f"{name} = {values[bad[0]]:g}, expected {expected}"
        raise refuse_row(setting, file, int(bad[0]) + 1, problem)


def refuse_row(setting: str, file: Path, row: int, problem: str) -> SettingsError:
    """The error about one row, the first of which is row 1."""
    return SettingsError(f"{setting} = {file}: row {row} has {problem}")


def whole_numbers(setting: str, file: Path, clients: Floats) -> Ints:
    """A column `client` as int64 [rows]. Raises SettingsError for the first bad row."""
    is_good = (clients == np.floor(clients)) & (clients >= 0) & (clients < 2**32)
    refuse_values(
        setting, file, "client", clients, is_good, "a whole number, 0 or above"
    )
    return clients.astype(np.int64)
