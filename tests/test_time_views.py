"""Runs with a clock: when they are evaluated, and what is shown of their time."""

from __future__ import annotations

import doctest
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedcore import Experiment, SettingsError
from fedcore.cli import app
from fedcore.clock.arrivals import NEVER, Arrival, Arrivals
from fedcore.clock.durations import Durations
from fedcore.clock.settings import ClockSettings
from fedcore.rounds import loop, slow_clients, time_summary
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result
from fedcore.rounds.slow_clients import Heard, Speeds, group, heard_clients
from fedcore.views import figures, run_figures, time_to
from fedcore.views.compare import compare, show
from fedcore.views.compare_page import table
from fedcore.views.comparison import Comparison, Run, timed_curve
from fedcore.views.run_record import read_run
from fedcore.views.run_report import summary, write_report
from fedcore.views.terminal import Terminal, show_result
from fedcore.views.time_figures import heard_table, time_plots
from fedcore.views.time_to import default_target, smoothed, values_of
from tests.helpers import PATIENCE
from tests.pages import CHROMIUM, Page, browse, titles

Row = dict[str, Any]
LOGNORMAL = {"name": "lognormal", "median": 1.0, "sigma": 1.0}
SMALL = {
    "population": 20,
    "rounds": 8,
    "evaluation.every_s": 10,
    "participation.name": "uniform",
    "participation.cohort": 5,
    "local.steps": 2,
    "local.batch_size": 5,
    "engine.chunk": 1,
    "model.name": "mlp",
    "model.hidden": [8],
    "clock": {"step_s": LOGNORMAL},
}
BUFFERED = {"schedule": {"name": "buffered", "buffer": 3, "concurrency": 5}}


def clocked(**settings: Any) -> Experiment:
    return Experiment.parse({"method": "fedavg"}, {**SMALL, **settings})


@pytest.fixture(scope="module")
def deadline(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A synchronous run in which some are late."""
    folder = tmp_path_factory.mktemp("runs") / "deadline"
    return loop.run(clocked(schedule={"deadline_s": 5.0}), folder)


@pytest.fixture(scope="module")
def buffered(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("runs") / "buffered"
    return loop.run(clocked(rounds=30, **BUFFERED), folder)


def history(values: Sequence[float | None], every: float = 1.0) -> History:
    """An evaluation of the test accuracy after each round, `every` seconds apart."""
    rows = []
    for number, value in enumerate(values, 1):
        sent = {"bytes_down": 10, "bytes_up": 10, "reports": 1, "seconds": 0.1}
        row = {"round": number, "time_s": every * number, "test_accuracy": value}
        rows.append({**row, **sent, "measures": {"accuracy": "higher"}})
    return History(rows)


def test_the_examples_run() -> None:
    for module in (time_to, slow_clients, time_summary, figures):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


# evaluation.every_s


def evaluated(result: Result) -> list[int]:
    """Rounds that were evaluated."""
    return [row["round"] for row in result.history if "test_loss" in row]


def due(result: Result, every: float) -> list[int]:
    """Rounds that are the first at or after a multiple of `every`, and the last."""
    rounds, before = [], 0.0
    for row in result.history:
        crossed = math.floor(row["time_s"] / every) - math.floor(before / every)
        if crossed or row["round"] == result.rounds:
            rounds.append(row["round"])
        before = row["time_s"]
    return rounds


def test_evaluations_come_by_the_runs_clock(deadline: Result, buffered: Result) -> None:
    for result in (deadline, buffered):
        assert evaluated(result) == due(result, 10.0)
        assert 2 < len(evaluated(result)) < result.rounds


def test_a_round_that_ends_at_a_multiple_is_evaluated(tmp_path: Path) -> None:
    """Everybody needs 2 s, so that the rounds end at 2, 4, 6, ... s."""
    settings = {"clock": {"step_s": 1.0}, "evaluation.every_s": 4, "rounds": 7}
    result = loop.run(clocked(**settings), tmp_path / "run")
    assert [row["time_s"] for row in result.history] == [2, 4, 6, 8, 10, 12, 14]
    assert evaluated(result) == [2, 4, 6, 7]


def test_a_resumed_run_is_evaluated_at_the_same_times(
    buffered: Result, tmp_path: Path
) -> None:
    class Stopping(loop.Quiet):
        def round_done(self, row: Row) -> None:
            if row["round"] == 11:
                raise KeyboardInterrupt

    folder = tmp_path / "run"
    experiment = clocked(rounds=30, **BUFFERED)
    with pytest.raises(KeyboardInterrupt):
        loop.run(experiment, folder, observer=Stopping())
    again = loop.run(experiment, resume=folder)
    assert evaluated(again) == evaluated(buffered)
    assert again.params_sha256 == buffered.params_sha256


def test_evaluations_by_time_need_a_clock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SettingsError, match="every_s = 10 without a clock"):
        loop.run(clocked(clock={}), folder)
    assert not folder.exists()


# The time of a run in its result


def test_the_summary_is_that_of_the_rows() -> None:
    """Two rounds of 2 and 6 s; the second has half of the idle time, and a late one."""
    rows: list[Row] = [
        {"time_s": 2.0, "idle": 0.8, "late_share": 0.0, "wasted_share": 0.0},
        {"time_s": 8.0, "idle": 0.4, "late_share": 0.5, "wasted_share": 0.25},
    ]
    ages = [{"mean": 1.0, "max": 2}, {"mean": 4.0, "max": 9}]
    for row, reports, age in zip(rows, (2, 1), ages, strict=True):
        row |= {"cohort": 4, "reports": reports, "staleness": age}
    found = time_summary.time_summary(History(rows))
    assert found["time_s"] == 8.0
    assert found["idle"] == pytest.approx((2 * 0.8 + 6 * 0.4) / 8)
    assert found["late_share"] == pytest.approx(0.25)
    # At work: 0.2 of 2 s, and 0.6 of 6 s.
    assert found["wasted_share"] == pytest.approx(0.25 * 3.6 / 4.0)
    assert found["staleness"] == {"mean": pytest.approx(2.0), "max": 9}
    assert "discount" not in found


def test_without_a_clock_there_is_no_time() -> None:
    assert time_summary.time_summary(History()) == {}
    rows = [{"round": 1, "cohort": 1, "reports": 1}]
    assert time_summary.time_summary(History(rows)) == {}
    assert History(rows).times is None


def test_the_summary_is_the_share_of_the_work_that_arrived(deadline: Result) -> None:
    """The slowest fifth's share, counted anew from who reported in every round."""
    durations = Durations(ClockSettings.model_validate(SMALL["clock"]), 20, 0)
    everybody = np.arange(20)
    seconds = durations.expected(everybody, np.full(20, 2), 0, 0)
    slow = set(np.argsort(seconds)[-4:].tolist())
    import pyarrow.parquet as pq

    clients = pq.read_table(Path(deadline.run_dir) / "clients.parquet").to_pylist()
    used = [
        row["client"]
        for row in clients
        if row["function"] == "train" and not row["left_out"]
    ]
    share = sum(client in slow for client in used) / len(used)
    found = deadline.time["slowest_fifth"]
    assert found["arrivals"] == pytest.approx(share)
    assert found["clients"] == 4
    assert found["from_s"] == pytest.approx(np.sort(seconds)[-4])
    last = [row for row in clients if row["function"] == "evaluate"]
    final = [row for row in last if row["round"] == deadline.rounds]
    accuracies = [row["accuracy"] for row in final if row["client"] in slow]
    assert found["measure"] == pytest.approx(np.mean(accuracies))


def test_the_result_has_it_as_json(deadline: Result, buffered: Result) -> None:
    for result in (deadline, buffered):
        time = json.loads(json.dumps(result.to_dict()))["time"]
        assert time["time_s"] == result.history[-1]["time_s"]
        assert {"idle", "late_share", "wasted_share"} <= time.keys()
        assert {"slowest_fifth", "slowest_tenth"} <= time.keys()
        assert time["clock"] == "simulated"
    assert buffered.time["staleness"]["max"] >= 1
    assert 0 < buffered.time["discount"] < 1


def test_the_terminal_tells_simulated_time(
    deadline: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    show_result(deadline, None)
    out = capsys.readouterr().out
    line = next(text for text in out.splitlines() if text.startswith("simulated time"))
    assert f"{deadline.time['time_s']:,.6g} s" in line
    assert re.search(r"clients' time +[\d.]+% idle, [\d.]+% of the work wasted", out)
    assert re.search(r"slowest fifth +[\d.]+% of the updates used, accuracy", out)
    speed = next(text for text in out.splitlines() if text.startswith("speed"))
    assert "clients/s" in speed
    assert "simulated" not in speed


def test_progress_tells_simulated_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal() as terminal:
        loop.run(clocked(rounds=2), tmp_path / "run", observer=terminal)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"round 2/2: [\d.]+ (s|min) simulated, [\d,]+ clients/s", last)


# Who is heard


def arrival(client: int, took: float, outcome: str = "", update: int = 1) -> Arrival:
    back = NEVER if took == math.inf else round(1e6 * took)
    return Arrival(update, 0, client, 0, "train", 0, back, outcome, 8, 8, 1, 0)


def recorded(folder: Path, rows: Sequence[Arrival]) -> Path:
    """A run directory with these arrivals, in this order."""
    folder.mkdir(exist_ok=True)
    arrivals = Arrivals(folder)
    arrivals.add([row._replace(order=place) for place, row in enumerate(rows)])
    arrivals.write(max(row.update for row in rows))
    arrivals.merge()
    return folder


def test_in_the_field_speed_is_the_median_of_times(tmp_path: Path) -> None:
    """Client 2 was always back late, client 3 never; a late answer is one work."""
    rows = [
        arrival(1, 1.0),
        arrival(1, 9.0),
        arrival(1, 2.0),
        arrival(0, 3.0),
        arrival(3, math.inf, "timeout"),
        arrival(2, math.inf, "timeout"),
        arrival(2, 8.0, "late", update=2),
        arrival(0, 3.0, update=3),
    ]
    heard = heard_clients(recorded(tmp_path, rows), None, up_to=2)
    assert heard is not None
    assert heard.clients.tolist() == [1, 0, 2, 3]
    assert heard.seconds.tolist() == [2.0, 3.0, 8.0, math.inf]
    assert heard.usable.tolist() == [3, 1, 0, 0]
    assert heard.unused.tolist() == [0, 0, 1, 1]
    slow = group(heard, (8, 10), {}, "accuracy")
    assert slow == (1, None, None, 0.0, None)


def test_a_simulated_clock_knows_clients_that_were_never_asked(tmp_path: Path) -> None:
    clock = ClockSettings.model_validate({"step_s": LOGNORMAL})
    folder = recorded(tmp_path, [arrival(4, 1.0)])
    heard = heard_clients(folder, Speeds(clock, 0, None, 10), up_to=1)
    assert heard is not None
    assert sorted(heard.clients.tolist()) == list(range(10))
    assert (np.diff(heard.seconds) >= 0).all()
    assert heard.usable.sum() == 1
    few = heard_clients(folder, Speeds(clock, 0, None, 3), up_to=1)
    assert few is None, "one client, of a population that the settings do not know"


def test_who_is_equally_fast_is_not_told_apart(tmp_path: Path) -> None:
    rows = [arrival(client, 2.0) for client in range(4)]
    assert heard_clients(recorded(tmp_path, rows), None, up_to=1) is None


@given(
    times=st.lists(st.integers(1, 9), min_size=2, max_size=40),
    used=st.lists(st.integers(0, 5), min_size=40, max_size=40),
)
def test_fifths_tile_the_clients(times: list[int], used: list[int]) -> None:
    n = len(times)
    seconds = np.sort(np.array(times, dtype=np.float64))
    usable = np.array(used[:n])
    heard = Heard(np.arange(n), seconds, usable, 0 * usable)
    parts = [group(heard, (low, low + 2), {}, "") for low in range(0, 10, 2)]
    assert sum(part.clients for part in parts) == n
    assert parts[-1].clients == -(-n // 5)
    if usable.sum():
        assert sum(part.arrivals or 0 for part in parts) == pytest.approx(1)
    else:
        assert all(part.arrivals is None for part in parts)


# The report


def test_the_report_has_curves_by_time_and_who_was_heard(
    deadline: Result, buffered: Result
) -> None:
    common = {
        "Test accuracy by round",
        "Test accuracy by simulated time",
        "Test loss by simulated time",
        "Simulated seconds a round",
        "Arrivals by speed",
    }
    shares = "Waiting, lateness and waste"
    late, stale = Path(deadline.run_dir), Path(buffered.run_dir)
    late_titles = titles(write_report(late))
    assert common | {shares} <= set(late_titles)
    assert "Staleness by round" not in late_titles
    drawn = {plot.title for plot in time_plots(read_run(stale))}
    assert "Staleness by round" in drawn
    assert drawn & common == {"Simulated seconds a round", "Arrivals by speed"}
    assert shares not in drawn  # nobody waits, and nothing is wasted
    # No method logged the mean weight by age.
    assert run_figures._method(History(buffered.history)) == []
    page = Page(late / "report.html")
    assert "Clients by speed: who was heard" in page.words
    slow = deadline.time["slowest_fifth"]
    assert f"slowest fifth of the clients sent {100 * slow['arrivals']:.3g}%" in (
        page.words
    )
    assert f"{deadline.time['time_s']:,.6g} s" in page.words
    assert "mathdefault" not in (late / "report.html").read_text()


def test_the_table_of_speeds_ends_with_the_slowest(deadline: Result) -> None:
    rows = heard_table(read_run(Path(deadline.run_dir)))
    assert [row[0] for row in rows[-2:]] == ["slowest fifth", "slowest tenth"]
    assert rows[-2][1] == "4"
    share = deadline.time["slowest_fifth"]["arrivals"]
    assert rows[-2][3] == f"{100 * share:.3g}%"


def test_arrivals_that_cannot_be_read_cost_their_part(
    deadline: Result, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(deadline.run_dir, tmp_path / "run")
    (folder / "arrivals.parquet").write_bytes(b"PAR1")
    run = read_run(folder)
    assert [note for note in run.notes if note.startswith("arrivals.parquet")]
    assert "Arrivals by speed" not in {plot.title for plot in time_plots(run)}
    assert heard_table(run) == []
    assert "simulated time" in summary(run)


def test_many_clients_are_drawn_in_groups(deadline: Result) -> None:
    from dataclasses import replace

    from fedcore.views.time_figures import _arrivals

    n = 1000
    heard = Heard(np.arange(n), np.linspace(1, 9, n), np.ones(n, int), np.ones(n, int))
    drawn = _arrivals(replace(read_run(Path(deadline.run_dir)), heard=heard), True)
    assert drawn is not None
    assert "a twentieth of the 1,000 clients" in drawn.caption
    assert "sent 20% of" in drawn.caption


# Time to a target


def test_the_target_is_reached_by_the_mean_of_three() -> None:
    """Single evaluations of 0.9 at 2 and 4 s are luck; the third of them counts."""
    one = history([0.1, 0.9, 0.2, 0.9, 0.8, 0.7, 0.95])
    found = time_to.time_to([one], "test_accuracy", 0.8, True, 10.0)
    assert found.values == [6.0]  # (0.9 + 0.8 + 0.7) / 3
    assert (found.mean, found.low) == (6.0, None)


def test_what_is_not_reached_by_the_horizon_is_in_no_mean() -> None:
    fast, slow = history([0.9] * 5), history([0.1] * 5 + [0.9] * 5)
    found = time_to.time_to([fast, slow], "test_accuracy", 0.9, True, 5.0)
    assert found.values == [3.0, None]
    assert (found.mean, found.reached, found.low) == (3.0, 1, None)
    assert time_to.reached_text(found) == "> 5 s (1 of 2: 3 s)"


def test_the_interval_is_students() -> None:
    """Times 3, 4 and 5 s: mean 4, error 1/sqrt(3), t(0.975, 2) = 4.302653."""
    runs = [history([0.0] * n + [1.0] * 9) for n in (0, 1, 2)]
    found = time_to.time_to(runs, "test_accuracy", 1.0, True, 99.0)
    assert found.values == [3.0, 4.0, 5.0]
    assert found.low == pytest.approx(4 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(4 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_a_value_that_is_not_finite_reaches_nothing() -> None:
    one = history([0.9, None, 0.9, 0.9, 0.9])
    found = time_to.time_to([one], "test_accuracy", 0.9, True, 10.0)
    assert found.values == [5.0]
    assert time_to.value_at(one, "test_accuracy", 2.5) is None
    assert time_to.value_at(one, "test_accuracy", 3.5) == 0.9
    assert time_to.value_at(one, "test_accuracy", 0.5) is None


@given(
    values=st.lists(st.floats(0, 1), min_size=3, max_size=12),
    target=st.floats(0.05, 1),
)
def test_time_to_target_is_that_of_a_slow_search(
    values: list[float], target: float
) -> None:
    expected = None
    for last in range(2, len(values)):
        mean = float(np.array(values[last - 2 : last + 1]).mean())
        if mean >= target:
            expected = last + 1.0
            break
    found = time_to.time_to([history(values)], "test_accuracy", target, True, 99.0)
    assert found.values == [expected]
    worse = [1 - value for value in values]
    assert len(smoothed(values_of(history(worse), "test_accuracy")).times) == (
        len(values) - 2
    )


def test_the_default_target_is_nine_tenths_of_the_way() -> None:
    poor, good = history([0.1, 0.3, 0.3, 0.3]), history([0.2, 0.9, 0.9, 0.9])
    target = default_target([[poor], [good]], "test_accuracy", True, 9.0)
    assert target == 0.82  # 0.1 + 0.9 x 0.8, and easier
    assert default_target([[poor], [good]], "test_accuracy", True, 2.0) is None
    losses = [history([2.0, 0.5, 0.5, 0.5]), history([1.0, 1.0, 1.0])]
    # Downwards: 2 - 0.9 x 1.5.
    assert default_target([losses[:1], losses[1:]], "test_accuracy", False, 9.0) == 0.65


def test_curves_of_seeds_meet_between_their_evaluations() -> None:
    runs = [Run(0, Path(), history([0.0, 1.0, 2.0], 1.0))]
    runs.append(Run(1, Path(), history([0.0, 1.0, 2.0], 2.0)))
    drawn = timed_curve(runs, "test_accuracy", "time")
    assert drawn.x.tolist() == [2.0, 3.0]
    assert drawn.values.tolist() == [[1.0, 2.0], [0.0, 0.5]]
    by_bytes = timed_curve(runs, "test_accuracy", "bytes")
    assert by_bytes.x.tolist() == [20.0, 40.0, 60.0]
    assert len(timed_curve([], "test_accuracy", "time").x) == 0


# The comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A deadline against a buffer, which comes to its end sooner, on two seeds."""
    experiments = [
        ("deadline", clocked(schedule={"deadline_s": 5.0})),
        ("buffered", clocked(rounds=12, **BUFFERED)),
    ]
    folder = tmp_path_factory.mktemp("runs") / "c"
    return compare(experiments, 2, folder, target=0.12)


def test_a_comparison_ends_where_its_first_run_ends(compared: Comparison) -> None:
    ends = []
    for runs in compared.runs.values():
        ends += [run.history.rows[-1]["time_s"] for run in runs]
    assert compared.horizon == min(ends)
    assert not compared.has_equal_ends
    for label in compared.runs:
        found = compared.time_to(label)
        assert found is not None
        assert found.horizon_s == min(ends)
        assert all(value is None or value <= min(ends) for value in found.values)
    head = table(compared)[0]
    assert head[1] == "test accuracy"
    assert head[2].startswith("at ")
    assert head[3:5] == ["time to 12%", "in all its time"]
    assert {"slowest fifth", "their updates", "own clock", "idle"} <= set(head)


def test_json_has_what_the_table_has(compared: Comparison) -> None:
    stored = json.loads((compared.folder / "compare.json").read_text())
    assert stored["target"]["value"] == 0.12
    assert stored["target"]["is_default"] is False
    assert stored["target"]["horizon_s"] == compared.horizon
    for label, entry in stored["methods"].items():
        found = compared.time_to(label)
        assert found is not None
        assert entry["time_to"] == json.loads(json.dumps(found.to_dict()))
        assert len(entry["time_to"]["values"]) == 2
        assert len(entry["time_s"]["values"]) == 2
        assert entry["slowest_fifth_arrivals"]["mean"] <= 1


def test_personal_models_are_compared_by_what_clients_get(tmp_path: Path) -> None:
    """The test set is nobody's there: the mean over clients counts."""
    rows = history([0.1] * 4).rows
    for row, mean in zip(rows, (0.2, 0.4, 0.6, 0.8), strict=True):
        row |= {"client_accuracy": {"mean": mean, "std": 0.1}, "evaluation_s": 0.1}
    experiment = clocked(method="ditto")
    runs = {"ditto": [Run(0, tmp_path, History(rows))]}
    one = Comparison(tmp_path, 1, {"ditto": experiment}, runs, wanted=0.6)
    found = one.time_to("ditto")
    assert found is not None
    assert found.values == [4.0]  # (0.4 + 0.6 + 0.8) / 3
    head = table(one)[0]
    assert head.index("time to 60%") == head.index("client mean") + 1


def test_the_page_draws_time_and_bytes(compared: Comparison) -> None:
    page = compared.folder / "compare.html"
    assert titles(page)[:2] == [
        "Test accuracy by simulated time, s",
        "Test accuracy by kB sent",
    ]
    assert "compared up to the first end" in Page(page).words


def test_the_target_that_was_chosen_is_said(
    compared: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    show(replace(compared, wanted=None))
    out = capsys.readouterr().out
    if "time to" in out:
        assert "nine tenths of the way" in out
    show(compared)
    assert "nine tenths" not in capsys.readouterr().out


def test_targets_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    plain = clocked(clock={}, **{"evaluation.every_s": None})
    with pytest.raises(SettingsError, match=r"--target 0\.9: plain has no clock"):
        compare([("plain", plain)], 1, tmp_path / "c", target=0.9)
    with pytest.raises(SettingsError, match="expected a number"):
        compare([("timed", clocked())], 1, tmp_path / "c", target=math.nan)
    assert not (tmp_path / "c").exists()
    with pytest.raises(SettingsError, match="judged by accuracy, a share"):
        compare([("timed", clocked(rounds=1))], 1, tmp_path / "c", target=90)


def test_the_command_takes_a_target(tmp_path: Path) -> None:
    out = str(tmp_path / "c")
    command = ["compare", "fedavg", "--seeds", "1", "--out", out, "--json"]
    for key, value in SMALL.items():
        if key != "clock":
            text = json.dumps(value) if not isinstance(value, str) else value
            command += ["--set", f"{key}={text}"]
    command += ["--set", "clock.step_s=1", "--set", "rounds=3", "--target", "0.05"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert stored["target"]["value"] == 0.05
    assert stored["methods"]["fedavg"]["time_to"]["horizon_s"] == 6.0


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("name", ["deadline", "buffered", "compared"])
def test_browser_shows_the_pages_of_time(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    found = request.getfixturevalue(name)
    if isinstance(found, Comparison):
        page = found.folder / "compare.html"
    else:
        page = write_report(found.run_dir)
    picture = tmp_path / "page.png"
    shot = [f"--screenshot={picture}", "--window-size=1180,3000"]
    browse(tmp_path / "a", *shot, page.resolve().as_uri())
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.std() > 10, "the screenshot is blank"
    dom = browse(tmp_path / "b", "--dump-dom", page.resolve().as_uri())
    assert "mathdefault" not in dom
    assert dom.count("<svg") == len(titles(page))
