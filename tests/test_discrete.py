"""The discrete Gaussian: its table to the last bit, its draws by chi-squared tests."""

from __future__ import annotations

import bisect
import decimal
import itertools
from decimal import Decimal

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import chi2

from fedcore.messages.secure.discrete import (
    BLOCK,
    LOW,
    REACH,
    DiscreteGaussian,
    cumulative,
    discrete_gaussian,
)

KEY = bytes(range(32))

# How often OpenDP's exact sampler draws each number, of 100 000 draws; from
# make_gaussian(vector_domain(atom_domain(T="i32")), l2_distance(T="f64"), scale=s) of
# opendp 0.16.0 on 2026-11-28, for s = 1 from -5 on, and for s = 7 from -31 on.
OPENDP_1 = [1, 11, 435, 5379, 24075, 40000, 24323, 5328, 435, 13, 0]
OPENDP_7 = """
    1 1 1 0 2 7 3 22 34 45 70 110 137 201 291 452 565 738 1018 1306 1616 2088 2530 3001
    3443 3931 4438 4870 5157 5571 5618 5674 5790 5440 5201 4948 4401 3861 3491 2936 2419
    2083 1580 1285 1028 794 581 397 265 196 132 82 54 42 26 16 3 3 3 1 1 0 0
"""
OPENDP = [(1, -5, OPENDP_1), (7, -31, [int(count) for count in OPENDP_7.split()])]


def probabilities(deviation: int) -> np.ndarray:
    """P(k), |k| <= 14 s, in float64."""
    k = np.arange(-REACH * deviation, REACH * deviation + 1)
    weights = np.exp(-(k**2) / (2 * deviation**2))
    return np.asarray(weights / weights.sum())


def counted(draws: np.ndarray, deviation: int) -> np.ndarray:
    return np.bincount(draws + REACH * deviation, minlength=2 * REACH * deviation + 1)


def chance(observed: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of Pearson's test, of neighbours joined until 20 are expected."""
    seen, hoped, pearson, bins = 0.0, 0.0, 0.0, 0
    for count, mean in zip(observed, expected, strict=True):
        seen, hoped = seen + count, hoped + mean
        if hoped >= 20:
            pearson += (seen - hoped) ** 2 / hoped
            seen, hoped, bins = 0.0, 0.0, bins + 1
    return float(chi2.sf(pearson, bins - 1))


def stream_of(key: bytes, count: int) -> list[int]:
    """The first words of 64 bits of AES-256-CTR."""
    cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    content = cipher.update(bytes(8 * count))
    return [int.from_bytes(content[8 * i : 8 * i + 8], "little") for i in range(count)]


# The table


@pytest.mark.parametrize("deviation", [1, 2, 32])
def test_the_table_is_right_to_the_last_of_its_128_bits(deviation: int) -> None:
    with decimal.localcontext(prec=80):
        weights = []
        for k in range(-REACH * deviation, REACH * deviation + 1):
            weights.append((Decimal(-(k**2)) / (2 * deviation**2)).exp())
        total = sum(weights)
        exact = []
        for part in itertools.accumulate(weights[:-1]):
            exact.append(int(part / total * 2**128))
    assert cumulative(deviation) == exact


def test_the_table_of_the_noise_is_right_where_it_can_be_checked() -> None:
    deviation = 1024
    table = cumulative(deviation)
    assert len(table) == 2 * REACH * deviation
    with decimal.localcontext(prec=80):
        half = Decimal(0)
        for k in range(1, REACH * deviation + 1):
            half += (Decimal(-(k**2)) / (2 * deviation**2)).exp()
        middle = int((1 + half) / (1 + 2 * half) * 2**128)
    assert table[REACH * deviation] == middle  # P(at most 0)
    for low, high in zip(table, reversed(table), strict=True):
        assert low + high in (2**128 - 1, 2**128), "as likely above as below zero"


def test_draws_are_looked_up_in_the_whole_table() -> None:
    gaussian = discrete_gaussian(1024)
    halves = zip(gaussian._high.tolist(), gaussian._low.tolist(), strict=True)
    assert [high << 64 | low for high, low in halves] == cumulative(1024)


# Draws


def test_the_first_draws_of_the_zero_key_are_the_specifications() -> None:
    draws = DiscreteGaussian(1).draw(10, key=bytes(32))
    assert draws.tolist() == [0, 0, 1, 0, 0, -1, 0, 0, 0, 2]
    assert draws.dtype == np.int32


@pytest.mark.parametrize("deviation", [1, 32, 1024])
def test_draws_have_the_exact_distribution(deviation: int) -> None:
    count = 400_000
    expected = probabilities(deviation) * count
    for number in range(3):
        key = number.to_bytes(32, "little")
        draws = discrete_gaussian(deviation).draw(count, key)
        found = chance(counted(draws, deviation), expected)
        assert 1e-3 < found < 1 - 1e-3, f"key {number}"


@pytest.mark.parametrize("wrong", [1.02, 0.98])
def test_the_test_of_distributions_sees_two_percent(wrong: float) -> None:
    k = np.arange(-REACH * 32, REACH * 32 + 1)
    weights = np.exp(-(k**2) / (2 * (32 * wrong) ** 2))
    expected = weights / weights.sum() * 400_000
    draws = discrete_gaussian(32).draw(400_000, bytes(32))
    assert chance(counted(draws, 32), expected) < 1e-9


@pytest.mark.parametrize(("deviation", "least", "theirs"), OPENDP, ids=["1", "7"])
def test_draws_are_those_of_opendp(
    deviation: int, least: int, theirs: list[int]
) -> None:
    other = np.array(theirs)
    draws = DiscreteGaussian(deviation).draw(int(other.sum()), KEY)
    inside = draws[(draws >= least) & (draws < least + len(other))]
    ours = np.bincount(inside - least, minlength=len(other))
    both, pearson, bins = ours + other, 0.0, 0
    for mine, total in zip(ours, both, strict=True):
        if total >= 20:
            pearson += 2 * (mine - total / 2) ** 2 / (total / 2)
            bins += 1
    assert chi2.sf(pearson, bins) > 1e-3
    assert chance(other, probabilities_from(deviation, least, len(other))) > 1e-3


def probabilities_from(deviation: int, least: int, count: int) -> np.ndarray:
    """Expected counts of 100 000 draws, from `least` on."""
    start = REACH * deviation + least
    return probabilities(deviation)[start : start + count] * 100_000


def test_every_draw_is_that_of_128_bits_in_whole_numbers() -> None:
    deviation, count = 1024, 20_000
    table, words = cumulative(deviation), stream_of(KEY, count)
    expected = []
    for word in words:  # no word is the first half of a threshold
        expected.append(bisect.bisect_right(table, word << 64) - REACH * deviation)
    draws = discrete_gaussian(deviation).draw(count, KEY)
    assert draws.tolist() == expected


def test_where_64_bits_do_not_decide_the_next_ones_do() -> None:
    count = 50
    words = stream_of(KEY, count + 2)
    gaussian = DiscreteGaussian(1)
    # Thresholds on both sides of what the two ties draw behind the others.
    ties = {words[7]: words[count], words[31]: words[count + 1]}
    table = []
    for word, last in ties.items():
        for low in (last - 1, last, last + 1):
            table.append(word << 64 | low)
    table.sort()
    gaussian._high = np.array([f >> 64 for f in table], np.uint64)
    gaussian._low = np.array([f & LOW for f in table], np.uint64)
    gaussian._cells = np.full_like(gaussian._cells, -1)
    expected = []
    for word in words[:count]:
        wanted = word << 64 | ties.get(word, 0)
        expected.append(bisect.bisect_right(table, wanted) - REACH)
    assert gaussian.draw(count, KEY).tolist() == expected


def test_a_longer_vector_begins_with_the_same_draws() -> None:
    whole = discrete_gaussian(32).draw(2 * BLOCK + 5, KEY)
    for count in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1):
        assert np.array_equal(discrete_gaussian(32).draw(count, KEY), whole[:count])


def test_neighbours_and_blocks_are_independent() -> None:
    draws = discrete_gaussian(1024).draw(1 << 19, KEY) / 1024
    for lag in (1, 2, BLOCK, 2 * BLOCK):
        product = draws[lag:] * draws[:-lag]
        assert abs(product.mean()) < 4 / np.sqrt(len(product)), f"{lag} apart"


def test_other_keys_draw_other_numbers() -> None:
    one = discrete_gaussian(1024).draw(1000, bytes(32))
    other = discrete_gaussian(1024).draw(1000, bytes(31) + b"\x01")
    assert (one == other).mean() < 0.01
