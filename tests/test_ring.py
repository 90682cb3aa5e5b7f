"""The ring of a secure sum: exact numbers, rounding without bias, sums that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore.messages.secure import ring as module
from fedcore.messages.secure.ring import (
    Encoded,
    Ring,
    power_of_two,
    values_of,
    words_of,
)
from fedcore.messages.secure.settings import SecureSettings

FEW = settings(max_examples=60, derandomize=True, deadline=None)
FLOATS = st.floats(-20, 20, width=32)


def half(x: Tensor) -> Tensor:
    return torch.full((len(x),), 0.5)


def generator(key: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(key)


def test_numbers_of_the_specification() -> None:
    ring = Ring(n_max=4, reach=8.0, cap=4.0)
    x = torch.tensor([0.5, -0.25, 8, 9, -9, 2.0**-30])
    numbers, num_clipped = ring.encode(x, 3, half(x))
    expected = [12582912, -6291456, 201326592, 201326592, -201326592, 0]
    assert numbers.tolist() == expected
    assert num_clipped == 2
    total = sum_of([numbers] * 4)
    assert (ring.decode(total) / 12).tolist() == [0.5, -0.25, 8, 8, -8, 0]


def test_levels_leave_room_for_every_client() -> None:
    exponents = {3: 29, 4: 28, 7: 28, 8: 27, 100: 24, 1000: 21, 1023: 21, 1024: 20}
    shares = {3: 0.75, 4: 0.5, 7: 0.875, 8: 0.5, 100: 0.78125, 1000: 0.977, 1024: 0.5}
    for n_max, exponent in exponents.items():
        ring = Ring(n_max)
        assert ring.levels == 2.0**exponent, n_max
        if n_max in shares:
            assert n_max * ring.levels / 2**31 == pytest.approx(shares[n_max], abs=1e-3)


def sum_of(messages: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(messages[0])
    for numbers in messages:
        total += numbers
    return total


@FEW
@given(n_max=st.integers(3, 300), reach=st.sampled_from([0.25, 1.0, 8.0]))
def test_a_sum_of_all_at_full_weight_does_not_wrap(n_max: int, reach: float) -> None:
    ring = Ring(n_max, reach, cap=4096.0)
    x = torch.tensor([1e30, -1e30, reach, -reach])
    numbers, num_clipped = ring.encode(x, 4096, generator())
    assert num_clipped == 2
    exact = [int(number) * n_max for number in numbers]
    assert max(map(abs, exact)) < 2**31
    wrapped = sum_of([numbers] * n_max)
    assert wrapped.tolist() == exact


@FEW
@given(
    xs=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=9),
    data=st.data(),
)
def test_a_sum_is_within_a_unit_a_client(
    xs: list[list[float]], data: st.DataObject
) -> None:
    ring = Ring(n_max=9)
    weights = data.draw(
        st.lists(st.integers(0, 4096), min_size=len(xs), max_size=len(xs))
    )
    messages, exact = [], [Fraction(0)] * 3
    for key, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        numbers, _ = ring.encode(torch.tensor(x), weight, generator(key))
        messages.append(numbers)
        for i, value in enumerate(x):
            exact[i] += weight * Fraction(max(-8.0, min(8.0, value)))
    total = ring.decode(sum_of(messages))
    for found, expected in zip(total.tolist(), exact, strict=True):
        assert abs(Fraction(found) - expected) < len(xs) * Fraction(ring.step)


@FEW
@given(
    x=st.lists(FLOATS, min_size=1, max_size=8),
    weight=st.integers(0, 4096),
    n_max=st.integers(3, 5000),
)
def test_nothing_is_rounded_before_the_draw(
    x: list[float], weight: int, n_max: int
) -> None:
    ring = Ring(n_max)
    never_up = torch.ones(len(x))  # u < part never holds
    numbers, _ = ring.encode(torch.tensor(x), weight, never_up)
    factor = Fraction(weight, 4096) * Fraction(int(ring.levels), 8)
    for number, value in zip(numbers.tolist(), x, strict=True):
        clipped = Fraction(max(-8.0, min(8.0, value)))
        assert number == math.floor(clipped * factor)


def test_rounding_has_no_bias() -> None:
    ring = Ring(n_max=2**20, cap=1.0)  # few levels: 2^10 in 8
    x = torch.full((200_000,), 0.3 * ring.step)
    numbers, _ = ring.encode(x, 1, generator())
    assert set(numbers.tolist()) == {0, 1}
    deviation = math.sqrt(0.3 * 0.7 / len(x))
    assert abs(numbers.double().mean().item() - 0.3) < 4 * deviation


def test_draws_do_not_depend_on_blocks_or_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(100_000, generator=generator(1))
    ring = Ring(n_max=10)
    numbers, _ = ring.encode(x, 100, generator(2))
    monkeypatch.setattr(module, "BLOCK", 999)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again, _ = ring.encode(x, 100, generator(2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(numbers, again)
    one_after_another = generator(2)
    pieces = [ring.encode(piece, 100, one_after_another)[0] for piece in x.split(777)]
    assert torch.equal(numbers, torch.cat(pieces))


def test_numbers_of_float64_keep_their_digits() -> None:
    ring = Ring(n_max=3, cap=1.0)
    x = torch.tensor([1 / 3], dtype=torch.float64)
    numbers, _ = ring.encode(x, 1, torch.ones(1))
    assert numbers.item() == math.floor(Fraction(1 / 3) * Fraction(2**29, 8))


@FEW
@given(values=st.lists(st.floats(-(2.0**20), 2.0**20), min_size=1, max_size=5))
def test_words_hold_scalars_to_a_part_in_two_to_the_twentieth(
    values: list[float],
) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    assert (values_of(words_of(x)) - x).abs().max() <= 2.0**-21
    assert values_of(words_of(torch.tensor([math.inf, -1e30]))).tolist() == [
        2.0**20,
        -(2.0**20),
    ]


def test_sums_wrap_around_as_masked_ones_do() -> None:
    last = Encoded(torch.tensor([2**31 - 1], dtype=torch.int32), torch.tensor([1]))
    total = Encoded(torch.tensor([1], dtype=torch.int32), torch.tensor([2**63 - 1]))
    total.add_(last)
    assert total.numbers.tolist() == [-(2**31)]
    assert total.words.tolist() == [-(2**63)]
    assert total.nbytes == 12


def test_powers_of_two() -> None:
    powers = {0: 1, 1: 1, 1.5: 2, 2: 2, 50: 64, 4096: 4096, 4097: 8192}
    assert {value: power_of_two(value) for value in powers} == powers
    assert SecureSettings(reach=0.125).reach == 0.125
    with pytest.raises(ValueError, match=r"power of two, .* take 8 or 16"):
        SecureSettings(reach=10)
