"""Buffered rounds over Flower nodes: the real ClientApp, a grid in process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fedcore.server.buffering
import fedcore.server.flights
import fedcore.server.nodes
import fedcore.server.post
import pytest
from fedcore.server.app import Safe
from fedcore.server.grid import GridEngine
from flwr.app import ConfigRecord, Message
from flwr.common.constant import ErrorCode

from fedcore.clock.arrivals import Arrival
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.rounds.loop import Loop, Quiet
from tests.flower.fake import FakeGrid, in_place_of
from tests.flower.paced import replayed
from tests.flower.test_grid import preset_of
from tests.helpers import LAYERED, equal, loop_of, small

NODES = 8


class PacedGrid(FakeGrid):
    """A grid whose nodes answer after so many looks for replies."""

    def __init__(self, preset: str, pace: dict[int, int], nodes: int = NODES) -> None:
        """`pace[i]` is the number of looks that node 100 + i needs, by default one."""
        super().__init__(preset, nodes)
        self.pace, self.looks = pace, 0
        self.due: dict[str, int] = {}
        self.work: list[dict[str, Any]] = []  # what clients were asked for, in order
        self.downs: dict[tuple[int, int], str] = {}  # digests by client and version

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                work: dict[str, Any] = dict(message.content["work"])  # type: ignore[call-overload]
                self.work.append(work)
                down = message.content["down"].object_id
                for client in work["clients"]:
                    self.downs[client, work["t"]] = down
        pushed = super().push_messages(messages)
        for message in messages:
            number = message.metadata.message_id
            if message.metadata.message_type == "train" and number in pushed:
                node = message.metadata.dst_node_id
                self.due[number] = self.looks + self.pace.get(node - 100, 1)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        message_ids = list(message_ids)
        self.looks += any(number in self.due for number in message_ids)
        ready = [i for i in message_ids if self.due.get(i, 0) <= self.looks]
        ready.sort(key=lambda number: (self.due.get(number, 0), len(number), number))
        return super().pull_messages(ready)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedcore.server.buffering, "POLL", 0.0)
    monkeypatch.setattr(fedcore.server.buffering, "LOOK", 0.0)
    monkeypatch.setattr(fedcore.server.post, "POLL", 0.0)


def experiment(method: str = "fedavg", **settings: Any) -> Experiment:
    schedule = {"name": "buffered", "buffer": 3, "concurrency": 5}
    usual = {
        "population": NODES,
        "engine": {"name": "grid"},
        "rounds": 6,
        "schedule": schedule | settings.pop("schedule", {}),
        "evaluation": {"every": 100},
        "checkpoint": {"seconds": 0},
    }
    return small(method, **{**usual, **settings})


class RecordingEngine(GridEngine):
    """Keeps the arrivals that the loop takes."""

    kept: list[Arrival]

    def arrivals(self) -> list[Arrival]:
        arrivals = super().arrivals()
        self.kept += arrivals
        return arrivals


class Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Field:
    """A run in a folder over a paced grid, round by round."""

    def __init__(
        self,
        folder: Path,
        e: Experiment,
        pace: dict[int, int] | None = None,
        resume: bool = False,
        nodes: int = NODES,
        **engine: Any,
    ) -> None:
        self.folder = folder / "run"
        self.grid = PacedGrid(preset_of(e, folder), pace or {}, nodes)
        self.folder.mkdir(exist_ok=True)
        settings = {"state": folder / "kept", **engine}
        self.kept: list[Arrival] = []

        def make(work: Work) -> GridEngine:
            self.engine = RecordingEngine(self.grid, work, 60, **settings)  # type: ignore[arg-type]
            self.engine.kept = self.kept
            return self.engine

        self.observer = Notes()
        self.loop = Loop(e, self.folder, self.observer, make, resume)

    def rounds(self, number: int) -> list[dict[str, Any]]:
        return [self.loop.round() for _ in range(number)]

    def update(self, number: int) -> list[tuple[int, int]]:
        """(version, client) of an update's answers, in order of arrival."""
        return [(a.version, a.client) for a in self.kept if a.update == number]


def test_an_idle_client_gets_work_at_once_and_each_version_once(
    tmp_path: Path,
) -> None:
    """The hand-worked table of three clients at 2, 3 and 7 units of time, K = 2."""
    schedule = {"buffer": 2, "concurrency": 3}
    e = experiment(population=3, schedule=schedule)
    field = Field(tmp_path, e, {0: 8, 1: 12, 2: 28}, nodes=3)
    rows = field.rounds(6)
    table = [
        [(0, 0), (0, 1)],
        [(1, 0), (1, 1)],
        [(0, 2), (2, 0)],
        [(2, 1), (3, 0)],
        [(3, 1), (4, 0)],
        [(2, 2), (5, 0)],
    ]
    assert [sorted(field.update(number)) for number in range(1, 7)] == table
    assert [row["staleness"]["max"] for row in rows] == [0, 0, 2, 1, 1, 3]
    assert [row["in_flight"] for row in rows] == [1, 1, 2, 2, 1, 1]
    given = [ask for ask in field.grid.work if ask["function"] == "train"]
    assert all(len(ask["clients"]) == 1 for ask in given)
    assert len({(ask["clients"][0], ask["t"]) for ask in given}) == len(given)


@pytest.mark.parametrize("method", ["fedavg", "fedvarp", "ditto"])
def test_a_buffer_of_everybody_is_a_synchronous_round(
    method: str, tmp_path: Path
) -> None:
    schedule: dict[str, Any] = {"buffer": NODES, "concurrency": NODES}
    if method == "fedvarp":
        schedule["staleness"] = "constant"
    e = experiment(method, schedule=schedule)
    field = Field(tmp_path, e, {i: 1 + i % 3 for i in range(NODES)})
    rows = field.rounds(4)
    alone = small(method, population=NODES, participation__cohort=NODES)
    one = loop_of(alone, tmp_path / "one")
    for row in rows:
        assert row["reports"] == one.round()["reports"] == NODES
    assert equal(field.loop.state.server, one.state.server)


def test_what_devices_measure_is_recorded_and_not_believed_blindly(
    tmp_path: Path,
) -> None:
    e = experiment(rounds=2, local={"steps": 3, "batch_size": 2})
    field = Field(tmp_path, e)
    lies: dict[int, dict[str, Any]] = {
        101: {"work-us": [10**15], "steps": [-3]},
        102: {"work-us": ["long"], "steps": [True]},
        103: {"work-us": 7, "steps": []},
    }

    def weather(reply: Message) -> list[Message]:
        about = reply.content["about"]
        assert isinstance(about, ConfigRecord)
        claim = lies.get(reply.metadata.src_node_id, {})
        reply.content["about"] = ConfigRecord({**about, **claim})
        return [reply]

    field.grid.weather = weather
    field.rounds(4)
    assert {a.client for a in field.kept} >= {0, 1, 2, 3}
    for arrival in field.kept:
        assert 0 <= arrival.work_us <= arrival.back_us - arrival.sent_us
        is_liar = 100 + arrival.client in lies
        assert arrival.steps == (0 if is_liar else 3)
        assert (arrival.work_us == 0) == is_liar
        assert arrival.outcome == ""
        assert arrival.bytes_up >= arrival.bytes_down > 0


def test_synchronous_rounds_record_late_answers_when_they_come(tmp_path: Path) -> None:
    e = small(
        "fedavg",
        population=NODES,
        participation__cohort=NODES,
        engine__name="grid",
        schedule={"goal": NODES - 1},
    )
    field = Field(tmp_path, e, {2: 4}, report_goal=NODES - 1)
    field.rounds(1)
    first = {a.client: a for a in field.kept}
    assert first[2].outcome == "not needed"
    assert first[2].back_us == -1
    others = [a for a in field.kept if a.client != 2]
    assert len(others) == NODES - 1
    assert all(a.outcome == "" and a.back_us >= a.sent_us for a in others)
    assert all(a.update == 1 and a.version == 0 for a in field.kept)
    field.rounds(1)
    late = [a for a in field.kept if a.outcome == "late"]
    assert [(a.client, a.version, a.update) for a in late] == [(2, 0, 2)]
    assert late[0].sent_us == first[2].sent_us
    assert late[0].work_us > 0


# A simulation that follows the arrivals


PACES = {0: 2, 1: 3, 2: 5, 3: 9, 4: 14, 5: 1, 6: 1, 7: 22}


@pytest.mark.parametrize("method", ["fedavg", "fedvarp", "mifa", "ditto", "fedsim"])
def test_a_replay_of_a_buffered_run_has_its_model(method: str, tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"buffer": 3, "concurrency": 6}
    if method in ("fedvarp", "mifa"):
        schedule["staleness"] = "constant"
    own = LAYERED if method == "fedsim" else {}
    e = experiment(method, **own, rounds=10, schedule=schedule)
    field = Field(tmp_path, e, PACES)
    result = field.loop.run()
    field.loop.close()
    assert max(a.update - a.version for a in field.kept) > 2
    assert replayed(field.folder, tmp_path / "again") == result.params_sha256


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_a_replay_of_synchronous_rounds_has_their_model(
    method: str, tmp_path: Path
) -> None:
    e = small(
        method,
        population=NODES,
        participation__cohort=NODES,
        engine__name="grid",
        evaluation__every=100,
        schedule={"goal": NODES - 2},
    )
    field = Field(tmp_path, e, PACES, report_goal=NODES - 2)
    result = field.loop.run()
    field.loop.close()
    assert {a.outcome for a in field.kept} == {"", "not needed", "late"}
    assert replayed(field.folder, tmp_path / "again") == result.params_sha256


# Bad weather


def test_a_bad_answer_is_one_of_the_buffer(tmp_path: Path) -> None:
    field = Field(tmp_path, experiment(schedule={"concurrency": NODES}))

    def weather(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == 100:
            return [in_place_of(reply, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no")]
        return [reply]

    field.grid.weather = weather
    row = field.rounds(1)[0]
    assert (row["cohort"], row["reports"], row["dropped"]) == (3, 2, {"error": 1})
    assert [a.outcome for a in field.kept] == ["error", "", ""]


def test_work_that_takes_too_long_is_given_up_and_fills_no_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"buffer": 7, "concurrency": NODES, "max_age_s": 0.05}
    e = experiment(schedule=schedule, rounds=10**6)
    field = Field(tmp_path, e, {3: 10**9})
    # A look for replies is a millisecond, whatever this machine does meanwhile.
    monkeypatch.setattr(
        fedcore.server.flights, "stamp", lambda: 1000 * field.grid.looks
    )
    row = field.rounds(1)[0]
    assert row["reports"] == 7
    assert row["in_flight"] == 1
    while not row["dropped"]:
        row = field.rounds(1)[0]
        assert row["reports"] == 7
    assert row["dropped"] == {"timeout": 1}
    lost = [a for a in field.kept if a.outcome]
    assert [(a.client, a.version, a.outcome, a.back_us) for a in lost] == [
        (3, 0, "timeout", -1)
    ]


def test_an_answer_to_a_model_that_is_too_old_fills_no_buffer(tmp_path: Path) -> None:
    schedule = {"buffer": 2, "concurrency": 3, "max_staleness": 1}
    e = experiment(population=3, schedule=schedule)
    field = Field(tmp_path, e, {0: 8, 1: 12, 2: 28}, nodes=3)
    rows = field.rounds(4)
    stale = [a for a in field.kept if a.outcome]
    assert [(a.version, a.client, a.outcome) for a in stale] == [(0, 2, "stale")]
    assert rows[2]["dropped"] == {"stale": 1}
    assert [row["reports"] for row in rows] == [2, 2, 2, 2]


@pytest.mark.parametrize("rejoin", [0.0, 20.0])
def test_a_device_that_starts_anew_gets_the_same_work_where_that_is_wished(
    rejoin: float, tmp_path: Path
) -> None:
    e = experiment("ditto", schedule={"buffer": NODES, "concurrency": NODES})
    field = Field(tmp_path, e, rejoin=rejoin)
    grid = field.grid

    def weather(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == 102 and grid.activated[102] == "0":
            grid.activated[102] = "1"  # killed before its answer was sent
            return []
        return [reply]

    grid.weather = weather
    row = field.rounds(1)[0]
    asked = Counter(ask["clients"][0] for ask in grid.work)
    assert asked[2] == (2 if rejoin else 1)
    assert row["reports"] == (NODES if rejoin else NODES - 1)
    assert row["dropped"] == ({} if rejoin else {"disconnected": 1})
    if rejoin:
        alone = small("ditto", population=NODES, participation__cohort=NODES)
        one = loop_of(alone, tmp_path / "one")
        one.round()
        assert equal(field.loop.state.server, one.state.server)


def test_a_buffer_is_closed_as_it_is_where_nobody_is_left_to_ask(
    tmp_path: Path,
) -> None:
    e = experiment(schedule={"buffer": 5, "concurrency": 5})
    field = Field(tmp_path, e)
    for node in range(103, 108):
        del field.grid.contexts[node]
    fedcore.server.nodes.WAIT, wait = 0.1, fedcore.server.nodes.WAIT
    row = field.rounds(1)[0]
    fedcore.server.nodes.WAIT = wait
    assert (row["reports"], row["skipped"], row["in_flight"]) == (3, False, 0)


# A server that is killed


class Stop(Exception):
    """The end of a server."""


class StopAfter(Quiet):
    """Kills a server after an update, of which the checkpoint knows nothing."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.out: list[tuple[int, int]] = []  # as the checkpoint has it
        self.engine: GridEngine | None = None

    def round_done(self, row: dict[str, Any]) -> None:
        assert self.engine is not None
        if row["round"] == self.number:
            raise Stop
        items = self.engine.in_flight()
        self.out = [(item.client, item.version) for item in items]


def test_a_server_that_starts_anew_sends_what_was_in_flight_again(
    tmp_path: Path,
) -> None:
    e = experiment("ditto", rounds=8, schedule={"buffer": 3, "concurrency": 6})
    pace = {i: 3 + 8 * i for i in range(NODES)}
    first = Field(tmp_path, e, pace)
    first.loop.observer = killer = StopAfter(5)
    killer.engine = first.engine
    with pytest.raises(Stop):
        first.loop.run()
    first.loop.close()
    out = killer.out
    assert len({version for _, version in out}) > 1
    second = Field(tmp_path, e, pace, resume=True)
    second.rounds(1)
    again = [(ask["clients"][0], ask["t"]) for ask in second.grid.work]
    assert sorted(again[: len(out)]) == sorted(out)
    for client, version in out:
        before, after = (field.grid.downs[client, version] for field in (first, second))
        assert before == after
    answered = second.update(5)
    assert set(answered) <= {(v, c) for c, v in again}


def test_devices_keep_states_as_long_as_work_from_them_may_be_asked_for_again(
    tmp_path: Path,
) -> None:
    e = experiment("ditto", rounds=8, schedule={"buffer": 3, "concurrency": 6})
    pace = {i: 3 + 8 * i for i in range(NODES)}
    field = Field(tmp_path, e, pace)
    safe = Safe(field.folder)
    assert safe() == 0
    field.loop.observer = killer = StopAfter(6)
    killer.engine = field.engine
    with pytest.raises(Stop):
        field.loop.run()
    field.loop.close()
    oldest = min(version for _, version in killer.out)
    assert oldest < 5
    assert safe() == oldest
