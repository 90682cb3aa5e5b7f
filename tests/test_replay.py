"""A run that follows a recording ends with the recorded run's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore import cli
from fedcore.clock.arrivals import Arrival, Arrivals, read_arrivals
from fedcore.clock.queue import Queue, Update
from fedcore.clock.replay import ReplayPlan
from fedcore.clock.settings import Buffered, Replay
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds import loop
from fedcore.rounds.recordings import following
from tests.helpers import slow, small

CLOCK = {"step_s": {"name": "lognormal", "median": 1.0}, "jitter": 0.2}
BUFFERED = {"name": "buffered", "buffer": 3, "concurrency": 8}


def experiment(method: str, **changes: Any) -> Experiment:
    usual = {
        "population": 24,
        "participation": {"name": "uniform", "cohort": 6},
        "local": {"batch_size": 4, "steps": 3},
        "rounds": 6,
        "checkpoint": {"seconds": 0},
        "engine": {"name": "sequential"},
        "clock": CLOCK,
    }
    return small(method, **{**usual, **changes})


def sha(result: Any) -> str:
    return str(result.to_dict()["params_sha256"])


def times_of(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["time_s"] for line in lines]


CONSTANT = {**BUFFERED, "staleness": "constant"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {"schedule": BUFFERED}),
    "weights": ("fedavg", {"schedule": {**BUFFERED, "normalise": "weights"}}),
    "dropout and server": (
        "fedavg",
        {
            "schedule": {**BUFFERED, "max_staleness": 2},
            "participation": {"name": "uniform", "dropout": 0.3},
            "clock": {**CLOCK, "server_s": 0.5},
        },
    ),
    "fedvarp": ("fedvarp", {"schedule": CONSTANT}),
    "ditto": ("ditto", {"schedule": BUFFERED}),
    "all": ("fedavg", {}),
    "goal": ("fedavg", {"schedule": {"goal": 3}}),
    "deadline": (
        "scaffold",
        {
            "schedule": {"deadline_s": 4.0},
            "clock": {**CLOCK, "server_s": 0.5},
            "participation": {"name": "uniform", "cohort": 6, "dropout": 0.2},
        },
    ),
    "two exchanges": ("fedamd", {"schedule": {"goal": 4}, "min_reports": 0}),
    "late clients with a state": ("ditto", {"schedule": {"goal": 3}}),
}


QUICK = ["fedavg", "ditto", "deadline", "two exchanges"]
SLOW = [slow(name) for name in RUNS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_replay_ends_with_the_recorded_model(name: str, tmp_path: Path) -> None:
    method, changes = RUNS[name]
    run = experiment(method, **changes)
    recorded = loop.run(run, tmp_path / "recorded")
    replay, notes = following(run, tmp_path / "recorded")
    assert not notes
    replayed = loop.run(replay, tmp_path / "replayed")
    assert sha(replayed) == sha(recorded)
    assert times_of(tmp_path / "replayed") == times_of(tmp_path / "recorded")
    before = read_arrivals(tmp_path / "recorded").to_pylist()
    assert read_arrivals(tmp_path / "replayed").to_pylist() == before


def test_a_replay_resumes_to_the_same_bits(tmp_path: Path) -> None:
    run = experiment("fedavg", schedule=BUFFERED)
    recorded = loop.run(run, tmp_path / "recorded")
    replay, _ = following(run, tmp_path / "recorded")
    short = replay.model_copy(update={"rounds": 3})
    loop.run(short, tmp_path / "replayed")
    assert sha(loop.run(replay, resume=tmp_path / "replayed")) == sha(recorded)


def test_other_orders_of_arrival_give_other_models(tmp_path: Path) -> None:
    run = experiment("fedavg", schedule=BUFFERED)
    recorded = loop.run(run, tmp_path / "recorded")
    other = run.model_copy(update={"seed": 1})
    replay, notes = following(other, tmp_path / "recorded")
    assert "seed was 3" in notes["seed"]
    assert sha(loop.run(replay, tmp_path / "replayed")) != sha(recorded)


# What is refused


def recording(tmp_path: Path, **changes: Any) -> tuple[Experiment, Path]:
    run = experiment("fedavg", **{"schedule": BUFFERED, **changes})
    loop.run(run, tmp_path / "recorded")
    return run, tmp_path / "recorded"


def test_what_is_no_recording_of_the_run_is_refused(tmp_path: Path) -> None:
    run, folder = recording(tmp_path)
    replay, _ = following(run, folder)
    changes: dict[str, Any] = {
        "holds 6 updates": {"rounds": 7},
        "holds work of client": {"population": 6, "schedule": _small(folder)},
        "the run was buffered": {"schedule": Replay(file=folder)},
        "there is none": {"schedule": Replay(file=tmp_path)},
    }
    for message, change in changes.items():
        with pytest.raises(SettingsError, match=message):
            loop.run(replay.model_copy(update=change), tmp_path / "replayed")
        assert not (tmp_path / "replayed").exists()


def _small(folder: Path) -> Replay:
    return Replay(file=folder, of=Buffered(buffer=3, concurrency=6))


def test_another_method_is_refused(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path)
    arrivals.add([Arrival(1, 0, 3, 0, "learn", 0, 5, "", 1, 1, 1, 0)])
    arrivals.write(1)
    replay = Replay(file=tmp_path)
    run = experiment("fedavg", rounds=1).model_copy(update={"schedule": replay})
    with pytest.raises(SettingsError, match='a client function "learn"'):
        loop.run(run, tmp_path / "replayed")


def test_a_version_that_a_client_had_twice_is_refused(tmp_path: Path) -> None:
    first = Arrival(1, 0, 3, 0, "train", 0, 5, "", 1, 1, 1, 0)
    arrivals = Arrivals(tmp_path)
    arrivals.add([first, first._replace(order=1)])
    arrivals.write(1)
    with pytest.raises(SettingsError, match="row 2 has work of client 3 on version 0"):
        ReplayPlan(Replay(file=tmp_path, of=Buffered()), 10)


# The plan against the queue


def recorded_updates(
    folder: Path, queue: Queue, seconds: Any, updates: int, server_us: int
) -> list[Update]:
    """Updates of a queue, which are written as a run writes them."""
    arrivals, order, done = Arrivals(folder), 0, []
    for t in range(updates):
        update = queue.advance(t, lambda clients: seconds[clients], server_us)
        done.append(update)
        rows = []
        for item, outcome in sorted(update.arrived, key=lambda a: a.item[:2]):
            back = -1 if outcome in ("dropout", "unavailable") else item.finish
            work = (item.client, item.version, "train", item.sent, back, outcome)
            rows.append(Arrival(t + 1, order, *work, 1, 1, 5, 0))
            order += 1
        arrivals.add(rows)
    arrivals.write(updates)
    return done


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    buffer=st.integers(1, 6),
    concurrency=st.integers(1, 10),
    dropout=st.sampled_from([0.0, 0.3]),
    oldest=st.sampled_from([None, 1]),
    server_us=st.sampled_from([0, 40]),
)
def test_a_plan_has_the_updates_that_were_recorded(
    seed: int,
    buffer: int,
    concurrency: int,
    dropout: float,
    oldest: int | None,
    server_us: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    schedule = Buffered(buffer=buffer, concurrency=concurrency, max_staleness=oldest)
    seconds = np.random.default_rng(seed).integers(1, 9, 12) ** 3
    queue = Queue(schedule, 12, seed, dropout=dropout)
    recorded = recorded_updates(folder, queue, seconds, 15, server_us)
    plan = ReplayPlan(Replay(file=folder, of=schedule), 12, server_us)
    held: dict[tuple[int, int], int] = {}  # slots by client and version
    for t, before in enumerate(recorded):
        update = plan.update(t)
        assert update.now == before.now
        seen = [(a.item.client, a.item.version, a.outcome) for a in update.arrived]
        assert seen == [
            (a.item.client, a.item.version, a.outcome) for a in before.arrived
        ]
        for item, outcome in update.arrived:
            slot = held.pop((item.client, item.version), -1)
            if not outcome:
                assert (slot == item.slot) == (item.version < t or slot == -1)
        waiting = [item for item in plan.in_flight(t) if item.slot >= 0]
        for item in waiting:
            key = item.client, item.version
            assert held.setdefault(key, item.slot) == item.slot < plan.slots
        assert len({*held.values()}) == len(held) == len(waiting)
        alone = ReplayPlan(Replay(file=folder, of=schedule), 12, server_us)
        assert alone.in_flight(t) == plan.in_flight(t)  # wherever a run goes on


# The command


def test_a_recorded_run_is_replayed_by_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = recording(tmp_path)
    words = ["fedcore", "run", "--replay", str(folder), "--json"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    printed = json.loads(capsys.readouterr().out)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert printed["time"]["time_s"] == json.loads(lines[-1])["time_s"]
    again, notes = following(run, folder)
    assert Experiment.parse(again.model_dump(mode="json")) == again
    assert not notes
