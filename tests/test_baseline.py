"""What is measured before the first round of a run that starts from trained weights."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from torch import Tensor

from fedcore import (
    Experiment,
    Task,
)
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result, run
from fedcore.views.compare import compare
from fedcore.views.run_report import write_report
from fedcore.views.terminal import show_result
from tests.tokens import (
    language,
    settings,
)


def trained(tmp_path: Path) -> Result:
    return run(settings(rounds=1), tmp_path / "first")


def test_a_run_from_trained_weights_is_measured_before_its_first_round(
    tmp_path: Path,
) -> None:
    start = trained(tmp_path)
    experiment = settings(initial=start.run_dir, rounds=3, evaluation__every=3)
    result = run(experiment, tmp_path / "run")
    before = result.history[0]["baseline"]
    first = start.final
    for name in ("test_perplexity", "unseen_perplexity", "test_loss"):
        assert before[name] == first[name]
    assert before["client_perplexity"] == first["client_perplexity"]
    assert [row["round"] for row in result.history] == [1, 2, 3]
    history = History(result.history)
    points = history.points("test_perplexity")
    assert points == [
        (0, first["test_perplexity"]),
        (3, result.final["test_perplexity"]),
    ]
    assert history.evaluated["round"] == 3
    rounds = read_clients(tmp_path / "run", "evaluate")["round"].to_pylist()
    assert set(rounds) == {3}
    plain = run(settings(rounds=3), tmp_path / "plain")
    assert "baseline" not in plain.history[0]


def test_a_resumed_run_has_the_same_baseline(tmp_path: Path) -> None:
    start = trained(tmp_path)
    whole = run(settings(initial=start.run_dir, rounds=3), tmp_path / "whole")
    folder = tmp_path / "parts"
    run(settings(initial=start.run_dir, rounds=2), folder)
    resumed = run(settings(initial=start.run_dir, rounds=3), resume=folder)
    assert resumed.params_sha256 == whole.params_sha256
    ours, theirs = (r.history[0]["baseline"] for r in (resumed, whole))
    del ours["evaluation_s"], theirs["evaluation_s"]
    assert ours == theirs


def written(params: dict[str, Tensor]) -> str:
    return f"To be <{params['head.bias'][0].item():.4f}>"


def writing(experiment: Experiment) -> Task:
    """`language`, with text that the model writes."""
    task = language(experiment)
    task.sample = written
    return task


def test_report_comparison_and_terminal_show_the_baseline_and_other_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = trained(tmp_path)
    experiment = settings(
        task="tests.test_baseline:writing", initial=start.run_dir, evaluation__every=2
    )
    result = run(experiment, tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    before = result.history[0]["baseline"]
    value = f"{before['test_perplexity']:.4g}"
    assert f"from {value} before the first round" in page
    assert f"; {value} before" in page
    found = re.findall(r">((?:test|unseen) [a-z ]+)</th>", page)
    kinds, names = ("test", "unseen"), ("perplexity", "token accuracy")
    assert found[:4] == [f"{kind} {name}" for name in names for kind in kinds]
    assert "Other test sets: &#34;unseen&#34;." in page
    for params in (start.params, result.params):
        assert html.escape(written(params)) in page
    show_result(result, None)
    shown = capsys.readouterr().out
    assert re.search(r"unseen perplexity +\d+\.\d+, \d+\.\d+ before the first", shown)
    assert re.search(r"test token_accuracy +\d+\.\d+%, \d+\.\d+% before", shown)
    ours = result.final["client_perplexity"]["pooled"]
    start_of_ours = before["client_perplexity"]["pooled"]
    first = f"{ours:.4f}, {start_of_ours:.4f} before the first round"
    assert re.fullmatch(f"clients' perplexity +{first}", shown.splitlines()[1])
    compared = compare([("one", experiment)], 1, tmp_path / "compared")
    text = json.loads((compared.folder / "compare.json").read_text())
    (entry,) = text["methods"].values()
    assert entry["unseen_perplexity"]["mean"] == result.final["unseen_perplexity"]
