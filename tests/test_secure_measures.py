"""Measures over clients from sums alone: exact means, percentiles to a bin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.messages.secure.measures import (
    BINS,
    VALUES,
    Measures,
    bin_of,
    edges,
    spread_evenly,
)
from fedcore.rounds.observer import Quiet
from fedcore.rounds.rundir import PERCENTILES
from tests import measured
from tests.helpers import loop_of

FEW = settings(max_examples=60, derandomize=True, deadline=None)
EXACT = 2.0**-20
SECURE = {"aggregation__secure": True}


class Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def evaluated(task: str, folder: Path, **others: Any) -> tuple[dict[str, Any], Notes]:
    """The measures of the model at its start, and the notes about them."""
    notes = Notes()
    loop = loop_of(measured.experiment(task, **others), folder, observer=notes)
    row = loop.evaluate()
    loop.close()
    return row, notes


@pytest.mark.parametrize("task", ["classes", "numbers", "by_loss"])
def test_means_are_exact_and_percentiles_right_to_a_bin(
    task: str, tmp_path: Path
) -> None:
    plain, _ = evaluated(task, tmp_path / "plain")
    secret, _ = evaluated(task, tmp_path / "secure", **SECURE)
    assert plain.keys() == secret.keys()
    spreads = [name for name in plain if name.startswith("client_")]
    assert spreads
    for name in spreads:
        one, other = plain[name], secret[name]
        assert one.keys() == other.keys()
        for exact in {"mean", "pooled"} & one.keys():
            assert other[exact] == pytest.approx(one[exact], abs=EXACT), (name, exact)
        if "std" not in one:
            continue  # defined for nobody alone
        assert other["std"] == pytest.approx(one["std"], abs=2 * EXACT), name
        is_higher = plain["measures"][name.removeprefix("client_")] == "higher"
        for part in [*(f"p{percent}" for percent in PERCENTILES), "worst_tenth"]:
            low, high = sorted((one[part], other[part]))
            if is_higher and low >= 0:
                assert high - low <= 1 / BINS, (name, part)
            elif not is_higher:
                assert high <= 2.0 * low + 2.0**-9, (name, part)


def test_a_measure_that_clients_lack_counts_nowhere_and_is_named(
    tmp_path: Path,
) -> None:
    plain, others = evaluated("numbers", tmp_path / "plain")
    secret, notes = evaluated("numbers", tmp_path / "secure", **SECURE)
    (said,) = [note for note in notes.notes if '"r2" is not defined' in note]
    assert said in others.notes
    for part in ("mean", "std", "pooled"):
        expected = pytest.approx(plain["client_r2"][part], abs=2 * EXACT)
        assert secret["client_r2"][part] == expected


def test_fine_tuned_models_are_measured_by_sums_too(tmp_path: Path) -> None:
    settings = {"finetune__epochs": 1, "rounds": 1}
    rows = []
    for name, more in (("plain", {}), ("secure", SECURE)):
        e = measured.experiment("numbers", **settings, **more)
        loop = loop_of(e, tmp_path / name)
        rows.append(loop.round())
        loop.close()
    one, other = (row["finetuned_mae"] for row in rows)
    assert other["mean"] == pytest.approx(one["mean"], abs=1e-4)
    assert one.keys() == other.keys()


def test_too_few_clients_are_not_evaluated(tmp_path: Path) -> None:
    e = measured.experiment("numbers", evaluation__clients=4, **SECURE)
    notes = Notes()
    loop = loop_of(e, tmp_path / "r", observer=notes)
    engine = loop.desk.engine
    each = engine.each

    def two(fn: Any, clients: Any, down: Any, t: int) -> Any:
        return each(fn, clients[:2], down, t)

    engine.each = two  # type: ignore[method-assign]
    row = loop.evaluate()
    loop.close()
    assert not [name for name in row if name.startswith("client_")]
    (said,) = [note for note in notes.notes if "not evaluated" in note]
    assert "a sum of 2 clients: expected at least 3" in said


# Words


class Judged:
    """A task that has these measures, of examples alone."""

    def __init__(self) -> None:
        self.set_metrics: dict[str, Any] = {}
        self.measures = {"accuracy": True, "loss": False}


@FEW
@given(
    clients=st.lists(
        st.tuples(
            st.floats(0, 1),
            st.one_of(st.floats(0, 50), st.just(math.nan)),
            st.integers(0, 99),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_sums_of_words_are_those_of_the_clients(
    clients: list[tuple[float, float, int]],
) -> None:
    measures = Measures(Judged())  # type: ignore[arg-type]
    total = torch.zeros(2 * VALUES, dtype=torch.int64)
    for accuracy, loss, n in clients:
        metrics = {"accuracy": torch.tensor(accuracy), "loss": torch.tensor(loss)}
        total += measures.words(metrics, n, n_max=12)
    shape = {"accuracy": torch.zeros(()), "loss": torch.zeros(())}
    summaries = measures.read(shape, total)
    for place, name in enumerate(("accuracy", "loss")):
        there = []
        for client in clients:
            value = float(torch.tensor(client[place]))
            if client[2] > 0 and not math.isnan(value):
                there.append((value, client[2]))
        summary = summaries[name]
        assert summary.clients == len(there) == sum(summary.bins)
        if not there:
            continue
        values = torch.tensor([value for value, _ in there], dtype=torch.float64)
        counts = torch.tensor([n for _, n in there], dtype=torch.float64)
        assert abs(summary.mean - values.mean()) <= EXACT
        assert abs(summary.std - values.std(correction=0)) <= 2 * EXACT
        pooled = (values * counts).sum() / counts.sum()
        assert abs(summary.pooled - pooled) <= EXACT


def test_words_of_many_clients_with_large_values_do_not_wrap() -> None:
    measures = Measures(Judged())  # type: ignore[arg-type]
    n_max = 2**20
    metrics = {"loss": torch.tensor(1e30), "accuracy": torch.tensor(-math.inf)}
    words = measures.words(metrics, 2**31, n_max)
    for word in words.tolist():
        assert abs(word) * n_max < 2**63


@FEW
@given(value=st.floats(-1e6, 1e6), is_higher=st.booleans())
def test_a_value_lies_in_its_bin(value: float, is_higher: bool) -> None:
    place, bounds = bin_of(value, is_higher), edges(is_higher)
    assert 0 <= place < BINS == len(bounds) - 1
    if place > 0:
        assert value >= bounds[place]
    if place < BINS - 1:
        assert value < bounds[place + 1]


def test_clients_of_a_bin_are_spread_evenly() -> None:
    bins = [0] * BINS
    bins[0], bins[BINS - 1] = 1, 2
    values = spread_evenly(bins, True)
    assert values.tolist() == pytest.approx([0.025, 0.9625, 0.9875])
    assert len(spread_evenly([0] * BINS, False)) == 0
