"""The counts of a round: no client owns them, and they name who was left out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.engines.readout import Readout
from fedcore.method import on_client
from fedcore.rounds.tally import LISTED, WEIGHTED, Aggregated, Tally, quantiles
from fedcore.storage.json import without_nan


@on_client
def train() -> tuple[None, None]:
    """A client function, for its name."""
    return None, None


def readout(
    losses: list[float], failed: dict[int, str] | None = None, first: int = 0
) -> Readout:
    """Reports of clients with these losses, from client `first` on."""
    clients = torch.arange(first, first + len(losses))
    return Readout(
        clients,
        torch.ones(len(losses)),
        {"loss": torch.tensor(losses)},
        failed or {},
        has_message=True,
        nbytes=0,
    )


def aggregated(n: int) -> Aggregated:
    weights = torch.full((n,), 1 / (n - 1), dtype=torch.float64)
    weights[1] = 0
    return Aggregated(torch.arange(n), weights, weights * 2, weights * 3)


def test_scalars_are_the_median_and_tenths_of_clients_that_count_the_same() -> None:
    tally = Tally(set(range(11)))
    tally.add(train, readout([float(i) for i in range(7)]))
    tally.add(train, readout([7.0, 8.0, 9.0, 10.0], first=7))
    row = tally.row()
    assert row["train_loss"] == 5
    assert row["train_loss_spread"] == {"p10": 1, "p90": 9}


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 10), min_size=3, max_size=20),
    st.floats(allow_nan=True, allow_infinity=True),
)
def test_one_client_moves_the_median_to_no_value_beyond_the_honest_ones(
    honest: list[float], lie: float
) -> None:
    median = quantiles([*honest, lie])[1]
    assert min(honest) <= median <= max(honest)


def test_values_that_are_not_finite_are_null_and_large() -> None:
    low, median, high = quantiles([1.0, math.nan, 2.0])
    assert low == pytest.approx(1.2)
    assert median == 2
    assert without_nan(high) is None
    assert without_nan(quantiles([math.nan] * 3)) == [None, None, None]


def test_a_client_without_examples_counts_in_no_median() -> None:
    tally = Tally({0, 1, 2})
    sent = readout([0.0, 3.0, 4.0])
    tally.add(train, sent._replace(num_examples=torch.tensor([0.0, 1.0, 1.0])))
    assert tally.row()["train_loss"] == 3.5


def test_a_row_names_the_first_clients_that_were_left_out_and_counts_all() -> None:
    tally = Tally(set(range(100)))
    failed = dict.fromkeys(range(99, 49, -1), "not finite: the update holds NaN or Inf")
    tally.add(train, readout([1.0], failed | {3: "timeout: no answer in 5 s"}))
    row = tally.row()
    assert row["left_out"] == {
        "not finite": list(range(50, 50 + LISTED)),
        "timeout": [3],
    }
    assert row["dropped"] == {"not finite": 50, "timeout": 1}
    assert tally.reasons["not finite"] == "not finite: the update holds NaN or Inf"
    assert tally.failed_in[3] == "train"


def test_a_row_says_nothing_of_what_did_not_happen() -> None:
    tally = Tally({0})
    tally.add(train, readout([1.0]))
    assert not tally.row().keys() & {"left_out", "clipped", "capped", "weights"}


def test_clipped_and_capped_clients_are_named_and_counted() -> None:
    tally = Tally(set(range(30)), clipped=set(range(30)), capped={7, 4})
    row = tally.row()
    assert (row["clipped"], row["num_clipped"]) == (list(range(LISTED)), 30)
    assert (row["capped"], row["num_capped"]) == ([4, 7], 2)


def test_weights_are_listed_one_by_one_where_they_are_few() -> None:
    tally = Tally(set(range(3)))
    tally.aggregation[("train", "delta")] = aggregated(3)
    tally.aggregation[("train", "dc")] = aggregated(WEIGHTED + 1)
    weights = tally.row()["weights"]
    assert weights["train.delta"] == {
        "unused": [1],
        "num_unused": 1,
        "clients": [0, 1, 2],
        "weight": [0.5, 0.0, 0.5],
        "norm_ratio": [1.0, 0.0, 1.0],
        "distance": [1.5, 0.0, 1.5],
    }
    assert weights["train.dc"] == {"unused": [1], "num_unused": 1}
