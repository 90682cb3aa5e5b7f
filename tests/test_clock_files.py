"""Files of devices: all that is read, and what is refused with its first bad row."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedcore.clock.durations import Durations
from fedcore.clock.settings import ClockSettings
from fedcore.errors import SettingsError


def traced(file: Path, population: int = 3, **changes: Any) -> Durations:
    clock = ClockSettings.model_validate({"trace": file, **changes})
    return Durations(clock, population, seed=0, batch_size=20)


def one_step(durations: Durations, population: int, nbytes: int = 0) -> list[float]:
    """Seconds of a step of clients 0, 1, ..., with as many bytes each way."""
    clients, steps = np.arange(population), np.ones(population, dtype=np.int64)
    microseconds = durations.of(clients, 0, steps, nbytes, nbytes)
    return [value / 1e6 for value in microseconds.tolist()]


def test_rows_are_dealt_out_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("step_s,down_mbps,up_mbps,latency_s\n1,8,4,0\n2,16,8,0.5\n")
    durations = traced(file, 5)
    assert durations.needs_bytes_up
    assert one_step(durations, 5, 1_000_000) == [4, 4.5, 4, 4.5, 4]


def test_a_row_may_be_a_client_s_own(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("client,step_s\n2,1\n0,2\n9,5\n1,3\n")
    assert one_step(traced(file), 3) == [2, 3, 1]


def test_seconds_of_an_example_are_times_the_batch(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("example_s\n0.1\n0.2\n")
    assert one_step(traced(file, 2), 2) == [2, 4]
    clock = ClockSettings.model_validate({"trace": file})
    with pytest.raises(SettingsError, match="no number of examples in a step"):
        Durations(clock, 2, seed=0)


def test_a_file_wins_over_the_settings_in_the_columns_that_it_has(
    tmp_path: Path,
) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("down_mbps\n8\n")
    settings = {"step_s": 3.0, "down_mbps": 0.001, "up_mbps": 4.0}
    assert one_step(traced(file, 1, **settings), 1, 1_000_000) == [3 + 1 + 2]


def test_parquet_and_csv_say_the_same(tmp_path: Path) -> None:
    table = {"client": [1, 0, 2], "step_s": [0.1, 7.25, 3.0], "latency_s": [0, 1, 2]}
    pq.write_table(pa.table(table), tmp_path / "devices.parquet")
    lines = ["client,step_s,latency_s"]
    for row in zip(*table.values(), strict=True):
        lines.append(",".join(map(str, row)))
    (tmp_path / "devices.CSV").write_text("\n".join(lines))
    found = one_step(traced(tmp_path / "devices.parquet"), 3)
    assert found == [9.25, 0.1, 7] == one_step(traced(tmp_path / "devices.CSV"), 3)


def test_spaces_line_ends_and_marks_of_spreadsheets_do_not_matter(
    tmp_path: Path,
) -> None:
    file = tmp_path / "devices.csv"
    file.write_bytes(b'\xef\xbb\xbfstep_s , latency_s\r\n"2",0\r\n\r\n4, 1e0\r\n')
    assert one_step(traced(file, 2), 2) == [2, 6]


WRONG = {
    b"": "expected CSV with columns out of client, step_s",
    b"step_s\n": "found no rows",
    b"step_s,up_mbps\n1,2\n3\n": "row 2: Expected 2 columns, got 1",
    b"step_s\n1\nnan\n": "row 2 has step_s = nan, expected a number",
    b"step_s\n1\ninf\n": "row 2 has step_s = inf, expected a number",
    b"step_s,up_mbps\n1,2\n,3\n4,x\n": 'row 2 has step_s = "", expected a number',
    b"step_s\n1\n\nfast\n": 'row 2 has step_s = "fast", expected a number',
    b"step_s\n1\n-2\n-3\n": "row 2 has step_s = -2, expected 1e+09 at most",
    b"step_s\n0\n": "row 1 has step_s = 0, expected 1e+09 at most, and above 0",
    b"step_s,up_mbps\n1,0\n": "row 1 has up_mbps = 0, expected",
    b"step_s,latency_s\n1,-1\n": "row 1 has latency_s = -1, expected",
    b"step_s,model\n1,2\n": 'found a column "model", expected columns out of client',
    b"step_s;up_mbps\n1;2\n": 'found a column "step_s;up_mbps", expected columns out',
    b"1,2\n3,4\n": 'found a column "1", expected columns out of client',
    b"step_s,step_s\n1,2\n": 'found 2 columns "step_s", expected one',
    b"step_s,example_s\n1,2\n": "found columns step_s and example_s, expected one",
    b"up_mbps\n3\n": "found columns up_mbps, expected step_s or example_s among them",
    b"client\n0\n1\n2\n": 'found the column "client" alone',
    b"client,step_s\n0,1\n2,1\n": "found no row for client 1, expected one for each",
    b"client,step_s\n0,1\n1,1\n0,2\n": "row 3 has client = 0 as a row above it",
    b"client,step_s\n0.5,1\n": "row 1 has client = 0.5, expected a whole number",
    b"step_s\n1\n\xff\xfe\n": "row 2: CSV conversion error to string: invalid UTF8",
    bytes(range(256)): "expected CSV with columns out of client, step_s",
}


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_with_its_first_bad_row(
    content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "devices.csv"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        traced(file)
    message = str(caught.value)
    assert message.startswith(f"clock.trace = {file}: ")
    assert WRONG[content] in message


WRONG_TABLES: dict[str, tuple[dict[str, list[Any]], str]] = {
    "missing": ({"step_s": [1.0, None]}, "row 2 has step_s = nan, expected a number"),
    "text": ({"step_s": ["a"]}, 'row 1 has step_s = "a", expected a number'),
    "lists": ({"step_s": [[1.0]]}, 'column "step_s" holds list'),
    "truth": ({"step_s": [True]}, 'column "step_s" holds bool, expected numbers'),
    "empty": ({"step_s": []}, 'column "step_s" holds null'),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_refused(name: str, tmp_path: Path) -> None:
    columns, expected = WRONG_TABLES[name]
    file = tmp_path / "devices.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(SettingsError) as caught:
        traced(file)
    if name == "empty":
        expected = "found no rows"
    assert expected in str(caught.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("devices.pkl", "devices.parquet", "devices.csv", "devices"):
        file = tmp_path / name
        file.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(SettingsError):
            traced(file)
    assert not (tmp_path / "ran").exists()


def test_no_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no such file"):
        traced(tmp_path / "devices.csv")
