"""Noise that clients draw themselves: bounds, epsilon, and runs with it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore import privacy, trees
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.messages.defence import DistributedSettings
from fedcore.messages.secure import distributed
from fedcore.messages.secure.discrete import REACH, discrete_gaussian
from fedcore.messages.secure.distributed import (
    DistributedNoise,
    check_threshold,
    deviation_for,
)
from fedcore.messages.secure.primitives import Refused
from fedcore.rng import rng, seed_of
from fedcore.rounds.loop import Interrupted, Loop, run
from fedcore.rounds.noise import expected_clients
from fedcore.rounds.refusals import participation_process
from fedcore.views.run_report import write_report
from tests.helpers import loop_of, small
from tests.test_privacy import Stop

NOISE: dict[str, Any] = {
    "aggregation__secure": True,
    "method__weighting": "participating",
    "participation": {"name": "uniform", "cohort": 6},
    "defence__distributed__noise_multiplier": 0.5,
    "defence__distributed__clip": 0.05,
}

# n0, d, C, z, s, steps: effective multiplier, epsilon at delta 1e-5 by RDP. Written by
# the specification, which has them from dp-accounting 0.6 too (ZCDpEvent).
FIGURES = [
    (10, 10**4, 1.0, 1.0, 1024, 1, 0.999724, 4.7300),
    (100, 10**6, 1.0, 5.0, 1024, 25, 4.855943, 4.8901),
    (10, 10**7, 1.0, 1.0, 1024, 1, 0.898433, 5.3499),
    (10, 10**7, 1.0, 1.0, 8192, 1, 0.998122, 4.7387),
]
# scale / sensitivity, steps: epsilon at delta 1e-5 by opendp 0.16.0, 2026-11-28, from
# make_zCDP_to_approxDP(make_gaussian(...)) on i32 in l2 distance, composed by scale.
OPENDP = [
    (0.999724, 1, 4.729886634),
    (4.855943, 25, 4.890045808),
    (0.898433, 1, 5.349923479),
    (2.0, 10, 8.078359548),
    (0.5, 3, 21.439604897),
]


def noisy(method: str = "fedavg", **settings: Any) -> Experiment:
    """FedAvg's clients count the same; other methods have no such setting."""
    values = {**NOISE, **settings}
    if method != "fedavg":
        del values["method__weighting"]
    return small(method, **values)


def noise(**changes: Any) -> DistributedNoise:
    usual = DistributedNoise(1.0, 1.0, honest=10, num_entries=1000, seed=3)
    return replace(usual, **changes)


# Accounting


@pytest.mark.parametrize(("n0", "d", "C", "z", "s", "steps", "z_eff", "eps"), FIGURES)
def test_epsilon_is_the_specifications_to_the_digit(
    n0: int,
    d: int,
    C: float,
    z: float,
    s: int,
    steps: int,
    z_eff: float,
    eps: float,
) -> None:
    noising = DistributedNoise(C, z, n0, d, deviation=s)
    assert round(noising.effective_multiplier, 6) == z_eff
    found = privacy.epsilon_rdp(noising.effective_multiplier, 1.0, steps, 1e-5)
    assert round(found, 4) == eps


@pytest.mark.parametrize(("z", "steps", "theirs"), OPENDP)
def test_epsilon_is_that_of_opendp(z: float, steps: int, theirs: float) -> None:
    found = privacy.epsilon_rdp(z, 1.0, steps, 1e-5)
    assert 0 <= found - theirs < 3e-4 * theirs, "by a grid of orders: a little above"


def test_the_effective_multiplier_is_below_z_and_never_above() -> None:
    for d in (1, 10, 10**5, 10**8):
        for n0 in (1, 2, 100):
            for z in (0.1, 1.0, 10.0):
                found = noise(num_entries=d, honest=n0, noise_multiplier=z)
                assert 0 < found.effective_multiplier < z
    fine = noise(num_entries=10**7, deviation=8192)
    coarse = noise(num_entries=10**7, deviation=1024)
    assert fine.effective_multiplier > coarse.effective_multiplier


def test_a_few_broad_steps_cost_what_the_sum_of_discrete_gaussians_costs() -> None:
    # Theorem 1 of the paper in NumPy, where tau is not zero: s = 1.
    n0, d, s = 5, 100, 1
    found = noise(honest=n0, num_entries=d, deviation=s)
    gamma = 1 / math.sqrt(n0)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, n0))
    delta = min(
        1 + gamma * math.sqrt(d),
        math.sqrt(1 + gamma**2 * d / 4 + gamma * (1 + gamma * math.sqrt(d) / 2)),
    )
    epsilon = min(
        math.sqrt(delta**2 / (n0 * gamma**2) + tau * d / 2),
        delta / (gamma * math.sqrt(n0)) + tau * math.sqrt(d),
    )
    assert tau > 1e-4
    assert found.effective_multiplier == pytest.approx(1 / epsilon, rel=1e-12)


def test_the_prv_accountant_has_no_word_on_discrete_noise() -> None:
    spent = privacy.guarantee(privacy.distributed(1.0, False), 3, 1e-5)
    assert spent.epsilon_prv is None
    assert "discrete" in str(spent.prv_failed)
    assert privacy.guarantee(privacy.distributed(1.0, True), 0, 1e-5).epsilon_rdp == 0


# 32 bits


@pytest.mark.parametrize("z", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("clients", [3, 100, 1000])
def test_nothing_wraps_at_a_thousand_clients_and_ten_million_numbers(
    clients: int, z: float
) -> None:
    for d in (10**4, 10**7):
        for honest in {2, clients // 2, clients}:
            s = deviation_for(d, max(honest, 1), z)
            noising = noise(
                noise_multiplier=z, honest=honest or 1, num_entries=d, deviation=s
            )
            assert noising.largest_sum(clients) < 2**31


def test_no_entry_of_a_sum_is_larger_than_the_bound_says() -> None:
    noising = noise(honest=2, num_entries=1, noise_multiplier=0.01)
    generator = torch.Generator().manual_seed(0)
    for sign in (1, -1):  # all of a message in one entry, and ten times too long
        vector = torch.tensor([10.0 * sign], dtype=torch.float64)
        rounded = abs(int(noising.rounded(vector, generator)))
        assert rounded + REACH * noising.deviation <= noising.largest_sum(1)
        assert rounded >= noising.clip / noising.step - 1


# One message


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.sampled_from([1e-3, 0.1, 1.0, 50.0]),
    st.sampled_from([0.05, 1.0, 30.0]),
    st.integers(0, 2**32),
)
def test_a_rounded_message_is_never_longer_than_the_accountant_assumes(
    values: list[float], clip: float, z: float, key: int
) -> None:
    noising = noise(clip=clip, noise_multiplier=z, num_entries=len(values), deviation=2)
    vector = torch.tensor(values, dtype=torch.float64)
    numbers = noising.rounded(vector, torch.Generator().manual_seed(key))
    length = math.sqrt(sum(int(number) ** 2 for number in numbers.tolist()))
    bound = noising.sensitivity(len(values)) / noising.step
    assert length <= bound * (1 + 1e-12)
    scaled = vector * min(1.0, clip / max(float(vector.norm()), 1e-300))
    assert bool(((numbers - scaled / noising.step).abs() < 1 + 1e-6).all())


def test_a_message_of_halves_is_rounded_again_until_it_is_short_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noising = noise(num_entries=16, deviation=1, honest=1, noise_multiplier=0.5)
    vector = torch.full((16,), 1.0, dtype=torch.float64)  # within C each is half a step
    longest = math.floor((noising.sensitivity(16) / noising.step) ** 2)
    generator, lengths = torch.Generator().manual_seed(0), []
    for _ in range(300):
        lengths.append(int(noising.rounded(vector, generator).square().sum()))
    assert max(lengths) <= longest
    monkeypatch.setattr(distributed, "BETA", 1e-300)  # any length up to the sure bound
    free = [int(noising.rounded(vector, generator).square().sum()) for _ in range(300)]
    assert max(free) > longest, "the bound did something"


def test_rounding_is_right_on_average() -> None:
    vector = torch.linspace(-0.3, 0.3, 50, dtype=torch.float64)
    noising = noise(clip=10.0, deviation=1, num_entries=50)
    draws = torch.Generator().manual_seed(1)
    total = torch.zeros(50, dtype=torch.float64)
    for _ in range(4000):
        total += noising.rounded(vector, draws)
    error = total / 4000 * noising.step - vector
    # A rounding is at most half a step off in deviation; the condition biases little.
    assert float(error.abs().max()) < 4.5 * noising.step / 2 / math.sqrt(4000)


def test_noise_is_added_to_every_entry_and_is_the_keys() -> None:
    noising, vector = noise(), torch.zeros(1000, dtype=torch.float64)
    numbers = noising.numbers(vector, "train", 2, 7)
    assert numbers.dtype == torch.int32
    key = rng(3, "noise train", 2, 7).bytes(32)
    assert numbers.tolist() == discrete_gaussian(1024).draw(1000, key).tolist()
    assert torch.equal(numbers, noising.numbers(vector, "train", 2, 7))
    others = [("train", 2, 8), ("train", 3, 7), ("other", 2, 7)]
    for function, t, client in others:
        other = noising.numbers(vector, function, t, client)
        assert (other == numbers).double().mean() < 0.01
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator())
    draws = torch.Generator().manual_seed(seed_of(3, "rounding train", 2, 7))
    assert torch.equal(
        noising.numbers(x, "train", 2, 7) - numbers, noising.rounded(x, draws)
    )


@pytest.mark.parametrize(("population", "rate"), [(100, 0.2), (100, 0.57), (30, 0.1)])
def test_as_many_clients_are_expected_as_a_person_would_say(
    population: int, rate: float
) -> None:
    """Floats would make 19.999999999999996 of a fifth of 100, and so 19 whole ones."""
    participation = {"name": "bernoulli", "mean": rate}
    e = small("fedavg", population=population, participation=participation)
    process = participation_process(e, e.build_task())
    assert expected_clients(e, process) == round(population * rate)


def test_a_device_draws_its_noise_from_the_operating_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared: dict[str, Any] = {
        "clip": 2.0,
        "noise_multiplier": 0.5,
        "colluding": 1,
        "deviation": 8192,
    }
    told = noise(**shared).terms()
    own = DistributedSettings(clip=2.0, noise_multiplier=0.5, colluding=1)
    device = DistributedNoise.on_device(own, told, seed=3)
    assert device == noise(**shared, is_secret=True)
    vector = torch.zeros(1000, dtype=torch.float64)
    once, again = (device.numbers(vector, "train", 0, 1) for _ in range(2))
    assert not torch.equal(once, again)
    asked = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr(os, "urandom", urandom)
    same = device.numbers(vector, "train", 0, 1)
    assert asked == [32]
    assert same.tolist() == discrete_gaussian(8192).draw(1000, bytes(32)).tolist()


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ("", "expected honest"),
        ("[1, 2]", "expected honest"),
        ({"honest": None}, "expected honest"),
        ({"honest": 0}, "honest of 0"),
        ({"honest": True}, "honest of True"),
        ({"honest": 3.5}, "honest of 3.5"),
        ({"deviation": 1}, "deviation of 1 steps"),
        ({"clip": 2.0}, "clip of 2, and by this client's settings 1"),
        ({"clip": None}, "expected honest, colluding, deviation, num_entries, clip"),
        ({"noise_multiplier": 0.5}, "noise_multiplier of 0.5, and by this client's"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier of nan: expected"),
        ({"clip": 1}, "clip of 1: expected"),
        ({"colluding": -1}, "colluding of -1"),
        ({"colluding": 1}, "colluding of 1, and by this client's settings 0"),
    ],
)
def test_a_device_refuses_terms_that_nobody_can_agree_to(
    terms: str | dict[str, Any], reason: str
) -> None:
    own = DistributedSettings(noise_multiplier=1.0)
    if isinstance(terms, dict):
        told = json.loads(noise().terms()) | terms
        left = {name: value for name, value in told.items() if value is not None}
        terms = json.dumps(left)
    with pytest.raises(Refused, match=reason):
        DistributedNoise.on_device(own, terms, seed=0)


def test_a_device_refuses_a_threshold_that_leaves_too_little_noise() -> None:
    terms = noise(honest=5, colluding=2).terms()
    check_threshold(terms, 7)
    check_threshold("", 2)
    with pytest.raises(Refused, match="noise is counted on from 5, and 2 may"):
        check_threshold(terms, 6)


def test_a_device_takes_no_bound_from_the_server() -> None:
    # Told of longer messages, it would let a longer one out.
    vector = torch.full((4,), 0.5, dtype=torch.float64)
    told = noise(num_entries=10**9, deviation=2)
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    short = noise(num_entries=4, deviation=2).rounded(vector, draws[0])
    assert torch.equal(told.rounded(vector, draws[1]), short)
    with pytest.raises(ValueError, match="made for 3"):
        noise(num_entries=3).rounded(vector, draws[0])


# Runs


def test_a_round_adds_up_what_clients_send_and_divides_by_those_expected(
    tmp_path: Path,
) -> None:
    e = noisy()
    plain = loop_of(
        small("fedavg", participation=NOISE["participation"]), tmp_path / "p"
    )
    cohort = plain.process.sample(0, {})[0]
    fn = plain.method.train  # type: ignore[attr-defined]
    params = plain.state.server.params
    noising = DistributedNoise(0.05, 0.5, 4, 5, seed=3, divisor=6.0)
    total = torch.zeros(5, dtype=torch.int64)
    for report in plain.engine.each(fn, cohort, plain.state.server, 0):
        for row, client in enumerate(report.clients.tolist()):
            vector = trees.ravel(trees.at(report.up.delta, row)).double()
            assert float(vector.norm()) > 0.05, "clipping does something"
            total += noising.numbers(vector, "train", 0, client)
    loop = loop_of(e, tmp_path / "n")
    row = loop.round()
    moved = trees.ravel(trees.sub(loop.state.server.params, params)).double()
    expected = total.double() * noising.step / 6
    assert float((moved - expected).abs().max()) < 1e-6
    assert "train_loss" not in row
    assert noising.step == pytest.approx(0.5 * 0.05 / (2 * 1024))


def test_the_divisor_stays_when_a_client_leaves(tmp_path: Path) -> None:
    loop = loop_of(noisy(), tmp_path)
    cohort = loop.process.sample(0, {})[0]
    lost = int(cohort[0])
    spoil(loop, lost)
    params = loop.state.server.params
    fn = loop.method.train  # type: ignore[attr-defined]
    noising = DistributedNoise(0.05, 0.5, 4, 5, seed=3)
    total = torch.zeros(5, dtype=torch.int64)
    for report in loop.engine.each(fn, cohort[1:], loop.state.server, 0):
        for row, client in enumerate(report.clients.tolist()):
            vector = trees.ravel(trees.at(report.up.delta, row)).double()
            total += noising.numbers(vector, "train", 0, client)
    row = loop.round()
    assert row["reports"] == 5
    moved = trees.ravel(trees.sub(loop.state.server.params, params)).double()
    assert float((moved - total.double() * noising.step / 6).abs().max()) < 1e-6


def spoil(loop: Loop, client: int) -> None:
    """Let one client's update be no number."""
    loop.task.data.x[loop.task.data.rows(client, "train")] = torch.nan


def test_the_noise_of_a_sum_is_z_times_the_bound_and_that_of_the_clients_beyond(
    tmp_path: Path,
) -> None:
    n, n0, d = 9, 6, 20_000
    noising = noise(honest=n0, num_entries=d, clip=3.0, noise_multiplier=0.7)
    total = torch.zeros(d, dtype=torch.int32)
    for client in range(n):
        vector = torch.zeros(d, dtype=torch.float64)
        total += noising.numbers(vector, "train", 0, client)
    deviation = float((total.double() * noising.step).std())
    # 20 000 draws: standard error 0.5 %
    assert deviation == pytest.approx(0.7 * 3.0 * math.sqrt(n / n0), rel=0.02)


def test_every_engine_has_the_same_noise(tmp_path: Path) -> None:
    one = run(noisy("scaffold"), tmp_path / "one")
    chunks = noisy("scaffold", engine__name="vectorised", engine__chunk=4)
    many = run(chunks, tmp_path / "many")
    again = run(noisy("scaffold"), tmp_path / "again")
    assert one.params_sha256 == again.params_sha256
    a, b = trees.ravel(one.params), trees.ravel(many.params)
    # A rounding that falls the other way is one step.
    assert float((a - b).abs().max()) < 8 * 0.5 * 0.05 / (2 * 1024)


def test_a_run_says_what_it_guarantees_and_that_it_is_a_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedcore.views.terminal import show_result

    e = noisy(rounds=6)
    result = run(e, tmp_path / "r")
    spent = result.final["privacy"]
    noising = DistributedNoise(0.05, 0.5, 4, 5)
    assert spent["noise_multiplier"] == noising.effective_multiplier
    sent = np.zeros(12)
    loop = loop_of(e, tmp_path / "other")
    for t in range(6):
        sent[loop.process.sample(t, {})[0].numpy()] += 1
    assert spent["steps"] == sent.max()
    epsilon = privacy.epsilon_rdp(
        noising.effective_multiplier, 1.0, int(sent.max()), 1e-5
    )
    assert spent["epsilon_rdp"] == pytest.approx(epsilon)
    about = (spent["view"], spent["unit"], spent["neighbours"], spent["noise"])
    zeros = "one client's message, or zeros in its place"
    assert about == ("secure_sum", "client", zeros, "drawn from the run's seed")
    show_result(result, None)
    text = capsys.readouterr().out
    assert "noise: drawn from the run's seed" in text
    page = write_report(tmp_path / "r").read_text()
    assert "against everybody, the server too" in page
    assert "guarantee of a simulation" in page


def test_a_resumed_run_draws_the_same_noise_and_goes_on_counting(
    tmp_path: Path,
) -> None:
    e = noisy("scaffold", rounds=6)
    whole = run(e, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(e, tmp_path / "part", observer=Stop(3))
    resumed = run(e, resume=tmp_path / "part")
    assert resumed.params_sha256 == whole.params_sha256
    assert resumed.final["privacy"] == whole.final["privacy"]
    others = noisy("scaffold", rounds=6, aggregation__clip=0.03)
    with pytest.raises(SettingsError, match="this run adds noise for privacy"):
        run(others, resume=tmp_path / "part", back_to=5)


def test_a_report_of_devices_does_not_speak_of_a_simulation() -> None:
    spent = privacy.guarantee(privacy.distributed(1.0, True), 3, 1e-5).to_dict()
    assert spent["noise"] == "drawn by each device from its operating system"
    assert "simulation" not in privacy.covers(spent)
    assert json.loads(json.dumps(spent)) == spent


def test_colluding_clients_cost_noise_of_the_others(tmp_path: Path) -> None:
    e = noisy(defence__distributed__colluding=2)
    spent = run(e, tmp_path / "r").final["privacy"]
    noising = DistributedNoise(0.05, 0.5, 2, 5)
    assert spent["noise_multiplier"] == noising.effective_multiplier
    loop = loop_of(e, tmp_path / "l")
    noising_of_run = loop.desk.work.sending.noising  # type: ignore[union-attr]
    assert isinstance(noising_of_run, DistributedNoise)
    assert (noising_of_run.honest, noising_of_run.least) == (2, 4)


def test_a_sum_with_too_little_noise_is_not_used(tmp_path: Path) -> None:
    loop = loop_of(noisy(secure__threshold=5), tmp_path)
    before = trees.ravel(loop.state.server.params).clone()
    cohort = loop.process.sample(0, {})[0]
    for lost in cohort[:2].tolist():
        spoil(loop, lost)
    row = loop.round()
    assert row["skipped"]
    assert torch.equal(trees.ravel(loop.state.server.params), before)
    assert int(loop.state.sent.sum()) == 6, "sent all the same, and so accounted for"


def test_cohorts_without_enough_clients_for_the_noise_are_skipped(
    tmp_path: Path,
) -> None:
    # Of 12 expected 8 are counted on; without the noise 3 would do.
    dropout = {"name": "uniform", "dropout": 0.0}
    loop = loop_of(noisy(participation=dropout), tmp_path / "a")
    sums = loop.desk.receiving.secret
    assert sums is not None
    method = loop.method
    assert [sums.threshold(method.train, n) for n in (12, 9, 5)] == [8, 8, 8]
    assert sums.threshold(method.evaluate, 5) == 4
    half = noisy(participation={**dropout, "dropout": 0.3}, rounds=2)
    noted = run(half, tmp_path / "b")
    assert noted.final["privacy"]["noise_multiplier"] < 0.5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "plain sums": ({"aggregation__secure": False}, "set aggregation.secure = true"),
    "examples": (
        {"method__weighting": "examples"},
        r'does not fit fedavg: .*method\.weighting = "participating"',
    ),
    "memory": ({"name": "fedvarp"}, "does not fit fedvarp: it remembers"),
    "own noise": (
        {
            "name": "dpfedavg",
            "min_reports": 0,
            "participation": {"name": "uniform"},
        },
        "does not fit dpfedavg: its server adds noise already",
    ),
    "wraps": (
        {"defence__distributed__noise_multiplier": 1e-6},
        "32 bits hold 2.15e.09: more noise makes steps larger",
    ),
    "all collude": (
        {"defence__distributed__colluding": 4},
        r"the threshold of 6 clients, that are expected, is 4\), and one",
    ),
    "more collude than a threshold": (
        {"defence__distributed__colluding": 5, "secure__threshold": 5},
        r"secure.threshold = 5\), and one of them",
    ),
    "too few": (
        {
            "participation": {"name": "uniform", "cohort": 6, "dropout": 0.4},
            "secure__threshold": 5,
        },
        "% of the rounds have fewer than",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_noise_that_would_guarantee_nothing_is_refused_before_a_run(
    name: str, tmp_path: Path
) -> None:
    changes, message = REFUSED[name]
    changes = dict(changes)
    e = noisy(changes.pop("name", "fedavg"), **changes)
    with pytest.raises(SettingsError, match=message):
        run(e, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defence__clip": 1.0}, "leave out clip, noise_multiplier, top_k and bits"),
        ({"defence__bits": 8}, "leave out clip"),
        ({"defence__top_k": 0.1}, "leave out clip"),
        (
            {"defence__distributed__noise_multiplier": 0.0},
            r"distributed\.clip = 0\.05 without distributed\.noise_multiplier",
        ),
    ],
)
def test_settings_that_disagree_are_refused_when_they_load(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        noisy(**changes)
