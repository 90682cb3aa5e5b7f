"""Schedules and clocks that do not fit a run are refused, with what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.clock.durations import Durations
from fedcore.clock.settings import Buffered
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds import refusals
from fedcore.rounds.loop import run
from fedcore.rounds.participation import Tiers, UniformProcess
from fedcore.rounds.schedule_checks import refuse_schedule
from tests.helpers import NEEDS, STRATEGIES

CLOCK = {"step_s": 1.0}
BUFFER: dict[str, Any] = {"name": "buffered", "buffer": 2, "concurrency": 4}
TINY: dict[str, Any] = {
    "task": "least-squares",
    "options": {"examples": 40, "features": 3},
    "population": 8,
}


def experiment_of(name: str = "fedavg", **settings: Any) -> Experiment:
    """A tiny experiment of a method, with a clock and these settings."""
    needed = {**TINY, "method": {"name": name}, **NEEDS.get(name, {}), "clock": CLOCK}
    return Experiment.parse({**needed, **settings})


def checked(experiment: Experiment) -> list[str]:
    """The notes of a run that is not refused."""
    task, notes = experiment.build_task(), list[str]()
    method = experiment.build_method()
    process = refusals.participation_process(experiment, task)
    refuse_schedule(experiment, task, method, process, notes.append)
    return notes


def refusal(experiment: Experiment) -> str:
    """The line of a run that is refused."""
    with pytest.raises(SettingsError) as caught:
        checked(experiment)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Methods

BUFFERED = {
    "fedavg",
    "fedopt",
    "fedprox",
    "ditto",
    "fedalt",
    "fedsim",
    "pfedme",
    "fedvarp",
    "mifa",
}
REASONS = {
    "scaffold": "|S| / N",
    "fedau": "count the rounds between two answers",
    "fedstale": "count the rounds between two answers",
    "fedamd": "two exchanges",
    "clu": "clients that are not asked work on",
    "admm": "another algorithm",
    "rerce": "several versions",
    "fedlaw": "all models of one cohort",
    "dpfedavg": "accountant",
    "rolora": "every second round",
    "exactlora": "product of every client's factors",
}


def test_every_method_says_whether_a_buffer_can_be_its_round() -> None:
    assert {*BUFFERED, *REASONS} == set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_buffer_is_the_round_of_these_methods_alone(name: str) -> None:
    remembers = name in ("fedvarp", "mifa")
    schedule = {**BUFFER, "staleness": "constant"} if remembers else BUFFER
    experiment = experiment_of(name, schedule=schedule)
    if name in BUFFERED:
        assert checked(experiment) == []
        return
    message = refusal(experiment)
    assert message.startswith(f'schedule.name = "buffered" does not fit {name}: ')
    assert REASONS[name] in message


@pytest.mark.parametrize("name", ["fedvarp", "mifa"])
def test_what_is_remembered_is_not_discounted(name: str) -> None:
    message = refusal(experiment_of(name, schedule=BUFFER))
    assert message.startswith(f'schedule.staleness = "sqrt" does not fit {name}: ')
    assert message.endswith('set schedule.staleness = "constant"')


@pytest.mark.parametrize(
    ("name", "weighting"),
    [("fedavg", "all"), ("fedavg", "known"), ("fedvarp", "known")],
)
def test_weights_of_a_cohort_are_refused_for_a_buffer(
    name: str, weighting: str
) -> None:
    schedule = {**BUFFER, "staleness": "constant"}
    method = {"name": name, "weighting": weighting}
    message = refusal(experiment_of(name, method=method, schedule=schedule))
    assert f'method.weighting = "{weighting}" divides by N' in message
    assert 'set it to "participating"' in message


def test_a_recorded_buffer_is_checked_as_one_on_a_clock(tmp_path: Path) -> None:
    schedule = {"name": "trace", "file": str(tmp_path), "of": BUFFER}
    message = refusal(experiment_of("scaffold", schedule=schedule))
    assert "does not fit scaffold: " in message
    message = refusal(experiment_of("fedvarp", schedule=schedule))
    assert "does not fit fedvarp: it remembers updates as they are" in message
    assert checked(experiment_of(schedule=schedule, clock={})) == []


# A buffer, beside other settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"participation": {"name": "bernoulli"}}, 'participation.name = "bernoulli"'),
        ({"aggregation": {"secure": True}}, "masks need the clients of a sum"),
        ({"audit": {"capture": 2}}, "audit.capture = 2"),
        ({"audit": {"canaries": 2}}, "audit.canaries = 2"),
        (
            {"adversary": {"attack": "alie", "fraction": 0.3}},
            'adversary.attack = "alie"',
        ),
        (
            {"adversary": {"attack": "backdoor", "fraction": 0.3, "scale": 5.0}},
            'adversary.attack = "backdoor"',
        ),
        ({"min_reports": 3}, "min_reports = 3: a buffer has 2 answers"),
        (
            {"aggregation": {"rule": "krum", "byzantine": 1}},
            'aggregation.rule = "krum" with f = 1 malicious clients needs 5 answers',
        ),
    ],
)
def test_settings_about_cohorts_are_refused_beside_a_buffer(
    setting: dict[str, Any], words: str
) -> None:
    assert words in refusal(experiment_of(schedule=BUFFER, **setting))


def test_what_acts_on_single_clients_is_fine_beside_a_buffer() -> None:
    settings: list[dict[str, Any]] = [
        {"adversary": {"attack": "label_flip", "fraction": 0.3}},
        {"adversary": {"attack": "backdoor", "fraction": 0.3, "scale": 1.0}},
        {"aggregation": {"rule": "median"}},
        {"defence": {"clip": 1.0, "noise_multiplier": 1.0}},
        {"links": {"uplink": {"variance": 0.01}}},
        {"participation": {"name": "uniform", "dropout": 0.2}},
        {"local": {"schedule": "cosine"}},
    ]
    for setting in settings:
        assert checked(experiment_of(schedule=BUFFER, **setting)) == []


@pytest.mark.parametrize(("name", "reason"), [("buffer", "full"), ("concurrency", "")])
def test_more_clients_than_there_are_cannot_work(name: str, reason: str) -> None:
    checked(experiment_of(schedule={**BUFFER, name: 8}))
    message = refusal(experiment_of(schedule={**BUFFER, name: 9}))
    assert message.startswith(f"schedule.{name} = 9: the population is 8, and ")
    assert reason in message


def test_the_population_that_counts_is_the_tasks() -> None:
    task = "tests.methods:with_an_empty_client"  # of 12, whatever is asked for
    schedule = {**BUFFER, "concurrency": 13}
    experiment = experiment_of(task=task, options={}, schedule=schedule)
    assert "schedule.concurrency = 13: the population is 12" in refusal(experiment)


def test_the_size_of_a_cohort_is_said_not_to_apply() -> None:
    for name, value in [("cohort", 3), ("fraction", 0.5)]:
        participation = {"name": "uniform", name: value}
        notes = checked(experiment_of(schedule=BUFFER, participation=participation))
        assert len(notes) == 1
        assert notes[0].startswith(f"participation.{name} = {value} does not apply")


# Clocks, deadlines, goals


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"schedule": BUFFER}, 'schedule.name = "buffered" without a clock'),
        ({"schedule": {"deadline_s": 5.0}}, "schedule.deadline_s = 5 without a clock"),
        ({"schedule": {"goal": 3}}, "schedule.goal = 3 without a clock"),
        ({"evaluation": {"every_s": 9.5}}, "evaluation.every_s = 9.5 without a clock"),
    ],
)
def test_time_in_a_simulation_needs_a_clock(
    settings: dict[str, Any], start: str
) -> None:
    message = refusal(experiment_of(clock={}, **settings))
    assert message.startswith(start)
    assert "set clock.step_s" in message
    assert checked(experiment_of(**settings)) == []
    on_devices = experiment_of(clock={}, engine={"name": "grid"}, **settings)
    assert checked(on_devices) == []


def test_a_clock_says_nothing_of_devices() -> None:
    notes = checked(experiment_of(engine={"name": "grid"}))
    assert notes == ["[clock] is of simulations: devices take the time that they take"]


def test_who_drops_out_needs_a_deadline() -> None:
    participation = {"name": "uniform", "dropout": 0.2}
    for schedule in ({}, {"goal": 3}):
        message = refusal(experiment_of(participation=participation, schedule=schedule))
        assert message.startswith("participation.dropout = 0.2 with a clock: ")
    with_deadline: dict[str, Any] = {
        "schedule": {"deadline_s": 60.0},
        "participation": participation,
    }
    assert checked(experiment_of(**with_deadline)) == []
    assert checked(experiment_of(clock={}, participation=participation)) == []


def test_a_goal_above_the_cohort_is_refused_with_a_cohort_that_over_selects() -> None:
    settings: dict[str, Any] = {"participation": {"name": "uniform", "cohort": 4}}
    assert checked(experiment_of(schedule={"goal": 4}, **settings)) == []
    message = refusal(experiment_of(schedule={"goal": 5}, **settings))
    assert message.startswith("schedule.goal = 5: a round asks at most 4 clients; ")
    assert "participation.cohort=6" in message


def test_a_goal_below_the_least_reports_is_refused() -> None:
    message = refusal(experiment_of(schedule={"goal": 2}, min_reports=3))
    assert message.startswith("schedule.goal = 2: ")
    assert "lower min_reports" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": {"goal": 3}},
        {"schedule": {"deadline_s": 50.0}},
        {"clock": {**CLOCK, "windows": "windows.csv"}},
    ],
)
@pytest.mark.parametrize("name", ["fedavg", "fedvarp", "fedstale"])
def test_rates_are_not_known_where_clients_may_be_late(
    name: str, settings: dict[str, Any]
) -> None:
    key = "rates" if name == "fedstale" else "weighting"
    method = {"name": name, key: "known"}
    assert checked(experiment_of(name, method=method)) == []
    message = refusal(experiment_of(name, method=method, **settings))
    assert "no rate p_i of arrival is known" in message
    assert checked(experiment_of(name, **settings)) == []


def test_noise_for_one_client_is_not_enough_where_it_displaces_another() -> None:
    participation = {"name": "bernoulli", "mean": 0.5}
    for noise, engine in [(1.0, "vectorised"), (1.0, "grid"), (0.0, "vectorised")]:
        experiment = experiment_of(
            "dpfedavg",
            method={"name": "dpfedavg", "noise_multiplier": noise},
            participation=participation,
            engine={"name": engine},
            clock=CLOCK if engine == "vectorised" else {},
            schedule={"goal": 3},
        )
        if noise:
            assert "puts a slower one out of it" in refusal(experiment)
        else:
            assert checked(experiment) == []


def test_windows_and_a_process_of_rounds_do_not_go_together() -> None:
    clock = {**CLOCK, "windows": "windows.csv"}
    participation = {"name": "markov"}
    message = refusal(experiment_of(clock=clock, participation=participation))
    assert message.startswith('participation.name = "markov" with clock.windows: ')
    assert checked(experiment_of(clock=clock)) == []


def test_a_first_round_of_all_clients_is_said_to_miss_the_late_ones() -> None:
    notes = checked(experiment_of("fedamd", schedule={"deadline_s": 50.0}))
    assert len(notes) == 1
    assert "fedamd asks every client in its first round" in notes[0]


def test_a_deadline_that_nobody_meets_is_refused() -> None:
    local = {"steps": 5}
    checked(experiment_of(local=local, schedule={"deadline_s": 5.0}))
    message = refusal(experiment_of(local=local, schedule={"deadline_s": 4.9}))
    assert message == (
        "schedule.deadline_s = 4.9: 8 of 8 clients need longer than that; the fastest "
        "needs 5 s, half of them 5 s: raise it"
    )
    with_jitter = {**CLOCK, "jitter": 0.1}
    notes = checked(
        experiment_of(local=local, schedule={"deadline_s": 4.9}, clock=with_jitter)
    )
    assert "8 of 8 clients need longer than that on average, and are seldom" in notes[0]


def test_clients_that_a_deadline_silences_are_counted() -> None:
    clock = {"step_s": {"name": "two_class", "value": 1.0, "share": 0.5}}
    experiment = experiment_of(
        clock=clock, local={"steps": 5}, schedule={"deadline_s": 10.0}
    )
    everybody = np.arange(8)
    durations = Durations(experiment.clock, 8, experiment.seed)
    slow = (durations.expected(everybody, np.full(8, 5), 0, 0) > 10).sum()
    assert 0 < slow < 8
    (text,) = checked(experiment)
    assert f"{slow} of 8 clients need longer than that, and are never heard" in text


# Cohorts among those who are there


def test_with_everybody_there_a_cohort_is_that_of_the_process() -> None:
    for size in (1, 7, 20):
        process = UniformProcess(20, seed=3, size=size)
        for t in range(5):
            cohort = process.among(t, np.arange(20))
            np.testing.assert_array_equal(cohort, process.members(t))


def test_a_cohort_is_drawn_from_those_who_are_there() -> None:
    process = UniformProcess(20, seed=3, size=5)
    there, counts = np.arange(1, 20, 2), np.zeros(20, dtype=np.int64)
    for t in range(2000):
        cohort = process.among(t, there)
        assert len(cohort) == 5
        assert bool((np.diff(cohort) > 0).all())
        counts[cohort] += 1
    assert counts[::2].sum() == 0
    # 5 of 10: 1000 each, with a deviation of sqrt(2000 / 4) = 22.4
    assert np.abs(counts[1::2] - 1000).max() < 100
    few = np.array([2, 9])
    np.testing.assert_array_equal(process.among(0, few), few)
    assert len(process.among(0, few[:0])) == 0


def test_a_presets_path_to_a_buffer_needs_no_more_than_two_settings(
    tmp_path: Path,
) -> None:
    """`--set schedule.name=buffered --set clock.step_s=0.05` on fedavg.toml."""
    overrides = ["schedule.name=buffered", "clock.step_s=0.05"]
    experiment = Experiment.load("fedavg", overrides)
    assert isinstance(experiment.schedule, Buffered)
    notes = checked(experiment)
    assert [note.split(" ")[0] for note in notes] == ["participation.cohort"]


# Tiers


def test_tiers_are_clients_of_like_speed() -> None:
    seconds = np.random.default_rng(0).lognormal(size=53)
    process = Tiers(tiers=5, cohort=6).of_speeds(seconds, seed=2)
    by_speed = np.argsort(seconds)
    tier_of = np.empty(53, dtype=np.int64)
    for number, tier in enumerate(np.array_split(by_speed, 5)):
        tier_of[tier] = number
    counts, tiers = np.zeros(53), np.zeros(5)
    for t in range(4000):
        cohort = process.members(t)
        assert len(cohort) == process.largest == 6
        assert bool((np.diff(cohort) > 0).all())
        assert len({*tier_of[cohort].tolist()}) == 1
        counts[cohort] += 1
        tiers[tier_of[cohort[0]]] += 1
    assert np.abs(tiers - 800).max() < 120  # deviation 25
    assert process.rates is not None
    # Clients of a tier come together with it, and again each by itself.
    assert np.abs(counts / 4000 - process.rates).max() < 0.03


def test_rounds_of_tiers_wait_less(tmp_path: Path) -> None:
    clock = {"step_s": {"name": "lognormal", "median": 1.0, "sigma": 1.5}}
    passed = []
    for name in ("uniform", "tiers"):
        participation = {"name": name, "cohort": 4}
        experiment = experiment_of(
            clock=clock, participation=participation, population=40, rounds=20
        )
        passed.append(run(experiment, tmp_path / name).history[-1]["time_s"])
    assert passed[1] < 0.7 * passed[0]


def test_tiers_need_a_clock_and_enough_clients() -> None:
    participation = {"name": "tiers", "tiers": 4, "cohort": 2}
    assert checked(experiment_of(participation=participation)) == []
    unclocked: list[dict[str, Any]] = [{"clock": {}}, {"engine": {"name": "grid"}}]
    for settings in unclocked:
        message = refusal(experiment_of(participation=participation, **settings))
        assert message.startswith('participation.name = "tiers" sorts clients by ')
    message = refusal(experiment_of(participation={**participation, "cohort": 3}))
    assert "8 clients in 4 tiers are 2 in the smallest" in message


# A whole run


def test_a_run_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    experiment = experiment_of("scaffold", schedule=BUFFER, rounds=2)
    with pytest.raises(SettingsError, match="does not fit scaffold"):
        run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rule_is_about_as_many_answers_as_a_buffer_has(tmp_path: Path) -> None:
    rule = {"rule": "krum", "byzantine": 1}
    settings: dict[str, Any] = {"aggregation": rule, "rounds": 2}
    schedule = {**BUFFER, "buffer": 5}
    experiment = experiment_of(schedule=schedule, **settings)
    assert len(run(experiment, tmp_path / "run").history) == 2


@pytest.mark.parametrize(
    "changed",
    [{"schedule.buffer": 3}, {"schedule.deadline_s": 9.0}, {"clock.step_s": 2.0}],
)
def test_time_does_not_change_when_a_run_goes_on(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    schedule = {} if "schedule.deadline_s" in changed else BUFFER
    experiment = experiment_of(schedule=schedule, rounds=2)
    run(experiment, tmp_path / "run")
    again = experiment.model_copy(update={"rounds": 3, **changed})
    with pytest.raises(SettingsError, match=next(iter(changed)).split(".")[0]):
        run(again, resume=tmp_path / "run")
