"""Texts from files: what is read, and what is refused with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedcore.data.text import hub
from fedcore.data.text.files import Columns, read_texts
from fedcore.data.text.texts import Text
from fedcore.errors import SettingsError

ROWS = [
    {"text": 'One, "two"\nthree', "client": "a", "label": "x"},
    {"text": "four", "client": "b", "label": "y"},
    {"text": "  \n", "client": "b", "label": "y"},
]
TEXTS = [Text('One, "two"\nthree', "a", "x"), Text("four", "b", "y")]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A table of the kind that the file's name says."""
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", encoding="utf-8-sig", newline="") as sink:
            writer = csv.DictWriter(sink, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_table_gives_its_texts_without_blank_ones(name: str, tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / name, ROWS)) == TEXTS
    assert read_texts(tmp_path) == TEXTS  # the folder with the one file


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_columns_may_have_other_names(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, [{"words": "one", "who": "a", "text": "no"}])
    assert read_texts(file, Columns("words", "who")) == [Text("one", "a")]


def test_a_client_may_be_a_number(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "x", "client": 7, "label": 1}])
    assert read_texts(file) == [Text("x", "7", 1)]


def test_rows_of_a_csv_end_where_lines_end(tmp_path: Path) -> None:
    """Not at the other characters that Python splits lines at."""
    texts = ["one\u2028two", "three\x0cfour", "five\x85six"]
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "\n".join(texts) + "\n", "utf-8", newline="")
    assert [text.content for text in read_texts(file)] == texts
    file.write_text("text,client\na\u2028b,c\nd\n", "utf-8", newline="")
    with pytest.raises(SettingsError, match="line 3: found 1 fields"):
        read_texts(file)


def test_a_field_of_a_csv_may_be_a_book(tmp_path: Path) -> None:
    long = "word " * 100_000
    before = csv.field_size_limit()
    assert read_texts(write(tmp_path / "a.csv", [{"text": long}]))[0].content == long
    assert csv.field_size_limit() == before


def test_a_folder_of_folders_has_a_client_each(tmp_path: Path) -> None:
    for client, texts in {"b": ["one\r\ntwo\r\n"], "a": ["three", "four"]}.items():
        (tmp_path / client).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / client / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / ".hidden.txt").write_text("no")
    assert read_texts(tmp_path) == [
        Text("three", "a"),
        Text("four", "a"),
        Text("one\ntwo", "b"),
    ]


def test_a_folder_of_files_has_a_client_each(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a.txt").write_text("two")
    assert read_texts(tmp_path) == [Text("two", "a"), Text("one", "b")]
    assert read_texts(tmp_path / "b.txt") == [Text("one", "b")]


REFUSED = {
    "no JSON": ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"line 3: no JSON"),
    "no object": ("a.jsonl", b"[1]\n", r"line 1: found \[1\], expected an object"),
    "no text": ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', r"line 2: found nothing a"),
    "a number": ("a.jsonl", b'{"text": 3}', r'line 1: found 3 as "text", expected tex'),
    "a truth": ("a.jsonl", b'{"text": "x", "client": true}', r'found true as "client"'),
    "a share": ("a.jsonl", b'{"text": "x", "label": 0.5}', r'found 0\.5 as "label"'),
    "some": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "y", "client": "a"}',
        r"1 of 2 texts have no client",
    ),
    "Latin 1": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', r"line 2: byte 0xe9 is"),
    "no column": ("a.csv", b"body\nx\n", r'found columns body, expected one "text"'),
    "a comma": (
        "a.csv",
        b'text,label\n"a\nb",x\none, two,y\n',
        r"line 4: found 3 field",
    ),
    "no quote": ("a.csv", b'text\none\n"two\n', r"line 3: unexpected end of data"),
    "no parquet": ("a.parquet", b"text", r"a\.parquet: .*expected parquet"),
    "blank": ("a.txt", b" \n", r"it holds no text"),
    "empty": ("a.csv", b"", r"it holds no text"),
    "depth": ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"line 2: no JSON"),
    "half": ("a.jsonl", b'{"text": "x\\ud800"}', r"line 1: found .ud800, half of a ch"),
    "half a name": ("a.jsonl", b'{"text": "x", "client": "\\udc00"}', r"found .udc00"),
    "twice": ("a.csv", b"text,client,text\nx,a,y\n", r'found 2 columns "text"'),
    "a picture": ("a.png", b"", r"expected a \.jsonl, \.csv or \.parquet file"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_is_told_with_file_and_line(fault: str, tmp_path: Path) -> None:
    name, content, expected = REFUSED[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=expected) as error:
        read_texts(tmp_path / name)
    assert name in str(error.value)


def test_lines_of_a_csv_end_at_newlines_alone(tmp_path: Path) -> None:
    content = "one\x0ctwo\x85three\u2028four"
    (tmp_path / "a.csv").write_text(f"text,client\r\n{content},a\r\n", "utf-8")
    assert read_texts(tmp_path / "a.csv") == [Text(content, "a")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_an_empty_name_is_none(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, [{"text": "x", "client": "", "label": ""}])
    assert read_texts(file) == [Text("x")]


def test_names_of_files_may_end_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b" / "c.Txt").write_text("two")
    assert read_texts(tmp_path) == [Text("one", "a"), Text("two", "b")]


@pytest.mark.parametrize("name", ["more.jsonl", "deeper/d.txt"])
def test_no_text_is_left_out_without_a_word(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a" / name
    file.parent.mkdir(parents=True)
    file.write_text("x")
    (tmp_path / "a" / "b.txt").write_text("one")
    with pytest.raises(SettingsError, match=r"plain text alone, \*\.txt, in the fold"):
        read_texts(tmp_path)


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no such thing"):
        read_texts(tmp_path / "none")
    with pytest.raises(SettingsError, match="it holds no text; expected"):
        read_texts(tmp_path)
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(SettingsError, match=r"a table \(a\.jsonl\) and plain text \(b"):
        read_texts(tmp_path)


# The hub


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: "x.org cannot be reached (no)")
    with pytest.raises(
        SettingsError, match=r"options\.dataset = a/b: it is not here, an"
    ):
        hub.texts_of_hub("a/b", "train", Columns())


def test_texts_of_the_hub_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    found = [Text("one", "a", 1), Text("two", "b", 0)]
    monkeypatch.setattr(hub, "_downloaded", lambda *_: found)
    assert hub.texts_of_hub("tests/kept", "train", Columns()) == found
    monkeypatch.setattr(hub, "_downloaded", lambda *_: pytest.fail("asked again"))
    assert hub.texts_of_hub("tests/kept", "train", Columns()) == found


def test_rows_of_the_hub_are_told_by_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one", "label": 1}, {"text": None}])
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    with pytest.raises(SettingsError, match="= a/b, row 1: found nothing as"):
        hub.texts_of_hub("a/b", "test", Columns())
    kept = rows.select([0])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: kept)
    assert hub.texts_of_hub("a/c", "test", Columns()) == [Text("one", None, 1)]
    with pytest.raises(
        SettingsError, match=r'expected one "body"; name it with option'
    ):
        hub.texts_of_hub("a/c", "test", Columns("body"))
