"""Reasons, names and messages that nodes send: shown, short, and in one line."""

from __future__ import annotations

from typing import Any

import fedcore.server.status
import pytest
from fedcore.server.post import one_line
from fedcore.server.replies import Reader
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

NASTY = "\x1b[31mred\u202e\u200b\r\nround 9: fine\x07"


def answer(**about: Any) -> Message:
    record = ConfigRecord({"t": 0, **about})
    return Message(RecordDict({"about": record}), dst_node_id=1, message_type="train")


def read(message: Message) -> str:
    """Everything that the server would say of the answer of client 3."""
    reading = Reader({}, {}, 0, 60.0, "strategies/fedavg.py").read(message, [3])
    said = [*reading.answers.values(), *reading.complaints.values()]
    return " | ".join(map(str, said))


@pytest.mark.parametrize(
    "about",
    [
        {"failed": [3], "reasons": [NASTY]},
        {"failed": [3], "reasons": [NASTY * 50_000]},
        {"failed": [NASTY], "reasons": ["?"]},
        {"clients": [NASTY * 50_000], "num-examples": [3]},
        {"clients": [3], "num-examples": [NASTY * 50_000]},
        {"t": NASTY * 50_000},
    ],
)
def test_whatever_a_node_says_is_short_and_printable(about: dict[str, Any]) -> None:
    said = read(answer(**about))
    assert said.isprintable()
    assert len(said) < 800


def test_a_million_lines_about_clients_are_one_line() -> None:
    said = read(answer(clients=list(range(200_000)), **{"num-examples": [1] * 200_000}))
    assert said == (
        "bad message: it has 200000 lines about clients, and was asked for 1"
    )


def test_a_reason_of_a_megabyte_is_cut_in_one_line() -> None:
    said = one_line(NASTY * 50_000)
    assert said.isprintable()
    assert len(said) == 200


def test_the_name_of_a_key_steers_no_status() -> None:
    row = fedcore.server.status._row(NodeInfo(node_id=7, name=NASTY, status="online"))
    facts = {"run": "r", "listen": "l", "round": 1, "waiting_for": [], "nodes": [row]}
    facts |= {"trouble": [], "num_trouble": 0}
    text = fedcore.server.status.text(facts | {"late_answers": 0, "waiting_s": 0.0})
    assert "\\x1b[31mred" in text
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text.split("\n")) == 3
