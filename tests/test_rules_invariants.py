"""What holds for a rule whatever the rows are, and how far it can be led astray."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Outcome, Rule, aggregate
from fedcore.messages.aggregation.settings import AggregationSettings

FEW = hypothesis_settings(max_examples=25)
SELECTING = ("krum", "multi_krum", "dnc", "caf")
TRANSLATED = (*SELECTING, "median", "trimmed_mean", "meamed", "geometric_median")


def outcome(rule: str, matrix: Tensor, f: int, **more: Any) -> Outcome:
    arguments = {}
    for key in ("memory", "reference", "weights"):
        if key in more:
            arguments[key] = more.pop(key)
    settings = AggregationSettings(rule=rule, byzantine=f, **more)
    return aggregate(matrix, settings, f, **arguments)


def value(rule: str, matrix: Tensor, f: int, **more: Any) -> np.ndarray:
    return np.asarray(outcome(rule, matrix, f, **more).value)


def close(found: Any, expected: Any, scale: float = 1.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * scale)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Rows of several lengths, and an f that every rule but Bulyan can bear."""
    f = draw(st.integers(0, 3))
    n = draw(st.integers(2 * f + 3, 2 * f + 8))
    d = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(n, d, dtype=torch.float64, generator=generator)
    lengths = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    return rows * 3**lengths, f


# Against formulas without a Gram matrix, a thread or a block.


def plain_krum(X: np.ndarray, f: int, keep: int) -> np.ndarray:
    scores = []
    for i in range(len(X)):
        distances = sorted(((X - X[i]) ** 2).sum(1).tolist())
        scores.append(sum(distances[1 : len(X) - f]))
    return X[np.argsort(scores, kind="stable")[:keep]].mean(0)


def plain_meamed(X: np.ndarray, f: int) -> np.ndarray:
    result = []
    for column in X.T:
        order = np.argsort(np.abs(column - np.median(column)), kind="stable")
        result.append(column[order[: len(X) - f]].mean())
    return np.array(result)


def plain_clipping(X: np.ndarray, tau: float | None) -> np.ndarray:
    v = np.zeros(X.shape[1])
    for _ in range(3):
        distances = np.linalg.norm(X - v, axis=1)
        radius = np.median(distances) if tau is None else tau
        factors = np.minimum(1, radius / np.maximum(distances, 1e-300))
        v = v + (factors[:, None] * (X - v)).mean(0)
    return v


def plain_geometric_median(X: np.ndarray) -> np.ndarray:
    z = np.median(X, axis=0)
    nu = 1e-3 * np.median(np.linalg.norm(X - z, axis=1))
    for _ in range(8):
        b = 1 / np.maximum(nu, np.linalg.norm(X - z, axis=1))
        z = b @ X / b.sum()
    return z


def plain_dnc(X: np.ndarray, f: int) -> np.ndarray:
    centred = X - X.mean(0)
    scores = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    return X[np.argsort(scores, kind="stable")[: len(X) - f]].mean(0)


def plain_mixing(X: np.ndarray, f: int) -> np.ndarray:
    mixed = []
    for row in X:
        order = np.argsort(((X - row) ** 2).sum(1), kind="stable")
        mixed.append(X[order[: len(X) - f]].mean(0))
    return np.array(mixed)


@FEW
@given(problems())
def test_rules_equal_their_formulas(problem: tuple[Tensor, int]) -> None:
    rows, f = problem
    X, n = rows.numpy(), len(rows)
    close(value("median", rows, f), np.median(X, axis=0))
    close(value("trimmed_mean", rows, f), np.sort(X, axis=0)[f : n - f].mean(0))
    close(value("meamed", rows, f), plain_meamed(X, f))
    close(value("krum", rows, f), plain_krum(X, f, 1))
    close(value("multi_krum", rows, f), plain_krum(X, f, n - f))
    close(value("dnc", rows, f), plain_dnc(X, f))
    # A distance is a difference of inner products here: good to half the digits.
    scale = 100 * float(np.abs(X).max())
    close(value("centred_clipping", rows, f), plain_clipping(X, None), scale)
    close(value("centred_clipping", rows, f, tau=0.7), plain_clipping(X, 0.7), scale)
    close(value("geometric_median", rows, f), plain_geometric_median(X), scale)


@FEW
@given(problems())
def test_rules_on_mixed_rows_equal_rules_on_rows_that_are_mixed_first(
    problem: tuple[Tensor, int],
) -> None:
    rows, f = problem
    mixed = torch.from_numpy(plain_mixing(rows.numpy(), f))
    scale = 100 * float(rows.abs().max())
    # No rule that selects: mixed rows are often equal but for their last bits.
    for rule in ("median", "trimmed_mean", "geometric_median", "caf"):
        expected = value(rule, mixed, f)
        close(value(rule, rows, f, before="nnm"), expected, scale)


@FEW
@given(problems())
def test_without_malicious_clients_a_rule_that_averages_is_the_mean(
    problem: tuple[Tensor, int],
) -> None:
    rows, _ = problem
    mean = rows.mean(0)
    for rule in ("trimmed_mean", "multi_krum", "meamed", "dnc", "caf", "bulyan"):
        close(value(rule, rows, 0), mean)
        close(value(rule, rows, 0, before="nnm"), mean)
    close(value("mean", rows, 0, before="arc"), mean)


@FEW
@given(problems())
def test_a_mean_trimmed_as_far_as_can_be_is_the_median(
    problem: tuple[Tensor, int],
) -> None:
    rows, f = problem
    rows = rows[: 2 * f + 1]
    close(value("trimmed_mean", rows, f), value("median", rows, f))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ahead", ["none", "nnm", "bucketing", "clip", "arc"])
def test_equal_rows_come_back(dtype: torch.dtype, ahead: str) -> None:
    row = torch.tensor([0.3, -1e-3, 7e3, 0.0], dtype=dtype)
    for rows in (row.repeat(11, 1), torch.zeros(11, 4, dtype=dtype)):
        for rule in (*TRANSLATED, "mean", "bulyan"):
            found = outcome(rule, rows, 1, before=ahead)
            torch.testing.assert_close(found.value, rows[0])
            assert (found.distances <= 1e-3).all()


@FEW
@given(problems())
def test_a_selection_is_in_the_convex_hull_and_in_the_dtype_of_the_rows(
    problem: tuple[Tensor, int],
) -> None:
    rows, f = problem
    for rule in (*SELECTING, "geometric_median"):
        for kept in (rows, rows.float()):
            found = outcome(rule, kept, f)
            assert (found.weights >= 0).all()
            assert float(found.weights.sum()) == pytest.approx(1)
            assert found.value.dtype == kept.dtype
    for number in range(len(rows)):
        if outcome("krum", rows, f).weights[number] == 1:
            assert torch.equal(outcome("krum", rows, f).value, rows[number])


@FEW
@given(problems())
def test_medians_are_between_the_values_of_any_n_minus_f_rows(
    problem: tuple[Tensor, int],
) -> None:
    rows, f = problem
    ordered = rows.sort(0).values
    # The narrowest ranges of n - f values: without the f smallest, or the f largest.
    for rule in ("median", "trimmed_mean"):
        found = outcome(rule, rows, f).value
        assert (found >= ordered[f] - 1e-12).all()
        assert (found <= ordered[len(rows) - f - 1] + 1e-12).all()


@FEW
@given(problems(), st.permutations(range(6)))
def test_order_and_place_of_the_rows_matter_to_no_rule(
    problem: tuple[Tensor, int], order: list[int]
) -> None:
    rows, f = problem
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(order[0]))
    offset = torch.arange(rows.shape[1]).double() - 2
    scale = 1000 * float(rows.abs().max())
    for rule in TRANSLATED:
        if "krum" in rule and len(rows) - f - 1 < 2:
            continue  # two that are nearest to each other have equal scores
        expected = value(rule, rows, f)
        close(value(rule, rows[start], f), expected, scale)
        close(value(rule, rows + offset, f) - offset.numpy(), expected, scale)
        close(value(rule, -rows, f), -expected, scale)
        close(value(rule, 2.5 * rows, f), 2.5 * expected, scale)


def test_equal_weights_are_no_weights() -> None:
    rows = torch.randn(9, 40)
    for rule in ("mean", "median", "trimmed_mean", "geometric_median"):
        weighted = outcome(rule, rows, 2, weights=torch.full((9,), 3.0)).value
        torch.testing.assert_close(weighted, outcome(rule, rows, 2).value)


@FEW
@given(problems())
def test_whole_weights_count_as_copies_of_a_row(problem: tuple[Tensor, int]) -> None:
    rows, _ = problem
    weights = torch.arange(len(rows)) % 3 + 1
    copies = rows.repeat_interleave(weights, dim=0)
    for rule in ("mean", "median"):
        found = value(rule, rows, 0, weights=weights)
        close(found, value(rule, copies, 0))


@FEW
@given(problems(), st.floats(0.01, 10), st.integers(1, 4), st.integers(0, 2**31))
def test_one_row_moves_centred_clipping_by_two_radii_an_nth_a_step(
    problem: tuple[Tensor, int], tau: float, steps: int, seed: int
) -> None:
    rows, f = problem
    others = rows.clone()
    generator = torch.Generator().manual_seed(seed)
    others[-1] = torch.randn(rows.shape[1], generator=generator).double() * 100
    more = {"tau": tau, "iterations": steps}
    moved = value("centred_clipping", rows, f, **more)
    moved = moved - value("centred_clipping", others, f, **more)
    assert np.linalg.norm(moved) <= 2 * steps * tau / len(rows) * (1 + 1e-6)


def test_the_bound_on_what_one_row_moves_is_tight() -> None:
    rows = torch.zeros(5, 1, dtype=torch.float64)
    up, down = rows.clone(), rows.clone()
    up[4], down[4] = 1e6, -1e6
    more = {"tau": 1.0, "iterations": 1}
    moved = value("centred_clipping", up, 1, **more)
    moved = moved - value("centred_clipping", down, 1, **more)
    close(moved, 2 / 5)


def test_fltrust_leaves_the_model_where_it_trusts_none() -> None:
    rows = torch.randn(5, 3)
    reference = torch.tensor([1.0, 0.0, 0.0])
    rows[:, 0] = -1.0
    for ahead in ("none", "nnm", "clip"):
        found = outcome("fltrust", rows, 1, reference=reference, before=ahead)
        assert torch.equal(found.value, torch.zeros(3)), ahead
        assert torch.equal(found.weights, torch.zeros(5).double())
    rows[1] = 0.0
    found = outcome("fltrust", rows, 1, reference=torch.zeros(3))
    assert torch.equal(found.value, torch.zeros(3)), "no direction, no trust"


def test_one_row_can_be_the_mean() -> None:
    rows = torch.zeros(7, 3)
    rows[3] = 7 * torch.tensor([1.0, 2.0, 3.0])
    assert outcome("mean", rows, 1).value.tolist() == pytest.approx([1, 2, 3])


# (f, kappa)-robustness: |F - mean_S|^2 <= kappa 1/|S| sum_S |x_i - mean_S|^2


def kappa(found: np.ndarray, rows: np.ndarray, f: int) -> float:
    """The least kappa for which the inequality holds for every S of n - f rows."""
    largest = 0.0
    for subset in itertools.combinations(range(len(rows)), len(rows) - f):
        chosen = rows[list(subset)]
        mean = chosen.mean(0)
        spread = ((chosen - mean) ** 2).sum(1).mean()
        if spread > 1e-12:
            largest = max(largest, ((found - mean) ** 2).sum() / spread)
    return float(largest)


def bounds(n: int, f: int) -> dict[tuple[str, str], float]:
    """Bounds of kappa, by rule and what is before it."""
    share = f / (n - 2 * f)
    r = 1 + share
    plain = {
        "trimmed_mean": 6 * share * r,
        "median": 4 * r**2,
        "geometric_median": 4 * r**2,
        "krum": 6 * r,
    }
    found = {}
    for rule, bound in plain.items():
        found[rule, "none"] = bound
        found[rule, "nnm"] = 8 * f / (n - f) * (1 + bound)
    return found


def searched(rule: str, ahead: str, n: int, f: int, tries: int) -> float:
    """The largest kappa of a random search that goes on from the best rows so far."""
    # Weiszfeld's steps end on the way to the geometric median, which the bound is of.
    iterations = 60 if rule == "geometric_median" else None
    settings = AggregationSettings(
        rule=rule, before=ahead, byzantine=f, iterations=iterations
    )
    draws = np.random.default_rng([n, f, len(rule), len(ahead)])
    best, largest = np.zeros((n, 1)), 0.0
    for attempt in range(tries):
        if attempt % 4 == 0 or largest == 0:
            d = int(draws.integers(1, 4))
            rows = draws.standard_normal((n, d)) * 10 ** draws.uniform(-1, 1, (n, 1))
            if attempt % 8 == 0:
                rows = np.round(rows)  # rows that are equal, and on a line
        else:
            size = 10 ** draws.uniform(-3, 0.3)
            moved = draws.random((n, 1)) < 0.4
            rows = best + moved * size * draws.standard_normal(best.shape)
        value = aggregate(torch.from_numpy(rows), settings, f).value.numpy()
        found = kappa(value, rows, f)
        if found > largest:
            best, largest = rows, found
    return largest


def cases() -> Iterator[Any]:
    for n, f in ((7, 1), (7, 2), (10, 2)):
        for rule, ahead in bounds(n, f):
            yield pytest.param(rule, ahead, n, f, id=f"{ahead}-{rule}-{n}-{f}")


@pytest.mark.parametrize(("rule", "ahead", "n", "f"), list(cases()))
def test_no_rows_lead_a_rule_beyond_its_bound(
    rule: str, ahead: str, n: int, f: int
) -> None:
    assert searched(rule, ahead, n, f, tries=16) <= bounds(n, f)[rule, ahead]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "ahead", "n", "f"), list(cases()))
def test_no_rows_of_a_long_search_lead_a_rule_beyond_its_bound(
    rule: str, ahead: str, n: int, f: int
) -> None:
    largest = searched(rule, ahead, n, f, tries=400)
    assert largest <= bounds(n, f)[rule, ahead]
    if (rule, ahead) == ("trimmed_mean", "none"):
        assert largest <= f / (n - 2 * f) * (1 + 1e-9)


def test_a_mean_has_no_bound() -> None:
    rows = np.zeros((7, 1))
    rows[0], rows[1] = 1.0, 1e6
    assert kappa(rows.mean(0), rows, 1) > 1000


@pytest.mark.parametrize("ahead", ["none", "nnm"])
@pytest.mark.parametrize(
    "rule", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"]
)
def test_enormous_rows_move_a_rule_no_farther_than_its_bound(
    rule: str, ahead: str
) -> None:
    n, f = 11, 3
    generator = torch.Generator().manual_seed(2)
    honest = torch.randn(n - f, 6, generator=generator)
    mean = honest.mean(0)
    spread = float(((honest - mean) ** 2).sum(1).mean())
    # Multi-Krum's bound is looser than Krum's by at most the rows that it averages.
    limits = {**bounds(n, f), ("multi_krum", "none"): 18.0, ("multi_krum", "nnm"): 57.0}
    for enormous in (1e30, -1e30, 1e8):
        rows = torch.cat([torch.full((f, 6), enormous), honest])
        found = outcome(rule, rows, f, before=ahead)
        assert found.value.isfinite().all()
        far = float(((found.value - mean) ** 2).sum())
        assert far <= limits[rule, ahead] * spread, f"{rule} with rows at {enormous}"


def test_bulyan_is_finite_beside_enormous_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(11, 6, generator=generator)
    rows[:2] = 1e30
    found = outcome("bulyan", rows, 2)
    # Of the last rows left, two that are equal are nearest to each other. One of them
    # is taken, and is far from the median of every column.
    assert (found.value.abs() < 3).all()


def test_caf_ends_beside_a_row_that_has_lost_its_mass_and_lies_far_away() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(9, 3, generator=generator)
    rows[:2] = torch.tensor([[1e8], [-3e7]])
    found = outcome("caf", rows, 2)
    assert (found.value.abs() < 5).all()
    assert (found.weights[:2].abs() < 1e-9).all()


def test_a_rule_keeps_nothing_between_two_calls() -> None:
    settings = AggregationSettings(rule="centred_clipping", byzantine=1)
    rule, rows = Rule(settings, seed=3), torch.randn(5, 4)

    def value(matrix: Tensor) -> Tensor:
        nothing = torch.empty(0)
        return rule.aggregate(Rows.of(matrix), 1, None, (0, 0), nothing, None).value

    first = value(rows)
    value(rows * 3)
    assert torch.equal(value(rows), first)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["dnc", "caf"])
@pytest.mark.parametrize("ahead", ["none", "nnm", "bucketing"])
def test_the_largest_entries_of_float64_have_a_direction(rule: str, ahead: str) -> None:
    rows = torch.linspace(-1, 1, 13, dtype=torch.float64)[:, None]
    rows[3] = 1e300
    assert abs(value(rule, rows, 2, before=ahead)).max() < 10


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["geometric_median", "fltrust"])
def test_rows_that_cancel_out_in_a_mixture_have_a_norm(rule: str) -> None:
    """Rounding can leave less than nothing of it."""
    rows = torch.full((13, 1), 1e20)
    rows[1::2] = -1e20
    found = value(rule, rows, 1, before="nnm", reference=torch.ones(1))
    assert np.isfinite(found).all()
