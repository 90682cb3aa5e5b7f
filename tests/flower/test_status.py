"""The clients that `fedcore status` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fedcore.server.status
import pyarrow as pa
import pyarrow.parquet as pq

from tests.flower.test_escapes import NASTY

ROUNDS = 9


def write(folder: Path, faults: dict[int, dict[str, Any]], clients: int = 4) -> None:
    """A table of so many clients in nine rounds; `faults` of clients in all of them."""
    rows = []
    usual: dict[str, Any] = {"function": "train", "num_examples": 9.0, "left_out": ""}
    usual |= {"clipped": False, "capped": False, "weight": 0.25}
    for number in range(1, ROUNDS + 1):
        for client in range(clients):
            row = {"round": number, "client": client, **usual}
            rows.append(row | faults.get(client, {}))
    table = pa.Table.from_pylist(rows)
    rounds = table["round"].cast(pa.int32())
    table = table.set_column(table.column_names.index("round"), "round", rounds)
    pq.write_table(table, folder / "clients.parquet")


def said(folder: Path) -> list[str]:
    """The lines about clients."""
    found = fedcore.server.status._troubles(folder)
    facts = {"run": "r", "listen": "l", "round": 1, "waiting_for": [], "nodes": []}
    facts |= {"late_answers": 0, "waiting_s": 0.0, "num_trouble": len(found)}
    named = found[: fedcore.server.status.NAMED]
    facts["trouble"] = [fedcore.server.status._facts_of(client) for client in named]
    return fedcore.server.status.text(facts).split("\n")[2:]


def test_a_client_that_gives_trouble_is_named_with_what_it_did(tmp_path: Path) -> None:
    faults = {1: {"clipped": True, "capped": True}, 2: {"weight": 0.0}}
    write(tmp_path, {**faults, 3: {"left_out": "bad message", "weight": None}})
    assert said(tmp_path) == [
        "client 3: left out of 9 of 9 rounds (the last time: bad message), "
        "FAILING, for 9 rounds in a row",
        "client 2: weighs 0 of an average client",
        "client 1: its message clipped in 9, "
        "more examples claimed than are counted in 9",
    ]


def test_a_client_whose_messages_are_long_is_named_with_their_length(
    tmp_path: Path,
) -> None:
    """Rules by column have no weights."""
    usual: dict[str, Any] = {"weight": float("nan"), "norm_ratio": 1.0}
    faults = {0: usual, 1: {**usual, "norm_ratio": 12.34567}, 2: usual, 3: usual}
    write(tmp_path, faults)
    assert said(tmp_path) == ["client 1: its message 12.3 times as long as most"]


def test_nobody_is_named_where_all_is_well(tmp_path: Path) -> None:
    write(tmp_path, {})
    assert said(tmp_path) == []


def test_a_run_without_a_table_and_a_table_that_is_cut_name_nobody(
    tmp_path: Path,
) -> None:
    assert said(tmp_path) == []
    write(tmp_path, {1: {"clipped": True}})
    file = tmp_path / "clients.parquet"
    file.write_bytes(file.read_bytes()[:100])
    assert said(tmp_path) == []


def test_so_many_are_named_and_the_rest_are_counted(tmp_path: Path) -> None:
    faults = {client: {"left_out": NASTY} for client in range(30)}
    write(tmp_path, faults, clients=40)
    lines = said(tmp_path)
    assert len(lines) == fedcore.server.status.NAMED + 1
    assert lines[-1] == "and 10 more clients with trouble: see the report"
    assert all(line.isprintable() for line in lines)


def test_the_exchange_of_a_secure_sum_is_shown() -> None:
    facts: dict[str, Any] = {"run": "r", "listen": "l", "round": 3, "nodes": []}
    facts |= {"waiting_for": [4], "waiting_s": 2.0, "late_answers": 0, "trouble": []}
    facts |= {"num_trouble": 0, "exchange": "survivors"}
    lines = fedcore.server.status.text(facts).split("\n")
    assert lines[1] == "round 3, a secure sum: survivors"


def test_work_in_flight_is_shown_the_oldest_first() -> None:
    facts: dict[str, Any] = {"run": "r", "listen": "l", "round": 9, "nodes": []}
    facts |= {"waiting_for": [], "waiting_s": 0.0, "late_answers": 0, "trouble": []}
    works = []
    for client in range(25):
        works.append({"client": client, "version": 5, "seconds": float(client)})
    facts |= {"num_trouble": 0, "in_flight": works}
    lines = fedcore.server.status.text(facts).split("\n")[2:]
    assert lines[0] == "client 24 works on version 5, for 24 s"
    assert lines[-1] == "and 5 more clients, for less long"
    assert len(lines) == fedcore.server.status.NAMED + 1
