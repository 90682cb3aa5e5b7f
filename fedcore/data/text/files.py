"""Texts from files of a user's: lines of JSON, tables, or folders of plain text.

    *.jsonl, *.csv, *.parquet    a row a text, with a column `text`; a column `client`
                                 names who wrote it, a column `label` its class
    <client>/*.txt               a folder a client, a file a text
    <client>.txt                 a file a client

Texts of blanks alone are left out. Every fault is a SettingsError with file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedcore.data.text.texts import Text
from fedcore.errors import SettingsError

__all__ = ["Columns", "Row", "complete", "read_texts", "text_of"]

EXPECTED = (
    "expected a .jsonl, .csv or .parquet file with a column text, or a folder with "
    "<client>.txt or <client>/*.txt"
)


class Columns(NamedTuple):
    """The names of a table's columns."""

    text: str = "text"
    client: str = "client"
    label: str = "label"


class Row(NamedTuple):
    """A row of a table, and where it stands."""

    place: str
    values: Mapping[str, Any]


def read_texts(path: Path, columns: Columns | None = None) -> list[Text]:
    """All texts of a file or folder, in order; of a folder by name.

    Raises SettingsError for what is no such thing, with the file and its line.
    """
    columns = columns or Columns()
    if path.is_file():
        texts = _file(path, columns, [path.stem])
    elif path.is_dir():
        texts = _folder(path, columns)
    else:
        raise SettingsError(f"data_folder = {path}: there is no such thing; {EXPECTED}")
    return complete(texts, f"data_folder = {path}")


def complete(texts: list[Text], name: str) -> list[Text]:
    """The texts that are not blank.

    Raises SettingsError where there is none, or where some alone have a client, or a
    label; `name` says of what.
    """
    kept = [text for text in texts if text.content.strip()]
    if not kept:
        raise SettingsError(f"{name}: it holds no text; {EXPECTED}")
    for field in ("client", "label"):
        without = sum(getattr(text, field) is None for text in kept)
        if 0 < without < len(kept):
            raise SettingsError(
                f"{name}: {without} of {len(kept)} texts have no {field}, the others "
                "have; give all of them one, or none"
            )
    return kept


def _folder(folder: Path, columns: Columns) -> list[Text]:
    tables: list[Path] = []
    plain: list[tuple[str, Path]] = []  # client and file
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            for file in _of_client(entry):
                plain.append((entry.name, file))
        elif _kind(entry) == ".txt":
            plain.append((entry.stem, entry))
        elif _kind(entry) in TABLES:
            tables.append(entry)
    if tables and plain:
        raise SettingsError(
            f"data_folder = {folder}: it holds a table ({tables[0].name}) and plain "
            f"text ({plain[0][1].name}); give one of the two"
        )
    if not tables and not plain:
        raise SettingsError(f"data_folder = {folder}: it holds no text; {EXPECTED}")
    texts: list[Text] = []
    for file in tables:
        texts += _file(file, columns, [])
    for client, file in plain:
        texts.append(Text(_plain(file), client))
    return texts


def _of_client(folder: Path) -> list[Path]:
    """The files of plain text in a client's folder, by name.

    Raises SettingsError for texts in it that would be left out without a word.
    """
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() or _kind(entry) in TABLES:
            raise SettingsError(
                f"{entry}: expected files of plain text alone, *.txt, in the folder of "
                "a client; move it"
            )
        if _kind(entry) == ".txt":
            files.append(entry)
    return files


def _kind(file: Path) -> str:
    """The end of a file's name, in small letters."""
    return file.suffix.lower()


def _file(file: Path, columns: Columns, client: list[str]) -> list[Text]:
    """The texts of one file; of plain text, that of the client given."""
    kind = _kind(file)
    if kind == ".txt" and client:
        return [Text(_plain(file), client[0])]
    if kind not in TABLES:
        raise SettingsError(f"{file}: {EXPECTED}")
    return [text_of(row, columns) for row in TABLES[kind](file, columns)]


def text_of(row: Row, columns: Columns) -> Text:
    """The text of a row. Raises SettingsError for another."""
    content = row.values.get(columns.text)
    if not isinstance(content, str):
        raise SettingsError(
            f'{row.place}: found {_shown(content)} as "{columns.text}", expected text'
        )
    for name in (columns.client, columns.label):
        value = row.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise SettingsError(
                f'{row.place}: found {_shown(value)} as "{name}", expected a name or a '
                "whole number"
            )
    client, label = row.values.get(columns.client), row.values.get(columns.label)
    # An empty name is none, in every kind of table.
    client, label = (None if value == "" else value for value in (client, label))
    for value in (content, client, label):
        _refuse_halves(row.place, value)
    return Text(content, None if client is None else str(client), label)


def _refuse_halves(place: str, value: str | int | None) -> None:
    """Raise SettingsError for half of a pair of surrogates, which is no character."""
    if not isinstance(value, str):
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])[1:-1]
        raise SettingsError(
            f"{place}: found {half}, half of a character, expected text that can be "
            "saved as UTF-8"
        ) from error


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{json.dumps(value, default=str)[:40]}"


def _decoded(file: Path) -> str:
    """A file's text, with line ends as \\n. Raises SettingsError with the line."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError(
            f"{file}, line {line}: byte {content[error.start]:#04x} is no UTF-8; save "
            "the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain(file: Path) -> str:
    return _decoded(file).strip("\n")


def _json_lines(file: Path, columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(_decoded(file).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{place}: no JSON ({error})") from error
        if not isinstance(values, dict):
            raise SettingsError(
                f"{place}: found {_shown(values)}, expected an object, "
                f'{{"{columns.text}": "..."}}'
            )
        yield Row(place, values)


def _csv(file: Path, columns: Columns) -> Iterator[Row]:
    with _long_fields():
        yield from _csv_rows(file, columns)


def _csv_rows(file: Path, columns: Columns) -> Iterator[Row]:
    # Not splitlines, which ends a line at a form feed or a paragraph mark, too.
    lines = io.StringIO(_decoded(file), newline="\n")
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            place = f"{file}, line {line}"
            line = reader.line_num + 1
            if not header:
                header = cells
                _refuse_columns(file, header, columns)
            elif cells and len(cells) != len(header):
                raise SettingsError(
                    f"{place}: found {len(cells)} fields, and {len(header)} columns "
                    f"({', '.join(header)}); a text with a comma stands in quotes"
                )
            elif cells:
                yield Row(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise SettingsError(f"{file}, line {line}: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Inside, a field of a CSV file may be as long as a book."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
        _refuse_columns(file, names, columns)
        kept = [name for name in columns if name in names]
        rows = pq.read_table(file, columns=kept).to_pylist()
    except SettingsError:
        raise
    except Exception as error:  # damaged bytes bring about whatever pyarrow raises
        reason = str(error).strip().partition("\n")[0]
        raise SettingsError(f"{file}: {reason}; expected parquet") from error
    for number, values in enumerate(rows):
        yield Row(f"{file}, row {number}", values)


def _refuse_columns(file: Path, names: list[str], columns: Columns) -> None:
    if columns.text not in names:
        raise SettingsError(
            f'{file}: found columns {", ".join(names)}, expected one "{columns.text}"'
        )
    for name in columns:
        if names.count(name) > 1:
            raise SettingsError(
                f'{file}: found {names.count(name)} columns "{name}", expected one'
            )


TABLES: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
