"""The history of a run: reading metrics.jsonl, and the sums over its rows."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

from fedcore import SettingsError
from fedcore.rounds import history
from fedcore.rounds.history import History, is_fruitless
from fedcore.storage import json as plain


def row(number: int, **more: Any) -> dict[str, Any]:
    counts = {"cohort": 4, "reports": 3, "bytes_down": 40, "bytes_up": 30}
    return {"round": number, **counts, "seconds": 0.5, "dropped": {"dropout": 1}} | more


def written(folder: Path, rows: list[dict[str, Any]], rest: str = "") -> Path:
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows) + rest)
    return file


def test_the_examples_run() -> None:
    for module in (history, plain):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


def test_a_line_that_was_not_finished_is_left_out(tmp_path: Path) -> None:
    rows = [row(1), row(2)]
    assert History.read(written(tmp_path, rows, '{"round": 3, "coh')).rows == rows


def test_lines_after_the_rounds_that_count_are_not_looked_at(tmp_path: Path) -> None:
    file = written(tmp_path, [row(1), row(2)], "nonsense\n{}\n")
    assert len(History.read(file, rounds=2)) == 2
    assert len(History.read(tmp_path / "none", rounds=0)) == 0


def test_fewer_lines_than_rounds_that_count_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, [row(1)], '{"round"')
    with pytest.raises(SettingsError, match=r"each of the 2 rounds.*found 1; start"):
        History.read(file, rounds=2)


def test_a_damaged_line_is_named_with_what_was_expected(tmp_path: Path) -> None:
    file = written(tmp_path, [row(1), row(3)])
    with pytest.raises(SettingsError, match="line 2 is damaged: expected round 2"):
        History.read(file)


def test_speed_is_that_of_the_rounds_after_the_first() -> None:
    slow = row(1, seconds=99.0)
    assert History([slow, row(2), row(3)]).clients_per_second == 6
    assert History([row(1)]).clients_per_second == 6
    assert History([]).clients_per_second == 0


def test_the_last_value_that_was_measured_counts() -> None:
    rows = [row(1, test_accuracy=0.5, test_loss=1.0), row(2, test_loss=None), row(3)]
    measured = History(rows)
    assert measured.last("test_loss") == 1.0
    assert measured.last_row("test_loss")["round"] == 1
    assert measured.evaluated["round"] == 2
    assert measured.points("test_loss") == [(1, 1.0)]
    assert measured.measure == "accuracy"
    assert History(rows[1:]).measure == "loss"


def test_sums_are_over_rounds() -> None:
    rows = History([row(1), row(2, late_answers=2, dropped={"dropout": 1, "NaN": 2})])
    assert rows.total("reports") == 6
    assert rows.total("late_answers") == 2
    assert rows.dropped() == {"dropout": 2, "NaN": 2}
    assert rows.sent().tolist() == [0, 70, 140]


def test_a_round_is_fruitless_where_all_fail_but_not_where_all_drop_out() -> None:
    failed = row(1, reports=0, dropped={"dropout": 3, "failed": 1})
    assert is_fruitless(failed)
    assert is_fruitless(row(1, dropped={"server not finite": 1}))
    assert not is_fruitless(row(1, reports=0, dropped={"dropout": 4}))
    assert History([failed, row(2), failed, failed]).fruitless == 2
