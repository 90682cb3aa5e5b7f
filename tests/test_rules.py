"""The robust rules on a few rows, number by number.

The numbers come from NumPy, and most of them from a second code as well: ByzFL 0.0.11
or Flower 1.39.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore.messages.aggregation import before, column_rules, weight_rules
from fedcore.messages.aggregation.gram import gram, squared_distances, star
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Outcome, aggregate
from fedcore.messages.aggregation.settings import AggregationSettings

CLOSE = 5e-10  # the last of ten digits
THIRD = 1 / 3

X = torch.tensor(
    [(1, 2, 3), (2, 1, 4), (0, 3, 2), (2, 3, 3), (-6, 9, -3)], dtype=torch.float64
)
SEVEN = torch.tensor(
    [
        *((1, 2, 3), (2, 1, 4), (0, 3, 2), (2, 3, 3)),
        *((1.3, 1.1, 2.2), (2.9, 2.4, 3.7), (-6, 9, -3)),
    ],
    dtype=torch.float64,
)
G = gram(Rows.of(X))


def settings(rule: str, **more: Any) -> AggregationSettings:
    return AggregationSettings(**{"rule": rule, "byzantine": 1, **more})


def outcome(rule: str, matrix: Tensor = X, f: int = 1, **more: Any) -> Outcome:
    """The outcome of a rule; settings and arguments by name."""
    names = ("weights", "memory", "reference", "key")
    arguments = {key: more.pop(key) for key in names if key in more}
    return aggregate(matrix, settings(rule, **more), f, **arguments)


def expect(value: Tensor | np.ndarray, *numbers: float) -> None:
    np.testing.assert_allclose(np.asarray(value), numbers, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        ("mean", (-0.2, 3.6, 1.8)),
        ("median", (1, 3, 3)),
        ("trimmed_mean", (1, 8 / 3, 8 / 3)),
        ("krum", (1, 2, 3)),
        ("multi_krum", (1.25, 2.25, 3)),
        ("meamed", (1.25, 2.25, 3)),
        ("dnc", (1.25, 2.25, 3)),
        ("caf", (1.2555037130, 2.3637264436, 2.9458886347)),
    ],
)
def test_a_rule_gives_the_known_row(rule: str, numbers: tuple[float, ...]) -> None:
    expect(outcome(rule).value, *numbers)


def test_a_mean_trimmed_to_the_middle_is_the_median() -> None:
    expect(outcome("trimmed_mean", f=2).value, 1, 3, 3)


@pytest.mark.parametrize(
    ("k", "scores"), [(3, (8, 20, 20, 12, 367)), (2, (5, 8, 8, 7, 231))]
)
def test_krum_scores_over_either_number_of_neighbours(
    k: int, scores: tuple[float, ...]
) -> None:
    found = weight_rules.krum_scores(squared_distances(G), k)
    expect(found, *scores)
    # Multi-Krum of two rows, Krum of one: the same with both.
    two = np.argsort(found, kind="stable")[:2]
    expect(X[two].mean(0), 1.5, 2.5, 3)


def test_krum_takes_all_others_but_f() -> None:
    assert weight_rules.neighbours(5, 1) == 3


def test_optimised_alie_against_multi_krum_is_where_it_does_most_harm() -> None:
    """The number depends on k: with the paper's it would be 1.342177."""
    honest = X[:4]
    mu, sigma = honest.mean(0), honest.std(0)

    def harm(tau: float) -> float:
        rows = torch.cat([honest, (mu + tau * sigma)[None]])
        return float((outcome("multi_krum", rows).value - mu).norm())

    assert harm(1.623652) > 0.65
    assert harm(1.64) < harm(1.623652)
    expect(mu + 1.623652256711 * sigma, 2.8045286841, 3.8045286841, 4.3257065162)


@pytest.mark.parametrize(
    ("start", "nu", "steps", "numbers"),
    [
        ("zero", 0.1, 3, (0.8102057391, 2.6047919211, 2.6302163940)),
        ("zero", 0.1, 8, (0.9959127962, 2.3980836793, 2.8196786390)),
        ("mean", 1e-5, 4, (0.7979131234, 2.6113627747, 2.6208722800)),
        ("mean", 1e-5, 2000, (1.0051982848, 2.3468591723, 2.8478701404)),
    ],
)
def test_weiszfeld_steps_from_several_starts(
    start: str, nu: float, steps: int, numbers: tuple[float, ...]
) -> None:
    at_first = np.zeros(5) if start == "zero" else np.full(5, 0.2)
    alphas = np.full(5, 0.2)
    weights = weight_rules.geometric_median(G, alphas, at_first, nu, steps)
    expect(weights @ X.numpy(), *numbers)


def test_the_geometric_median_of_the_rule_goes_to_the_exact_one() -> None:
    near = outcome("geometric_median").value
    np.testing.assert_allclose(near, (1.005198, 2.346859, 2.847870), atol=0.03)
    exact = outcome("geometric_median", iterations=2000).value
    np.testing.assert_allclose(exact, (1.005198, 2.346859, 2.847870), atol=2e-4)


def test_a_geometric_median_starts_at_the_median_so_that_few_steps_are_enough() -> None:
    """From the mean, three steps end 3 890 away."""
    honest = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([honest, torch.full((2, 3), 1e6)]).double()
    value = outcome("geometric_median", rows, f=2, iterations=3).value
    assert (value - honest.double().mean(0)).norm() < 1


def test_centred_clipping_goes_on_from_what_it_kept() -> None:
    first = outcome("centred_clipping", tau=2, iterations=1)
    expect(first.value, 0.2382303885, 1.2104706173, 1.0406785560)
    assert torch.equal(first.memory, first.value)
    more = {"tau": 2, "iterations": 1, "memory": first.memory}
    second = outcome("centred_clipping", **more)
    expect(second.value, 0.5210320983, 2.1909768797, 2.0163902535)
    # And the same bits again: what it kept is all that there is.
    again = outcome("centred_clipping", **more)
    assert torch.equal(again.value, second.value)


def test_centred_clipping_in_three_steps() -> None:
    value = outcome("centred_clipping", tau=2, iterations=3).value
    expect(value, 0.7796035210, 2.5579375215, 2.5076128197)
    assert torch.equal(outcome("centred_clipping", tau=2).value, value)


def test_nearest_neighbour_mixing() -> None:
    mixing = before.nearest_neighbour_mixing(G, 1)
    mixed = mixing @ X.numpy()
    for row in mixed[:4]:
        expect(row, 1.25, 2.25, 3)
    expect(mixed[4], -0.75, 4.25, 1.25)


def test_the_gram_matrix_of_mixed_rows_is_enough_for_a_rule() -> None:
    mixing = before.nearest_neighbour_mixing(G, 1)
    mixed_gram = mixing @ G @ mixing.T
    alphas, start = np.full(5, 0.2), np.zeros(5)
    weights = weight_rules.geometric_median(mixed_gram, alphas, start, 0.1, 3)
    value = weights @ mixing @ X.numpy()
    expect(value, 1.2228800151, 2.2771199849, 2.9762700132)


def test_buckets_in_order_of_the_rows() -> None:
    mixing = before.buckets(np.arange(5), 2)
    mixed = mixing @ X.numpy()
    expect(mixed.ravel(), 1.5, 1.5, 3.5, 1, 3, 2.5, -6, 9, -3)
    expect(column_rules.median(np.ascontiguousarray(mixed.T)), 1, 3, 2.5)


def test_norms_cut_to_a_number_and_to_that_of_a_rank() -> None:
    norms = X.norm(dim=1).numpy()
    cut = before.clip_factors(norms, 4.0)[:, None] * X.numpy()
    expect(cut.mean(axis=0), 0.4626517835, 2.3276830120, 1.9961699745)
    expect(before.arc_factors(norms, 1), 1, 1, 1, 1, 0.4178554470)
    # Of ten rows with f = 3, the floor(2 * 3 * 7 / 10) = 4 longest.
    expect(before.arc_factors(np.arange(1.0, 11), 3)[5:], 1, 6 / 7, 6 / 8, 6 / 9, 0.6)


def test_fltrust_and_its_trust() -> None:
    g0 = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    value = outcome("fltrust", reference=g0).value
    expect(value, 0.7380403103, 1.7183429531, 2.0118141815)
    trust = weight_rules.fltrust_scores(star(Rows.of(X), g0))
    numbers = (0.979957887, 0.8728715609, 0.924500327, 0.9949366763, 0.1781741613)
    expect(trust, *numbers)


def test_claims_of_many_examples_and_a_cap_on_them() -> None:
    claimed = torch.tensor([10, 20, 30, 40, 1000])
    value = outcome("mean", weights=claimed).value
    expect(value, -5.3363636364, 8.4090909091, -2.4636363636)
    capped = outcome("mean", weights=claimed.clamp(max=60)).value
    expect(capped, -1.4375, 4.9375, 0.6875)


def test_medians_and_trimmed_means_with_weights() -> None:
    weights = torch.tensor([10, 20, 30, 40, 15])
    expect(outcome("median", weights=weights).value, 2, 3, 3)
    value = outcome("trimmed_mean", weights=weights).value
    expect(value, 28 / 23, 66.6666666667 / 23, 61.6666666667 / 23)
    expect(value, 1.2173913043, 2.8985507246, 2.6811594203)


def test_bulyan_takes_one_krum_winner_at_a_time() -> None:
    taken = weight_rules.bulyan_taken(gram(Rows.of(SEVEN)), 1)
    assert [number + 1 for number in taken] == [1, 6, 5, 2, 3]
    found = outcome("bulyan", SEVEN)
    expect(found.value, 43 / 30, 11 / 6, 89 / 30)
    expect(found.weights, 0.2, 0.2, 0.2, 0, 0.2, 0.2, 0)


def test_dnc_on_the_rows_of_another_codes_test() -> None:
    rows = torch.tensor([(1, 2, 3), (-1, 4, -1), (2, 2, 3), (3, 1, 3)]).double()
    expect(outcome("dnc", rows).value, 2, 5 / 3, 3)


def test_a_vote_of_signs() -> None:
    expect(outcome("sign", tau=0.5).value, 0.5, 0.5, 0.5)
    # Without a step: the median root mean square of an entry, here that of row 2.
    expect(outcome("sign").value, *[(21 / 3) ** 0.5] * 3)


def test_an_outcome_tells_weights_norms_and_distances() -> None:
    found = outcome("multi_krum")
    expect(found.weights, 0.25, 0.25, 0.25, 0.25, 0)
    expect(found.norms, *X.norm(dim=1).tolist())
    expect(found.distances, *(X - found.value).norm(dim=1).tolist())
    assert outcome("median").weights.isnan().all()
    expect(outcome("median").distances, 1, 6**0.5, 2**0.5, 1, 11)


def test_what_is_before_a_rule_is_in_its_weights() -> None:
    for ahead in ("nnm", "bucketing", "clip", "arc"):
        found = outcome("multi_krum", before=ahead)
        torch.testing.assert_close(found.weights @ X, found.value)


def test_a_column_rule_sees_the_mixed_rows() -> None:
    expect(outcome("median", before="nnm").value, 1.25, 2.25, 3)
    # Row 5 is cut to the norm of row 4.
    cut = X.clone()
    cut[4] *= 0.4178554470
    expect(outcome("trimmed_mean", before="arc").value, *_trimmed(cut))


def _trimmed(rows: Tensor) -> list[float]:
    values: list[float] = rows.sort(0).values[1:-1].mean(0).tolist()
    return values


def test_buckets_are_drawn_by_seed_and_round() -> None:
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    values = set()
    for key in ((0, 0), (0, 0), (1, 0), (0, 1)):
        value = outcome("median", rows, before="bucketing", key=key).value
        values.add(tuple(value.tolist()))
    assert len(values) == 3, "the same key draws the same buckets, another key others"
