"""Comparisons: runs that are made, runs that are read, and the results."""

from __future__ import annotations

import doctest
import json
import statistics
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedcore import Experiment, RunError, SettingsError
from fedcore.rounds.history import History
from fedcore.rounds.loop import Interrupted, Quiet
from fedcore.views import compare as comparing
from fedcore.views import compare_page
from fedcore.views.compare import compare, distinct, show, slug
from fedcore.views.comparison import Comparison, Run, curve

SMALL: dict[str, Any] = {
    "population": 12,
    "rounds": 2,
    "evaluation.every": 1,
    "participation.name": "uniform",
    "participation.cohort": 4,
    "engine.chunk": 1,
    "model.name": "mlp",
    "model.hidden": [8],
}


def small(method: str = "fedavg", **more: Any) -> Experiment:
    overrides = dict(SMALL)
    for key, value in more.items():
        overrides[key.replace("__", ".")] = value
    return Experiment.parse({"method": method}, overrides)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two methods on two seeds."""
    presets = [("fedavg", small()), ("fedprox", small("fedprox"))]
    return compare(presets, 2, tmp_path_factory.mktemp("runs") / "c")


class Listener(Quiet):
    """The seeds of runs that were started, and the number of rounds that were done."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.rounds, self.stop_at = 0, stop_at
        self.notes: list[str] = []

    def started(self, experiment: Experiment, *_: Any) -> None:
        self.seeds.append(experiment.seed)

    def round_done(self, row: dict[str, Any]) -> None:
        self.rounds += 1
        if self.rounds == self.stop_at:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_mean_and_deviation_are_those_of_the_runs(done: Comparison) -> None:
    finals = []
    for seed in (0, 1):
        metrics = done.folder / f"fedavg-seed{seed}" / "metrics.jsonl"
        finals.append(History.read(metrics).rows[-1])
    written = json.loads((done.folder / "compare.json").read_text())
    assert written == done.to_dict()
    row = written["methods"]["fedavg"]
    accuracies = [final["test_accuracy"] for final in finals]
    assert row["seeds"] == [0, 1]
    assert row["test_accuracy"]["values"] == accuracies
    assert row["test_accuracy"]["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert row["test_accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
    tenths = [final["client_accuracy"]["p10"] for final in finals]
    assert row["client_p10"]["values"] == tenths
    history = done.runs["fedavg"][0].history
    sent = sum(row["bytes_down"] + row["bytes_up"] for row in history)
    assert row["bytes"]["values"][0] == sent


def test_a_number_that_is_not_finite_is_null_in_json(done: Comparison) -> None:
    run = done.runs["fedavg"][0]
    last = run.history.rows[-1] | {"test_loss": float("inf")}
    diverged = run._replace(history=History([*run.history.rows[:-1], last]))
    spoilt = replace(done, runs={**done.runs, "fedavg": [diverged]})
    loss = spoilt.to_dict()["methods"]["fedavg"]["test_loss"]
    assert loss == {"mean": None, "std": None, "values": [None]}


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    c = compare([("fedavg", small())], 1, tmp_path)
    stat = c.stat("fedavg", "test_accuracy")
    assert stat is not None
    assert stat.std is None
    page = (tmp_path / "compare.html").read_text()
    results = page.partition("<table>")[2].partition("</table>")[0]
    assert "±" not in results


def test_complete_runs_are_read_and_not_run_again(done: Comparison) -> None:
    listener = Listener()
    presets = [("fedavg", small()), ("fedprox", small("fedprox"))]
    again = compare(presets, 2, done.folder, listener)
    assert listener.seeds == []
    assert again.to_dict() == done.to_dict()


def test_more_seeds_run_the_new_ones_only(tmp_path: Path) -> None:
    compare([("fedavg", small())], 1, tmp_path)
    listener = Listener()
    compare([("fedavg", small())], 2, tmp_path, listener)
    assert listener.seeds == [1]


def test_interrupted_comparison_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    experiments = [("fedavg", small(rounds=3, checkpoint__seconds=0))]
    whole = compare(experiments, 2, tmp_path / "whole")
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        compare(experiments, 2, tmp_path / "cut", Listener(stop_at=5))
    listener = Listener()
    cut = compare(experiments, 2, tmp_path / "cut", listener)
    assert listener.seeds == [1]
    assert listener.rounds < 3
    assert cut.stat("fedavg", "test_accuracy") == whole.stat("fedavg", "test_accuracy")
    assert cut.stat("fedavg", "test_loss") == whole.stat("fedavg", "test_loss")


def test_interruption_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted("stop")

    monkeypatch.setattr(comparing, "run", interrupted)
    with pytest.raises(Interrupted, match=f"the same command and --out {tmp_path}"):
        compare([("fedavg", small())], 1, tmp_path)


def test_other_settings_in_the_same_folder_are_refused(done: Comparison) -> None:
    with pytest.raises(SettingsError, match=r"fedavg, seed 0: .*method\.local_lr was"):
        compare([("fedavg", small(method__local_lr=0.5))], 1, done.folder)


def test_fewer_rounds_than_were_run_are_refused(done: Comparison) -> None:
    message = "holds a run of 2 rounds, and 1 are wanted"
    with pytest.raises(SettingsError, match=message):
        compare([("fedavg", small(rounds=1))], 1, done.folder)


def test_failed_run_is_left_out_and_named(tmp_path: Path) -> None:
    listener = Listener()
    bad = small(method__local_lr=1e38, rounds=4)
    c = compare([("good", small()), ("bad", bad)], 1, tmp_path, listener)
    assert list(c.failed) == ["bad, seed 0"]
    assert any("bad, seed 0, failed" in note for note in listener.notes)
    assert c.stat("good", "test_accuracy") is not None
    assert c.stat("bad", "test_accuracy") is None
    assert "Left out: bad, seed 0" in (tmp_path / "compare.html").read_text()


def test_comparison_in_which_all_fails_fails(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="every run failed"):
        compare([("bad", small(method__local_lr=1e38, rounds=4))], 1, tmp_path)


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least one of each"):
        compare([], 3, tmp_path)


def test_labels_and_their_directories_are_distinct() -> None:
    e = small()
    labels = ["a", "a", "a-2", "x/y", "x y", "../up"]
    found = distinct([(label, e) for label in labels])
    assert list(found) == ["a", "a-2", "a-2-2", "x/y", "x y-2", "../up"]
    folders = [slug(label) for label in found]
    assert len(set(folders)) == len(folders)
    assert all("/" not in folder and not folder.startswith(".") for folder in folders)


def test_curves_are_taken_where_every_seed_was_evaluated() -> None:
    def one(rounds: list[int]) -> Run:
        rows: list[dict[str, Any]] = []
        for number in (1, 2, 3):
            rows.append({"round": number, "bytes_down": 1, "bytes_up": 1})
            if number in rounds:
                rows[-1]["test_loss"] = float(number)
        return Run(0, Path(), History(rows))

    drawn = curve([one([1, 3]), one([2, 3])], "test_loss")
    assert drawn.rounds.tolist() == [3]
    assert drawn.sent.tolist() == [6.0]
    assert drawn.values.tolist() == [[3.0], [3.0]]
    assert len(curve([], "test_loss").rounds) == 0


def test_the_examples_run() -> None:
    for module in (comparing, compare_page):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


def test_pictures_are_whole(done: Comparison) -> None:
    assert ET.parse(done.folder / "compare.svg").getroot().tag.endswith("svg")
    page = (done.folder / "compare.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 4
    assert "<script" not in page
    assert "method.mu" in page  # what the two differ in


def test_regression_is_compared_by_loss(tmp_path: Path) -> None:
    e = Experiment.parse(
        {"method": "fedavg"},
        {"task": "least-squares", "population": 5, "rounds": 2, "engine.chunk": 1},
    )
    c = compare([("fedavg", e)], 2, tmp_path)
    assert c.measure == "loss"
    assert c.to_dict()["methods"]["fedavg"]["test_accuracy"] is None
    assert "accuracy" not in (tmp_path / "compare.html").read_text()


def test_table_goes_to_stdout_one_line_a_method(
    done: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    show(done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["test", "fedavg", "fedprox", "Mean"]
    assert "±" in lines[1]
