"""Rows of runs on a buffered schedule, by hand. Specification (h) 8 and (f) 14.

Clients 0, 1 and 2 of most runs need 2, 3 and 7 seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedcore.rounds import loop
from tests.helpers import loop_of, slow
from tests.test_buffer import buffered, rows_of
from tests.test_clocked_rounds import pulled, rows


def buffer_rows(clock: dict[str, Any], folder: Path, number: int, **more: Any) -> Any:
    schedule = {"name": "buffered", "buffer": 1, "concurrency": 3, **more}
    run = loop_of(pulled(clock={"step_s": 1.0, **clock}, schedule=schedule), folder)
    return rows(run, number)


def test_idle_places_of_a_buffer_by_hand(tmp_path: Path) -> None:
    done = buffer_rows({}, tmp_path, 3, buffer=2)
    # Of 3, 3 and 2 seconds: client 0 is idle from 2 to 3, and from 5 to 6; client 1,
    # which has had version 2, from 7 on with client 0 until 8.
    assert [row["time_s"] for row in done] == [3, 6, 8]
    assert [row["in_flight"] for row in done] == [1, 1, 2]
    assert [row["idle"] for row in done] == pytest.approx([1 / 9, 1 / 9, 0])
    assert [row["staleness"] for row in done] == [
        {"mean": 0, "max": 0},
        {"mean": 0, "max": 0},
        {"mean": 1, "max": 2},
    ]


def test_work_that_waits_for_the_server_is_idle(tmp_path: Path) -> None:
    """The server takes 10 s; nobody works longer than 7."""
    done = buffer_rows({"server_s": 10.0}, tmp_path, 4)
    assert [row["time_s"] for row in done] == [12, 22, 32, 42]
    # Until 12 clients work for 2, 3 and 7 seconds; until 22 client 0 does for 2; client
    # 1 begins at 22, and client 2 at 32.
    expected = [1 - 12 / 36, 1 - 2 / 30, 1 - 3 / 30, 1 - 7 / 30]
    assert [row["idle"] for row in done] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_an_interrupted_first_update_leaves_no_trace(
    method: str, tmp_path: Path
) -> None:
    schedule = {"name": "buffered", "buffer": 1, "concurrency": 3}
    run = loop_of(pulled(method, schedule=schedule), tmp_path)
    engine: Any = run.engine
    each = engine.each

    def interrupted(*work: Any) -> Any:
        yield from each(*work)
        raise KeyboardInterrupt

    engine.each = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.round()
    for store in run.stores.values():
        store.rollback()
    engine.each = each
    passes = 2 if method == "ditto" else 1
    times = [row["time_s"] / passes for row in rows(run, 6)]
    assert times == [2, 3, 4, 6, 6, 7]


# Specification (f) 14


@pytest.mark.parametrize("method", ["fedavg", slow("fedvarp"), slow("ditto")])
def test_who_works_when_does_not_depend_on_where_and_in_what_pieces(
    method: str, tmp_path: Path
) -> None:
    engines: list[dict[str, Any]] = [
        {"name": "sequential"},
        {"name": "vectorised", "chunk": 1},
        {"name": "vectorised", "chunk": 3},
    ]
    recorded = []
    for number, engine in enumerate(engines):
        folder = tmp_path / str(number)
        run = buffered(method, 4, 8, engine=engine, participation__dropout=0.2)
        loop.run(run, folder)
        times = [row["time_s"] for row in rows_of(folder)]
        arrivals = pq.read_table(folder / "arrivals.parquet").to_pydict()
        recorded.append((times, arrivals))
    assert len(recorded[0][1]["client"]) > 24
    assert "dropout" in recorded[0][1]["outcome"]
    for other in recorded[1:]:
        assert other == recorded[0]
