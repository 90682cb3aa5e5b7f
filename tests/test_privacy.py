"""Epsilon: the accountants, the sampling they assume, the steps that were counted.

And DP-FedAvg in NumPy.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm as normal

from fedcore import privacy, trees
from fedcore.errors import SettingsError
from fedcore.rng import rng
from fedcore.rounds.loop import Interrupted, Quiet, run
from fedcore.views.run_report import write_report
from tests.helpers import Server, assert_close, loop_of, small

# q, z, steps, delta, epsilon by Opacus (RDP) and by dp-accounting (PLD)
TABLE = [
    (1, 1, 1, 1e-5, 4.7285, 4.3772),
    (1, 5, 25, 1e-5, 4.7285, 4.3772),
    (0.1, 1, 100, 1e-5, 7.8993, 7.0466),
    (0.01, 1.1, 1000, 1e-5, 1.7118, 1.5162),
    (0.05, 0.8, 200, 1e-4, 7.4903, 6.4726),
    (0.5, 2, 50, 1e-5, 10.2779, 9.4736),
]
LOCAL: dict[str, Any] = {"defence__clip": 0.5, "defence__noise_multiplier": 2.0}
DP: dict[str, Any] = {
    "method__clip": 0.2,
    "method__noise_multiplier": 1.5,
    "participation": {"name": "bernoulli", "mean": 0.4},
    "min_reports": 0,
}


def central(**settings: Any) -> Any:
    return small("dpfedavg", **DP, **settings)


# The accountants


@pytest.mark.parametrize(("q", "z", "steps", "delta", "rdp", "pld"), TABLE)
def test_epsilon_is_that_of_the_table(
    q: float, z: float, steps: int, delta: float, rdp: float, pld: float
) -> None:
    assert privacy.epsilon_rdp(z, q, steps, delta) == pytest.approx(rdp, abs=1e-3)
    prv, failed = privacy.epsilon_prv(z, q, steps, delta)
    assert failed is None
    assert prv is not None
    assert 0 <= prv - pld <= 0.011, "PRV is an upper bound, its error of 0.01 included"


def test_epsilon_falls_with_the_noise_and_rises_with_rate_steps_and_certainty() -> None:
    def rises(values: list[float]) -> bool:
        return all(a < b for a, b in itertools.pairwise(values))

    accountants: list[Any] = [
        privacy.epsilon_rdp,
        lambda *a: privacy.epsilon_prv(*a)[0],
    ]
    for epsilon in accountants:
        assert rises([epsilon(z, 0.1, 50, 1e-5) for z in (4, 2, 1, 0.7)])
        assert rises([epsilon(1, q, 50, 1e-5) for q in (0.01, 0.1, 0.5, 1)])
        assert rises([epsilon(1, 0.1, steps, 1e-5) for steps in (1, 10, 100)])
        assert rises([epsilon(1, 0.1, 50, delta) for delta in (1e-3, 1e-5, 1e-7)])
        once, often = epsilon(1, 1, 1, 1e-5), epsilon(5, 1, 25, 1e-5)
        assert once == pytest.approx(often, abs=1e-5)


@pytest.mark.parametrize(("z", "steps"), [(0.3, 5), (1.0, 10), (20.0, 3)])
def test_without_sampling_prv_is_the_exact_gaussian_mechanism(
    z: float, steps: int
) -> None:
    mu, delta = math.sqrt(steps) / z, 1e-5  # Balle and Wang, ICML 2018, theorem 8

    def excess(epsilon: float) -> float:
        head = normal.cdf(mu / 2 - epsilon / mu)
        tail = normal.logcdf(-mu / 2 - epsilon / mu)
        return float(head - math.exp(epsilon + tail) - delta)

    exact = brentq(excess, 0, 500)
    found, _ = privacy.epsilon_prv(z, 1.0, steps, delta)
    assert found is not None
    assert 0 <= found - exact <= 0.012  # delta's error of a thousandth too


def test_no_noise_is_infinite_and_nothing_sent_is_nothing_spent() -> None:
    g = privacy.guarantee(privacy.central(0.0, 0.1), 3, 1e-5)
    assert (g.epsilon_rdp, g.epsilon_prv) == (math.inf, math.inf)
    assert json.loads(json.dumps(g.to_dict(), allow_nan=False))["epsilon_rdp"] == "inf"
    assert privacy.guarantee(privacy.central(1.0, 0.1), 0, 1e-5).epsilon_prv == 0


@pytest.mark.parametrize(
    ("z", "q", "steps", "delta"),
    [(0.01, 1.0, 1, 1e-5), (0.1, 0.1, 10**6, 1e-5), (1.0, 1.0, 1, 1e-15)],
)
def test_where_prv_fails_it_says_why_and_rdp_stands(
    z: float, q: float, steps: int, delta: float
) -> None:
    g = privacy.guarantee(privacy.central(z, q), steps, delta)
    assert math.isfinite(g.epsilon_rdp)
    assert g.epsilon_prv is None
    assert g.prv_failed
    assert privacy.describe(g.to_dict())[1].startswith("by RDP, ")


def test_delta_is_well_below_one_in_n_and_a_setting(tmp_path: Path) -> None:
    assert privacy.default_delta(1) == privacy.default_delta(1000) == 1e-5
    assert privacy.default_delta(10**6) == pytest.approx(10**-6.6)
    result = run(small("fedavg", **LOCAL, defence__delta=1e-3), tmp_path / "r")
    assert result.final["privacy"]["delta"] == 1e-3


# What a run reports


def test_local_noise_is_accounted_by_the_messages_of_the_busiest_client(
    tmp_path: Path,
) -> None:
    e = small("fedavg", **LOCAL, rounds=6)
    result = run(e, tmp_path / "r")
    loop = loop_of(e, tmp_path / "other")
    sent = Counter(i for t in range(6) for i in loop.process.sample(t, {})[0].tolist())
    spent = result.final["privacy"]
    assert spent["steps"] == max(sent.values()) < 6
    epsilon = privacy.epsilon_rdp(2.0, 1.0, spent["steps"], 1e-5)
    assert spent["epsilon_rdp"] == pytest.approx(epsilon)
    view = (spent["view"], spent["sample_rate"], spent["unit"])
    assert view == ("client_update", 1.0, "client")
    rows = [row for row in result.history if "privacy" in row]
    assert [row["round"] for row in rows] == [2, 4, 6]
    epsilons = [row["privacy"]["epsilon_rdp"] for row in rows]
    assert epsilons == sorted(epsilons)
    written = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(written[-1])["privacy"] == spent


def test_two_messages_a_round_count_twice_and_dropouts_do_not(tmp_path: Path) -> None:
    everybody: dict[str, Any] = {"name": "uniform"}
    e = small("tests.methods:Two", **LOCAL, participation=everybody)
    assert run(e, tmp_path / "r").final["privacy"]["steps"] == 8
    half = {**everybody, "dropout": 0.5}
    loop = loop_of(small("fedavg", **LOCAL, participation=half), tmp_path / "d")
    row = loop.round()
    assert int(loop.state.sent.sum()) == row["reports"] < 12


def test_a_skipped_round_was_sent_all_the_same(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg", **LOCAL), tmp_path)
    loop.task.data.x[:] = torch.nan
    loop.round()
    assert int(loop.state.sent.sum()) == 5


def test_defences_without_noise_guarantee_nothing_and_no_defence_reports_nothing(
    tmp_path: Path,
) -> None:
    clipped = run(small("fedavg", defence__clip=1.0, defence__bits=4), tmp_path / "a")
    spent = clipped.final["privacy"]
    assert (spent["epsilon_rdp"], spent["epsilon_prv"]) == ("inf", "inf")
    assert "privacy" not in run(small("fedavg"), tmp_path / "b").final


def test_central_noise_is_accounted_by_rounds_and_rate(tmp_path: Path) -> None:
    spent = run(central(), tmp_path / "a").final["privacy"]
    assert (spent["steps"], spent["sample_rate"]) == (4, 0.4)
    assert (spent["view"], spent["sampling"]) == ("global_model", "Poisson, rate 0.4")
    epsilon = privacy.epsilon_rdp(1.5, 0.4, 4, 1e-5)
    assert spent["epsilon_rdp"] == pytest.approx(epsilon)
    assert spent["epsilon_prv"] < spent["epsilon_rdp"]
    everybody = small("dpfedavg", **{**DP, "participation": {"name": "uniform"}})
    spent = run(everybody, tmp_path / "b").final["privacy"]
    assert spent["sample_rate"] == 1.0
    assert spent["sampling"] == "every client in every round"


class Stop(Quiet):
    """Interrupts after this round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round_done(self, row: dict[str, Any]) -> None:
        if row["round"] == self.after:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("which", ["local", "central"])
def test_a_resumed_run_goes_on_counting(which: str, tmp_path: Path) -> None:
    e = small("fedavg", **LOCAL, rounds=6) if which == "local" else central(rounds=6)
    whole = run(e, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(e, tmp_path / "part", observer=Stop(3))
    resumed = run(e, resume=tmp_path / "part")
    assert resumed.params_sha256 == whole.params_sha256
    assert resumed.final["privacy"] == whole.final["privacy"]
    for row, expected in zip(resumed.history, whole.history, strict=True):
        assert row.get("privacy") == expected.get("privacy")


def test_other_noise_is_refused_on_resume(tmp_path: Path) -> None:
    run(small("fedavg", **LOCAL), tmp_path / "r")
    louder = small("fedavg", **{**LOCAL, "defence__noise_multiplier": 3.0}, rounds=5)
    change = r"defence\.noise_multiplier was 2\.0 and is now 3\.0"
    with pytest.raises(SettingsError, match=change):
        run(louder, resume=tmp_path / "r")


def test_a_person_reads_epsilon_with_all_that_it_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedcore.views.terminal import show_result

    result = run(central(), tmp_path / "r")
    show_result(result, None)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("privacy"))
    for word in ("epsilon", "PRV", "RDP", "delta 1e-05", "one client", "4 steps"):
        assert word in line
    assert "Poisson, rate 0.4" in line
    assert "global_model" in line
    page = write_report(tmp_path / "r").read_text()
    for words in ("by PRV", "does not cover", "example counts", "run&#39;s seed"):
        assert words in page
    assert "which the server reads without noise" in page
    run(small("fedavg"), tmp_path / "plain")
    assert "epsilon " not in write_report(tmp_path / "plain").read_text()


# The sampling that ran is the one that is accounted for, or there is no run


@pytest.mark.parametrize(
    "participation",
    [
        {"name": "uniform", "cohort": 5},
        {"name": "bernoulli", "p": [0.2] * 11 + [0.3]},
        {"name": "markov", "mean": 0.4},
        {"name": "cyclic", "mean": 0.4, "cycle": 5},
    ],
    ids=lambda p: p["name"],
)
def test_dpfedavg_refuses_any_other_sampling_by_name(
    participation: dict[str, Any], tmp_path: Path
) -> None:
    e = small("dpfedavg", **{**DP, "participation": participation})
    name = rf'participation\.name = "{participation["name"]}"'
    with pytest.raises(SettingsError, match=rf'{name}: .*"bernoulli".*let everybody'):
        run(e, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_dpfedavg_refuses_what_its_noise_would_not_cover(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("1\n2\n3\n4\n")
    traced = {"participation": {"name": "trace", "file": str(trace)}}
    refused = [
        (small("dpfedavg", **{**DP, **traced}), r'participation\.name = "trace"'),
        (central(defence__bits=8), r"its own noise: leave out defence\.clip"),
        (central(links__uplink__variance=0.1), r"links\.uplink: noise after the clip"),
        (small("dpfedavg", **{**DP, "min_reports": 1}), "set min_reports = 0"),
    ]
    for e, message in refused:
        with pytest.raises(SettingsError, match=message):
            run(e, tmp_path / "r")
        assert not (tmp_path / "r").exists()


# DP-FedAvg


def test_dpfedavg_is_the_papers_algorithm(tmp_path: Path) -> None:
    loop = loop_of(central(), tmp_path)
    theta = {name: x.double().numpy() for name, x in loop.state.server.params.items()}
    cohort = loop.process.sample(0, {})[0]
    e = small("fedavg", participation=DP["participation"])
    plain = loop_of(e, tmp_path / "plain")
    fn = plain.method.train  # type: ignore[attr-defined]
    raw = list(plain.engine.each(fn, cohort, plain.state.server, 0))
    C, z, q, N = 0.2, 1.5, 0.4, 12
    total = {name: np.zeros_like(x) for name, x in theta.items()}
    clipped = 0
    for report in raw:
        delta = {name: x[0].double().numpy() for name, x in report.up.delta.items()}
        length = np.sqrt(sum((x**2).sum() for x in delta.values()))
        clipped += int(length > C)
        for name, x in delta.items():
            total[name] += x * min(1, C / length)
    assert clipped > 0
    draw = rng(loop.experiment.seed, "dp noise", 0)
    for name, x in total.items():
        noise = z * C * draw.standard_normal(x.shape)
        theta[name] = theta[name] + (x + noise) / (q * N)
    loop.round()
    expected = {name: torch.from_numpy(x) for name, x in theta.items()}
    assert_close(loop.state.server.params, expected, 1e-6, "theta_1")


def test_a_dpfedavg_client_sends_its_clipped_difference_and_nothing_else(
    tmp_path: Path,
) -> None:
    loop = loop_of(central(), tmp_path)
    fn = loop.method.train  # type: ignore[attr-defined]
    for report in loop.engine.each(fn, torch.arange(12), loop.state.server, 0):
        assert report.up._fields == ("delta",)
        length = trees.ravel(report.up.delta).double().norm()
        assert float(length) <= 0.2 * (1 + 1e-6)


def test_the_noise_of_a_round_without_clients_has_its_deviation() -> None:
    server = Server("dpfedavg", 50, w=[0.0] * 20_000, clip=2.0, noise_multiplier=0.5)
    step = server.round({}, rates=[0.2] * 50)
    # 20 000 draws: standard error 0.5 %
    assert float(step.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.03)
    assert not torch.equal(server.round({}, rates=[0.2] * 50), step)


def test_without_noise_and_clipping_dpfedavg_is_fedavg_with_uniform_weights(
    tmp_path: Path,
) -> None:
    everybody = {"participation": {"name": "uniform"}, "method__local_lr": 0.05}
    none = {"method__clip": 1e6, "method__noise_multiplier": 0.0}
    dp = run(small("dpfedavg", **everybody, **none), tmp_path / "a")
    uniform = small("fedavg", **everybody, method__weighting="participating")
    average = run(uniform, tmp_path / "b")
    assert_close(dp.params, average.params, 1e-6, "z = 0, C = 1e6")
    assert dp.final["privacy"]["epsilon_rdp"] == "inf"
