"""Rows of messages, in memory and in a file, and passes over their columns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.errors import RunError
from fedcore.messages.aggregation import gram as gram_module
from fedcore.messages.aggregation.gram import gram, squared_distances
from fedcore.messages.aggregation.passes import over_columns
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Rule, aggregate
from fedcore.messages.aggregation.settings import AggregationSettings

IDS = torch.tensor([3, 5, 8, 13, 21])
RULES = (
    *("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "meamed", "dnc", "caf"),
    *("geometric_median", "centred_clipping", "fltrust", "sign"),
)


def rows_of(matrix: torch.Tensor, order: list[int], memory: int, folder: Path) -> Rows:
    """Rows that arrive in this order, two leaves each."""
    rows = Rows(IDS, matrix.shape[1], matrix.dtype, memory, lambda: folder)
    for place in order:
        row = matrix[place : place + 1]
        rows.put(IDS[[place]], [row[:, :2], row[:, 2:].reshape(1, -1, 1)])
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 10**6])
def test_rows_come_back_in_order_of_client_without_those_that_are_missing(
    dtype: torch.dtype, memory: int, tmp_path: Path
) -> None:
    matrix = torch.randn(5, 37).to(dtype)
    rows = rows_of(matrix, [4, 0, 2], memory, tmp_path)
    assert rows.is_in_file == (memory == 0)
    assert rows.n == 3
    assert rows.clients.tolist() == [3, 8, 21]
    for width in (1, 7, 37, 1000):
        assert torch.equal(torch.cat(list(rows.blocks(width)), 1), matrix[[0, 2, 4]])
    rows.close()


def test_a_file_of_rows_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = rows_of(torch.randn(5, 9), [0, 1], 0, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == [], "the file has no name"
    rows.close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        rows_of(torch.randn(5, 9), [0], 0, tmp_path / "file")


def test_a_client_has_one_row_and_is_expected() -> None:
    rows = Rows(IDS, 2, torch.float32, 10**6, Path.cwd)
    rows.put(torch.tensor([5]), [torch.zeros(1, 2)])
    with pytest.raises(AssertionError, match="already"):
        rows.put(torch.tensor([5]), [torch.zeros(1, 2)])
    with pytest.raises(AssertionError, match="expected"):
        rows.put(torch.tensor([22]), [torch.zeros(1, 2)])
    with pytest.raises(AssertionError, match="expected 2"):
        rows.put(torch.tensor([3]), [torch.zeros(1, 3)])


@pytest.mark.parametrize("rule", RULES)
def test_neither_arrival_nor_where_rows_are_changes_a_bit(
    rule: str, tmp_path: Path
) -> None:
    matrix = torch.randn(5, 37)
    f = 0 if rule in ("bulyan",) else 1
    settings = AggregationSettings(rule=rule, byzantine=f)
    reference = matrix.mean(0)
    expected = aggregate(matrix, settings, f, reference=reference)
    for order, memory in (([0, 1, 2, 3, 4], 10**6), ([3, 1, 4, 0, 2], 0)):
        rows = rows_of(matrix, order, memory, tmp_path)
        found = Rule(settings, 0).aggregate(
            rows, f, None, (), torch.zeros(0), reference
        )
        assert torch.equal(found.value, expected.value), f"{rule}, arrived as {order}"
        assert torch.equal(found.distances, expected.distances)
        rows.close()


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "meamed", "sign"])
@pytest.mark.parametrize("width", [1, 7])
def test_the_width_of_a_block_changes_no_bit_of_a_column_rule(
    rule: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(31, 300)
    settings = AggregationSettings(rule=rule, byzantine=4, tau=1.0)
    whole = aggregate(matrix, settings, 4).value
    blocks = Rows.blocks
    monkeypatch.setattr(Rows, "blocks", lambda rows: blocks(rows, width))
    assert torch.equal(aggregate(matrix, settings, 4).value, whole)


def test_the_width_of_a_block_hardly_changes_the_gram_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Rows.of(torch.randn(9, 500))
    whole = gram(rows)
    blocks = Rows.blocks
    for width in (1, 7):
        monkeypatch.setattr(
            Rows, "blocks", lambda rows, width=width: blocks(rows, width)
        )
        difference = np.abs(gram(rows) - whole)
        assert (difference <= 1e-12 * np.diagonal(whole).max()).all()


def test_distances_are_good_far_from_zero_and_beside_an_enormous_row() -> None:
    """In float32 a row at 1e20 makes its own distances NaN, and an offset the rest."""
    generator = torch.Generator().manual_seed(0)
    offset = 1e4 * torch.ones(50)
    matrix = offset + torch.randn(6, 50, generator=generator)
    matrix[5] = 1e20
    found = squared_distances(gram(Rows.of(matrix)))
    assert np.isfinite(found).all()
    exact = torch.cdist(matrix.double(), matrix.double()) ** 2
    np.testing.assert_allclose(found[:5, :5], exact[:5, :5], rtol=1e-4, atol=1e-4)


def test_an_enormous_row_of_float64_leaves_all_distances_finite() -> None:
    matrix = torch.randn(5, 3, dtype=torch.float64)
    matrix[2] = 1e300
    found = squared_distances(gram(Rows.of(matrix)))
    assert np.isfinite(found).all()
    settings = AggregationSettings(rule="krum", byzantine=1)
    outcome = aggregate(matrix, settings, 1)
    assert outcome.weights[2] == 0
    assert outcome.distances.isfinite().all()


def test_extra_rows_come_last_in_a_gram_matrix() -> None:
    matrix = torch.randn(4, 2100)
    whole = gram(Rows.of(matrix))
    split = gram_module.gram(Rows.of(matrix[:3]), matrix[3:])
    np.testing.assert_allclose(split, whole, rtol=1e-12)


def test_every_column_is_seen_once() -> None:
    matrix = torch.arange(3 * 5001).view(3, 5001).float()
    seen = np.zeros(5001)

    def look(_thread: int, start: int, piece: np.ndarray) -> None:
        stop = start + piece.shape[1]
        seen[start:stop] += 1
        assert (piece[0] == np.arange(start, stop)).all()

    over_columns(Rows.of(matrix), look)
    assert (seen == 1).all()


def test_an_error_in_a_thread_is_raised() -> None:
    def fail(_thread: int, start: int, _piece: np.ndarray) -> None:
        raise ValueError(f"at {start}")

    with pytest.raises(ValueError, match="at 0"):
        over_columns(Rows.of(torch.zeros(2, 10)), fail)


PEAK = """
import resource, sys, torch
from pathlib import Path
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Rule
from fedcore.messages.aggregation.settings import AggregationSettings

d, n = int(sys.argv[1]), 100
rows = Rows(torch.arange(n), d, torch.float32, 0, lambda: Path(sys.argv[2]))
row = torch.arange(d).float()[None]
for client in range(n):
    rows.put(torch.tensor([client]), [row + client])
settings = AggregationSettings(rule=sys.argv[3], before="nnm", byzantine=10)
Rule(settings, 0).aggregate(rows, 10, None, (), torch.zeros(0), None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["trimmed_mean", "geometric_median"])
def test_memory_of_rows_in_a_file_does_not_grow_with_their_length(
    rule: str, tmp_path: Path
) -> None:
    """Beyond a few vectors of that length; the rows of it would take a hundred."""
    peaks = []
    for d in (500_000, 1_500_000):
        command = [sys.executable, "-c", PEAK, str(d), str(tmp_path), rule]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    grown = (peaks[1] - peaks[0]) / (1_000_000 * 4)
    assert grown < 12, f"{grown:.0f} rows more"
