"""Shares of a secret: any t give it back, fewer tell nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.messages.secure.shamir import (
    PRIME,
    new_secret,
    recover,
    split,
    weights_at_zero,
)

several = settings(max_examples=60, deadline=None, derandomize=True)
elements = st.integers(0, PRIME - 1)
places_of = st.lists(st.integers(1, 10**9), min_size=1, max_size=20, unique=True)


def written(number: int) -> bytes:
    return number.to_bytes(32, "little")


@several
@given(elements, places_of, st.data())
def test_any_t_shares_give_the_secret(
    secret: int, places: list[int], data: st.DataObject
) -> None:
    t = data.draw(st.integers(1, len(places)))
    kept = data.draw(st.permutations(places))[:t]
    shares = split(written(secret), t, places)
    assert recover({place: shares[place] for place in kept}, t) == written(secret)
    with pytest.raises(ValueError, match="expected"):
        recover({place: shares[place] for place in kept[1:]}, t)


@several
@given(elements, elements, st.integers(1, 10**9))
def test_one_share_of_two_fits_every_secret(
    secret: int, other: int, place: int
) -> None:
    shares = split(written(secret), 2, [place, place + 1])
    value = int.from_bytes(shares[place], "little")
    # The line through (0, other) and the share gives what the other share may be.
    slope = (value - other) * pow(place, -1, PRIME)
    second = written((other + slope * (place + 1)) % PRIME)
    assert recover({place: shares[place], place + 1: second}, 2) == written(other)


def test_fewer_than_t_shares_are_uniform() -> None:
    # The top bit of a share, of a secret that is always 1: half of the time set.
    tops = [split(written(1), 2, [5, 6])[5][31] >> 6 for _ in range(2000)]
    assert 850 < sum(tops) < 1150


def test_the_parabola_that_everybody_knows() -> None:
    # 1234 + 166 x + 94 x^2, of "Shamir's secret sharing" in many texts.
    shares = {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414, 6: 5614}
    for kept in ((1, 2, 3), (2, 4, 5), (1, 3, 6)):
        found = recover({place: written(shares[place]) for place in kept}, 3)
        assert found == written(1234)


def test_lagrange_at_one_two_three() -> None:
    assert weights_at_zero((1, 2, 3)) == (3, PRIME - 3, 1)
    places = tuple(random.Random(1).sample(range(1, 1000), 30))
    assert sum(weights_at_zero(places)) % PRIME == 1  # of the constant 1


def test_a_wrong_share_gives_another_secret() -> None:
    secret = new_secret()
    shares = split(secret, 3, [1, 2, 3, 4])
    shares[2] = new_secret()
    assert recover(shares, 3) != secret


def test_places_and_elements_are_checked() -> None:
    with pytest.raises(ValueError, match="not distinct"):
        split(written(1), 2, [1, 1])
    with pytest.raises(ValueError, match="one is 0"):
        split(written(1), 2, [0, 1])
    with pytest.raises(ValueError, match="a threshold of 3"):
        split(written(1), 3, [1, 2])
    with pytest.raises(ValueError, match="not an element"):
        recover({1: written(PRIME), 2: written(1)}, 2)
    assert int.from_bytes(new_secret(), "little") < PRIME
