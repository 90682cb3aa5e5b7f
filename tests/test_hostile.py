"""Runs among hostile clients: bounds, rules in every engine and method, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedcore.strategies.scaffold import Up
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.messages.aggregation.aggregator import Gathered
from fedcore.messages.aggregation.bounds import Bounds
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.reports import Reports
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import run
from fedcore.types import Model, Tree
from tests.helpers import (
    EXACT,
    STRATEGIES,
    answers,
    assert_close,
    equal,
    loop_of,
    per_method,
    small,
)
from tests.liars import enormous, flipped, run_among

RULES: dict[str, dict[str, Any]] = {
    "median": {"aggregation__rule": "median"},
    "trimmed mean": {"aggregation__rule": "trimmed_mean", "aggregation__byzantine": 1},
    "multi-Krum": {"aggregation__rule": "multi_krum", "aggregation__byzantine": 1},
    "geometric median": {"aggregation__rule": "geometric_median"},
    "centred clipping": {"aggregation__rule": "centred_clipping"},
    "NNM": {
        "aggregation__rule": "trimmed_mean",
        "aggregation__before": "nnm",
        "aggregation__byzantine": 1,
    },
    "buckets": {
        "aggregation__rule": "geometric_median",
        "aggregation__before": "bucketing",
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "vectorised": {"engine__name": "vectorised", "engine__chunk": 3},
    "one at a time": {"engine__name": "vectorised", "engine__chunk": 1},
}
REFUSE_RULES = {
    *("fedstale", "fedvarp", "mifa", "admm", "clu", "rerce"),
    *("fedlaw", "fedamd", "dpfedavg", "exactlora"),
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def digits(**settings: Any) -> Experiment:
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    values = {"population": 20, "rounds": 8, "engine.name": "sequential"}
    return Experiment.load("fedavg", {**values, **overrides})


# No rule: what a server bounds


@pytest.mark.slow
def test_a_cap_and_a_bound_keep_one_client_of_twenty_from_ruining_a_run(
    tmp_path: Path,
) -> None:
    honest = run(digits(), tmp_path / "honest").final["test_accuracy"]
    assert honest > 0.75
    ruined = run_among({3}, flipped, digits(), tmp_path / "ruined")
    assert ruined.final["test_accuracy"] < 0.3
    capped = digits(aggregation__max_examples=100)
    saved = run_among({3}, flipped, capped, tmp_path / "saved")
    # The flipped update still takes a tenth of the step back.
    assert saved.final["test_accuracy"] > honest - 0.15
    assert 3 in rows_of(tmp_path / "saved")[0]["capped"]


def test_a_bound_on_norms_keeps_enormous_updates_out_of_the_model(
    tmp_path: Path,
) -> None:
    clipped = digits(aggregation__clip=1.0, rounds=2)
    saved = run_among({3}, enormous, clipped, tmp_path / "saved")
    assert np.isfinite(saved.final["test_loss"])
    # Of 20 clients, or fewer examples: a step of at most C each.
    norm = float(trees.ravel(saved.params).norm())
    assert norm < 50
    row = rows_of(tmp_path / "saved")[0]
    assert 3 in row["clipped"]
    assert not row["dropped"]


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -5.0])
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_count_that_is_none_is_left_out_and_named(
    rule: str, count: float, tmp_path: Path
) -> None:
    def lie(up: Tree, num_examples: Tensor) -> tuple[Tree, Tensor]:
        return up, torch.full_like(num_examples, count)

    e = small("fedavg", aggregation__rule=rule, participation__cohort=12, rounds=1)
    result = run_among({2}, lie, e, tmp_path / "run")
    row = rows_of(tmp_path / "run")[0]
    assert row["left_out"] == {"bad count": [2]}
    assert (row["reports"], row["skipped"]) == (11, False)
    assert np.isfinite(result.final["test_loss"])


def test_bounds_scale_a_vector_whole_and_name_those_who_exceed_them() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.3, 0.0]])
    bias = torch.tensor([[4.0], [0.4]])
    reports = Reports(
        torch.tensor([5, 9]),
        Model({"w": weight, "b": bias}),
        torch.tensor([7.0, 9e18]),
    )
    bounds = Bounds(AggregationSettings(clip=1.0, max_examples=10), is_devices=False)
    bounded = bounds.apply(reports)
    assert bounded.clipped == [5]
    assert bounds.over(reports.clients, reports.num_examples) == [9]
    assert bounded.reports.num_examples.tolist() == [7.0, 10.0]
    assert bounded.norms["params"].tolist() == pytest.approx([5.0, 0.5])
    params = bounded.reports.up.params
    assert params["w"][:, 0].tolist() == pytest.approx([0.6, 0.3])
    assert params["b"][:, 0].tolist() == pytest.approx([0.8, 0.4])


def test_a_bound_holds_for_each_vector_by_itself() -> None:
    delta, dc = {"w": torch.tensor([[3.0]])}, {"w": torch.tensor([[0.5]])}
    message = Up(delta, dc, torch.tensor([0.1]))
    bounds = Bounds(AggregationSettings(clip=1.0), is_devices=False)
    bounded = bounds.apply(Reports(torch.tensor([0]), message, torch.ones(1)))
    assert bounded.reports.up.delta["w"].item() == pytest.approx(1.0)
    assert bounded.reports.up.dc["w"].item() == pytest.approx(0.5)


def test_the_row_of_a_round_has_the_norms_that_a_bound_is_chosen_by(
    tmp_path: Path,
) -> None:
    run(small("fedavg", rounds=1, aggregation__clip=1e6), tmp_path / "run")
    spread = rows_of(tmp_path / "run")[0]["update_norm"]["delta"]
    assert 0 < spread["p10"] <= spread["median"] <= spread["p90"] < 1e6


def test_rounds_that_are_mostly_too_small_for_a_rule_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bernoulli = {"name": "bernoulli", "mean": 0.2}
    e = small("fedavg", aggregation__rule="median", aggregation__byzantine=2, rounds=1)
    e = Experiment.parse(e.model_dump(mode="json") | {"participation": bernoulli})
    run(e, tmp_path / "run")
    assert "asks 2 clients on average" in caplog.text


def test_devices_have_a_cap_that_nobody_has_to_set() -> None:
    claimed = torch.tensor([9e18])
    devices = Bounds(AggregationSettings(), is_devices=True)
    assert devices.capped(claimed).item() == 10_000
    assert Bounds(AggregationSettings(), is_devices=False).capped(claimed) == claimed


@pytest.mark.parametrize("name", ["fedavg", "fedstale"])
def test_the_bound_acts_behind_both_doors(name: str, tmp_path: Path) -> None:
    experiment = small(name, rounds=1, aggregation__clip=1e-3)
    result = run(experiment, tmp_path / "run")
    assert len(rows_of(tmp_path / "run")[0]["clipped"]) == 5
    start = loop_of(experiment, tmp_path / "other").state.server.params
    moved = trees.ravel(trees.sub(result.params, start)).norm().item()
    assert 0 < moved <= 1e-3 * 1.0001


# Rules in a run


def test_a_round_moves_the_model_by_the_rule_of_what_clients_sent(
    tmp_path: Path,
) -> None:
    loop = loop_of(small("fedavg", aggregation__rule="median"), tmp_path / "run")
    server = loop.state.server
    cohort, _ = loop.process.sample(0, loop.state.participation)
    sent = []
    for reports in answers(loop.engine, loop.method.train, cohort, server, 0):
        sent.append(trees.ravel(trees.at(reports.up.delta, 0)).numpy())
    loop.round()
    moved = trees.ravel(trees.sub(loop.state.server.params, server.params)).numpy()
    assert np.allclose(moved, np.median(sent, axis=0), atol=1e-7)
    loop.close()


def test_equal_weights_make_fedavg_its_own_unweighted_mean(tmp_path: Path) -> None:
    sizes = {**EXACT, "rounds": 2}
    one = run(small("fedavg", **sizes, aggregation__weights="equal"), tmp_path / "one")
    other = small("fedavg", **sizes, method__weighting="participating")
    by_size = run(small("fedavg", **sizes), tmp_path / "by size")
    assert_close(one.params, run(other, tmp_path / "b").params, 1e-6, "equally")
    assert not equal(one.params, by_size.params)


def test_model_replacement_knows_the_weights_of_a_mean_by_examples(
    tmp_path: Path,
) -> None:
    """gamma = W / w_m: the mean is x_m and what the honest ones add."""
    attack = {
        "adversary__attack": "scaled",
        "adversary__clients": list(range(0, 12, 3)),
    }
    sizes = {"task": "tests.methods:with_an_empty_client", "participation__cohort": 12}
    loop = loop_of(small("fedavg", **attack, **sizes), tmp_path / "run")
    server, cohort = loop.state.server, torch.arange(12)
    sent, weights = [], []
    for reports in answers(loop.engine, loop.method.train, cohort, server, 0):
        sent.append(trees.ravel(trees.at(reports.up.delta, 0)).double())
        weights.append(float(reports.num_examples))
    loop.round()
    loop.close()
    x, w = torch.stack(sent), torch.tensor(weights, dtype=torch.float64)
    hostile = torch.isin(cohort, torch.arange(0, 12, 3))
    w[hostile] *= w.sum() / w[hostile].sum()
    expected = (w @ x / sum(weights)).numpy()
    moved = trees.ravel(trees.sub(loop.state.server.params, server.params)).numpy()
    assert np.allclose(moved, expected, atol=1e-6)


def test_what_a_method_takes_of_the_total_is_weight_times_the_rule(
    tmp_path: Path,
) -> None:
    """FedAU divides the total by N: (sum of omega / N) x rule."""
    settings = {"rounds": 1, "aggregation__rule": "median", "participation__cohort": 5}
    one = run(small("fedau", **settings), tmp_path / "one")
    two = run(small("fedavg", **settings), tmp_path / "two")
    start = loop_of(small("fedavg", **settings), tmp_path / "other").state.server.params
    step, whole = trees.sub(one.params, start), trees.sub(two.params, start)
    assert_close(step, trees.scale(whole, 5 / 12), 1e-7, "a step of FedAU")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_rules_are_the_same_in_every_engine(
    engine: str, rule: str, tmp_path: Path
) -> None:
    settings = {**RULES[rule], "rounds": 2}
    one = run(small("fedavg", **settings), tmp_path / "one")
    other = run(small("fedavg", **settings, **ENGINES[engine]), tmp_path / "other")
    assert_close(one.params, other.params, 2e-5, rule)


@per_method([name for name in STRATEGIES if name not in REFUSE_RULES])
def test_every_method_of_a_mean_takes_a_rule(name: str, tmp_path: Path) -> None:
    experiment = small(
        name,
        aggregation__rule="trimmed_mean",
        aggregation__byzantine=1,
        adversary__attack="sign_flip",
        adversary__clients=[1],
        adversary__scale=100.0,
        participation__cohort=12,
    )
    result = run(experiment, tmp_path / "run")
    assert np.isfinite(result.final["test_loss"])
    assert not any(row["skipped"] for row in result.history)


@pytest.mark.parametrize("name", sorted(REFUSE_RULES))
def test_other_methods_refuse_a_rule_by_name_with_the_reason(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as error:
        run(small(name, aggregation__rule="median"), tmp_path / "run")
    message = str(error.value)
    assert 'aggregation.rule = "median" cannot take the place of the mean' in message
    assert name in message
    assert not (tmp_path / "run").exists()


def test_scaffold_has_a_rule_for_each_of_its_two_vectors() -> None:
    clients = torch.tensor([0, 1, 2])
    gathered = Gathered(clients, 10**9, Path)
    change = {"w": torch.ones(3, 4)}
    message = Up(change, change, torch.tensor([1.0, 5.0, 3.0]))
    gathered.add(Reports(clients, message, torch.ones(3)), torch.ones(3))
    assert set(gathered.rows) == {"delta", "dc"}
    assert gathered.tree({"delta": torch.zeros(4), "dc": torch.ones(4)}).loss == 3.0


def test_a_round_with_too_few_for_the_rule_is_skipped_and_not_averaged(
    tmp_path: Path,
) -> None:
    experiment = small(
        "fedavg",
        aggregation__rule="trimmed_mean",
        aggregation__byzantine=2,
        participation__dropout=0.5,
        rounds=6,
    )
    result = run(experiment, tmp_path / "run")
    too_few = [row for row in result.history if row["reports"] < 5]
    assert too_few
    assert all(row["skipped"] == (row["reports"] < 5) for row in result.history)


def test_no_odds_are_told_where_no_round_can_have_more_than_f(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"aggregation__rule": "median", "rounds": 1, "participation__cohort": 9}
    run(small("fedavg", **settings, aggregation__byzantine=2), tmp_path / "b")
    assert "of the rounds" in caplog.text  # 2 of 9 asked are 3 of 12
    caplog.clear()
    attack = {"adversary__attack": "zero", "adversary__clients": [0, 1]}
    run(small("fedavg", **settings, **attack, aggregation__byzantine=2), tmp_path / "a")
    assert "of the rounds" not in caplog.text


def test_f_is_that_of_the_clients_asked_for_attackers_do_not_drop_out(
    tmp_path: Path,
) -> None:
    experiment = small(
        "fedavg",
        aggregation__rule="trimmed_mean",
        aggregation__fraction=0.2,
        participation__cohort=10,
        participation__dropout=0.6,
        rounds=8,
    )
    rows = run(experiment, tmp_path / "run").history
    # f = 2 of the ten that are asked, so that it takes five; of four it would be 1.
    assert any(3 <= row["reports"] < 5 for row in rows)
    assert all(row["skipped"] == (row["reports"] < 5) for row in rows)


def test_a_client_without_examples_is_in_no_rule(tmp_path: Path) -> None:
    experiment = small(
        "fedavg",
        task="tests.methods:with_an_empty_client",
        participation__cohort=12,
        aggregation__rule="median",
        rounds=1,
    )
    run(experiment, tmp_path / "run")
    listed = rows_of(tmp_path / "run")[0]["weights"]["train.delta"]
    assert listed["clients"] == list(range(11))


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_cap_that_all_exceed_makes_all_clients_count_the_same(
    engine: str, tmp_path: Path
) -> None:
    settings = {**EXACT, "rounds": 2, "engine__name": engine, "engine__chunk": 3}
    capped = small("fedavg", **settings, aggregation__max_examples=1)
    other = small("fedavg", **settings, method__weighting="participating")
    one, two = run(capped, tmp_path / "one"), run(other, tmp_path / "two")
    assert_close(one.params, two.params, 1e-6, "a cap of one example")
    assert len(rows_of(tmp_path / "one")[0]["capped"]) == 5


# Stop and resume


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation__rule": "centred_clipping"},
        {"aggregation__rule": "geometric_median", "aggregation__before": "bucketing"},
        {"adversary__attack": "mimic", "adversary__fraction": 0.3},
        {"adversary__attack": "stale", "adversary__fraction": 0.3},
    ],
    ids=["centred clipping", "buckets", "mimic", "stale"],
)
def test_what_rules_and_attacks_remember_comes_back_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(small("fedavg", **settings, rounds=4), tmp_path / "whole")
    run(small("fedavg", **settings, rounds=2), tmp_path / "half")
    resumed = run(small("fedavg", **settings, rounds=4), resume=tmp_path / "half")
    assert equal(whole.params, resumed.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation__rule": "centred_clipping"},
        {"aggregation__rule": "median", "aggregation__before": "bucketing"},
        {"aggregation__rule": "fltrust"},  # the server's own control variate
        {
            "aggregation__rule": "centred_clipping",
            "adversary__attack": "ipm_optimised",
            "adversary__clients": [0, 3],
        },
        {"adversary__attack": "mimic", "adversary__clients": [0, 3]},
    ],
    ids=["centred clipping", "buckets", "fltrust", "optimised", "mimic"],
)
def test_kill_9_costs_nothing_that_rules_and_attacks_remember(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    values = {"task": "tests.methods:crashing", "rounds": 8, "proxy": 20}
    e = small("scaffold", **settings)
    e = Experiment.parse(e.model_dump(mode="json") | values)
    (tmp_path / "preset.toml").write_text(e.to_toml())
    whole = run(e, tmp_path / "whole")
    command = [sys.executable, "-m", "fedcore", "run", str(tmp_path / "preset.toml")]
    killed = subprocess.run(
        [*command, "--out", str(tmp_path / "r")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FEDCORE_TEST_CRASH": "25"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert 0 < len(rows_of(tmp_path / "r")) < 8
    assert run(e, resume=tmp_path / "r").params_sha256 == whole.params_sha256


# Refused before a run


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aggregation__rule": "median", "aggregation__byzantine": 3}, "7"),
        ({"aggregation__rule": "krum", "aggregation__byzantine": 2}, "7"),
        ({"aggregation__rule": "bulyan", "aggregation__byzantine": 1}, "7"),
        ({"aggregation__rule": "fltrust"}, "proxy"),
    ],
)
def test_impossible_rules_are_refused_with_the_least_cohort(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=words):
        run(small("fedavg", **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"participation": {"name": "bernoulli", "mean": 0.3}},  # it has no cohort
        {"participation": {"name": "uniform", "cohort": 12}},  # all there are
    ],
    ids=["drawn", "all"],
)
def test_no_larger_cohort_is_advised_where_none_can_be_set(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    e = small("fedavg", aggregation__rule="krum", aggregation__byzantine=7)
    e = Experiment.parse(e.model_dump(mode="json") | settings)
    with pytest.raises(SettingsError) as error:
        run(e, tmp_path / "run")
    assert "participation.cohort" not in str(error.value)
    assert "set aggregation.byzantine = 4 or less" in str(error.value)


def test_fltrust_follows_the_servers_own_message(tmp_path: Path) -> None:
    base = {"rounds": 3, "proxy": 40, "aggregation__rule": "fltrust"}
    one = run(digits(**base), tmp_path / "one")
    lied = run_among({1, 2, 5, 7, 9, 11}, flipped, digits(**base), tmp_path / "lied")
    assert lied.final["test_accuracy"] > one.final["test_accuracy"] - 0.15
    everybody = run_among(set(range(20)), flipped, digits(**base), tmp_path / "all")
    first = loop_of(digits(**base), tmp_path / "first").state.server.params
    # All cosines are negative: the model stays.
    assert equal(everybody.params, first)


def test_what_devices_say_of_themselves_is_cut_at_both_ends_where_f_is_set(
    tmp_path: Path,
) -> None:
    settings = {"rounds": 1, "evaluation__every": 1, "aggregation__byzantine": 2}
    devices = small("fedavg", **settings, engine__name="grid")
    cut = run_among(set(), flipped, devices, tmp_path / "cut").history[-1]
    plain = run(small("fedavg", **settings), tmp_path / "plain").history[-1]
    losses = read_clients(tmp_path / "plain", "evaluate")["loss"].to_numpy()
    assert plain["client_loss"]["mean"] == pytest.approx(losses.mean())
    inner = np.sort(losses)[2:-2]
    assert cut["client_loss"]["mean"] == pytest.approx(inner.mean())


def test_one_device_does_not_own_the_measure_over_all_examples(tmp_path: Path) -> None:
    def boasting(up: Tree, num_examples: Tensor) -> tuple[Tree, Tensor]:
        return up, torch.full_like(num_examples, 9e18)

    settings = {"rounds": 1, "evaluation__every": 1, "aggregation__max_examples": 1}
    devices = small("fedavg", **settings, engine__name="grid")
    result = run_among({0}, boasting, devices, tmp_path / "run", in_evaluation=True)
    row = result.history[-1]
    assert row["client_loss"]["pooled"] == pytest.approx(row["client_loss"]["mean"])
