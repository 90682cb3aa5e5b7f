"""Who fails, how often, and since when: counts, notes, rows and the report."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from fedcore import RunError
from fedcore.engines.readout import Readout
from fedcore.messages.aggregation.aggregator import Aggregated
from fedcore.rounds.client_table import ClientTable
from fedcore.rounds.history import History
from fedcore.rounds.loop import Loop, run
from fedcore.rounds.observer import NOTES, Notes, Quiet
from fedcore.rounds.tally import LISTED, Tally
from fedcore.rounds.trouble import FAILING, Trouble, failing_clients, troubles
from fedcore.rounds.watch import Watch
from fedcore.views.run_report import write_report
from fedcore.views.terminal import show_result
from tests.helpers import loop_of, small
from tests.pages import Page

BROKEN, EMPTY = 4, 7  # clients that raise, and that send NaN


class Told(Quiet):
    """An observer that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def watch() -> tuple[Watch, list[str]]:
    """A watch, and the notes that it makes."""
    told = Told()
    return Watch(Notes(told), jump=3.0), told.notes


def tally_of(reported: set[int], **failed: Any) -> Tally:
    """A round; keywords are kinds of reasons, with their clients."""
    tally = Tally(set(reported), reported=reported)
    for kind, clients in failed.items():
        name = kind.replace("_", " ")
        tally.failed |= dict.fromkeys(clients, name)
        tally.reasons[name] = f"{name}: in full"
    return tally


def weather(folder: Path, rounds: int, resume: bool = False, **more: Any) -> Loop:
    """A run of twelve clients in which two always fail."""
    e = small(
        "tests.methods:BadWeather", rounds=rounds, participation__cohort=12, **more
    )
    loop = loop_of(e, folder, resume)
    data = loop.task.data
    data.x[data.rows(BROKEN, "train")] = 666.0
    data.x[data.rows(EMPTY, "train")] = 667.0
    return loop


def finished(loop: Loop) -> list[dict[str, Any]]:
    """The rows of a loop that was run to its end."""
    try:
        return loop.run().history
    finally:
        loop.close()


# In a run


def test_clients_that_fail_eight_rounds_in_a_row_are_named_in_rows_log_and_report(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loop = weather(tmp_path / "r", FAILING + 1)
    with caplog.at_level(logging.WARNING):
        result = loop.run()
    loop.close()
    rows = result.history
    assert rows[0]["left_out"] == {"error": [BROKEN], "not finite": [EMPTY]}
    assert ["failing" in row for row in rows] == [False] * 7 + [True] * 2
    assert rows[-1]["failing"] == [
        {"client": BROKEN, "rounds": 9, "reason": "error"},
        {"client": EMPTY, "rounds": 9, "reason": "not finite"},
    ]
    line = "round 8: left out 8 times in a row, and failing: clients 4, 7 (error, not"
    assert caplog.text.count(line) == 1
    words = Page(write_report(tmp_path / "r")).words
    assert "Clients that were left out" in words
    assert "Failing at the end, left out 8 times in a row or more: clients 4, 7" in (
        words
    )
    assert "9, failing" in words
    show_result(result, None)
    shown = capsys.readouterr().out
    assert "client 4 (9 rounds in a row: error), client 7 (9 rounds in a row:" in shown


def test_a_run_that_goes_on_knows_who_failed_before(tmp_path: Path) -> None:
    finished(weather(tmp_path / "r", 5))
    rows = finished(weather(tmp_path / "r", 9, resume=True))
    assert [len(row.get("failing", [])) for row in rows] == [0] * 7 + [2] * 2
    whole = finished(weather(tmp_path / "whole", 9))
    assert rows[-1]["failing"] == whole[-1]["failing"]


def test_rounds_with_too_few_reports_are_skipped_to_the_end_and_not_hopeless(
    tmp_path: Path,
) -> None:
    rows = finished(weather(tmp_path / "r", 5, min_reports=11))
    assert [row["skipped"] for row in rows] == [True] * 5
    assert [row["reports"] for row in rows] == [10] * 5


def test_rounds_in_which_every_client_fails_are_hopeless(tmp_path: Path) -> None:
    loop = weather(tmp_path / "r", 5)
    loop.task.data.x[:] = 667.0
    with pytest.raises(RunError, match="no usable update in 3 round"):
        finished(loop)


def test_a_liar_is_told_by_its_length_where_a_rule_has_no_weights(
    tmp_path: Path,
) -> None:
    e = small(
        "fedavg",
        rounds=4,
        participation__cohort=12,
        aggregation={"rule": "trimmed_mean", "byzantine": 2},
        adversary={"attack": "sign_flip", "scale": 50.0, "clients": [5]},
    )
    run(e, tmp_path / "r")
    first = troubles(tmp_path / "r")[0]
    assert (first.client, first.norm_ratio > 10) == (5, True)
    assert math.isnan(first.weight)
    words = Page(write_report(tmp_path / "r")).words
    assert "norm, of the median" in words
    assert "weight, of the mean" not in words


def test_a_liar_that_a_rule_never_takes_is_first_in_the_report(
    tmp_path: Path,
) -> None:
    e = small(
        "fedavg",
        rounds=4,
        participation__cohort=12,
        aggregation={"rule": "multi_krum", "byzantine": 2},
        adversary={"attack": "sign_flip", "scale": 10.0, "clients": [5]},
    )
    result = run(e, tmp_path / "r")
    first = troubles(tmp_path / "r")[0]
    assert (first.client, first.weight, first.left_out) == (5, 0.0, 0)
    for row in result.history:
        (weights,) = row["weights"].values()
        assert 5 in weights["unused"]
        assert weights["weight"][5] == 0
        assert weights["norm_ratio"][5] == max(weights["norm_ratio"])
    words = Page(write_report(tmp_path / "r")).words
    assert "weight, of the mean" in words
    assert "Simulated attackers: sign_flip by client 5." in words
    assert "The server takes multi_krum, with f = 2." in words


# Streaks and notes


def test_a_streak_ends_with_a_report_and_is_not_touched_by_absence() -> None:
    watcher, _ = watch()
    for number in range(1, 8):
        assert watcher.close_round(number, tally_of({0}, timeout=[1, 2])) == {}
    # Client 1 is not asked, client 2 reports, and dropping out by the settings is no
    # failure.
    assert watcher.close_round(8, tally_of({0, 2}, dropout=[1])) == {}
    row = watcher.close_round(9, tally_of({0}, error=[1, 2]))
    assert row["failing"] == [{"client": 1, "rounds": 8, "reason": "error"}]


def test_a_row_names_the_longest_streaks_and_counts_the_others() -> None:
    watcher, notes = watch()
    row: dict[str, Any] = {}
    for number in range(1, 10):
        late = range(30) if number > 1 else [7]
        row = watcher.close_round(number, tally_of({99}, timeout=late))
    assert row["failing"][0] == {"client": 7, "rounds": 9, "reason": "timeout"}
    assert [entry["client"] for entry in row["failing"][1:4]] == [0, 1, 2]
    assert (len(row["failing"]), row["num_failing"]) == (LISTED, 30)
    assert any(
        "clients 0, 1, 2" in note and "9 more (timeout)" in note for note in notes
    )


def test_notes_name_every_client_with_the_reason_in_full_and_once() -> None:
    watcher, notes = watch()
    late = tally_of({0}, timeout=range(5, 30), not_finite=[3])
    late.capped, late.clipped = {0}, {0, 1}
    watcher.close_round(1, late)
    watcher.close_round(2, late)
    names = ", ".join(map(str, range(5, 25)))
    assert notes == [
        f"round 1: clients {names} and 5 more: left out: timeout: in full",
        "round 1: client 0: claimed more examples than aggregation.max_examples",
        "round 1: messages longer than aggregation.clip: clients 0, 1",
    ]
    watcher.close_round(3, tally_of({0}, timeout=[5, 40]))
    assert notes[-1] == "round 3: clients 5, 40: left out: timeout: in full"


def test_notes_are_bounded_however_many_clients_fail() -> None:
    watcher, notes = watch()
    for number in range(1, 200):
        failed = [3 * number, 3 * number + 1]
        watcher.close_round(number, tally_of({0}, timeout=failed))
    assert len(notes) <= NOTES


# Counts from the table


def report(clients: list[int]) -> Readout:
    n = len(clients)
    return Readout(torch.tensor(clients), torch.ones(n), {}, {}, True, 0)


def filled(folder: Path) -> ClientTable:
    """Three rounds: client 1 is never weighted, 2 fails, 3 is clipped, 4 drops out."""
    table = ClientTable(folder)
    for number in range(1, 4):
        clients = [0, 1, 3] if number > 1 else [0, 1, 2, 3]
        table.add(number, "train", report(clients))
        tally = tally_of(set(clients), dropout=[4], timeout=[2] if number > 1 else [])
        tally.clipped = {3}
        weights = torch.full((len(clients),), 1 / (len(clients) - 1))
        weights[1] = 0
        tally.aggregation[("train", "delta")] = Aggregated(
            torch.tensor(clients), weights, weights, weights
        )
        table.close_round(number, tally)
        table.add(number, "evaluate", report([0, 1, 2, 3, 4]))
    return table


def test_the_table_says_how_often_each_client_gave_trouble(tmp_path: Path) -> None:
    filled(tmp_path).write(3)
    found = {trouble.client: trouble for trouble in troubles(tmp_path)}
    assert list(found) == [2, 1, 3], "left out first, then the lightest"
    alike = {"weight": 0, "norm_ratio": 0}
    assert found[2]._replace(**alike) == Trouble(2, 3, 2, 2, "timeout", 0, 0, 0, 0)
    assert found[2].weight == pytest.approx(4 / 3)
    assert found[1] == Trouble(1, 3, 0, 0, "", 0, 0, 0.0, 0.0)
    assert found[3]._replace(**alike) == Trouble(3, 3, 0, 0, "", 3, 0, 0, 0)
    early = troubles(tmp_path, up_to=1)
    assert [trouble.client for trouble in early] == [1, 3]


def test_a_run_of_an_older_fedcore_gave_no_trouble(tmp_path: Path) -> None:
    table = ClientTable(tmp_path)
    table.add(1, "train", report([0, 1]))
    table.write(1)
    (file,) = (tmp_path / "clients").iterdir()
    pq.write_table(pq.read_table(file).drop_columns(["left_out"]), file)
    assert troubles(tmp_path) == []
    assert troubles(tmp_path / "none") == []


def test_a_client_that_is_asked_twice_counts_once_a_round(tmp_path: Path) -> None:
    table = ClientTable(tmp_path)
    for number in (1, 2):
        table.add(number, "anchor", report([0, 1]))
        table.add(number, "train", report([0]))
        table.close_round(number, tally_of({0, 1}, error=[1]))
    table.write(2)
    (trouble,) = troubles(tmp_path)
    assert (trouble.client, trouble.rounds, trouble.left_out, trouble.streak) == (
        (1, 2, 2, 2)
    )
    assert math.isnan(trouble.weight)


def test_a_streak_goes_on_over_rounds_without_the_client_and_ends_with_a_report(
    tmp_path: Path,
) -> None:
    """Client 1 fails in rounds 1, 3, 4 and is evaluated in 2; client 2 reports in 3."""
    table = ClientTable(tmp_path)
    asked = {1: [1, 2], 2: [], 3: [1], 4: [1, 2]}
    for number, failed in asked.items():
        reported = [0, 2] if number == 3 else [0]
        table.add(number, "train", report(reported))
        table.close_round(number, tally_of(set(reported), timeout=failed))
        table.add(number, "evaluate", report([0, 1, 2]))
    table.write(4)
    found = [(one.client, one.rounds, one.streak) for one in troubles(tmp_path)]
    assert found == [(1, 3, 3), (2, 3, 1)]
    assert failing_clients(tmp_path, 3) == {1: (2, "timeout")}


# Jumps


def jumps(*losses: float | None, reported: set[int] | None = None) -> list[Any]:
    """The jump of each evaluation in a run with these test losses; every second
    round has none."""
    watcher, _ = watch()
    history, found = History(), []
    for place, loss in enumerate(losses):
        for number in (2 * place + 1, 2 * place + 2):
            tally = tally_of(reported or {number, number + 1})
            row = {"round": number, **tally.row(), "seconds": 0.0}
            watcher.close_round(number, tally)
            if number % 2 == 0:
                row["test_loss"] = loss
            jump = watcher.jump(row, history)
            if number % 2 == 0:
                found.append(jump)
            history.add(row)
    return found


def test_a_jump_names_all_that_reported_since_the_evaluation_before() -> None:
    found = jumps(1.0, 2.9, 8.7, 5.0)
    assert found[:2] == [None, None]
    assert found[3] is None
    jump = found[2]
    assert (jump.number, jump.since, jump.before, jump.after) == (6, 4, 2.9, 8.7)
    assert (jump.clients, jump.is_all) == ([5, 6, 7], True)
    assert jump.text() == (
        "round 6: THE TEST LOSS JUMPED from 2.9 in round 4 to 8.7, 3 times as much "
        "(checkpoint.jump = 3); reports since round 4: clients 5, 6, 7"
    )


def test_a_jump_after_many_reports_names_those_of_its_round_with_their_number() -> None:
    jump = jumps(1.0, 9.0, reported=set(range(50)))[1]
    assert (len(jump.clients), jump.num_clients, jump.is_all) == (LISTED, 50, False)
    assert "reports in round 4: clients 0, 1," in jump.text()
    assert jump.text().endswith("and 30 more")
    advice = jump.advice(Path("runs/a"), [1, 2, 3, 4], "with a rule")
    assert "fedcore run --resume runs/a --round 2, with a rule" in advice
    assert "no checkpoint from before" in jump.advice(Path("runs/a"), [3, 4], "")


def test_a_loss_that_is_not_finite_is_a_jump_and_is_told_once() -> None:
    found = jumps(1.0, None, None, 1.0, None)
    assert [jump is not None for jump in found] == [False, True, False, False, True]
    assert "to a number that is not finite" in found[1].text()


def test_small_losses_and_losses_without_a_factor_are_no_jumps() -> None:
    assert jumps(1.0, 1e-6, 1e-4, 1e-5) == [None] * 4
    assert jumps(-1.0, -0.1, 5.0) == [None] * 3
    assert jumps(0.0, 5.0) == [None] * 2


def test_jumps_and_changed_rules_are_in_the_report(tmp_path: Path) -> None:
    finished(weather(tmp_path / "r", 4))
    file = tmp_path / "r" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    jump = {"since": 2, "from": 0.5, "clients": [3, 9], "num_clients": 2}
    rows[3] |= {"jump": jump, "changed": {"aggregation.rule": ["mean", "median"]}}
    rows[3]["test_loss"] = 99.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = Page(write_report(tmp_path / "r")).words
    jumped = "jumped from 0.5 in round 2 to 99 in round 4. Reports came from clients 3"
    assert jumped in words
    assert "From round 4 on aggregation.rule is median, before it was mean." in words


def test_the_report_names_twenty_clients_and_counts_the_others(tmp_path: Path) -> None:
    finished(weather(tmp_path / "r", 4))
    table = ClientTable(tmp_path / "r")
    table.cut(3)
    table.add(4, "train", report([0, 1]))
    table.close_round(4, tally_of({0, 1}, timeout=range(100, 140)))
    table.write(4)
    words = " ".join(Page(write_report(tmp_path / "r")).words.split())
    assert "The first 20 of 42 clients that were left out" in words
