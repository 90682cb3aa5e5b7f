"""The stress test: its plan, what follows from its numbers, its command and page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import hostile
from fedcore import Experiment, SettingsError
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.rounds.history import History
from fedcore.rounds.loop import Quiet
from fedcore.stress import report
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
    parse_attack,
    parse_rule,
)
from fedcore.stress.results import CellResult, Judge, SeedRun, Stress
from fedcore.stress.tables import (
    cost_table,
    damage_table,
    heat_rows,
    table,
)
from fedcore.stress.treatment import treatment_of
from fedcore.stress.words import measured
from tests.helpers import PATIENCE
from tests.pages import Page, titles

Cli = Callable[..., tuple[int, str, str]]

JUDGE = Judge("accuracy", True, "test_accuracy")
TINY: dict[str, Any] = {
    "population": 10,
    "rounds": 2,
    "evaluation.every": 1,
    "participation.name": "uniform",
    "participation.fraction": 1.0,
    "engine.chunk": 10,
    "local.steps": 1,
    "local.batch_size": 4,
    "model.name": "mlp",
    "model.hidden": [4],
}
SETTINGS = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]
COMMAND = ["stress", "fedavg", *SETTINGS, "--rules", "mean,trimmed_mean"]
COMMAND += ["--attacks", "sign_flip:10"]


def tiny(**more: Any) -> Experiment:
    overrides = dict(TINY)
    for key, value in more.items():
        overrides[key.replace("__", ".")] = value
    return Experiment.parse({"method": "fedavg"}, overrides)


def plan(
    rules: str = "mean,trimmed_mean",
    attacks: str = "sign_flip,backdoor",
    fractions: tuple[float, ...] = (0.2,),
    seeds: int = 1,
) -> Plan:
    return Plan(
        tuple(map(parse_rule, rules.split(","))),
        tuple(map(parse_attack, attacks.split(","))),
        fractions,
        seeds,
    )


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


# Numbers

VALUES = {  # final accuracy by rule and column, by seed; None: ruined
    "mean": {
        CLEAN: [0.9, 0.94],
        ABSENT: [0.8, 0.84],
        "sign_flip": [0.5, None],
        "backdoor": [0.88, 0.9],
    },
    "trimmed_mean": {
        CLEAN: [0.85, 0.87],
        ABSENT: [0.8, 0.84],
        "sign_flip": [0.7, 0.8],
        "backdoor": [0.7, 0.7],
    },
}


def row(t: int, accuracy: float, **more: Any) -> dict[str, Any]:
    counts = {"cohort": 10, "reports": 10, "bytes_down": 1, "bytes_up": 1}
    return {
        "round": t,
        **counts,
        "seconds": 0.1,
        "dropped": {},
        "test_accuracy": accuracy,
        "test_loss": 1.0,
        "client_accuracy": {"mean": accuracy, "worst_tenth": accuracy / 2},
        **more,
    }


def made(
    values: dict[str, dict[str, list[float | None]]] = VALUES, seeds: int = 2
) -> Stress:
    """A stress test with these results; round 1 is better than the last by 0.05."""
    wanted = plan(seeds=seeds)
    experiment = tiny()
    cells = {}
    for cell in cells_of(experiment, wanted):
        result = CellResult(cell, JUDGE)
        for seed, value in enumerate(values[cell.rule][cell.column][:seeds]):
            final = 0.1 if value is None else value
            more = {"backdoor_success": 0.9 if cell.rule == "mean" else 0.05}
            rows = [row(1, final + 0.05), row(2, final)]
            if cell.column == "backdoor":
                rows[-1] |= more
            why = "no client sent a usable update" if value is None else None
            run = SeedRun(seed, Path(f"{cell.label}-{seed}"), History(rows), why)
            result.runs.append(run)
        cells[cell.fraction, cell.rule, cell.column] = result
    return Stress(experiment, "fedavg", wanted, Path("out"), JUDGE, cells)


def test_the_worst_case_is_the_worst_mean_of_the_last_round() -> None:
    stress = made()
    worst = stress.worst(0.2, "trimmed_mean")
    assert worst is not None
    assert worst.attack == "backdoor"
    assert worst.value == pytest.approx(0.7)
    # A model that is not there is worse than any number.
    assert stress.worst(0.2, "mean") == ("sign_flip", None)
    assert [rule for rule, _ in stress.ranked(0.2)] == ["trimmed_mean", "mean"]


def test_damage_is_measured_from_absent_clients_and_cost_from_the_mean() -> None:
    stress = made()
    assert stress.damage(0.2, "trimmed_mean", "sign_flip") == pytest.approx(0.07)
    assert stress.damage(0.2, "mean", "sign_flip") is None
    assert stress.damage(0.2, "mean", "backdoor") == pytest.approx(-0.07)
    assert stress.cost(0.2, "trimmed_mean") == pytest.approx(0.06)
    assert stress.backdoor(0.2, "mean") == 0.9
    assert damage_table(stress, 0.2)[1:] == [
        ["mean", "ruined", "-7.0"],
        ["trimmed_mean", "7.0", "12.0"],
    ]
    assert cost_table(stress, 0.2)[2] == ["trimmed_mean", "86.0%", "6.0", "43.0%"]


def test_of_several_backdoors_the_most_successful_counts() -> None:
    stress = made()
    wanted = plan(attacks="sign_flip,backdoor,backdoor:auto", seeds=2)
    cell = stress.cells[0.2, "mean", "backdoor"]
    rows = [row(1, 0.9), row(2, 0.9, backdoor_success=0.2)]
    weaker = [SeedRun(seed, Path("b"), History(rows)) for seed in (0, 1)]
    cells = stress.cells | {
        (0.2, "mean", "backdoor:auto"): CellResult(cell.cell, JUDGE, weaker)
    }
    both = replace(stress, plan=wanted, cells=cells)
    assert both.backdoor(0.2, "mean") == pytest.approx(0.9)


def test_a_rule_that_never_had_enough_messages_is_stuck() -> None:
    stress = made()
    cell = stress.cells[0.2, "trimmed_mean", ABSENT]
    for one in cell.runs[1].history:
        one["skipped"] = True
    assert table(stress, 0.2)[2][2] == "stuck"
    assert stress.damage(0.2, "trimmed_mean", "sign_flip") is None
    assert cell.rounds_skipped == 2


def test_the_presets_of_the_benchmark_can_be_stressed() -> None:
    for preset, rules in (
        (hostile.DIGITS, hostile.DIGITS_RULES),
        (hostile.FASHION, hostile.FASHION_RULES),
    ):
        experiment = Experiment.load(preset)
        wanted = plan(",".join(rules), ",".join(hostile.FASHION_ATTACKS), (0.1, 0.2))
        assert cells_of(experiment, wanted)


def test_the_table_has_references_attacks_worst_case_and_backdoor() -> None:
    assert table(made(), 0.2) == [
        [
            "20% malicious",
            "clean",
            "absent",
            "sign_flip",
            "backdoor",
            "worst",
            "backdoor success",
        ],
        ["mean", "92.0%", "82.0%", "ruined", "89.0%", "ruined (sign_flip)", "90%"],
        ["trimmed_mean", "86.0%", "82.0%", "75.0%", "70.0%", "70.0% (backdoor)", "5%"],
    ]


def test_where_lower_is_better_the_largest_value_is_the_worst() -> None:
    judge = Judge("loss", False, "test_loss")
    cells = {}
    for key, result in made().cells.items():
        runs = []
        for run in result.runs:
            loss = 1 - run.history.rows[-1]["test_accuracy"]
            rows = [each | {"test_loss": loss} for each in run.history]
            runs.append(SeedRun(run.seed, run.folder, History(rows)))
        cells[key] = CellResult(result.cell, judge, runs)
    old = made()
    stress = Stress(old.experiment, "fedavg", old.plan, old.folder, judge, cells)
    worst = stress.worst(0.2, "trimmed_mean")
    assert worst is not None
    assert worst.attack == "backdoor"
    assert worst.value == pytest.approx(0.3)
    assert stress.damage(0.2, "trimmed_mean", "sign_flip") == pytest.approx(0.07)
    assert stress.ranked(0.2)[0][0] == "trimmed_mean"


def test_json_has_the_best_step_beside_the_last_round() -> None:
    values = made().to_dict()
    json.dumps(values, allow_nan=False)
    (of_share,) = values["tables"]
    assert of_share["best_rule"] == "trimmed_mean"
    cell = of_share["rules"]["trimmed_mean"]["cells"]["sign_flip"]
    assert cell["mean"] == pytest.approx(0.75)
    assert cell["best_step"] == {"round": 1, "mean": pytest.approx(0.8)}
    assert cell["values"] == [0.7, 0.8]
    assert cell["settings"]["adversary.attack"] == "sign_flip"
    ruined = of_share["rules"]["mean"]["cells"]["sign_flip"]
    assert ruined["mean"] is None
    assert list(ruined["ruined"]) == [1]


def test_fail_below_looks_at_the_best_rule() -> None:
    stress = made()
    assert report.too_low(stress, 70) is None
    too_low = report.too_low(stress, 71)
    assert too_low is not None
    assert "trimmed_mean, comes down to 70.0% (backdoor)" in too_low


def test_words_name_the_rules_that_a_backdoor_passes() -> None:
    text = " ".join(measured(made()))
    assert "a backdoor passes mean; it is stopped by trimmed_mean" in text
    assert "trimmed_mean has the best worst case, 70.0% (backdoor)" in text
    assert "costs 6.0 points" in text


def test_cells_that_are_not_done_are_empty_and_rank_nothing() -> None:
    stress = made()
    del stress.cells[0.2, "trimmed_mean", "sign_flip"]
    stress.cells[0.2, "mean", "backdoor"].runs.pop()
    assert stress.ranked(0.2) == []
    assert table(stress, 0.2)[2][3] == "-"
    assert heat_rows(stress, 0.2)[0].cells[3].heat is None
    report.page(stress, ["fedcore"])
    assert report.too_low(stress, 1) is not None


def test_the_page_has_a_map_with_colours_and_a_command_for_each_cell(
    tmp_path: Path,
) -> None:
    file = tmp_path / "stress.html"
    file.write_text(report.page(made(), ["fedcore", "stress", "fedavg"]))
    page = Page(file)
    heats = [value for name, value in page.attributes if value.startswith("--h: ")]
    assert len(heats) == 2 * (4 + 2)
    assert "--h: 100" in heats
    assert "--h: 0" in heats
    for words in ("What to choose", "FLTrust", "ruined", "7.0"):
        assert words in page.words
    for setting in ("aggregation.rule=trimmed_mean", "adversary.attack=sign_flip"):
        assert setting in page.words
    assert "Each rule at its worst, 20%" in titles(file)


# Clients


def test_the_treatment_of_clients_is_read_from_the_run(tmp_path: Path) -> None:
    columns = {
        "round": np.array([1, 1, 1, 1, 2, 2], dtype=np.int32),
        "function": ["train", "train", "train", "evaluate", "train", "train"],
        "client": np.array([0, 1, 2, 0, 0, 1], dtype=np.int64),
        "num_examples": np.ones(6),
        "weight": [0.5, 0.5, 0.0, np.nan, 0.75, 0.25],
        "norm_ratio": [1.0, 1.0, 9.0, np.nan, 1.0, 3.0],
        "distance": [2.0, 1.0, 8.0, np.nan, 1.0, 1.0],
    }
    pq.write_table(pa.table(columns), tmp_path / "clients.parquet")
    treatment = treatment_of(tmp_path, {2})
    assert treatment is not None
    assert treatment.clients.tolist() == [0, 1, 2]
    # 1 is an equal share: of three clients in round 1, and of two in round 2.
    assert treatment.weights.tolist() == [1.5, 1.0, 0.0]
    assert treatment.norm_ratios.tolist() == [1.0, 2.0, 9.0]
    assert treatment.distances.tolist() == [1.0, 0.75, 4.0]
    values = treatment.to_dict()
    assert values["malicious"] == {
        "clients": 1,
        "weight": 0.0,
        "norm_ratio": 9.0,
        "distance": 4.0,
    }
    assert values["honest"]["weight"] == 1.25


def test_a_run_without_a_rule_has_no_treatment(tmp_path: Path) -> None:
    assert treatment_of(tmp_path, {0}) is None


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
            raise KeyboardInterrupt


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
    # The clean run was done; the other had a line, and no checkpoint yet.
    assert watching.to_do == 3
    assert watching.rounds == 4
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
    done: tuple[Stress, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stress, folder = done
    cell = stress.cells[0.2, "trimmed_mean", "sign_flip:10"]
    (run,) = cell.runs
    note = run.folder / "ruined.txt"
    note.write_text("no client sent a usable update")
    prepared = prepare(tiny(), "fedavg", stress.plan, tiny().build_task())
    again = examine(prepared, folder, Watching())
    note.unlink()
    assert again.worst(0.2, "trimmed_mean") == ("sign_flip:10", None)


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
