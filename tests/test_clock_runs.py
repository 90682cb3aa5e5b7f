"""Clocked rounds of a whole run, by hand: speeds and hours come from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedcore.errors import SettingsError
from fedcore.rounds import loop
from tests.helpers import small

# Client 1 is always there, 0 for the first 20 s of each minute, and 2 for four.
DEVICES = "client,step_s\n0,2\n1,3\n2,7\n"
HOURS = "client,start_s,end_s\n0,0,20\n1,0,60\n2,0,4\n"


def rows_of(folder: Path, clock: dict[str, Any], **schedule: Any) -> list[Any]:
    """The rows of three rounds of one step with clients that need 2, 3 and 7 s."""
    (folder / "devices.csv").write_text(DEVICES)
    (folder / "hours.csv").write_text(HOURS)
    experiment = small(
        "fedavg",
        population=3,
        rounds=3,
        local={"batch_size": 4, "steps": 1},
        participation={"name": "uniform", "cohort": 3},
        clock={"trace": folder / "devices.csv", **clock},
        schedule={"name": "synchronous", **schedule},
    )
    loop.run(experiment, folder / "run")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Worked(NamedTuple):
    schedule: dict[str, Any]
    time_s: float
    idle: float
    late_share: float
    wasted_share: float
    dropped: dict[str, int]


BY_HAND = [
    Worked({}, 7, 9 / 21, 0, 0, {}),
    Worked({"deadline_s": 5}, 5, 1 / 3, 1 / 3, 1 / 2, {"timeout": 1}),
    Worked({"goal": 2}, 3, 1 / 9, 1 / 3, 3 / 8, {"not needed": 1}),
]


@pytest.mark.parametrize("worked", BY_HAND, ids=str)
@pytest.mark.parametrize("stragglers", ["finish", "stop"])
def test_rows_of_a_run_are_as_worked_by_hand(
    worked: Worked, stragglers: str, tmp_path: Path
) -> None:
    # Client 2 is late in every round: where it goes on, it begins later, too.
    rows = rows_of(tmp_path, {"stragglers": stragglers}, **worked.schedule)
    for number, row in enumerate(rows, 1):
        assert row["time_s"] == number * worked.time_s
        assert row["idle"] == pytest.approx(worked.idle, abs=1e-15)
        assert row["late_share"] == worked.late_share
        assert row["wasted_share"] == worked.wasted_share
        assert row["dropped"] == worked.dropped


def test_the_server_s_seconds_come_on_top(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"server_s": 0.25})
    assert [row["time_s"] for row in rows] == [7.25, 14.5, 21.75]


# Seconds at the end of each round, and who is lost. In round 1 client 2 goes away after
# four seconds; later it is not asked, until the next minute.
WINDOWS = {
    "lost": ([4, 7, 10], [{"unavailable": 1}, {}, {}]),
    # Client 2 works 0 ... 4 and 60 ... 63; then 63 ... 64, 120 ... 124 and 180 ... 182;
    # then 182 ... 184, 240 ... 244 and 300 ... 301.
    "pause": ([63, 182, 301], [{}, {}, {}]),
}


@pytest.mark.parametrize("at_end", WINDOWS)
def test_work_at_the_end_of_a_window_is_lost_or_pauses(
    at_end: str, tmp_path: Path
) -> None:
    clock = {"windows": tmp_path / "hours.csv", "period_s": 60, "at_end": at_end}
    rows = rows_of(tmp_path, clock)
    times, dropped = WINDOWS[at_end]
    assert [row["time_s"] for row in rows] == times
    assert [row["dropped"] for row in rows] == dropped


@pytest.mark.parametrize("name", ["trace", "windows"])
def test_a_wrong_file_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("client,start_s,end_s\n0,x,1\n" if name == "windows" else "a\n1\n")
    with pytest.raises(SettingsError, match=f"clock.{name} = "):
        rows_of(tmp_path, {name: wrong})
    assert not (tmp_path / "run").exists()
