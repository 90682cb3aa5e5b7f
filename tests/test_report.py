"""report.html from real runs, and from what is left of runs that ended badly."""

from __future__ import annotations

import doctest
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore import Experiment, SettingsError, run
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result
from fedcore.views import run_figures, text
from fedcore.views.figures import log_scale, new_figure, plot, thin
from fedcore.views.run_report import write_or_note, write_report
from tests.helpers import PATIENCE
from tests.pages import CHROMIUM, Page, browse, titles

Row = dict[str, Any]
SMALL = {
    "population": 12,
    "rounds": 4,
    "evaluation.every": 2,
    "participation.name": "uniform",
    "participation.cohort": 4,
    "engine.chunk": 1,
    "model.name": "mlp",
    "model.hidden": [8],
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A small run on digits in which some clients do not answer."""
    settings = {**SMALL, "participation.dropout": 0.3}
    experiment = Experiment.parse({"method": "fedavg"}, settings)
    return run(experiment, out=tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def finished(result: Result) -> Path:
    return Path(result.run_dir)


@pytest.fixture(scope="module")
def report(finished: Path) -> Path:
    """The report of the finished run."""
    return write_report(finished)


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run towards a known optimum, whose method logs a list over clients."""
    settings = {
        "task": "least-squares",
        "population": 6,
        "proxy": 12,
        "rounds": 3,
        "engine.chunk": 1,
        "evaluation.every": 1,
    }
    folder = tmp_path_factory.mktemp("runs") / "optimum"
    run(Experiment.parse({"method": "fedlaw"}, settings), out=folder)
    return folder


@pytest.fixture(scope="module")
def optimum_report(optimum: Path) -> Path:
    return write_report(optimum)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, for tests of their words."""
    monkeypatch.setattr("fedcore.views.run_report.sections", lambda _: [])


def rows_of(folder: Path) -> list[Row]:
    return History.read(folder / "metrics.jsonl").rows


def write_rows(folder: Path, rows: list[Row]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)


def test_the_examples_run() -> None:
    for module in (text, run_figures):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


# The page of a finished run


def test_report_of_a_real_run_tells_its_numbers(finished: Path, report: Path) -> None:
    page = Page(report)
    last = rows_of(finished)[-1]
    assert f"{last['test_accuracy']:.1%} test accuracy" in page.words
    assert not re.search(r"(?<!\d)20 clients(?! a second)", page.words)
    assert "over 12 clients" in page.words
    assert "4 of them were asked in each of 4 rounds" in page.words
    assert "finished" in page.words
    assert "unfinished" not in page.words
    assert "dropout" in page.words
    assert f"fedcore run {finished / 'config.toml'}" in page.words
    assert titles(report) == [
        "Test accuracy by round",
        "Test accuracy by kB sent",
        "Test loss by round",
        "Test loss by kB sent",
        "Accuracy of single clients",
        "Spread over clients",
        "Who took part",
        "Seconds a round",
        "How classes and examples are spread over clients",
    ]


def test_report_names_the_parameters_that_the_run_ended_with(
    result: Result, report: Path
) -> None:
    assert result.params_sha256 in report.read_text()


def test_report_has_the_speed_that_the_run_printed(
    result: Result, report: Path
) -> None:
    assert f"{result.clients_per_second:,.0f} clients a second" in Page(report).words


def test_page_needs_nothing_from_outside(report: Path) -> None:
    page = Page(report)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#"), f"{name} leads outside"
    assert re.search(r"url\((?!#)|@import", report.read_text()) is None


def test_ids_are_unique_and_every_reference_has_its_target(report: Path) -> None:
    page = Page(report)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#(.*?)\)", report.read_text()))
    for name, value in page.attributes:
        if name == "xlink:href":
            used.add(value[1:])
    assert used <= set(ids)


def test_plots_take_their_colours_from_the_page(report: Path) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", report.read_text(), re.S))
    assert "var(--ink)" in pictures
    assert "var(--s0)" in pictures
    # The partition's own grey shows in both modes.
    assert set(re.findall(r"#[0-9a-f]{6}\b", pictures)) <= {"#808080"}


def test_the_same_run_gives_the_same_bytes(finished: Path, report: Path) -> None:
    before = report.read_bytes()
    assert write_report(finished).read_bytes() == before


# Runs of other kinds


def test_unfinished_run_says_so_and_how_to_go_on(copy: Path, undrawn: None) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    words = Page(write_report(copy)).words
    assert "unfinished: 3 of 4 rounds" in words
    assert f"fedcore run --resume {copy}" in words


def test_run_without_an_evaluation_has_a_report(copy: Path) -> None:
    write_rows(copy, rows_of(copy)[:1])
    (copy / "clients.parquet").unlink()
    file = write_report(copy)
    assert "not evaluated yet" in Page(file).words
    assert titles(file)[0] == "Training loss by round"
    assert "Spread over clients" not in titles(file)


def test_run_without_a_round_has_a_report(copy: Path) -> None:
    write_rows(copy, [])
    file = write_report(copy)
    assert "No round is done yet" in Page(file).words
    assert titles(file) == ["How classes and examples are spread over clients"]


def test_regression_is_judged_by_its_loss(optimum_report: Path) -> None:
    words = Page(optimum_report).words
    assert "test loss" in words
    assert "accuracy" not in words
    assert "Loss of single clients" in titles(optimum_report)


def test_numbers_that_the_method_logged_are_drawn(tmp_path: Path) -> None:
    settings = {**SMALL, "participation.name": "bernoulli", "participation.mean": 0.5}
    del settings["participation.cohort"]
    settings["min_reports"] = 0
    run(Experiment.parse({"method": "fedau"}, settings), out=tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert max(row.get("server_omega_max", 0) for row in rows) >= 1
    assert "Omega max by round" in titles(write_report(tmp_path / "run"))


def test_logged_numbers_that_are_not_finite_are_left_out(
    optimum: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(optimum, tmp_path / "run")
    rows = rows_of(copy)
    rows[1] |= {"server_lambda": [None] * 6, "server_gamma": None}
    write_rows(copy, rows)
    assert "Lambda by round" in titles(write_report(copy))


def test_a_logged_list_over_clients_is_a_band_and_a_known_optimum_a_curve(
    optimum: Path, optimum_report: Path
) -> None:
    last = rows_of(optimum)[-1]
    names = ("Lambda", "Gamma", "Coherence", "NMSD in dB")
    assert {f"{name} by round" for name in names} <= set(titles(optimum_report))
    words = Page(optimum_report).words
    least, largest = min(last["server_lambda"]), max(last["server_lambda"])
    assert f"between {least:.3g} and {largest:.3g} at the end" in words
    assert f"{last['nmsd_db']:.2f} dB at the end" in words


def test_empty_and_skipped_rounds_are_counted(copy: Path) -> None:
    rows = rows_of(copy)
    rows[1] |= {"cohort": 0, "reports": 0, "skipped": False, "dropped": {}}
    rows[1] |= {"train_loss": None, "train_accuracy": None}
    reasons = {"timed out": 4, "<b>odd</b> & long" * 9: 1}
    rows[2] |= {"reports": 0, "skipped": True, "dropped": reasons, "test_loss": None}
    write_rows(copy, rows)
    words = Page(write_report(copy)).words
    assert "Between 0 and 4 of them were asked" in words
    assert "1 round had too few reports" in words
    assert "timed out" in words
    assert "<b>odd</b>" in words  # shown, not obeyed


def test_only_empty_rounds_have_a_report(copy: Path) -> None:
    row: Row = {"cohort": 0, "reports": 0, "skipped": False, "dropped": {}}
    row |= {"bytes_down": 0, "bytes_up": 0, "seconds": 0.0}
    write_rows(copy, [{"round": number, **row} for number in range(1, 5)])
    assert "0 of them were asked in each of 4 rounds" in Page(write_report(copy)).words


def test_long_run_stays_small(copy: Path) -> None:
    last = rows_of(copy)[-1]
    write_rows(copy, [{**last, "round": number} for number in range(1, 5001)])
    assert write_report(copy).stat().st_size < 1_500_000


# Damage


@pytest.mark.parametrize(
    "spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"PAR1 no")]
)
@pytest.mark.parametrize("name", ["clients.parquet", "environment.json"])
def test_other_files_that_are_missing_or_damaged_cost_their_part_only(
    copy: Path, undrawn: None, name: str, spoil: Callable[[Path], Any]
) -> None:
    spoil(copy / name)
    words = Page(write_report(copy)).words
    assert "test accuracy" in words
    is_told = (copy / name).exists() or name == "environment.json"
    assert words.count(f"{name} cannot be read") == is_told


def test_method_that_is_not_at_hand_costs_its_part_only(
    copy: Path, undrawn: None
) -> None:
    config = (copy / "config.toml").read_text()
    gone = config.replace('name = "fedavg"', 'name = "gone.away:Method"')
    (copy / "config.toml").write_text(gone)
    words = Page(write_report(copy)).words
    assert "gone.away:Method on digits" in words
    assert "Not drawn" in words


def test_folder_that_is_no_run_directory_is_named(tmp_path: Path) -> None:
    message = r"is no run directory: expected config\.toml"
    with pytest.raises(SettingsError, match=message):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{nonsense\n{}\n", "line 1 is damaged: expected a JSON object"),
        ("[1]\n", 'line 1 is damaged: expected a number "round"'),
        ('{"round": 1}\n', 'line 1 is damaged: expected a number "cohort"'),
        ("\xff\xfe\n\n", "line 1 is damaged"),
    ],
)
def test_damaged_metrics_are_refused_by_line(
    copy: Path, content: str, message: str
) -> None:
    (copy / "metrics.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(SettingsError, match=message):
        write_report(copy)


def test_metrics_with_a_round_missing_are_refused(copy: Path) -> None:
    rows = rows_of(copy)
    write_rows(copy, [rows[0], rows[2], rows[3]])
    with pytest.raises(SettingsError, match="line 2 is damaged: expected round 2"):
        write_report(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = [", "is damaged"),
        ('task = "digits"', "rounds is missing"),
        ("", "task is missing"),
    ],
)
def test_damaged_settings_are_refused(copy: Path, content: str, message: str) -> None:
    (copy / "config.toml").write_text(content)
    with pytest.raises(SettingsError, match=message):
        write_report(copy)


def test_run_that_has_not_begun_is_named(copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(SettingsError, match="its run has not begun"):
        write_report(copy)


def test_failed_report_at_the_end_of_a_run_is_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert write_or_note(tmp_path) is None
    assert "no report" in caplog.text
    assert f"fedcore report {tmp_path}" in caplog.text


def test_failed_drawing_leaves_the_old_report(copy: Path, report: Path) -> None:
    (copy / "report.html").write_bytes(report.read_bytes())
    (copy / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(SettingsError):
        write_report(copy)
    assert (copy / "report.html").read_bytes() == report.read_bytes()


# Parts


def test_thinning_keeps_first_and_last() -> None:
    kept = thin(list(range(1, 5000)))
    assert (kept[0], kept[-1], len(kept)) == (1, 4999, 400)
    assert thin([1, 2]) == [1, 2]


def test_times_read_well() -> None:
    texts = [text.time_text(seconds) for seconds in (0.0123, 1.5, 90, 600, 9000)]
    assert texts == ["12.3 ms", "1.5 s", "90 s", "10 min", "2 h 30 min"]


def test_a_table_lines_up_and_cuts_nothing() -> None:
    long = "a label of many words " * 6 + "!"
    table = [["", "accuracy"], [long, "9%"], ["学", "10%"]]
    lines = text.table_text(table).split("\n")
    assert lines[1].startswith(long)
    # A Chinese character is as wide as two letters.
    assert [len(line) for line in lines] == [
        len(long) + 10,
        len(long) + 10,
        len(long) + 9,
    ]


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "is_dark"), [(1280, False), (500, True)])
def test_browser_shows_the_report(
    finished: Path, report: Path, tmp_path: Path, width: int, is_dark: bool
) -> None:
    from PIL import Image

    address = report.resolve().as_uri()
    mode = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    picture = tmp_path / "report.png"
    shot = [f"--screenshot={picture}", f"--window-size={width},2400"]
    browse(tmp_path / "a", mode, *shot, address)
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] == width
    is_drawn_dark = np.median(pixels) < 80
    assert is_drawn_dark == is_dark, "the page does not follow the reader's mode"
    assert pixels.std() > 10, "the screenshot is blank"
    assert (pixels.std(1) > 3).mean() > 0.5, "most of the page is empty"
    dom = browse(tmp_path / "b", "--dump-dom", address)
    last = rows_of(finished)[-1]
    assert f"<b>{last['test_accuracy']:.1%}</b>" in dom
    assert dom.count("<svg") == 9


def test_numbers_of_a_logarithmic_scale_are_written_out() -> None:
    """Within a decade and over many: text in a figure is text, and no markup."""
    for values in ([2.0, 7.0], [1e-4, 1e5]):
        figure, axes = new_figure(4.0, 3.0)
        axes.plot([0, 1], values)
        log_scale(axes)
        drawn = plot(figure, "title", "caption")
        assert "mathdefault" not in str(drawn)
