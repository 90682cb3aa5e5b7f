"""Files that look like those of the field, and the page about such files."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from fedcore.clock.durations import Durations
from fedcore.clock.lookalikes import lookalike_devices, lookalike_windows
from fedcore.clock.settings import ClockSettings
from fedcore.clock.windows import Windows

PAGE = Path("docs/device-traces.md").read_text()
HOUR = 3600 * 10**6


def blocks(language: str) -> list[str]:
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, PAGE, re.MULTILINE | re.DOTALL)


def test_most_devices_are_there_by_night(tmp_path: Path) -> None:
    file = lookalike_windows(tmp_path / "hours.csv", clients=400)
    windows = Windows.of(ClockSettings.model_validate({"step_s": 1, "windows": file}))
    there = [len(windows.all_there(400, hour * HOUR)) for hour in range(24)]
    assert max(there[:4]) > 300
    assert 10 < min(there[12:20]) < 60


def test_some_devices_are_much_slower_than_most(tmp_path: Path) -> None:
    file = lookalike_devices(tmp_path / "devices.csv", rows=500)
    durations = Durations(ClockSettings(trace=file), 500, seed=0)
    seconds = durations.expected(np.arange(500), np.full(500, 10), 100_000, 100_000)
    assert 5 < np.quantile(seconds, 0.99) / np.median(seconds) < 20


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for write in (lookalike_devices, lookalike_windows):
        texts = [write(tmp_path / "a.csv", 20, seed).read_text() for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


def test_the_files_of_the_page_are_read(tmp_path: Path) -> None:
    devices, hours = blocks("csv")
    (tmp_path / "devices.csv").write_text(devices)
    (tmp_path / "hours.csv").write_text(hours)
    clock = ClockSettings.model_validate(
        {"trace": tmp_path / "devices.csv", "windows": tmp_path / "hours.csv"}
    )
    assert (
        Durations(clock, 3, 0).expected(np.arange(3), np.array([1, 1, 1]), 0, 0)[1]
        == 0.55
    )
    # Client 0's two windows are one over midnight, of eight hours.
    begin = np.array([22 * HOUR])
    finish, is_lost = Windows.of(clock).ends(np.array([0]), begin, np.array([9 * HOUR]))
    assert (finish[0], is_lost[0]) == (30 * HOUR, True)


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert, make = blocks("python")
    capacity = {"a": {"computation": 25.0, "communication": 4000.0}}
    Path("device_capacity").write_bytes(pickle.dumps(capacity))
    # The page, as a script, leaves a file open: it ends with the process.
    opened = "io.BytesIO(Path('device_capacity').read_bytes())"
    convert = convert.replace('open("device_capacity", "rb")', opened)
    exec(compile(convert, "convert.py", "exec"), {"io": io, "Path": Path})
    assert Path("devices.csv").read_text().split() == [
        "example_s,down_mbps,up_mbps",
        "0.075,4.0,4.0",
    ]
    clock = ClockSettings.model_validate({"trace": Path("devices.csv")})
    durations = Durations(clock, 1, 0, batch_size=20)
    nbytes = 1_000_000  # two seconds at 4 Mbit/s
    seconds = durations.expected(np.array([0]), np.array([2]), nbytes, nbytes)
    assert seconds.tolist() == pytest.approx([2 * 20 * 0.075 + 2 * 2])
    exec(compile(make, "make.py", "exec"), {})
    clock = ClockSettings(trace=Path("devices.csv"), windows=Path("hours.csv"))
    assert len(Windows.of(clock).all_there(1000, 0)) > 500
    Durations(clock, 1000, 0)
