"""The stress test: its plan, its runs and its command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore import Experiment, RunError, SettingsError
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.rounds.loop import Quiet
from fedcore.stress import examine as examining
from fedcore.stress.examine import (
    default_plan,
    examine,
    jobs_of,
    malicious_clients,
    prepare,
)
from fedcore.stress.odds import odds_line
from fedcore.stress.plan import (
    ABSENT,
    CLEAN,
    Plan,
    cells_of,
    default_rules,
)
from fedcore.stress.results import Stress
from tests.helpers import PATIENCE
from tests.stressed import TINY, plan, tiny

Cli = Callable[..., tuple[int, str, str]]

SETTINGS = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]
COMMAND = ["stress", "fedavg", *SETTINGS, "--rules", "mean,trimmed_mean"]
COMMAND += ["--attacks", "sign_flip:10"]


# The plan


def test_a_cell_has_the_rule_the_attack_and_f() -> None:
    wanted = plan("nnm+trimmed_mean", "alie:1.5,minmax:unit", (0.3,))
    cells = {cell.column: cell for cell in cells_of(tiny(), wanted)}
    assert list(cells) == [CLEAN, ABSENT, "alie:1.5", "minmax:unit"]
    for cell in cells.values():
        aggregation = cell.experiment.aggregation
        assert (aggregation.before, aggregation.rule) == ("nnm", "trimmed_mean")
        assert aggregation.f(10) == 3
    assert not cells[CLEAN].experiment.adversary.is_active
    assert cells[ABSENT].experiment.adversary.attack == "absent"
    alie = cells["alie:1.5"].experiment.adversary
    assert (alie.attack, alie.scale, alie.fraction) == ("alie", 1.5, 0.3)
    assert cells["minmax:unit"].experiment.adversary.direction == "unit"


def test_f_of_the_preset_stays() -> None:
    given = tiny(aggregation__rule="median", aggregation__byzantine=4)
    for cell in cells_of(given, plan("krum", "zero")):
        assert cell.experiment.aggregation.f(10) == 4


def test_runs_with_equal_settings_are_one_run(tmp_path: Path) -> None:
    wanted = plan("mean,median,trimmed_mean", "sign_flip", (0.1, 0.2), seeds=2)
    prepared = prepare(tiny(), "fedavg", wanted, tiny().build_task())
    jobs = jobs_of(prepared, tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs)
    clean = [job for job in jobs if job.cell.column == CLEAN]
    # Mean and median are not told f; the trimmed mean has one for each share.
    assert len(clean) == 2 * (1 + 1 + 2)
    assert len(jobs) == len(clean) + 2 * 2 * 3 * 2
    different = {job.experiment.model_dump_json() for job in jobs}
    assert len(different) == len(jobs)
    assert [job.experiment.seed for job in jobs] == sorted(
        job.experiment.seed for job in jobs
    )


def test_defaults_follow_the_settings_and_the_data() -> None:
    names = [rule.name for rule in default_rules(tiny())]
    assert "fltrust" not in names
    with_proxy = tiny(proxy=20, aggregation__rule="sign")
    names = [rule.name for rule in default_rules(with_proxy)]
    assert names[0] == "sign"
    assert names[-1] == "fltrust"
    assert len(set(names)) == len(names)


def test_what_the_data_and_the_method_do_not_allow_is_left_out_with_a_note() -> None:
    numbers = tiny(task="least-squares")
    left, notes = default_plan(numbers, Plan((), ()), numbers.build_task())
    kinds = {attack.attack for attack in left.attacks}
    assert "mimic" in kinds
    assert not kinds & {"label_flip", "backdoor"}
    assert any("label_flip" in note for note in notes)
    remembers = Experiment.parse({"method": "mifa"}, TINY)
    left, notes = default_plan(remembers, Plan((), ()), remembers.build_task())
    assert [rule.name for rule in left.rules] == ["mean"]
    assert any("cannot take the place of the mean of mifa" in note for note in notes)
    # What the user names is refused, not left out.
    with pytest.raises(SettingsError, match=r"median against clean.*mifa"):
        prepare(remembers, "mifa", plan("median"), remembers.build_task())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rules", "krumm"], "did you mean krum?"),
        (["--rules", "nmm+krum"], "did you mean nnm?"),
        (["--rules", "mean,,krum"], "names separated by commas"),
        (["--attacks", "sign_flop"], "did you mean sign_flip?"),
        (["--attacks", "alie:strong"], "expected a number after the colon"),
        (["--attacks", "minmax:2"], "known: unit, sign, std"),
        (["--attacks", "absent"], "always there"),
        (["--fraction", "20"], "shares between 0 and 1"),
        (["--fraction", "0.05"], "of 10 clients that rounds down to nobody"),
        (["--fraction", "0.6", "--rules", "krum"], "krum against clean"),
        (["--fail-below", "0.8"], "expected percent"),
        (["--set", "adversary.attack=zero", "--set", "adversary.clients=[1]"], "--att"),
        (["--set", "task=least-squares", "--fail-below", "5"], "judged by"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], told: str, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    status, printed, err = cli("stress", "fedavg", *SETTINGS, *words, "--out", out)
    assert (status, printed) == (2, ""), err
    assert told in err
    assert not out.exists()


def test_odds_of_more_malicious_clients_than_a_rule_is_told_of() -> None:
    few = AggregationSettings(rule="trimmed_mean", byzantine=2)
    line = odds_line(few, population=100, asked=20, share=0.1)
    assert "32 % of the rounds of 20 have more than f = 2" in line
    assert line.endswith("--set aggregation.byzantine=5")
    enough = AggregationSettings(rule="trimmed_mean", byzantine=5)
    assert "0.39 %" in odds_line(enough, population=100, asked=20, share=0.1)
    assert odds_line(few, population=20, asked=20, share=0.1) == ""
    assert odds_line(AggregationSettings(), 100, 20, 0.1) == ""
    assert "ask more clients" in odds_line(few, population=100, asked=6, share=0.4)


# Runs


class Watching(Quiet):
    """The runs that were begun; an interrupt in the run of this number."""

    def __init__(self, stop_in: int | None = None) -> None:
        self.names: list[str] = []
        self.rounds, self.stop_in = 0, stop_in

    def planned(self, cells: int, runs: int, rounds: int, folder: Path) -> None:
        self.to_do = rounds

    def cell(self, number: int, runs: int, name: str, is_clean: bool) -> None:
        self.names.append(name)

    def training(self) -> Watching:
        return self

    def round_done(self, row: dict[str, Any]) -> None:
        self.rounds += 1
        if len(self.names) == self.stop_in:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stress, Path]:
    """One rule against one attack."""
    folder = tmp_path_factory.mktemp("stress") / "s"
    prepared = prepare(
        tiny(), "fedavg", plan("trimmed_mean", "sign_flip:10"), tiny().build_task()
    )
    first = examine(prepared, folder, Watching(stop_in=2))
    assert first.is_interrupted
    watching = Watching()
    stress = examine(prepared, folder, watching)
    # The clean run was done, and a round of the one that was interrupted.
    assert watching.to_do == 3
    assert watching.rounds == 3
    return stress, folder


def test_an_interrupted_test_goes_on_where_it_was(done: tuple[Stress, Path]) -> None:
    stress, folder = done
    assert not stress.is_interrupted
    for column in stress.plan.columns:
        cell = stress.cell(0.2, "trimmed_mean", column)
        assert cell is not None
        (run,) = cell.runs
        assert len(run.history) == 2
        assert (run.folder / "config.toml").is_file()
        assert run.folder.parent == folder


def test_another_experiment_in_the_same_directory_is_refused(
    done: tuple[Stress, Path],
) -> None:
    _, folder = done
    other = tiny(local__steps=2)
    wanted = plan("trimmed_mean", "sign_flip:10")
    prepared = prepare(other, "fedavg", wanted, other.build_task())
    with pytest.raises(SettingsError, match=r"trimmed_mean, clean, seed 0.*steps"):
        examine(prepared, folder, Watching())


def test_a_run_that_an_attack_ended_is_a_result_and_is_not_run_again(
    tmp_path: Path,
) -> None:
    # Updates of 1e38 are finite, their mean is a model that gives nothing but NaN.
    destroyed = tiny(rounds=8, adversary__start=2)
    wanted = plan("mean", "sign_flip:1e38")
    prepared = prepare(destroyed, "fedavg", wanted, destroyed.build_task())
    for to_do in (24, 0):
        watching = Watching()
        stress = examine(prepared, tmp_path / "s", watching)
        assert watching.to_do == to_do
        assert (watching.rounds == 0) == (to_do == 0)
        assert stress.worst(0.2, "mean") == ("sign_flip:1e+38", None)
        (run,) = stress.cells[0.2, "mean", "sign_flip:1e+38"].runs
        assert run.ruined is not None
        assert len(run.history) < 8
        assert not stress.cells[0.2, "mean", ABSENT].is_ruined


def test_a_failure_of_the_machine_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("the workers are gone")

    monkeypatch.setattr(examining, "finish", fail)
    prepared = prepare(tiny(), "fedavg", plan("mean"), tiny().build_task())
    with pytest.raises(RunError, match="workers are gone"):
        examine(prepared, tmp_path / "s", Watching())


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_kill_9_in_the_middle_of_a_test_costs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedcore", *COMMAND, "--seeds", "2", "--json"]

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--out", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tables_of(process: subprocess.Popen[str]) -> Any:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        tables = json.loads(out)["tables"]
        for rule in tables[0]["rules"].values():
            for cell in rule["cells"].values():
                del cell["runs"]
        return tables

    whole = tables_of(start(tmp_path / "whole"))
    folder = tmp_path / "killed"
    for runs in (2, 5):
        process = start(folder)
        end = time.monotonic() + PATIENCE
        while len(list(folder.glob("*/metrics.jsonl"))) < runs:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert not (folder / "stress.json").exists()
    assert tables_of(start(folder)) == whole


def test_malicious_clients_are_a_share_rounded_down() -> None:
    found = malicious_clients(25, 0.1, seed=3)
    assert len(found) == 2
    assert found < malicious_clients(25, 0.3, seed=3)


def test_the_command_prints_one_json_object_and_fails_below(
    cli: Cli, done: tuple[Stress, Path]
) -> None:
    _, folder = done
    words = ["stress", "fedavg", *SETTINGS, "--rules", "trimmed_mean"]
    words += ["--attacks", "sign_flip:10", "--out", str(folder)]
    status, out, err = cli(*words, "--json", "--fail-below", "100")
    assert status == 1, err
    assert "below --fail-below 100" in err
    values = json.loads(out)
    assert values["tables"][0]["best_rule"] == "trimmed_mean"
    assert Path(values["report"]).is_file()
    status, out, err = cli(*words)
    assert status == 0, err
    assert out.startswith("20% malicious")
    assert "3 runs, 0 rounds to do" in err
