"""Means of adapters against numbers by hand, and what no choice of factors changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.factors import (
    Change,
    Pair,
    Products,
    best_pair,
    fresh_rows,
    pair_of,
    spectrum,
)
from fedcore.rng import rng
from tests.lora import (
    CLIENTS,
    PRODUCT_OF_MEANS,
    Alone,
    P,
    R,
    matrix,
    one_layer,
    random_pairs,
)

ALL_CUT = matrix(
    [[-0.149629, 0.197999], [1.266757, -1.676263], [1.416386, -1.874262]]
)  # P cut to rank 1
SEED_OF_RANKS_1_AND_2 = 1  # ranks = [1, 2]: client 0 has 1, client 1 has 2


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)


def exact(form: str, rank: int = 1, **more: Any) -> Alone:
    return Alone(one_layer(rank), "exactlora", form=form, **more)


def wide(form: str, m: int = 5, n: int = 7, rank: int = 2, **more: Any) -> Alone:
    return Alone(one_layer(rank, m, n), "exactlora", form=form, **more)


def gauged(pairs: Sequence[Pair]) -> list[Pair]:
    """Other factors of the same products: B G and G^-1 A, with a G for each client."""
    others = []
    for i, (left, right) in enumerate(pairs):
        draw = torch.Generator().manual_seed(100 + i)
        rank = left.shape[1]
        G = torch.randn(rank, rank, generator=draw, dtype=torch.float64)
        others.append(Pair(left @ G, torch.linalg.solve(G, right)))
    return others


# The oracle


def test_fedit_is_the_mean_of_each_factor() -> None:
    server = Alone(one_layer(1), "fedavg")
    server.round(CLIENTS)
    assert close(server.params["0.lora_A"], matrix([[1.75, -1]]), 1e-15)
    assert close(server.params["0.lora_B"], matrix([[0.25], [0.75], [0.5]]), 1e-15)
    assert close(server.product, PRODUCT_OF_MEANS, 1e-15)


def test_fedex_adds_what_the_mean_of_the_factors_lacks() -> None:
    server = exact("fedex")
    server.round(CLIENTS)
    assert close(server.product, PRODUCT_OF_MEANS, 1e-15)
    assert close(server.params["0.lora_change"], R, 1e-15)
    assert close(server.update, P, 1e-15)
    assert R.square().sum() == 3.5859375
    expected = (R.square().sum() / P.square().sum()).sqrt()
    assert server.log["residual"] == pytest.approx(expected)


def test_flora_adds_the_mean_of_the_products_with_the_weight_on_one_factor() -> None:
    server = exact("flora")
    server.round(CLIENTS)
    assert close(server.params["0.lora_change"], P, 1e-15)
    assert not server.params["0.lora_B"].any()
    assert close(server.update, P, 1e-15)


@pytest.mark.parametrize("form", ["fedex", "flora"])
def test_the_weight_takes_the_update_times_the_scale(form: str) -> None:
    server = Alone(one_layer(1, alpha=4), "exactlora", form=form)
    server.round(CLIENTS)
    assert close(server.update, 4 * P, 1e-15)


def test_flexlora_has_the_mean_of_the_products_and_the_best_one_of_its_rank() -> None:
    whole = exact("flexlora", rank=2)
    pairs = [Pair(torch.cat([B, 0 * B], 1), torch.cat([A, A])) for B, A in CLIENTS]
    whole.round(pairs)
    assert close(whole.product, P)
    assert whole.log["residual"] == pytest.approx(0, abs=1e-6)
    one = exact("flexlora")
    one.round(CLIENTS)
    assert close(one.product, ALL_CUT, 5e-7)
    assert (one.product - P).square().sum().item() == pytest.approx(0.379873, abs=1e-6)
    roots = np.roots([1, -10.375, 3.796875])
    assert (one.product - P).square().sum().item() == pytest.approx(min(roots))


def test_ffa_is_exact() -> None:
    task = one_layer(1, freeze="A")
    task.model.get_parameter("0.lora_A").data = CLIENTS[0].right
    server = Alone(task, "fedavg")
    assert list(server.params) == ["0.lora_B"]
    mean = 0.25 * CLIENTS[0].left + 0.75 * CLIENTS[1].left
    expected = matrix([[0.25, 0.5], [0.75, 1.5], [0.5, 1]])
    assert close(mean @ CLIENTS[0].right, expected, 1e-15)


HETERO = [
    CLIENTS[0],
    Pair(matrix([[0, 1], [1, 0], [1, 2]]), matrix([[2, -2], [1, 1]])),
]


@pytest.mark.parametrize("weights", ["norm", "examples"])
def test_hetlora_fills_up_with_zeros_and_weighs_by_the_norm(weights: str) -> None:
    server = exact("hetlora", rank=2, ranks=[1, 2], weights=weights)
    server.seed = SEED_OF_RANKS_1_AND_2
    server.round(HETERO)
    B, A = pair_of(server.params, "0")
    if weights == "norm":
        expected_A = matrix([[1.617218, -0.468871], [0.617218, 0.617218]])
        expected_B = [[0.382782, 0.617218], [0.617218, 0], [0.234436, 1.234436]]
    else:
        expected_A = matrix([[1.75, -1], [0.75, 0.75]])
        expected_B = [[0.25, 0.75], [0.75, 0], [0.5, 1.5]]
    assert close(A, expected_A, 1e-6)
    assert close(B, matrix(expected_B), 1e-6)


def test_clients_get_factors_of_their_own_rank_and_send_no_more() -> None:
    server = exact("hetlora", rank=2, ranks=[1, 2])
    server.seed = SEED_OF_RANKS_1_AND_2
    server.round(HETERO)
    server.round(HETERO)
    sizes = [trees.nbytes(down) // 8 for down in server.downs]
    assert sizes == [1 * (3 + 2), 2 * (3 + 2)] * 2
    first, whole = server.downs[2].params, server.downs[3].params
    assert torch.equal(first["0.lora_A"], whole["0.lora_A"][:1])
    assert torch.equal(first["0.lora_B"], whole["0.lora_B"][:, :1])


# What does not depend on the factors that a product is written with


@pytest.mark.parametrize("form", ["fedex", "flora", "flexlora"])
def test_other_factors_of_the_same_products_change_no_exact_mean(form: str) -> None:
    pairs, updates = random_pairs(3, 2), []
    for sent in (pairs, gauged(pairs)):
        server = wide(form)
        server.round(sent, [1, 2, 3])
        updates.append(server.update)
    assert close(updates[0], updates[1], 1e-5)


def test_other_factors_of_the_same_products_change_means_of_factors() -> None:
    fedit = Alone(one_layer(1), "fedavg")
    B2, A2 = CLIENTS[1]
    fedit.round([CLIENTS[0], Pair(-B2, -A2)])
    expected = matrix([[-0.3125, 0.5], [0.9375, -1.5], [1.25, -2]])
    assert close(fedit.product, expected, 1e-15)
    other = exact("hetlora", weights="examples")
    other.round([CLIENTS[0], Pair(-B2, -A2)])
    assert close(other.product, expected, 1e-15)


# Identities


@given(count=st.integers(1, 5), rank=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_fedex_moves_the_weight_by_exactly_the_mean_of_the_products(
    count: int, rank: int, seed: int
) -> None:
    server = wide("fedex", rank=rank)
    pairs = random_pairs(count, rank, seed=seed)
    examples = np.random.default_rng(seed).integers(1, 9, count).tolist()
    for t in range(3):  # the factors travel in the first round, the whole in the last
        before = server.params["0.lora_change"].clone()
        sent = [Pair(left + t, right) for left, right in pairs]
        server.round(sent, examples)
        share = torch.tensor(examples) / sum(examples)
        mean = sum(
            w * pair.product for w, pair in zip(share.tolist(), sent, strict=True)
        )
        # W0 + s B A moves by s P - s B_old A_old, besides the change that is kept.
        assert close(server.update, before + mean, 1e-5)
        lost = mean - server.product
        assert torch.linalg.matrix_rank(lost, atol=1e-5) <= (count - 1) * rank


def test_what_fedex_loses_has_the_rank_of_all_clients_but_one() -> None:
    products = Products(keeps_factors=True)
    left, right = zip(*random_pairs(3, 2, 9, 8), strict=True)
    weights = torch.tensor([1.0, 2.0, 5.0])
    products.add(Pair(torch.stack(left), torch.stack(right)), weights)
    pair = products.centred_pair()
    assert pair.left.shape == (9, 4)
    w = (weights / 8).double()[:, None, None]
    B, A = torch.stack(left), torch.stack(right)
    centred = (w * (B - (w * B).sum(0)) @ (A - (w * A).sum(0))).sum(0)
    assert close(pair.product, centred, 1e-14)
    assert torch.linalg.matrix_rank(centred, rtol=1e-8) == 4


@pytest.mark.parametrize("count", [1, 3])
def test_equal_clients_lose_nothing_and_fedex_is_fedit(count: int) -> None:
    pairs = random_pairs(1, 2, 20, 30) * count
    server, fedit = wide("fedex", 20, 30), Alone(one_layer(2, 20, 30), "fedavg")
    for _ in range(2):
        server.round(pairs, [2] * count)
        fedit.round(pairs, [2] * count)
    assert not server.params["0.lora_change"].any()
    assert server.log["residual"] == 0
    for name, value in fedit.params.items():
        assert torch.equal(value, server.params[name])


@given(st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_factors_and_sums_are_the_same_mean_in_any_grouping(seed: int) -> None:
    pairs = random_pairs(5, 2, seed=seed)
    left = torch.stack([pair.left for pair in pairs])
    right = torch.stack([pair.right for pair in pairs])
    weights = torch.arange(1.0, 6.0)
    expected = torch.einsum("n,nor,nri->oi", weights.double() / 15, left, right)
    for keeps in (True, False):
        for cuts in ([5], [2, 3], [1, 1, 1, 1, 1]):
            products = Products(keeps_factors=keeps)
            for rows in torch.split(torch.arange(5), cuts):
                products.add(Pair(left[rows], right[rows]), weights[rows])
            assert close(products.mean(), expected, 1e-12)


@given(rank=st.integers(1, 8), count=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_best_factors_miss_the_tail_of_the_singular_values(
    rank: int, count: int, seed: int
) -> None:
    products = Products(keeps_factors=True)
    for pair in random_pairs(count, 2, 6, 5, seed):
        products.add(Pair(pair.left[None], pair.right[None]), torch.ones(1))
    P, fresh = products.mean(), torch.ones(rank, 5).double()
    tail = torch.linalg.svdvals(P)[rank:].square().sum()
    for form in (products.pair(), P):
        for is_balanced in (False, True):
            best = best_pair(spectrum(form, rank), fresh, is_balanced=is_balanced)
            assert best.left.shape == (6, rank)
            assert best.right.shape == (rank, 5)
            assert close((P - best.product).square().sum(), tail, 1e-8)
    found = spectrum(P, rank)
    assert bool((found.U.gather(0, found.U.abs().argmax(0)[None]) > 0).all())


def test_a_direction_that_no_client_has_is_drawn_and_adds_nothing() -> None:
    server = wide("flexlora", rank=3)
    lone = random_pairs(1, 1)[0]
    zeros = Pair(torch.zeros(5, 2).double(), torch.zeros(2, 7).double())
    sent = Pair(
        torch.cat([lone.left, zeros.left], 1), torch.cat([lone.right, zeros.right])
    )
    server.round([sent], [1])
    assert close(server.product, lone.product)
    B, A = pair_of(server.params, "0")
    assert not B[:, 1:].any()
    drawn = fresh_rows((3, 7), rng(server.seed, "lora", 0)).double()
    assert torch.equal(A[1:], drawn[1:])


def test_a_diverged_client_makes_no_error_of_a_decomposition() -> None:
    server = wide("flexlora", rank=1)
    (pair,) = random_pairs(1, 1)
    server.round([Pair(pair.left * torch.inf, pair.right)], [1])
    assert not bool(trees.finite(server.state))


# FLoRA's rounds


def test_flora_starts_every_round_anew() -> None:
    server = wide("flora")
    pairs = random_pairs(2, 2)
    starts = []
    for _ in range(2):
        server.round(pairs, [1, 1])
        (down,) = server.downs[-1:]
        assert not down.params["0.lora_B"].any()
        starts.append(down.params["0.lora_A"])
    assert not torch.equal(*starts)
    assert starts[0].abs().max() <= 1 / 7**0.5
    mean = (pairs[0].product + pairs[1].product) / 2
    assert close(server.update, 2 * mean, 1e-6)  # two rounds, B A of none is kept


def test_flora_in_which_nothing_moves_keeps_every_bit() -> None:
    server = wide("flora")
    for _ in range(2):
        server.round([Pair(torch.zeros(5, 2).double(), torch.ones(2, 7).double())], [1])
        assert torch.equal(server.params["0.lora_change"], torch.zeros(5, 7).double())


def test_flora_takes_clients_of_several_ranks() -> None:
    server = wide("flora", ranks=[1, 2])
    server.seed = SEED_OF_RANKS_1_AND_2
    pairs = [random_pairs(1, 1)[0], random_pairs(1, 2)[0]]
    server.round(pairs, [1, 3])
    mean = 0.25 * pairs[0].product + 0.75 * pairs[1].product
    assert close(server.update, mean)


# What goes down


@pytest.mark.parametrize(("form", "columns"), [("fedex", 2), ("flora", 4)])
def test_a_change_goes_down_as_factors_while_these_are_smaller(
    form: str, columns: int
) -> None:
    """At [20, 30] up to 11 columns are: 12 x 50 is no less than 600."""
    server = wide(form, 20, 30)
    pairs, factors = random_pairs(2, 2, 20, 30), 2 * (20 + 30)
    for _ in range(8):
        server.round(pairs, [1, 3])
    sizes = [trees.nbytes(down) // 8 - factors for down in server.downs]
    expected = []
    for t in range(8):
        is_small = columns * t <= 11
        expected.append(50 * columns * t if is_small else 600)
    assert sizes == expected
    last = server.downs[-1]
    assert list(last.whole) == ["0"]
    assert last.left == last.right == {}


@pytest.mark.parametrize("form", ["fedex", "flora"])
def test_what_goes_down_is_what_the_server_has(form: str) -> None:
    server = wide(form, 20, 30)
    pairs = random_pairs(2, 2, 20, 30)
    for t in range(8):
        before = server.params["0.lora_change"]
        server.round([Pair(left + t, right) for left, right in pairs], [1, 3])
        (down,) = server.downs[-1:]
        got = down.whole.get("0")
        if got is None:
            got = down.left["0"] @ down.right["0"]
        assert close(got, before, 1e-4)


def test_a_change_without_room_is_never_taken_for_a_whole_one_again() -> None:
    params = {"x.lora_A": torch.zeros(1, 4), "x.lora_B": torch.zeros(4, 1)}
    change = Change.none(params, ["x"])  # room for one column
    assert change.has_room("x", 1)
    assert not change.has_room("x", 2)
    change = change.plus("x", None)
    assert not change.has_room("x", 0)
    assert change.pairs() == {}


# What is refused


@pytest.mark.parametrize(
    ("lora", "method", "words"),
    [
        ({"freeze": "A"}, {}, "trains both lora_A and lora_B"),
        ({"form": "dora"}, {}, "no sum of products"),
        ({}, {"form": "flora", "ranks": [1, 4]}, "of rank 2; raise lora.rank"),
    ],
)
def test_models_without_an_exact_mean_are_refused(
    lora: dict[str, Any], method: dict[str, Any], words: str
) -> None:
    task = one_layer(2, **lora)
    server = Alone(task, "exactlora", **method)
    with pytest.raises(SettingsError, match=words):
        server.method.check(task, 2)


def test_a_start_whose_product_flora_would_throw_away_is_refused() -> None:
    task = one_layer(2)
    server = Alone(task, "exactlora", form="flora")
    assert server.method.check(task, 2) is None
    task.model.get_parameter("0.lora_B").data.add_(1)
    with pytest.raises(SettingsError, match="the start has a product B A"):
        server.method.check(task, 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranks": [1, 2]}, "ranks are of the forms"),
        ({"weights": "examples"}, 'weights = "examples" is of the form "hetlora"'),
        ({"balanced": True, "form": "flora"}, 'balanced is of the form "flexlora"'),
    ],
)
def test_settings_of_another_form_are_refused(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        exact(**{"form": "fedex", **values})


def test_no_robust_rule_takes_the_place_of_the_mean() -> None:
    reason = exact("fedex").method.refuses("rule")
    assert reason is not None
    assert "every client's factors" in reason


def test_rows_are_drawn_as_a_layer_draws_them() -> None:
    rows = fresh_rows((3, 400), np.random.default_rng(0))
    assert rows.dtype == torch.float32
    assert 0.9 / 20 < rows.abs().max() <= 1 / 20
