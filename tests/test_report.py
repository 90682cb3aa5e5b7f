"""report.html from real runs, and from what is left of runs that ended badly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore import Experiment, SettingsError, run
from fedcore.views.run_report import (
    read_rows,
    thin,
    time_text,
    write_or_note,
    write_report,
)

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on digits in which some clients do not answer."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(
        Experiment.parse({"method": "fedavg"}, {**SMALL, "participation.dropout": 0.3}),
        out=folder,
    )
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


class Page(HTMLParser):
    """Fails on what is not closed; keeps tags, attributes and text."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(file.read_text())
        assert self.stack == [], f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.words += data if "svg" in self.stack else " ".join(data.split()) + " "


def titles(file: Path) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", file.read_text())


def test_report_of_a_real_run_tells_its_numbers(finished: Path) -> None:
    file = write_report(finished)
    page = Page(file)
    last = read_rows(finished / "metrics.jsonl")[-1]
    assert f"{last['test_accuracy']:.1%} test accuracy" in page.words
    assert not re.search(r"(?<!\d)20 clients(?! a second)", page.words)
    assert "over 12 clients" in page.words
    assert "4 of them were asked in each of 4 rounds" in page.words
    assert "finished" in page.words
    assert "unfinished" not in page.words
    assert "dropout" in page.words
    assert f"fedcore run {finished / 'config.toml'}" in page.words
    assert titles(file) == [
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


def test_report_names_the_parameters_that_the_run_ended_with(tmp_path: Path) -> None:
    e = Experiment.parse({"method": "fedavg"}, {**SMALL, "rounds": 1})
    result = run(e, out=tmp_path / "run")
    assert result.params_sha256 in write_report(tmp_path / "run").read_text()


def test_page_needs_nothing_from_outside(finished: Path) -> None:
    page = Page(write_report(finished))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    outside = [
        (n, v)
        for n, v in page.attributes
        if n in ("href", "xlink:href", "src") and not v.startswith("#")
    ]
    assert outside == []
    assert (
        re.search(r"url\((?!#)|@import", (finished / "report.html").read_text()) is None
    )


def test_ids_are_unique_and_every_reference_has_its_target(finished: Path) -> None:
    file = write_report(finished)
    page = Page(file)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {v[1:] for n, v in page.attributes if n == "xlink:href"} | set(
        re.findall(r"url\(#(.*?)\)", file.read_text())
    )
    assert used <= set(ids)


def test_plots_take_their_colours_from_the_page(finished: Path) -> None:
    pictures = "".join(
        re.findall(r"<svg.*?</svg>", write_report(finished).read_text(), re.S)
    )
    assert "var(--ink)" in pictures
    assert "var(--s0)" in pictures
    assert set(re.findall(r"#[0-9a-f]{6}\b", pictures)) <= {
        "#808080"
    }  # the partition's own grey shows in both modes


def test_the_same_run_gives_the_same_bytes(finished: Path) -> None:
    assert write_report(finished).read_bytes() == write_report(finished).read_bytes()


def test_unfinished_run_says_so_and_how_to_go_on(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    words = Page(write_report(copy)).words
    assert "unfinished: 3 of 4 rounds" in words
    assert f"fedcore run --resume {copy}" in words


def test_run_without_an_evaluation_has_a_report(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text(lines[0] + "\n")
    (copy / "clients.parquet").unlink()
    file = write_report(copy)
    assert "not evaluated yet" in Page(file).words
    assert titles(file)[0] == "Training loss by round"
    assert "Spread over clients" not in titles(file)


def test_run_without_a_round_has_a_report(copy: Path) -> None:
    (copy / "metrics.jsonl").write_text("")
    file = write_report(copy)
    assert "No round is done yet" in Page(file).words
    assert titles(file) == ["How classes and examples are spread over clients"]


def test_regression_is_judged_by_its_loss(tmp_path: Path) -> None:
    e = Experiment.parse(
        {"method": "fedavg"},
        {"task": "least-squares", "population": 10, "rounds": 2, "engine.chunk": 1},
    )
    run(e, out=tmp_path / "run")
    file = write_report(tmp_path / "run")
    words = Page(file).words
    assert "test loss" in words
    assert "accuracy" not in words
    assert "Loss of single clients" in titles(file)


def test_what_the_method_logged_is_drawn(tmp_path: Path) -> None:
    values = {
        **SMALL,
        "participation.name": "bernoulli",
        "participation.mean": 0.5,
        "min_reports": 0,
    }
    values = {
        key: value for key, value in values.items() if key != "participation.cohort"
    }
    run(Experiment.parse({"method": "fedau"}, values), out=tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert max(row.get("server_omega_max", 0) for row in rows) >= 1
    assert "Omega max by round" in titles(write_report(tmp_path / "run"))


def test_what_the_method_logged_and_was_not_finite_is_left_out(tmp_path: Path) -> None:
    values = {
        "task": "least-squares",
        "population": 6,
        "proxy": 12,
        "rounds": 2,
        "engine.chunk": 1,
    }
    run(Experiment.parse({"method": "fedlaw"}, values), out=tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    first, second = file.read_text().splitlines()
    broken = json.loads(second) | {"server_lambda": [None] * 6, "server_gamma": None}
    file.write_text(f"{first}\n{json.dumps(broken)}\n")
    assert "Lambda by round" in titles(write_report(tmp_path / "run"))


def test_what_the_method_logged_of_each_client_is_a_band_and_a_known_optimum_a_curve(
    tmp_path: Path,
) -> None:
    values = {
        "task": "least-squares",
        "population": 6,
        "proxy": 12,
        "rounds": 3,
        "engine.chunk": 1,
        "evaluation.every": 1,
    }
    run(Experiment.parse({"method": "fedlaw"}, values), out=tmp_path / "run")
    file = write_report(tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {
        "Lambda by round",
        "Gamma by round",
        "Coherence by round",
        "NMSD in dB by round",
    } <= set(titles(file))
    words = Page(file).words
    least, largest = min(rows[-1]["server_lambda"]), max(rows[-1]["server_lambda"])
    assert f"between {least:.3g} and {largest:.3g} at the end" in words
    assert f"{rows[-1]['nmsd_db']:.2f} dB at the end" in words


def test_empty_and_skipped_rounds_are_counted(copy: Path) -> None:
    rows = read_rows(copy / "metrics.jsonl")
    rows[1] |= {
        "cohort": 0,
        "reports": 0,
        "skipped": False,
        "dropped": {},
        "train_loss": None,
        "train_accuracy": None,
    }
    rows[2] |= {
        "reports": 0,
        "skipped": True,
        "dropped": {"timed out": 4, "<b>odd</b> & long" * 9: 1},
        "test_loss": None,
    }
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = Page(write_report(copy)).words
    assert "Between 0 and 4 of them were asked" in words
    assert "1 round had too few reports" in words
    assert "timed out" in words
    assert "<b>odd</b>" in words  # shown, not obeyed


def test_only_empty_rounds_have_a_report(copy: Path) -> None:
    row = {
        "cohort": 0,
        "reports": 0,
        "skipped": False,
        "dropped": {},
        "bytes_down": 0,
        "bytes_up": 0,
        "seconds": 0.0,
    }
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps({"round": t + 1, **row}) + "\n" for t in range(4))
    )
    assert "0 of them were asked in each of 4 rounds" in Page(write_report(copy)).words


def test_long_run_stays_small(copy: Path) -> None:
    row = read_rows(copy / "metrics.jsonl")[-1]
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "round": t}) + "\n" for t in range(1, 5001))
    )
    assert write_report(copy).stat().st_size < 1_500_000


@pytest.mark.parametrize(
    "spoil", [lambda f: f.unlink(), lambda f: f.write_bytes(b"PAR1 no")]
)
@pytest.mark.parametrize("name", ["clients.parquet", "environment.json"])
def test_what_else_is_missing_or_damaged_costs_its_part_only(
    copy: Path, name: str, spoil: Any
) -> None:
    spoil(copy / name)
    words = Page(write_report(copy)).words
    assert "test accuracy" in words
    assert (f"{name} cannot be read" in words) == (
        (copy / name).exists() or name == "environment.json"
    )


def test_method_that_is_not_at_hand_costs_its_part_only(copy: Path) -> None:
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(
        config.replace('name = "fedavg"', 'name = "gone.away:Method"')
    )
    words = Page(write_report(copy)).words
    assert "gone.away:Method on digits" in words
    assert "Not drawn" in words


def test_folder_that_is_no_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"is no run directory: expected config\.toml"
    ):
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
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([lines[0], lines[2], lines[3]]))
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


def test_failed_drawing_leaves_the_old_report(copy: Path) -> None:
    before = write_report(copy).read_bytes()
    (copy / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(SettingsError):
        write_report(copy)
    assert (copy / "report.html").read_bytes() == before


def test_thinning_keeps_first_and_last() -> None:
    kept = thin(list(range(1, 5000)))
    assert (kept[0], kept[-1], len(kept)) == (1, 4999, 400)
    assert thin([1, 2]) == [1, 2]


def test_times_read_well() -> None:
    assert [time_text(s) for s in (0.0123, 1.5, 90, 600, 9000)] == [
        "12.3 ms",
        "1.5 s",
        "90 s",
        "10 min",
        "2 h 30 min",
    ]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(profile: Path, *arguments: str) -> str:
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --hide-scrollbars"
    command = [str(CHROMIUM), *quiet.split(), f"--user-data-dir={profile}", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_browser_shows_the_report(
    finished: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    from PIL import Image

    address = write_report(finished).resolve().as_uri()
    mode = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    picture = tmp_path / "report.png"
    browse(
        tmp_path / "a",
        mode,
        f"--screenshot={picture}",
        f"--window-size={width},2400",
        address,
    )
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] == width
    assert (np.median(pixels) < 80) == dark, (
        "the page does not follow the reader's mode"
    )
    assert pixels.std() > 10, "the screenshot is blank"
    assert (pixels.std(1) > 3).mean() > 0.5, "most of the page is empty"
    dom = browse(tmp_path / "b", "--dump-dom", address)
    last = read_rows(finished / "metrics.jsonl")[-1]
    assert f"<b>{last['test_accuracy']:.1%}</b>" in dom
    assert dom.count("<svg") == 9
