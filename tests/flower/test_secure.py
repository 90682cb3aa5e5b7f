"""Secure sums over Flower: the real ClientApp, and a grid in process."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedcore.client.secure
import fedcore.server.post
import fedcore.server.secure
import pytest
import torch
from fedcore.client.marks import Marks
from fedcore.client.store import Moment, StateError, Store
from fedcore.server.grid import GridEngine
from fedcore.server.journal import Entry, Journal, Void
from fedcore.server.secure import answers_in
from fedcore.server.sums import Securing
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.common.constant import ErrorCode

from fedcore.config import Experiment
from fedcore.errors import TooFewReports
from fedcore.messages.secure.ask import SecretTotal
from fedcore.messages.secure.primitives import Refused
from fedcore.messages.secure.ring import Encoded
from fedcore.rounds import loop
from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid, in_place_of, over_the_wire
from tests.flower.test_grid import over_flower, preset_of
from tests.helpers import small

SECURE: dict[str, Any] = {"aggregation": {"secure": True}}
CAPPED: dict[str, Any] = {"method__cutoff": 8}


def secure(name: str, **settings: Any) -> Experiment:
    """A run of milliseconds whose sums are secret."""
    return small(name, **{**SECURE, **settings})


def facts_of(reply: Message) -> dict[str, Any]:
    """What a reply says of itself; {} for one that is no exchange of a sum."""
    about = reply.content.get("about")
    facts = dict(about) if isinstance(about, ConfigRecord) else {}
    return facts if "exchange" in facts else {}


Edit = Callable[[Message], list[Message]]


def in_exchange(number: int, t: int, client: int, edit: Edit) -> Edit:
    """Weather for the reply about one client in one exchange of round t."""

    def weather(reply: Message) -> list[Message]:
        facts = facts_of(reply)
        is_it = facts.get("exchange") == number and facts["t"] == t
        if is_it and client in facts["clients"]:
            return edit(reply)
        return [reply]

    return weather


def gone(reply: Message) -> list[Message]:
    return [in_place_of(reply, ErrorCode.NODE_UNAVAILABLE, "gone")]


def without(clients: dict[int, list[int]], patch: pytest.MonkeyPatch) -> None:
    """In this process these clients, by round t, drop out."""
    answering = loop.answering

    def some(cohort: torch.Tensor, dropout: float, seed: int, t: int) -> torch.Tensor:
        there = answering(cohort, dropout, seed, t)
        absent = torch.tensor(clients.get(t, []), dtype=torch.int64)
        return there[~torch.isin(there, absent)]

    patch.setattr(loop, "answering", some)


# Where all goes well


@pytest.mark.parametrize("nodes", [12, 5])
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedau", "fedsim"])
def test_devices_add_up_to_the_bits_of_the_simulation(
    name: str, nodes: int, tmp_path: Path
) -> None:
    e = secure(name, **(CAPPED if name == "fedau" else {}))
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), nodes))
    assert other.params_sha256 == one.params_sha256
    assert other.final == one.final
    assert other.dropped == {}


def test_a_session_is_a_file_for_its_owner_and_gone_after_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: set[int] = set()

    def look(reply: Message) -> list[Message]:
        for file in (tmp_path / "kept").glob("run/client-*/session"):
            modes.add(stat.S_IMODE(file.stat().st_mode))
        return [reply]

    e = secure("fedavg", rounds=1)
    over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, look))
    assert modes == {0o600}
    assert not list((tmp_path / "kept").glob("run/client-*/session"))
    marks = list((tmp_path / "kept").glob("run/client-*/summed.json"))
    assert len(marks) == 12  # the cohort, and the others were evaluated


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# A client that is lost in an exchange of round t = 1


def cohort_of(e: Experiment, t: int) -> list[int]:
    """Clients of round t."""
    process = e.participation.process(12, e.seed, lambda: None)  # type: ignore
    return process.sample(t, process.start())[0].tolist()


@pytest.mark.parametrize("exchange", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_client_lost_in_an_exchange_is_as_if_it_had_not_come(
    name: str, exchange: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SCAFFOLD: its state, too. Once its vector has arrived it is in the sum."""
    e = secure(name, participation__cohort=6)
    client = cohort_of(e, 1)[2]
    weather = in_exchange(exchange, 1, client, gone)
    monkeypatch.setattr(fedcore.server.secure, "GRACE", 0.0)
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, weather))
    lost = {1: [client]} if exchange <= 3 else {}
    with monkeypatch.context() as patch:
        without(lost, patch)
        one = run(e, tmp_path / "sequential")
    assert other.params_sha256 == one.params_sha256
    rows = rows_of(tmp_path)
    dropped = {"disconnected": 1} if exchange <= 3 else {}
    assert [row["dropped"] for row in rows] == [{}, dropped, {}, {}]
    assert rows[1]["reports"] == 6 - len(dropped)


def test_below_the_threshold_the_round_is_skipped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = secure("scaffold")
    lost = cohort_of(e, 1)[:3]

    def weather(reply: Message) -> list[Message]:
        facts = facts_of(reply)
        if facts.get("exchange") == 3 and facts["t"] == 1:
            if lost[0] in facts["clients"] or lost[1] in facts["clients"]:
                return gone(reply)
        return [reply]

    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, weather))
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [False, True, False, False]
    with monkeypatch.context() as patch:
        without({1: cohort_of(e, 1)}, patch)
        one = run(e, tmp_path / "sequential")
    assert other.params_sha256 == one.params_sha256, "states went on without a sum"
