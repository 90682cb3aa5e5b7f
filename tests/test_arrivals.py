"""`arrivals.parquet`: the rows of a stopped or resumed run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedcore.clock.arrivals import Arrival, Arrivals, read_arrivals
from fedcore.errors import SettingsError

GOOD = Arrival(1, 0, 3, 0, "train", 0, 2_000_000, "", 40, 44, 5, 0)


def rows_of(update: int, first: int) -> list[Arrival]:
    """Three works of an update; the last one was lost."""
    back = GOOD._replace(update=update, version=update - 1)
    lost = back._replace(order=first + 2, client=5, back_us=-1, outcome="dropout")
    return [
        back._replace(order=first),
        back._replace(order=first + 1, client=4),
        lost,
    ]


def written(folder: Path, updates: int, every: int = 1) -> Arrivals:
    folder.mkdir(exist_ok=True)
    arrivals = Arrivals(folder)
    for update in range(1, updates + 1):
        arrivals.add(rows_of(update, 3 * (update - 1)))
        if update % every == 0:
            arrivals.write(update)
    return arrivals


def all_rows(updates: int) -> list[dict[str, Any]]:
    rows = []
    for update in range(1, updates + 1):
        rows += [row._asdict() for row in rows_of(update, 3 * (update - 1))]
    return rows


def test_rows_come_back_as_they_were_whole_and_in_pieces(tmp_path: Path) -> None:
    arrivals = written(tmp_path, 5, every=2)
    assert read_arrivals(tmp_path).to_pylist() == all_rows(4)
    arrivals.write(5)
    assert read_arrivals(tmp_path / "arrivals.parquet").to_pylist() == all_rows(5)
    arrivals.merge()
    assert [file.name for file in tmp_path.iterdir()] == ["arrivals.parquet"]
    copy = (tmp_path / "arrivals.parquet").rename(tmp_path / "copy.parquet")
    assert read_arrivals(copy).to_pylist() == all_rows(5)


@pytest.mark.parametrize("merged", [True, False])
def test_a_resumed_run_has_each_row_once(merged: bool, tmp_path: Path) -> None:
    arrivals = written(tmp_path, 5, every=5)
    if merged:
        arrivals.merge()
    resumed = Arrivals(tmp_path)
    resumed.cut(3)
    for update in range(4, 7):
        resumed.add(rows_of(update, 3 * (update - 1)))
    resumed.write(6)
    resumed.merge()
    assert read_arrivals(tmp_path).to_pylist() == all_rows(6)


def test_rows_after_a_checkpoint_wait_for_the_next(tmp_path: Path) -> None:
    arrivals = written(tmp_path, 2, every=3)
    arrivals.write(1)
    assert read_arrivals(tmp_path).to_pylist() == all_rows(1)


def table_of(*rows: Arrival) -> pa.Table:
    columns = zip(*rows, strict=True)
    names = dict(zip(Arrival._fields, map(list, columns), strict=True))
    return pa.table(names)


def refusal(table: pa.Table, folder: Path) -> str:
    pq.write_table(table, folder / "a.parquet")
    with pytest.raises(SettingsError) as error:
        read_arrivals(folder / "a.parquet")
    return str(error.value)


SECOND = GOOD._replace(order=1, client=4)
BAD = {
    "row 2 has client = -1, expected 0": SECOND._replace(client=-1),
    "row 2 has client = 4294967296, expected an id": SECOND._replace(client=2**32),
    "row 2 has update = 0, expected 1": SECOND._replace(update=0),
    "row 2 has order = 0, expected more": SECOND._replace(order=0),
    "row 2 has version = 1, expected a number below": SECOND._replace(version=1),
    "row 2 has back_us = 3, expected sent_us": SECOND._replace(sent_us=4, back_us=3),
    "row 2 has back_us = -1, expected a time": SECOND._replace(back_us=-1),
    "row 2 has steps = -2": SECOND._replace(steps=-2),
    "row 2 has work_us = -9": SECOND._replace(work_us=-9),
}


@pytest.mark.parametrize("message", BAD)
def test_the_first_row_that_cannot_be_is_named(message: str, tmp_path: Path) -> None:
    assert message in refusal(table_of(GOOD, BAD[message]), tmp_path)


def test_updates_do_not_fall(tmp_path: Path) -> None:
    first = GOOD._replace(update=2)
    assert "row 2 has update = 1" in refusal(table_of(first, SECOND), tmp_path)


def test_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    table = table_of(GOOD)
    more = table.append_column("mood", pa.array(["good"]))
    assert 'found a column "mood"' in refusal(more, tmp_path)
    fewer = table.drop_columns(["steps"])
    assert 'found 0 columns "steps"' in refusal(fewer, tmp_path)
    place = table.column_names.index("client")
    texts = table.set_column(place, "client", pa.array(["a"]))
    assert 'column "client" holds string, expected whole' in refusal(texts, tmp_path)
    empty = pa.array([None], pa.int64())
    nothing = table.set_column(place, "client", empty)
    assert "row 1 has no client" in refusal(nothing, tmp_path)
    assert "has no rows" in refusal(table.slice(0, 0), tmp_path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "arrivals.parquet", tmp_path / "x.parquet"):
        with pytest.raises(SettingsError, match="there is none"):
            read_arrivals(source)
    (tmp_path / "x.parquet").write_bytes(b"client,step_s\n")
    with pytest.raises(SettingsError, match="cannot be read as"):
        read_arrivals(tmp_path / "x.parquet")
