"""s(tau): the specification's values, and the buffer of (f) 8 through a mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.clock.settings import Buffered
from fedcore.clock.staleness import discount
from fedcore.reports import Reports, RunningSum, equally

AGES = torch.arange(6)
ROOTS = [1, 0.707107, 0.577350, 0.5, 0.447214, 0.408248]


def values(tau: torch.Tensor = AGES, **schedule: Any) -> list[float]:
    found: list[float] = discount(Buffered(**schedule), tau).tolist()
    return found


def test_the_default_is_one_over_the_root() -> None:
    assert values() == pytest.approx(ROOTS, abs=5e-7)
    # The exponent of a polynomial is its own.
    assert values(staleness="sqrt", a=3.0) == values()
    assert values(staleness="polynomial", a=0.5) == pytest.approx(ROOTS, abs=5e-7)


def test_other_discounts_by_hand() -> None:
    assert values(staleness="constant") == [1.0] * 6
    reciprocals = [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]
    assert values(staleness="polynomial", a=1.0) == pytest.approx(reciprocals)
    # a = 10, b = 6: 1 up to 6, then 1/11, 1/21
    late = torch.tensor([0, 6, 7, 8])
    hinge = values(late, staleness="hinge", a=10.0, b=6)
    assert hinge == pytest.approx([1, 1, 1 / 11, 1 / 21])
    assert values(late, staleness="hinge", a=0.0, b=0) == [1.0] * 4


@settings(derandomize=True, max_examples=60)
@given(
    name=st.sampled_from(["constant", "sqrt", "polynomial", "hinge"]),
    a=st.floats(0, 20),
    b=st.integers(0, 10),
    tau=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
)
def test_weights_are_1_when_fresh_and_never_grow(
    name: str, a: float, b: int, tau: list[int]
) -> None:
    ages = torch.tensor([0, *sorted(tau)])
    weights = discount(
        Buffered.model_validate({"staleness": name, "a": a, "b": b}), ages
    )
    assert weights.dtype == torch.float64
    assert weights[0] == 1
    assert bool((weights[1:] <= weights[:-1]).all())
    assert bool((weights >= 0).all())


@pytest.mark.parametrize(("counts", "step"), [(False, 2.5), (True, 10 / 3)])
def test_the_buffer_of_the_specification(counts: bool, step: float) -> None:
    """Delta = (4, 2), tau = (0, 3): (4 + 1) / 2 by count, 5 / 1.5 by weights."""
    total = RunningSum(counts_discount=counts)
    up = {"x": torch.tensor([4.0, 2.0])}
    weights = discount(Buffered(), torch.tensor([0, 3]))
    reports = Reports(torch.tensor([1, 5]), up, torch.ones(2), discount=weights)
    total.add(reports, equally(reports.clients, reports.num_examples))
    assert float(total.mean(dict).value["x"]) == pytest.approx(step, rel=1e-6)
