"""Synchronous rounds on a clock, and their rows. Specification (c) 2, (f) 4, 5, 13.

Clients 0, 1 and 2 of most runs need 2, 3 and 7 seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore.config import Experiment
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import equally
from fedcore.rounds import loop
from fedcore.rounds.loop import Loop
from fedcore.task import Task
from fedcore.types import Batches, Model, Params
from tests.helpers import loop_of, slow
from tests.test_buffer import Stop, StopAfter, rows_of

PULLS = {
    "task": "tests.test_buffered_methods:pulls",
    "holdout": 0.0,
    "local": {"batch_size": 1, "epochs": 1},
    "clock": {"step_s": 1.0},
    "evaluation": {"clients": 0},
    "engine": {"name": "sequential"},
    "rounds": 4,
}
MANY = {
    "task": "least-squares",
    "options": {"examples": 4, "features": 1},
    "local": {"batch_size": 4, "epochs": 1},  # one step
    "evaluation": {"clients": 0, "every": 10**6},
}


def pulled(method: str | dict[str, Any] = "fedavg", **settings: Any) -> Experiment:
    own = {"name": method} if isinstance(method, str) else method
    return Experiment.parse({**PULLS, "method": own, **settings})


def rows(run: Loop, number: int) -> list[dict[str, Any]]:
    return [run.round() for _ in range(number)]


def shares(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["idle"], row["late_share"], row["wasted_share"]


# Specification (f) 4


@pytest.mark.parametrize(
    ("schedule", "time", "expected"),
    [
        ({}, 7, (3 / 7, 0, 0)),
        ({"deadline_s": 5}, 5, (1 / 3, 1 / 3, 1 / 2)),
        ({"goal": 2}, 3, (1 / 9, 1 / 3, 3 / 8)),
        ({"goal": 2, "deadline_s": 2.5}, 2.5, (1 / 15, 2 / 3, 5 / 7)),
    ],
)
@pytest.mark.parametrize("stragglers", ["finish", "stop"])
def test_the_shares_of_a_round_by_hand(
    schedule: dict[str, Any],
    time: float,
    expected: tuple[float, float, float],
    stragglers: str,
    tmp_path: Path,
) -> None:
    clock = {"step_s": 1.0, "stragglers": stragglers}
    row = loop_of(pulled(schedule=schedule, clock=clock), tmp_path).round()
    assert row["time_s"] == time
    assert shares(row) == pytest.approx(expected)


def test_the_server_s_seconds_come_on_top_of_each_round(tmp_path: Path) -> None:
    run = loop_of(pulled(clock={"step_s": 1.0, "server_s": 0.25}), tmp_path)
    done = rows(run, 3)
    assert [row["time_s"] for row in done] == [7.25, 14.5, 21.75]
    assert shares(done[2]) == pytest.approx((3 / 7, 0, 0))  # of the exchange


# Specification (f) 5: the k-th of m draws of an exponential law


class Exponential:
    """Durations with a mean of one second."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(4)

    def of(self, clients: np.ndarray, *_: Any) -> np.ndarray:
        return np.rint(1e6 * self.draw.exponential(1.0, len(clients))).astype(int)


ORDER = [
    slow(10, 10, None, 2.928968),
    (13, 10, None, 1.346800),
    slow(30, 30, None, 3.994987),
    slow(39, 30, None, 1.424575),
    (10, None, 2.0, 1.904092),
]


@pytest.mark.parametrize(("cohort", "goal", "deadline", "expected"), ORDER)
def test_a_round_takes_as_long_as_the_order_statistics_say(
    cohort: int,
    goal: int | None,
    deadline: float | None,
    expected: float,
    tmp_path: Path,
) -> None:
    run = loop_of(
        Experiment.parse(
            {
                **MANY,
                "method": {"name": "fedavg"},
                "population": 60,
                "participation": {"cohort": cohort},
                "clock": {"step_s": 1.0, "stragglers": "stop"},
                "schedule": {"goal": goal, "deadline_s": deadline},
            }
        ),
        tmp_path,
    )
    timing: Any = run.timing
    timing._durations = Exponential()
    done = rows(run, 120)
    times = np.diff([0.0, *(row["time_s"] for row in done)])
    error = times.std(ddof=1) / np.sqrt(len(times))
    assert error < 0.15
    assert times.mean() == pytest.approx(expected, abs=4 * error)
    if goal is not None:
        harmonic = [
            sum(1 / i for i in range(1, n + 1)) for n in (cohort, cohort - goal)
        ]
        assert harmonic[0] - harmonic[1] == pytest.approx(expected, abs=1e-6)
        assert all(row["reports"] == goal for row in done)
    else:
        heard = np.mean([row["reports"] / cohort for row in done])
        n = cohort * len(done)
        assert heard == pytest.approx(0.8647, abs=4 * np.sqrt(0.8647 * 0.1353 / n))


# Specification (f) 13


@pytest.mark.parametrize("stragglers", ["finish", "stop"])
def test_who_is_slower_than_the_deadline_is_never_heard(
    stragglers: str, tmp_path: Path
) -> None:
    clock = {"step_s": 1.0, "stragglers": stragglers}
    run = loop_of(pulled(schedule={"deadline_s": 5}, clock=clock), tmp_path)
    for row in rows(run, 6):
        assert (row["reports"], row["dropped"]) == (2, {"timeout": 1})
        assert row["left_out"] == {"timeout": [2]}
    assert row["time_s"] == 30


# Clients that are busy


def test_a_late_client_is_busy_in_the_next_rounds(tmp_path: Path) -> None:
    """Client 2 is done with round 1 at 7, when round 3 has begun at 6."""
    run = loop_of(pulled(schedule={"goal": 2}), tmp_path / "finish")
    assert [row["time_s"] for row in rows(run, 3)] == [3, 6, 9]
    assert run.state.timing["busy"].tolist() == [[2, 21_000_000]]
    # Now all three are needed: client 2 has three works to end, and then this one.
    timing: Any = run.timing
    timing._goal = None
    row = run.round()
    assert row["time_s"] == 28
    assert shares(row) == pytest.approx((1 - (2 + 3 + 19) / (3 * 19), 0, 0))
    assert len(run.state.timing["busy"]) == 0

    clock = {"step_s": 1.0, "stragglers": "stop"}
    run = loop_of(pulled(schedule={"goal": 2}, clock=clock), tmp_path / "stop")
    rows(run, 3)
    assert len(run.state.timing["busy"]) == 0
    timing = run.timing
    timing._goal = None
    assert run.round()["time_s"] == 16


def test_who_is_busy_is_in_the_checkpoint(tmp_path: Path) -> None:
    clock = {"step_s": {"name": "lognormal", "median": 1.0}, "server_s": 0.5}
    settings = {
        **MANY,
        "method": {"name": "ditto", "local_lr": 0.05},
        "population": 12,
        "participation": {"cohort": 8},
        "clock": clock,
        "schedule": {"goal": 4, "deadline_s": 3.0},
        "checkpoint": {"seconds": 0},
        "rounds": 8,
    }
    run = Experiment.parse(settings)
    whole = loop.run(run, tmp_path / "whole")
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        loop.run(run, folder, observer=StopAfter(4))
    assert loop.run(run, resume=folder).params_sha256 == whole.params_sha256
    assert rows_of(folder) == rows_of(tmp_path / "whole")


# Two exchanges in a round


def test_exchanges_of_a_round_follow_one_another(tmp_path: Path) -> None:
    """Gradients take one step of everybody, training 2, 3 and 7."""
    run = loop_of(pulled("tests.methods:Two"), tmp_path)
    row = run.round()
    assert row["time_s"] == 1 + 7
    assert row["idle"] == pytest.approx(1 - (3 + 12) / (3 * 8))
    assert row["cohort"] == row["reports"] == 3


def test_a_goal_and_a_deadline_hold_in_each_exchange(tmp_path: Path) -> None:
    goal = loop_of(pulled("tests.methods:Two", schedule={"goal": 2}), tmp_path / "goal")
    # Client 2 is not needed for gradients (all at 1: ids decide), nor in training.
    assert goal.round()["time_s"] == 1 + 3
    late = loop_of(
        pulled("tests.methods:Two", schedule={"deadline_s": 5}), tmp_path / "late"
    )
    row = late.round()
    assert row["time_s"] == 1 + 5
    assert row["late_share"] == pytest.approx(1 / 3)
    assert row["wasted_share"] == pytest.approx(5 / (3 + 2 + 3 + 5))


class Visits(NamedTuple):
    one: Tensor
    loss: Tensor


class Diary(Method[MethodSettings]):
    """Clients write down what they did: 1 for the first exchange, 2 for the second."""

    def init_client(self, params: Params) -> Tensor:
        return torch.zeros((), dtype=torch.int64)

    @on_client
    def one(
        self, task: Task, t: Tensor, down: Model, state: Tensor, batches: Batches
    ) -> tuple[Visits, Tensor]:
        return Visits(torch.ones(()), torch.zeros(())), 10 * state + 1

    @on_client(data="all")
    def two(
        self, task: Task, t: Tensor, down: Model, state: Tensor, batches: Batches
    ) -> tuple[Visits, Tensor]:
        return Visits(torch.ones(()), torch.zeros(())), 10 * state + 2

    def round(self, server: Model, r: Round) -> Model:
        r.mean(self.one, r.cohort, server, equally)
        r.mean(self.two, r.cohort, server, equally)
        return server


def diaries(run: Loop) -> list[int]:
    states = run.engine.states
    assert states is not None
    return [int(states.get(client)) for client in range(3)]


@pytest.mark.parametrize(
    ("goal", "expected"), [(None, [1212, 1212, 1212]), (2, [1212, 1212, 1212])]
)
def test_a_client_does_its_works_in_their_order(
    goal: int | None, expected: list[int], tmp_path: Path
) -> None:
    """A late one, too, which is done with the first when it begins the second."""
    run = loop_of(
        pulled("tests.test_clocked_rounds:Diary", schedule={"goal": goal}), tmp_path
    )
    rows(run, 2)
    assert diaries(run) == expected


def test_a_late_client_that_answers_the_second_exchange_has_ended_the_first(
    tmp_path: Path,
) -> None:
    run = loop_of(
        pulled("tests.test_clocked_rounds:Diary", schedule={"goal": 2}), tmp_path
    )
    timing: Any = run.timing

    def twice() -> Iterator[None]:
        timing._goal = 2
        yield
        timing._goal = None
        yield

    goals, ask = twice(), timing.ask

    def asked(*work: Any) -> Any:
        next(goals)
        return ask(*work)

    timing.ask = asked
    row = run.round()
    # The first exchange is over at 3; client 2 ends it at 7, and begins the second one.
    assert (row["time_s"], row["reports"]) == (8, 3)
    assert diaries(run) == [12, 12, 12]


def test_who_stops_does_not_move(tmp_path: Path) -> None:
    clock = {"step_s": 1.0, "stragglers": "stop"}
    run = loop_of(
        pulled("tests.test_clocked_rounds:Diary", schedule={"goal": 2}, clock=clock),
        tmp_path,
    )
    run.round()
    assert diaries(run) == [12, 12, 0]


# Windows


def write_windows(folder: Path, *windows: tuple[int, float, float]) -> str:
    lines = [f"{client},{start},{end}" for client, start, end in windows]
    file = folder / "windows.csv"
    file.write_text("\n".join(["client,start_s,end_s", *lines]) + "\n")
    return str(file)


def test_a_cohort_is_of_those_who_are_there(tmp_path: Path) -> None:
    file = write_windows(tmp_path, (0, 0, 20), (1, 0, 4), (1, 10, 20), (2, 6, 20))
    clock = {"step_s": 1.0, "windows": file, "period_s": 20.0}
    run = loop_of(pulled(clock=clock), tmp_path / "run")
    done = rows(run, 3)
    # From 0 on 0 and 1; from 3 on both, and 1 goes at 4; from 5 on 0 alone.
    assert [row["cohort"] for row in done] == [2, 2, 1]
    assert [row["dropped"] for row in done] == [{}, {"unavailable": 1}, {}]
    assert [row["time_s"] for row in done] == [3, 5, 7]
    assert shares(done[1]) == pytest.approx((1 / 4, 1 / 2, 1 / 3))
    row = run.round()  # 0 and 2
    assert (row["cohort"], row["reports"], row["time_s"]) == (2, 2, 14)


def test_a_round_waits_until_somebody_is_there(tmp_path: Path) -> None:
    file = write_windows(tmp_path, (0, 5, 9), (1, 5, 9), (2, 12, 20))
    clock = {"step_s": 1.0, "windows": file, "period_s": 30.0}
    run = loop_of(pulled(clock=clock), tmp_path / "run")
    done = rows(run, 4)
    assert [row["cohort"] for row in done] == [2, 2, 1, 1]
    # 5 to 8; at 8 both begin, and are lost at 9; client 2 from 12 to 19, and to 20.
    assert [row["time_s"] for row in done] == [8, 9, 19, 20]
    assert [row["skipped"] for row in done] == [False, True, False, True]
    # Time that nobody is there is no client's idle time.
    assert [row["idle"] for row in done] == pytest.approx([1 / 6, 0, 0, 0])
    row = run.round()
    assert (row["cohort"], row["time_s"]) == (2, 38)


def test_paused_work_ends_in_a_later_window(tmp_path: Path) -> None:
    file = write_windows(tmp_path, (0, 0, 10), (1, 0, 10), (2, 0, 4))
    clock = {"step_s": 1.0, "windows": file, "period_s": 10.0, "at_end": "pause"}
    run = loop_of(pulled(clock=clock), tmp_path / "run")
    row = run.round()
    assert (row["reports"], row["time_s"]) == (3, 13)


def test_cohorts_are_those_without_windows_where_all_are_there(tmp_path: Path) -> None:
    file = write_windows(tmp_path, (0, 0, 10))
    settings = {
        **MANY,
        "method": {"name": "fedavg"},
        "population": 12,
        "participation": {"cohort": 5},
        "rounds": 4,
    }
    plain = Experiment.parse({**settings, "clock": {"step_s": 1.0}})
    clock = {"step_s": 1.0, "windows": file, "period_s": 10.0}
    always = Experiment.parse({**settings, "clock": clock})
    expected = loop.run(plain, tmp_path / "plain")
    found = loop.run(always, tmp_path / "always")
    assert found.params_sha256 == expected.params_sha256
    assert rows_of(tmp_path / "always") == rows_of(tmp_path / "plain")
