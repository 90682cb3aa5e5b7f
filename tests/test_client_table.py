"""`clients.parquet`: what it costs, and which rows a stopped or killed run has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from fedcore.config import CheckpointSettings
from fedcore.engines.readout import Readout
from fedcore.messages.aggregation.aggregator import Aggregated
from fedcore.rounds.client_table import ClientTable, read_clients
from fedcore.rounds.loop import run
from fedcore.rounds.tally import Tally
from fedcore.storage import pieces
from tests.helpers import small

ROOT = Path(__file__).parent.parent
COHORT = 50


def measured(clients: Tensor, **metrics: Tensor) -> Readout:
    num_examples = torch.arange(1.0, len(clients) + 1)
    return Readout(clients, num_examples, metrics, {}, has_message=True, nbytes=0)


def add_round(table: ClientTable, number: int) -> None:
    """One training report, and every third round an evaluation with more metrics."""
    clients = torch.arange(COHORT) + number
    loss = torch.linspace(0, 1, COHORT) + number
    table.add(number, "train", measured(clients, loss=loss))
    if number % 3 == 0:
        accuracy = loss.double() / 100
        readout = measured(clients, loss=loss, accuracy=accuracy)
        table.add(number, "evaluate", readout)


def written(folder: Path, rounds: int, every: int = 1) -> ClientTable:
    """A table of `rounds` rounds with a checkpoint after each `every` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    table = ClientTable(folder)
    for number in range(1, rounds + 1):
        add_round(table, number)
        if number % every == 0:
            table.write(number)
    return table


def rows_of(table: pa.Table) -> list[str]:
    """Rows as JSON, in which NaN equals itself."""
    return [json.dumps(row, sort_keys=True) for row in table.to_pylist()]


def expected(folder: Path, rounds: int) -> list[str]:
    """The rows of a run that wrote them at once."""
    table = written(folder, rounds, every=rounds)
    table.merge()
    return rows_of(pq.read_table(folder / "clients.parquet"))


# What it costs


def memory_of_adding(rounds: int) -> int:
    """Bytes that were allocated to add this many rounds, over all of them."""
    table = ClientTable(Path())
    add_round(table, 3)
    total = 0
    tracemalloc.start()
    try:
        for number in range(4, rounds + 4):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            add_round(table, number)
            _, peak = tracemalloc.get_traced_memory()
            total += peak - before
    finally:
        tracemalloc.stop()
    return total


def test_ten_times_the_reports_take_ten_times_the_memory_to_add_and_not_a_hundred() -> (
    None
):
    assert memory_of_adding(1500) < 15 * memory_of_adding(150)


def test_a_checkpoint_writes_what_is_new_however_long_the_run_was(
    tmp_path: Path,
) -> None:
    sizes = []
    for rounds in (6, 60):
        folder = tmp_path / str(rounds)
        table = written(folder, rounds)
        before = set((folder / "clients").iterdir())
        add_round(table, rounds + 1)
        table.write(rounds + 1)
        (piece,) = set((folder / "clients").iterdir()) - before
        assert not (folder / "clients.parquet").exists()
        sizes.append(piece.stat().st_size)
    assert sizes[1] < 1.2 * sizes[0]


def test_joining_holds_a_bounded_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "ROW_GROUP", 2 * COHORT)
    written(tmp_path / "a", 10).merge()
    file = tmp_path / "a" / "clients.parquet"
    assert pq.read_metadata(file).num_row_groups > 4
    assert rows_of(pq.read_table(file)) == expected(tmp_path / "b", 10)


# What it holds


def odd_round(table: ClientTable, number: int) -> None:
    """A round with clients that are left out, clipped and weighted."""
    clients = torch.tensor([5, 2, 9])
    table.add(number, "anchor", measured(clients))
    table.add(number, "train", measured(clients, loss=torch.tensor([1.0, 2.0, 3.0])))
    tally = Tally({2, 4, 5, 7, 9}, clipped={9}, failed={7: "timeout", 4: "dropout"})
    tally.failed_in[7] = "train"
    weights = torch.tensor([0.75, 0.25])
    vector = Aggregated(torch.tensor([2, 9]), weights, weights * 2, weights * 4)
    tally.aggregation[("train", "delta")] = vector
    tally.aggregation[("train", "dc")] = vector._replace(weights=1 - weights)
    table.close_round(number, tally)


def test_a_round_that_is_closed_has_who_was_left_out_clipped_and_how_weighted(
    tmp_path: Path,
) -> None:
    table = ClientTable(tmp_path)
    add_round(table, 1)
    table.write(1)  # a piece without the columns, and one with them
    odd_round(table, 2)
    add_round(table, 3)
    table.write(3)
    table.merge()
    rows = read_clients(tmp_path).to_pylist()
    found = [row for row in rows if row["round"] == 2]
    seen = [(row["function"], row["client"], row["left_out"]) for row in found]
    assert seen == [
        *[("anchor", client, "") for client in (5, 2, 9)],
        *[("train", client, "") for client in (5, 2, 9)],
        ("", 4, "dropout"),
        ("train", 7, "timeout"),
    ]
    assert [row["clipped"] for row in found] == [False, False, True] * 2 + [False] * 2
    trained = found[3:6]
    assert np.isnan(trained[0]["weight"])
    for name, values in (
        ("weight", [0.75, 0.25]),
        ("weight_dc", [0.25, 0.75]),
        ("norm_ratio", [1.5, 0.5]),
        ("distance", [3.0, 1.0]),
    ):
        assert [row[name] for row in trained[1:]] == values, name
    others = [row for row in rows if row["round"] != 2]
    assert {row["clipped"] for row in others} == {False}
    assert {row["left_out"] for row in others} == {""}
    assert all(np.isnan(row["weight"]) for row in [*others, *found[:3], *found[6:]])


def test_a_table_of_an_older_fedcore_is_read_and_gone_on_with(tmp_path: Path) -> None:
    table = written(tmp_path, 4)
    table.merge()
    file = tmp_path / "clients.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["left_out"]), file)
    assert set(read_clients(tmp_path)["left_out"].to_pylist()) == {""}
    resumed = ClientTable(tmp_path)
    resumed.cut(3)
    odd_round(resumed, 4)
    resumed.write(4)
    resumed.merge()
    reasons = read_clients(tmp_path)["left_out"].to_pylist()
    assert (len(reasons), reasons[-2:]) == (4 * COHORT + 8, ["dropout", "timeout"])


def test_pieces_and_the_joined_file_have_the_rows_of_a_table_written_at_once(
    tmp_path: Path,
) -> None:
    whole = expected(tmp_path / "whole", 7)
    table = written(tmp_path / "pieces", 7, every=2)
    assert rows_of(read_clients(tmp_path / "pieces")) == whole[:-COHORT]
    table.write(7)
    assert rows_of(read_clients(tmp_path / "pieces")) == whole
    table.merge()
    assert [file.name for file in (tmp_path / "pieces").iterdir()] == [
        "clients.parquet"
    ]
    frame = pq.read_table(tmp_path / "pieces" / "clients.parquet")
    assert rows_of(frame) == whole
    assert np.isnan(frame["accuracy"][0].as_py()), "not reported by a training client"
    types = [str(frame.schema.field(name).type) for name in ("round", "client", "loss")]
    assert types == ["int32", "int64", "double"]


def test_rows_are_selected_by_function_and_round(tmp_path: Path) -> None:
    table = written(tmp_path, 5)
    table.merge()
    add_round(table, 6)
    table.write(6)
    evaluated = read_clients(tmp_path, function="evaluate")
    assert set(evaluated["round"].to_pylist()) == {3, 6}
    early = read_clients(tmp_path, function="evaluate", up_to=5)
    assert set(early["round"].to_pylist()) == {3}
    nothing = read_clients(tmp_path, function="finetune")
    assert (len(nothing), len(read_clients(tmp_path / "none"))) == (0, 0)


def test_a_round_that_was_interrupted_is_not_written(tmp_path: Path) -> None:
    table = written(tmp_path, 2)
    add_round(table, 3)
    table.write(2)
    assert max(read_clients(tmp_path)["round"].to_pylist()) == 2


@pytest.mark.parametrize("merged", [0, 4, 9])
@pytest.mark.parametrize("back_to", [0, 3, 5, 8])
def test_a_run_that_goes_on_from_an_earlier_round_has_each_row_once(
    merged: int, back_to: int, tmp_path: Path
) -> None:
    """Pieces of two rounds, joined after `merged` rounds, and killed after 9."""
    folder = tmp_path / "part"
    folder.mkdir()
    table = ClientTable(folder)
    for number in range(1, 10):
        add_round(table, number)
        if number % 2 == 0:
            table.write(number)
        if number == merged:
            table.write(number)
            table.merge()
    resumed = ClientTable(folder)
    resumed.cut(min(back_to, 8))
    for number in range(back_to + 1, 12):
        add_round(resumed, number)
        resumed.write(number)
    whole = expected(tmp_path / "whole", 11)
    assert rows_of(read_clients(folder)) == whole
    resumed.merge()
    assert rows_of(pq.read_table(folder / "clients.parquet")) == whole


def test_a_kill_while_pieces_are_joined_doubles_and_loses_no_row(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "part"
    table = written(folder, 5)
    shutil.copytree(folder / "clients", tmp_path / "copy")
    table.merge()
    # As if the process had ended after the rename, and before all pieces were deleted.
    shutil.copytree(tmp_path / "copy", folder / "clients")
    (folder / "clients" / "000002.parquet").unlink()
    whole = expected(tmp_path / "whole", 5)
    assert rows_of(read_clients(folder)) == whole
    resumed = ClientTable(folder)
    resumed.cut(5)
    resumed.merge()
    assert rows_of(pq.read_table(folder / "clients.parquet")) == whole


def test_a_damaged_piece_costs_its_own_rows_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 4)
    (tmp_path / "clients" / "000002.parquet").write_bytes(b"PAR1 no")
    table = ClientTable(tmp_path)
    table.cut(4)
    assert "000002.parquet cannot be read" in caplog.text
    table.merge()
    found = pq.read_table(tmp_path / "clients.parquet")["round"].to_pylist()
    assert set(found) == {1, 3, 4}
    (left,) = (tmp_path / "clients").iterdir()
    assert left.name == "000002.parquet.damaged"


# In a run

KILLED = """
import os
import torch
torch.set_num_threads(1)
from fedcore.rounds.loop import run
from fedcore.storage.checkpoint import Checkpoint
from tests.helpers import small

save = Checkpoint.save

def killed(self, number, *rest):
    if number == 5:  # the rows of round 5 are written, its checkpoint is not
        os.kill(os.getpid(), 9)
    save(self, number, *rest)

Checkpoint.save = killed
run(small("fedavg", rounds=6, finetune__epochs=1), "FOLDER")
"""


def test_a_killed_run_that_goes_on_has_the_rows_of_one_that_did_not_stop(
    tmp_path: Path,
) -> None:
    e = small("fedavg", rounds=6, finetune__epochs=1)
    run(e, tmp_path / "whole")
    code = KILLED.replace("FOLDER", str(tmp_path / "part"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert done.returncode == -9
    whole = pq.read_table(tmp_path / "whole" / "clients.parquet")
    early = read_clients(tmp_path / "whole", up_to=5)
    columns = early.column_names[:5]
    killed = read_clients(tmp_path / "part")
    assert rows_of(killed.select(columns)) == rows_of(early.select(columns))
    # One piece for the rest, so that nothing but `cut` takes the one of round 5 away.
    seldom = e.model_copy(update={"checkpoint": CheckpointSettings(seconds=1e6)})
    run(seldom, resume=tmp_path / "part")
    assert not (tmp_path / "part" / "clients").exists()
    found = pq.read_table(tmp_path / "part" / "clients.parquet")
    assert found.column_names == whole.column_names
    assert rows_of(found) == rows_of(whole)
