"""A server that wants one client's message, against the real ClientApp."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fedcore.client.assignment import Assignment
from fedcore.client.marks import Marks
from fedcore.client.secure import Node
from fedcore.client.store import Store
from fedcore.server.grid import GridEngine
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedcore.config import Experiment
from fedcore.deploy import certs
from fedcore.errors import TooFewReports
from fedcore.messages.moment import Moment
from fedcore.messages.secure.ask import Ask, Part, SecretTotal
from fedcore.messages.secure.primitives import Refused
from fedcore.messages.secure.ring import Ring
from fedcore.rounds.setup import work_of
from fedcore.types import Model
from tests.flower.fake import FakeGrid
from tests.flower.test_grid import over_flower, preset_of
from tests.flower.test_secure import edited, facts_of, rows_of, secure

CLIENTS = 5
RING = Ring(CLIENTS, cap=64.0)


class Attack:
    """A server that asks what it likes, and its five clients."""

    def __init__(self, e: Experiment, folder: Path) -> None:
        self.grid = FakeGrid(preset_of(e, folder), CLIENTS)
        self.work = work_of(e, e.build_task(), e.build_method())
        self.folder = folder / "kept"
        self.engine = self.server()
        self.failed: dict[int, str] = {}

    def server(self, series: str = "s") -> GridEngine:
        grid: Any = self.grid
        return GridEngine(grid, self.work, 60, series=series, state=self.folder)

    def ask(self, clients: Iterable[int], t: int = 0, **changes: Any) -> SecretTotal:
        """The sum of these clients; why others are not in it is in `failed`."""
        ask = Ask(
            self.work.method.train,  # type: ignore[attr-defined]
            torch.tensor([*clients]),
            Model(self.work.task.init_params()),
            t,
            (Part("", "examples"),),
            RING,
        )
        into, self.failed = SecretTotal(), {}
        for report in self.engine.secret_sum(ask._replace(**changes), into):
            self.failed.update(report.failed)
        return into


def attack(folder: Path, name: str = "fedavg", **settings: Any) -> Attack:
    return Attack(secure(name, population=CLIENTS, **settings), folder)


def test_a_second_sum_of_a_round_is_refused_under_another_number(
    tmp_path: Path,
) -> None:
    """Both would hold the same integers: their difference is client 4's."""
    server = attack(tmp_path)
    assert server.ask(range(5)).clients == [0, 1, 2, 3, 4]
    with pytest.raises(TooFewReports):
        server.ask(range(4))  # t = 0 once more, k = 1
    assert "in a sum of train in round 1 already" in server.failed[0]
    assert server.ask(range(4), t=1).clients == [0, 1, 2, 3]


def test_a_mark_names_the_functions_of_its_round(tmp_path: Path) -> None:
    marks = Marks(Store(tmp_path, "f", "s"))
    marks.write(3, Moment(4, 0), "anchor")
    marks.write(3, Moment(4, 1), "mine")
    for function in ("anchor", "mine"):
        with pytest.raises(Refused, match=f"a sum of {function} in round 5 already"):
            marks.refuse(3, Moment(4, 2), function)
    marks.refuse(3, Moment(4, 2), "evaluate")
    marks.write(3, Moment(5, 0), "mine")
    marks.refuse(3, Moment(5, 1), "anchor")


@pytest.mark.parametrize(
    "setting", ["method.local_lr=1e-9", "seed=7", "aggregation.max_examples=1"]
)
def test_settings_that_one_client_alone_has_keep_it_out(
    setting: str, tmp_path: Path
) -> None:
    """With a step size of zero for all but one, the sum would be its message."""
    server = attack(tmp_path)
    server.grid.contexts[102].run_config["set"] = setting
    assert server.ask(range(5)).clients == [0, 1, 3, 4]
    assert "other terms" in server.failed[2]
    for node in (100, 101, 103, 104):
        server.grid.contexts[node].run_config["set"] = setting
    with pytest.raises(TooFewReports):
        server.ask(range(5), t=1)


def test_settings_of_a_device_alone_are_no_others(tmp_path: Path) -> None:
    server = attack(tmp_path)
    context = server.grid.contexts[102]
    context.node_config["set"] = "engine.device=cpu"
    assert server.ask(range(5)).clients == [0, 1, 2, 3, 4]
    assert server.failed == {}


@pytest.mark.parametrize("series", ["../elsewhere", "/tmp/elsewhere", "a/.", "a\n"])
def test_a_run_names_no_other_folder_of_a_device(series: str, tmp_path: Path) -> None:
    """Under another name of the same folder a client would find no mark."""
    server = attack(tmp_path)
    for context in server.grid.contexts.values():
        context.node_config["state"] = str(tmp_path / "device")
    server.engine = server.server(series)
    with pytest.raises(TooFewReports):
        server.ask(range(5))
    assert "expected letters, digits" in server.failed[0]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("more", [{}, {"num-partitions": CLIENTS}])
def test_a_device_is_one_client_and_no_other(
    more: dict[str, Any], tmp_path: Path
) -> None:
    """As another one it has no certificate, and would believe any key."""
    certs.make(tmp_path, ["localhost"], 2)
    place = {"partition-id": 1, "certs": str(tmp_path / "client-1")}
    node: dict[str, Any] = {"state": str(tmp_path / "device"), **place, **more}
    work: dict[str, Any] = {
        "function": "train",
        "t": 0,
        "k": 0,
        "series": "s",
        "clients": [3],
    }
    message = Message(
        RecordDict({"work": ConfigRecord(work)}), dst_node_id=1, message_type="train"
    )
    device = Node(message, Context(1, 1, node, RecordDict(), {}))
    assert device.identity_of(1) is not None
    with pytest.raises(Refused, match="asked as client 3, and this is 1"):
        device.identity_of(3)


def test_a_client_that_spoils_a_sum_costs_one_round_and_is_named(
    tmp_path: Path,
) -> None:
    """Its shares are what it said they are, and do not give its secret."""
    e = secure("fedavg", population=CLIENTS, participation__cohort=CLIENTS, rounds=3)

    def spoil(reply: Message) -> list[Message]:
        if facts_of(reply).get("exchange") == 2 and 3 in facts_of(reply)["clients"]:
            return edited(lambda record: {**record, "seal": bytes(16)})(reply)
        return [reply]

    grid = FakeGrid(preset_of(e, tmp_path), CLIENTS, spoil)
    result = over_flower(e, tmp_path, grid)
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [True, False, False]
    assert [row["left_out"] for row in rows] == [{"bad message": [3]}] * 3
    assert result.dropped == {"bad message": 3}


def test_a_client_whose_shares_are_forged_costs_one_round_and_is_named(
    tmp_path: Path,
) -> None:
    """The others cannot read them, and leave the sum."""
    e = secure("fedavg", population=CLIENTS, participation__cohort=CLIENTS, rounds=3)

    def forge(reply: Message) -> list[Message]:
        if facts_of(reply).get("exchange") == 2 and 3 in facts_of(reply)["clients"]:
            change = edited(lambda r: {**r, "sent": bytes(len(r["sent"]))})
            return change(reply)
        return [reply]

    grid = FakeGrid(preset_of(e, tmp_path), CLIENTS, forge)
    over_flower(e, tmp_path, grid)
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [True, False, False]
    assert rows[0]["left_out"]["bad message"] == [3]
    assert [row["left_out"] for row in rows[1:]] == [{"bad message": [3]}] * 2


def test_an_error_of_a_client_tells_no_number_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = attack(tmp_path)

    def broken(*_: Any) -> None:
        raise ValueError("label 17 in row 3: 0.4711")

    monkeypatch.setattr(Assignment, "run", broken)
    with pytest.raises(TooFewReports):
        server.ask(range(5))
    assert set(server.failed.values()) == {
        "error: ValueError; the client's own log has its text"
    }
