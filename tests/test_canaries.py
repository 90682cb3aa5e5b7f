"""Canaries: what their scores are worth, and what they do to a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcore.errors import SettingsError
from fedcore.messages import defence
from fedcore.messages.secure import distributed
from fedcore.messages.secure.discrete import discrete_gaussian
from fedcore.methods import load
from fedcore.privacy import epsilon_prv
from fedcore.rounds.canaries import LONGER, Canaries
from fedcore.rounds.canary_bound import (
    Scores,
    Seen,
    describe,
    estimate,
    gaussian_delta,
    gaussian_epsilon,
    measured,
)
from fedcore.rounds.loop import run
from fedcore.rounds.setup import prepare
from tests.canaries import (
    NOISY_MESSAGES,
    SECRET_NOISE,
    found_in,
    outcome_of,
    planted,
)
from tests.helpers import loop_of

CLAIM = {
    "noise_multiplier": 1.0,
    "sample_rate": 1.0,
    "steps": 9,
    "delta": 1e-5,
    "epsilon_rdp": 21.0,
    "epsilon_prv": None,
    "view": "global_model",
}


def unit(draw: torch.Generator, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=draw, dtype=torch.float64)
    lengths: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / lengths


def scores_of_rounds(
    draw: torch.Generator, *, canaries: int, d: int, z: float, rounds: int, drift: float
) -> Scores:
    """Scores of a Gaussian mechanism, written down once more: C = 1."""
    total = Scores()
    others = torch.full((d,), drift / math.sqrt(d), dtype=torch.float64)
    for _ in range(rounds):
        directions = unit(draw, canaries, d)
        noise = torch.randn(d, generator=draw, dtype=torch.float64)
        release = directions.sum(0) + others + z * noise
        seen = Seen({"w": release}, [{"w": others}])
        xs = [seen.score(c, directions.sum(0) - c) for c in directions]
        total += Scores.of(xs, seen.dimensions)
    return total


# The estimator


def test_the_epsilon_of_a_gaussian_is_exact() -> None:
    # dp-accounting's figure for one step at noise 1, delta 1e-5
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=5e-4)
    tight, _ = epsilon_prv(2.0, 1.0, 4, 1e-5)
    assert tight == pytest.approx(gaussian_epsilon(0.5 * 4**0.5, 1e-5), abs=0.02)
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(1e-6, 1e-5) == 0
    for mu in (0.01, 1.0, 7.0, 60.0):
        epsilon = gaussian_epsilon(mu, 1e-6)
        assert gaussian_delta(epsilon, mu) == pytest.approx(1e-6, rel=1e-6)


def test_without_the_canary_scores_have_students_distribution() -> None:
    draw, d = torch.Generator().manual_seed(4), 30
    release = torch.linspace(-1, 3, d, dtype=torch.float64)  # far from random
    seen = Seen({"w": release})
    xs = [seen.score(c) for c in unit(draw, 2000, d)]
    assert stats.kstest(xs, stats.t(d - 2).cdf).pvalue > 0.01


def test_in_noise_alone_the_mean_score_is_one_over_z() -> None:
    draw, z = torch.Generator().manual_seed(5), 0.5
    scores = scores_of_rounds(draw, canaries=20, d=300, z=z, rounds=60, drift=40)
    found = estimate(scores)
    assert abs(found.shift - 1 / z) < 3 * found.deviation
    assert found.deviation < 0.05


@pytest.mark.parametrize(("canaries", "d", "z"), [(20, 400, 2.0), (5, 200, 0.2)])
def test_a_bound_at_95_percent_holds_so_often(canaries: int, d: int, z: float) -> None:
    draw, wrong, runs = torch.Generator().manual_seed(6), 0, 150
    for _ in range(runs):
        scores = scores_of_rounds(draw, canaries=canaries, d=d, z=z, rounds=2, drift=9)
        wrong += estimate(scores).at_least(0.95) > 1 / z
    # 16 or more of 150 come once in 700 times at 5 percent
    assert wrong < 16


@settings(derandomize=True, max_examples=25)
@given(st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_the_length_of_a_release_says_nothing(factor: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    c, release = unit(draw, 40), unit(draw, 40)
    before = Seen({"w": release}).score(c)
    assert Seen({"w": release * factor}).score(c) == pytest.approx(before, rel=1e-9)
    assert Seen({"w": -release}).score(c) == pytest.approx(-before, rel=1e-9)


def test_scores_of_rounds_add_up_in_any_grouping() -> None:
    first, second = Scores.of([1.0, 2.0], 50), Scores.of([4.0], 50)
    rows: list[dict[str, Any]] = []
    for scores in (first, None, second):
        rows.append({} if scores is None else {"canary_scores": scores._asdict()})
    assert Scores.joined(json.loads(json.dumps(rows))) == first + second
    assert first + second == Scores(3, 7.0, 21.0, 5.0, 50)


def test_less_noise_than_is_claimed_raises_an_alarm() -> None:
    honest = Scores(400, 400.0, 800.0, 4000.0, 1000)
    half = Scores(400, 800.0, 2000.0, 4000.0, 1000)
    assert not measured(honest, CLAIM)["alarm"]
    found = measured(half, CLAIM)
    assert found["alarm"]
    assert found["noise_multiplier"] == pytest.approx(0.5, rel=1e-3)
    assert found["epsilon_at_least_99.9"] < found["epsilon_at_least"] < found["epsilon"]
    assert found["epsilon"] == pytest.approx(gaussian_epsilon(6.0, 1e-5), rel=1e-2)
    assert "ALARM" in describe(found)[1]


def test_a_claim_without_noise_is_measured_and_not_contradicted() -> None:
    claim = CLAIM | {"noise_multiplier": 0.0, "epsilon_rdp": "inf"}
    found = measured(Scores(400, 800.0, 2000.0, 4000.0, 1000), claim)
    assert not found["alarm"]
    assert found["claimed_epsilon"] == "inf"
    assert found["epsilon_at_least"] > 10


# Messages


def canaries_in(tmp_path: Path, **overrides: Any) -> tuple[Canaries, Any, Any]:
    """(canaries, the server's state, the method) of a run that is not begun."""
    parts = prepare(planted(**overrides), tmp_path / "run", None, lambda note: None)
    assert parts.canaries is not None
    server = parts.method.init_server(parts.params, parts.task.population)
    return parts.canaries, server, parts.method


def test_a_canarys_message_has_the_length_of_the_bound(tmp_path: Path) -> None:
    canaries, server, method = canaries_in(tmp_path)
    message = canaries.message(method.train, server, 3, 2)
    direction = canaries.direction(3, 2, server.params)
    inner = sum(float((message.delta[n] * direction[n]).sum()) for n in direction)
    norm = math.sqrt(sum(float(x.square().sum()) for x in message.delta.values()))
    assert norm == pytest.approx(0.5, rel=1e-5)
    assert inner / norm == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "local",
    [
        {"local__steps": 7},
        {"local__optimizer": "adamw", "local__steps": 30},
        {"method__quantile": 0.5, "method__bit_noise": 2.0},
    ],
)
def test_its_update_is_longer_before_it_is_clipped(
    local: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canaries, server, method = canaries_in(tmp_path, **local)
    fn, down = method.train, server
    if "method__quantile" in local:
        fn = method.train_within
    monkeypatch.setattr("fedcore.strategies.dpfedavg.clip", lambda tree, bound: tree)
    message = canaries.message(fn, down, 0, 0)
    direction = canaries.direction(0, 0, server.params)
    inner = sum(float((message.delta[n] * direction[n]).sum()) for n in direction)
    assert inner > 0.5
    if "local__optimizer" not in local:
        assert inner == pytest.approx(LONGER * 0.5, rel=1e-4)


def test_directions_are_new_in_every_round_and_known_to_their_key_alone(
    tmp_path: Path,
) -> None:
    canaries, server, _ = canaries_in(tmp_path)
    first = canaries.direction(0, 0, server.params)
    again = canaries.direction(0, 0, server.params)
    for other in ((0, 1), (1, 0)):
        direction = canaries.direction(*other, server.params)
        inner = sum(float((first[n] * direction[n]).sum()) for n in first)
        assert abs(inner) < 5 / math.sqrt(400)
    for name, value in first.items():
        assert torch.equal(value, again[name])
    assert sum(float(x.double().square().sum()) for x in first.values()) == (
        pytest.approx(1.0, rel=1e-6)
    )


# Runs


def test_a_run_measures_the_noise_that_it_claims() -> None:
    for kind in ({}, NOISY_MESSAGES):
        found = found_in(planted(kind))
        assert found["observations"] == 100
        assert abs(found["score"] - 1) < 3.5 * found["score_deviation"]
        assert not found["alarm"]
        assert found["epsilon_at_least"] < found["claimed_epsilon"]


def test_a_secret_sum_has_the_noise_of_all_that_stay() -> None:
    found = found_in(planted(SECRET_NOISE))
    assert found["view"] == "secure_sum"
    assert found["observations"] == 100
    # Ten clients add noise, and that of t = 7 is counted on.
    expected = math.sqrt(7 / 10)
    assert abs(found["score"] - expected) < 3 * found["score_deviation"]
    assert not found["alarm"]


def test_canaries_take_part_as_often_as_the_accountant_assumes() -> None:
    bernoulli = {"name": "bernoulli", "mean": 0.4}
    result = outcome_of(planted({"participation": bernoulli}, rounds=3))
    found = result.final["canaries"]
    assert 10 < found["observations"] < 40  # 24 expected
    assert found["claimed_epsilon"] < 15
    assert found["epsilon"] is not None
    numbers = [row.get("canary_scores", {}).get("number", 0) for row in result.history]
    assert sum(numbers) == found["observations"]


def test_clients_that_are_counted_are_those_of_the_population() -> None:
    with_canaries = outcome_of(planted(rounds=2))
    without = outcome_of(planted(rounds=2, audit__canaries=0))
    for key in ("cohort", "bytes_up", "bytes_down", "clients_trained", "dropped"):
        assert getattr(with_canaries, key) == getattr(without, key), key
    assert with_canaries.to_dict()["final"]["canaries"]["observations"] == 40
    assert "canaries" not in without.final
    assert "canary_scores" not in without.history[0]
    assert with_canaries.params_sha256 != without.params_sha256, "they are in the sum"


def test_canaries_that_are_only_heard_change_nothing() -> None:
    heard = outcome_of(planted(NOISY_MESSAGES, rounds=2))
    without = outcome_of(planted(NOISY_MESSAGES, rounds=2, audit__canaries=0))
    assert heard.params_sha256 == without.params_sha256
    assert heard.final["canaries"]["observations"] == 40


@pytest.mark.slow
def test_workers_change_nothing_of_what_canaries_find() -> None:
    few: dict[str, Any] = {"rounds": 2, "evaluation__clients": 2}
    one = outcome_of(planted(**few))
    other = outcome_of(planted(**few, engine__name="ray", engine__workers=2))
    assert one.params_sha256 == other.params_sha256
    assert one.final["canaries"] == other.final["canaries"]


@pytest.mark.parametrize("kind", [{}, NOISY_MESSAGES], ids=["model", "message"])
def test_engines_agree_on_what_canaries_find(kind: dict[str, Any]) -> None:
    one = found_in(planted(kind, rounds=2))
    other = found_in(planted(kind, rounds=2, engine__name="vectorised"))
    assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    assert one["observations"] == other["observations"]


def test_a_secure_sum_of_the_same_run_has_the_same_canaries() -> None:
    plain = found_in(planted(rounds=2))
    secure = found_in(planted(rounds=2, aggregation__secure=True))
    assert secure["score"] == pytest.approx(plain["score"], abs=1e-3)


def test_a_run_that_was_stopped_has_the_canaries_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    whole = outcome_of(planted(rounds=3))
    stopped = loop_of(planted(rounds=2), tmp_path / "run")
    stopped.run()
    stopped.close()
    resumed = run(planted(rounds=3), resume=tmp_path / "run")
    assert resumed.params_sha256 == whole.params_sha256
    assert resumed.final["canaries"] == whole.final["canaries"]


def test_what_canaries_find_is_in_the_result_and_in_the_report(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = tmp_path / "planted.toml"
    config.write_text(planted(rounds=1).to_toml())
    status, out, err = cli("run", config, "--out", tmp_path / "run")
    assert status == 0, err
    assert "at 95% confidence, claimed" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "measured by canaries" in page
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert {"epsilon_at_least", "claimed_epsilon", "alarm"} <= row["canaries"].keys()


@pytest.mark.parametrize(
    ("kind", "overrides", "why"),
    [
        ({"method": {"name": "fedavg"}}, {}, "has none"),
        ({"method": {"name": "fedavg"}}, {"defence__top_k": 0.5}, "has none"),
        ({"method": {"name": "fedavg"}}, {"defence__clip": 1.0}, "gives itself away"),
        ({}, {"audit__canaries": 41}, "hide each other; set it to at most 40"),
    ],
)
def test_canaries_that_would_measure_nothing_are_refused(
    kind: dict[str, Any], overrides: dict[str, Any], why: str, tmp_path: Path
) -> None:
    experiment = planted(kind, **overrides)
    with pytest.raises(SettingsError, match=why):
        run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_devices_have_no_canaries(tmp_path: Path) -> None:
    experiment = planted(engine__name="grid")
    with pytest.raises(SettingsError, match="clients of a simulation"):
        prepare(experiment, tmp_path / "run", lambda work: None, lambda note: None)  # type: ignore[arg-type, return-value]


# The whole test


def half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = load("dpfedavg")
    whole, added = method._multiplier, defence.add_noise

    def half(self: Any, expected: float) -> Any:
        return whole(self, expected) / 2

    def less(x: Any, deviation: float, draw: Any) -> Any:
        return added(x, deviation / 2, draw)

    monkeypatch.setattr(method, "_multiplier", half)
    monkeypatch.setattr(defence, "add_noise", less)
    monkeypatch.setattr(
        distributed, "discrete_gaussian", lambda s: discrete_gaussian(s // 2)
    )


def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("strategies.dpfedavg", "messages.defence"):
        monkeypatch.setattr(f"fedcore.{place}.clip", lambda tree, bound: tree)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, NOISY_MESSAGES], ids=["model", "message"])
@pytest.mark.parametrize("fault", [None, half_the_noise, no_clip])
def test_faults_are_caught_and_honest_runs_are_not_accused(
    kind: dict[str, Any],
    fault: Callable[[pytest.MonkeyPatch], None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault is not None:
        fault(monkeypatch)
    section = "defence" if kind else "method"
    few: dict[str, Any] = {"rounds": 3, "population": 4, "audit__canaries": 10}
    few[f"{section}__noise_multiplier"] = 0.5
    alarms = []
    for seed in range(20):
        found = found_in(planted(kind, seed=seed, **few))
        alarms.append(found["alarm"])
    expected = fault is not None
    assert alarms == [expected] * 20, np.flatnonzero(np.array(alarms) != expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, half_the_noise])
def test_faults_of_noise_that_clients_add_are_caught(
    fault: Callable[[pytest.MonkeyPatch], None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault is not None:
        fault(monkeypatch)
    few = {"rounds": 3, "population": 4, "audit__canaries": 10}
    noise = {"defence__distributed__noise_multiplier": 0.5}
    alarms = []
    for seed in range(20):
        found = found_in(planted(SECRET_NOISE, seed=seed, **few, **noise))
        alarms.append(found["alarm"])
    assert alarms == [fault is not None] * 20
