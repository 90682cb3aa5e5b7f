"""Clocked and buffered rounds, behind the doors of a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.settings import Buffered
from fedcore.config import Experiment
from fedcore.engines.base import failure
from fedcore.reports import Reports
from fedcore.rounds import loop
from fedcore.rounds.buffer import Flight, Ring, first_exchange
from fedcore.rounds.loop import Loop, Quiet
from fedcore.storage.rows import StateStore
from tests.helpers import LAYERED, equal, loop_of, slow, small

EQUAL = {"clock": {"step_s": 1.0}}  # everybody is equally fast
UNEQUAL = {"clock": {"step_s": {"name": "lognormal", "median": 1.0}, "jitter": 0.2}}
COLUMNS = {"time_s", "idle", "late_share", "wasted_share"}
MEMORY = ("fedvarp", "mifa")  # weigh no update by its age


def experiment(method: str, **settings: Any) -> Experiment:
    own = LAYERED if method in ("fedsim", "fedalt") else {}
    usual = {
        "population": 24,
        "participation": {"name": "uniform", "cohort": 6},
        "local": {"batch_size": 4, "steps": 3},
        "rounds": 6,
        "checkpoint": {"seconds": 0},
        "engine": {"name": "sequential"},
    }
    return small(method, **{**own, **usual, **settings})


def buffered(method: str, buffer: int, concurrency: int, **settings: Any) -> Any:
    schedule = {"name": "buffered", "buffer": buffer, "concurrency": concurrency}
    if method in MEMORY:
        schedule["staleness"] = "constant"
    return experiment(method, **{**UNEQUAL, "schedule": schedule, **settings})


def sha(result: Any) -> str:
    return str(result.to_dict()["params_sha256"])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, without what the computer's speed decides."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("seconds", "evaluation_s", "first_round_s"):
            row.pop(name, None)
        rows.append(row)
    return rows


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "ditto"])
def test_a_clock_adds_columns_and_changes_no_bit(method: str, tmp_path: Path) -> None:
    plain = loop.run(experiment(method), tmp_path / "plain")
    clocked = loop.run(experiment(method, **UNEQUAL), tmp_path / "clocked")
    assert sha(plain) == sha(clocked)
    without = []
    for row in rows_of(tmp_path / "clocked"):
        assert row.keys() >= COLUMNS
        without.append({k: v for k, v in row.items() if k not in COLUMNS})
    assert without == rows_of(tmp_path / "plain")


ENGINES = ["sequential", "vectorised", slow("ray")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedvarp", "mifa", "fedsim", "ditto"])
def test_where_all_are_equally_fast_a_buffer_is_a_round(
    method: str, engine: str, tmp_path: Path
) -> None:
    settings = {"engine": {"name": engine}}
    plain = loop.run(experiment(method, **settings), tmp_path / "plain")
    run = buffered(method, 6, 6, **EQUAL, **settings)
    assert sha(loop.run(run, tmp_path / "buffered")) == sha(plain)
    last = rows_of(tmp_path / "buffered")[-1]
    assert last["staleness"] == {"mean": 0.0, "max": 0}
    passes = 2 if method == "ditto" else 1
    assert last["time_s"] == 6 * 3.0 * passes


class Stop(Exception):
    """The end of a run that is to be resumed."""


class StopAfter(Quiet):
    """Ends a run after so many rounds."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_done(self, row: dict[str, Any]) -> None:
        if row["round"] == self.number:
            raise Stop


@pytest.mark.parametrize("method", ["fedavg", "fedvarp", "ditto"])
def test_a_buffered_run_resumes_to_the_same_bits(method: str, tmp_path: Path) -> None:
    run = buffered(method, 3, 8)
    whole = loop.run(run, tmp_path / "whole")
    assert max(row["staleness"]["max"] for row in rows_of(tmp_path / "whole")) > 1
    for number in (2, 4):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(Stop):
            loop.run(run, folder, observer=StopAfter(number))
        resumed = loop.run(run, resume=folder)
        assert sha(resumed) == sha(whole)
        assert rows_of(folder) == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("method", ["fedavg", "fedvarp", "mifa"])
def test_work_at_dispatch_or_at_arrival_gives_the_same_bits(
    method: str, tmp_path: Path
) -> None:
    run = buffered(method, 3, 8)
    at_dispatch = loop_of(run, tmp_path / "dispatch")
    at_arrival = loop_of(run, tmp_path / "arrival")
    timing: Any = at_arrival.timing
    server = at_arrival.state.server
    _, down = first_exchange(at_arrival.method, server, at_arrival.task)
    store = StateStore(trees.zeros_like(down), 10**9, lambda: tmp_path)
    timing.ring, timing.flight = Ring(store), None
    for _ in range(6):
        at_dispatch.round()
        at_arrival.round()
    assert equal(at_dispatch.state.server, at_arrival.state.server)


def test_engines_agree_on_times_and_versions(tmp_path: Path) -> None:
    seen, models = [], []
    for name in ("sequential", "vectorised"):
        run = loop_of(buffered("fedavg", 3, 8, engine={"name": name}), tmp_path / name)
        rows = [run.round() for _ in range(6)]
        seen.append([(row["time_s"], row["staleness"], row["idle"]) for row in rows])
        models.append(trees.ravel(run.state.server.params))
    assert seen[0] == seen[1]
    assert float((models[0] - models[1]).abs().max()) < 1e-5


def test_old_answers_weigh_less_and_do_not_share_what_they_lose(
    tmp_path: Path,
) -> None:
    """Specification (f) 8: count divides by the weights without s, weights with it."""
    by = {}
    for normalise in ("count", "weights"):
        schedule = {"name": "buffered", "buffer": 3, "concurrency": 8}
        schedule["normalise"] = normalise
        run = loop_of(
            experiment("fedavg", **UNEQUAL, schedule=schedule), tmp_path / normalise
        )
        before = None
        while True:
            before = trees.ravel(run.state.server.params).clone()
            row = run.round()
            if row["staleness"]["max"]:
                break
        step = trees.ravel(run.state.server.params) - before
        by[normalise] = (row["time_s"], row["server_discount"], step)
    (when, mean, count), (when_2, mean_2, weights) = by["count"], by["weights"]
    assert (when, mean) == (when_2, mean_2)
    assert mean < 1
    # The clients hold the same number of examples, so that the two are proportional.
    assert float((count - weights * mean).abs().max()) < 1e-6


def test_a_failure_waits_as_long_as_its_work_takes(tmp_path: Path) -> None:
    run = loop_of(buffered("fedavg", 3, 8), tmp_path)
    each = run.engine.each

    def broken(fn: Any, clients: Tensor, down: Any, t: int) -> Any:
        for reports in each(fn, clients, down, t):
            if t < 5 and int(reports.clients[0]) % 2:
                yield failure(reports.clients.tolist(), "error: it is odd")
            else:
                yield reports

    run.engine.each = broken  # type: ignore[method-assign]
    failed = 0
    for _ in range(6):
        row = run.round()
        assert row["reports"] + row["dropped"].get("error", 0) == 3
        failed += row["dropped"].get("error", 0)
    assert failed > 2


def test_flight_keeps_reports_and_reasons(tmp_path: Path) -> None:
    message = {"w": torch.zeros(2), "n": torch.tensor(1)}
    flight = Flight(StateStore(Flight.row_of(message), 10**6, lambda: tmp_path))
    up = {"w": torch.tensor([[1.0, 2], [3, 4]]), "n": torch.tensor([5, 6])}
    reports = Reports(torch.tensor([7, 9]), up, torch.tensor([10.0, 20.0]))
    flight.put(reports._replace(failed={8: "error: naïve"}), {7: 2, 8: 0, 9: 1})
    found = flight.take([0, 1, 2])
    assert found.failed == {8: "error: naïve"}
    assert found.clients.tolist() == [9, 7]
    assert found.up["w"].tolist() == [[3, 4], [1, 2]]
    assert found.up["n"].tolist() == [6, 5]
    assert found.num_examples.tolist() == [20, 10]


@pytest.mark.parametrize("stragglers", ["finish", "stop"])
def test_a_late_client_has_moved_where_it_goes_on(
    stragglers: str, tmp_path: Path
) -> None:
    clock = {**UNEQUAL["clock"], "stragglers": stragglers}
    run = loop_of(
        experiment("ditto", clock=clock, schedule={"goal": 3}), tmp_path / "run"
    )
    row = run.round()
    assert row["reports"] == 3
    assert row["dropped"] == {"not needed": 3}
    states = run.stores["clients"]
    moved = [client for client in range(24) if client in states.row_of]
    assert len(moved) == (6 if stragglers == "finish" else 3)


def test_a_goal_takes_the_mean_of_the_first(tmp_path: Path) -> None:
    goal = loop_of(experiment("fedavg", **UNEQUAL, schedule={"goal": 2}), tmp_path)
    row = goal.round()
    assert (row["cohort"], row["reports"]) == (6, 2)
    assert row["late_share"] == pytest.approx(4 / 6)
    assert 0 < row["wasted_share"] < 1


def kept_of(run: Loop) -> dict[str, Any]:
    return {name: value.tolist() for name, value in run.state.timing.items()}


def test_an_interrupted_update_leaves_no_trace(tmp_path: Path) -> None:
    run = loop_of(buffered("ditto", 3, 8), tmp_path / "one")
    for _ in range(3):
        run.round()
    before, ring = kept_of(run), dict(run.stores["ring"].row_of)
    each = run.engine.each

    def interrupted(*work: Any) -> Any:
        yield from each(*work)
        raise KeyboardInterrupt

    run.engine.each = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.round()
    for store in run.stores.values():
        store.rollback()
    run.engine.each = each  # type: ignore[method-assign]
    assert (kept_of(run), run.stores["ring"].row_of) == (before, ring)
    other = loop_of(buffered("ditto", 3, 8), tmp_path / "two")
    for _ in range(3):
        other.round()
    for _ in range(3):
        run.round()
        other.round()
    assert equal(run.state.server, other.state.server)
    assert kept_of(run) == kept_of(other)


def test_settings_of_a_buffer_are_in_the_settings_of_the_run() -> None:
    run = buffered("fedavg", 3, 8)
    assert isinstance(run.schedule, Buffered)
    assert Experiment.parse(run.model_dump(mode="json")) == run


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_who_drops_out_frees_its_place_and_is_not_counted(
    engine: str, tmp_path: Path
) -> None:
    settings = {"participation": {"name": "uniform", "dropout": 0.4}}
    run = loop_of(
        buffered("fedavg", 3, 8, engine={"name": engine}, **settings), tmp_path
    )
    rows = [run.round() for _ in range(8)]
    assert sum(row["dropped"].get("dropout", 0) for row in rows) > 5
    assert {row["reports"] for row in rows} == {3}
