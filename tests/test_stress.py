"""The numbers of a stress test, its tables and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import hostile
from fedcore import Experiment
from fedcore.rounds.history import History
from fedcore.stress import report
from fedcore.stress.plan import (
    ABSENT,
    cells_of,
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
from tests.pages import Page, titles
from tests.stressed import JUDGE, made, plan, row


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
