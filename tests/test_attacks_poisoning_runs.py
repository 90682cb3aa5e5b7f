"""Whole runs under attack: the same in every engine, and the damage that they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fedcore.config import Experiment
from fedcore.messages.adversary.settings import AttackName
from fedcore.messages.aggregation.aggregator import Aggregator
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import run
from fedcore.rounds.reference import Reference
from tests.helpers import assert_close, equal, loop_of, small

ON_MESSAGES = sorted({*get_args(AttackName)} - {"none", "label_flip", "backdoor"})
# A line search jumps: rounding of honest messages can choose another strength.
SMOOTH = [attack for attack in ON_MESSAGES if not attack.endswith("_optimised")]
AGAINST: dict[str, Any] = {
    "adversary__fraction": 0.34,
    "aggregation__rule": "geometric_median",
    "participation__cohort": 8,
    "rounds": 3,
}


def attacked(attack: str, method: str = "fedavg", **settings: Any) -> Experiment:
    return small(method, **{**AGAINST, "adversary__attack": attack, **settings})


# Every engine


@pytest.mark.parametrize("attack", SMOOTH)
def test_attacks_are_the_same_in_chunks(attack: str, tmp_path: Path) -> None:
    one = run(attacked(attack), tmp_path / "one")
    chunks = {"engine__name": "vectorised", "engine__chunk": 3}
    other = run(attacked(attack, **chunks), tmp_path / "chunks")
    assert_close(other.params, one.params, 2e-5, attack)
    assert other.dropped == one.dropped
    honest = run(attacked("none", adversary__fraction=None), tmp_path / "honest")
    assert honest.params_sha256 != one.params_sha256


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["gaussian", "mimic", "ipm_optimised"])
def test_attacks_on_workers_have_the_bits_of_sequential(
    attack: str, tmp_path: Path
) -> None:
    one = run(attacked(attack, "scaffold"), tmp_path / "one")
    workers = {"engine__name": "ray", "engine__workers": 2}
    other = run(attacked(attack, "scaffold", **workers), tmp_path / "ray")
    assert other.params_sha256 == one.params_sha256


def test_a_run_without_an_attack_is_the_run_that_it_was(tmp_path: Path) -> None:
    plain = run(small("fedavg"), tmp_path / "plain")
    settings = {"adversary__attack": "sign_flip", "adversary__fraction": 0.3}
    late = run(small("fedavg", **settings, adversary__start=5), tmp_path / "late")
    assert late.params_sha256 == plain.params_sha256


def test_absent_clients_are_missing_with_their_reason(tmp_path: Path) -> None:
    e = attacked("absent", participation__cohort=12)
    loop = loop_of(e, tmp_path / "loop")
    hostile = sorted(loop.desk.work.adversary.clients)
    loop.close()
    result = run(e, tmp_path / "run")
    assert [row["reports"] for row in result.history] == [12 - len(hostile)] * 3
    (reason,) = result.dropped
    assert reason == "absent"
    trained = read_clients(tmp_path / "run", function="train")
    measured = trained[trained["loss"].notna()] if "loss" in trained else trained
    assert not set(hostile) & set(measured["client"])


@pytest.mark.filterwarnings("error")
def test_a_rule_that_has_too_few_messages_is_not_tried_out(tmp_path: Path) -> None:
    """It would take a mean of no rows at all."""
    e = attacked(
        "alie_optimised",
        aggregation__rule="trimmed_mean",
        aggregation__byzantine=2,
        participation__dropout=0.5,
        rounds=6,
    )
    result = run(e, tmp_path / "run")
    reports = [row["reports"] for row in result.history]
    assert min(reports) <= 4
    assert [row["skipped"] for row in result.history] == [n < 5 for n in reports]


def test_memory_of_a_skipped_round_is_that_of_the_round_before(tmp_path: Path) -> None:
    settings = {"participation__dropout": 0.5, "min_reports": 6, "rounds": 12}
    loop = loop_of(attacked("mimic", **settings), tmp_path / "loop")
    skipped = []
    for _ in range(12):
        before = loop.state.adversary
        row = loop.round()
        skipped.append(row["skipped"])
        if row["skipped"]:
            assert equal(loop.state.adversary, before)
    loop.close()
    assert True in skipped
    assert False in skipped
    steps, z = (loop.state.adversary[f"mimic train 0 {x}"] for x in ("steps", "z"))
    assert 0 < int(steps) <= skipped.count(False)
    assert z.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("rule", "before"), [("bulyan", "none"), ("meamed", "none"), ("median", "nnm")]
)
def test_a_round_of_few_is_skipped_under_an_attack_that_tries_the_rule(
    rule: str, before: str, tmp_path: Path
) -> None:
    """Fewer than f of them, with which no rule can be tried."""
    settings = {
        "aggregation__rule": rule,
        "aggregation__before": before,
        "aggregation__byzantine": 2,
        "participation__cohort": 12,
        "participation__dropout": 0.8,
        "adversary__fraction": 0.5,
        "rounds": 1,
    }
    for attack in ("alie_optimised", "ipm_optimised"):
        result = run(attacked(attack, **settings), tmp_path / attack)
        first = result.history[0]
        assert (first["reports"], first["skipped"]) == (2, True)


def test_an_optimised_attack_tries_the_rule_with_the_weights_that_it_has() -> None:
    """One honest client has most of the weight, and is the weighted median."""
    settings = AggregationSettings(rule="median", weights="method")
    aggregator = Aggregator(settings, 0, Path.cwd)
    trial = aggregator.trial("train", 0, 3, {})
    rows = torch.tensor([[1.0], [2.0], [9.0]])
    assert trial(rows, torch.tensor([1.0, 1.0, 7.0]), 0).tolist() == [9.0]


def test_the_server_trains_once_a_round_where_an_attack_does_not_try_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    message = Reference.message

    def counted(self: Reference, fn: Any, down: Any, t: int, kept: Any) -> Any:
        calls.append(t)
        return message(self, fn, down, t, kept)

    monkeypatch.setattr(Reference, "message", counted)
    e = attacked("sign_flip", aggregation__rule="fltrust", proxy=20)
    run(e, tmp_path / "run")
    assert calls == [0, 1, 2]


# Damage


DIGITS: dict[str, Any] = {
    "method.local_lr": 0.2,
    "model.hidden": [32],
    "population": 20,
    "participation.cohort": 20,
    "partition.alpha": 0.3,
    "local.batch_size": 16,
    "local.epochs": 1,
    "local.steps": 8,
    "rounds": 25,
    "aggregation.weights": "equal",
    "evaluation.every": 100,
    "evaluation.clients": 0,
}
MULTI_KRUM = {"aggregation.rule": "multi_krum", "aggregation.byzantine": 4}


def last(folder: Path, **settings: Any) -> dict[str, Any]:
    """The last row of a run on digits with 20 clients."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    e = Experiment.load("fedavg", {**DIGITS, **overrides})
    return run(e, folder).history[-1]


@pytest.mark.slow
def test_one_client_in_five_ruins_the_mean_and_not_multi_krum(tmp_path: Path) -> None:
    flip = {
        "adversary__attack": "sign_flip",
        "adversary__fraction": 0.2,
        "adversary__scale": 10.0,
    }
    clean = last(tmp_path / "clean")["test_accuracy"]
    mean = last(tmp_path / "mean", **flip)["test_accuracy"]
    robust = last(tmp_path / "robust", **flip, **MULTI_KRUM)["test_accuracy"]
    assert clean > 0.85
    assert mean < 0.2
    assert robust > clean - 0.08


@pytest.mark.slow
def test_a_backdoor_goes_through_the_mean_and_not_through_multi_krum(
    tmp_path: Path,
) -> None:
    """With clients that are alike; Multi-Krum takes it for rare data where not."""
    backdoor = {
        "adversary__attack": "backdoor",
        "adversary__fraction": 0.2,
        "partition.alpha": 100.0,
    }
    mean = last(tmp_path / "mean", **backdoor)
    replacing = last(tmp_path / "replacing", **backdoor, adversary__scale="auto")
    robust = last(tmp_path / "robust", **backdoor, **MULTI_KRUM)
    assert mean["backdoor_success"] > 0.7
    assert replacing["backdoor_success"] > 0.9
    assert robust["backdoor_success"] < 0.25
    assert robust["test_accuracy"] > 0.8
