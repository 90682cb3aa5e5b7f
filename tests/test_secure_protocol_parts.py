"""The parts of secure sums: published vectors, masks, the graph, weights, terms."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.messages.secure import masks
from fedcore.messages.secure.graph import (
    degree,
    degree_rule,
    graph_fault,
    neighbours_of,
    threshold,
    tolerated,
    weights_fault,
)
from fedcore.messages.secure.masks import (
    Mask,
    add_masks,
    joined,
    pair_mask,
    parted,
    self_mask,
    size_of,
)
from fedcore.messages.secure.primitives import (
    Refused,
    Secret,
    agreed,
    derived,
    digest,
    hkdf,
)
from fedcore.messages.secure.terms import Terms, read_offer
from fedcore.messages.secure.transcript import public_key

several = settings(max_examples=50, deadline=None, derandomize=True)


def test_keys_are_derived_as_rfc_5869_has_it() -> None:
    info, salt = bytes(range(0xF0, 0xFA)), bytes(range(13))
    assert hkdf(b"\x0b" * 22, salt, info, 42).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        "34007208d5b887185865"
    )
    assert hkdf(b"\x0b" * 22, None, b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
        "9d201395faa4b61a96c8"
    )


def test_two_agree_on_a_secret_as_rfc_7748_has_it() -> None:
    text = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    alice = bytes.fromhex(text)
    text = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
    bob = bytes.fromhex(text)
    assert public_key(alice).hex() == (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    assert public_key(bob).hex() == (
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    )
    both = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agreed(alice, public_key(bob)).hex() == both
    assert agreed(bob, public_key(alice)).hex() == both


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_points_that_make_a_secret_known_to_all_are_refused(point: bytes) -> None:
    with pytest.raises(Refused, match="not a point"):
        agreed(bytes(range(32)), point)


def test_streams_are_those_of_nist_sp_800_38a() -> None:
    text = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
    counter = bytes(range(0xF0, 0x100))
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    assert masks._stream(bytes.fromhex(text), counter).update(plain).hex() == (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )


def test_the_mask_of_the_zero_key_is_that_of_the_specification() -> None:
    vector = np.zeros(size_of(4, 1), np.uint8)
    add_masks(vector, 4, [Mask(Secret(bytes(32)), True)])
    numbers, words = parted(vector, 4)
    wanted = [0x78C095DC, 0x898940A2, 0x14A248AD, 0x87208492]
    assert numbers.tolist() == wanted
    assert words.tolist() == [0xB93645C7FB8A0F53]


@several
@given(st.integers(0, 70), st.integers(0, 20), st.integers(1, 5))
def test_masks_go_on_and_come_off_in_any_order(d: int, s: int, number: int) -> None:
    draw = np.random.default_rng(d)
    numbers = draw.integers(0, 2**32, d, dtype=np.uint32)
    words = draw.integers(0, 2**64, s, dtype=np.uint64)
    vector = joined(numbers, words)
    several_masks = []
    for i in range(number):
        several_masks.append(Mask(derived(b"x", "test", i), i % 2 == 0))
    add_masks(vector, d, several_masks)
    for mask in several_masks:
        add_masks(vector, d, [mask._replace(is_added=not mask.is_added)])
    assert (parted(vector, d)[0] == numbers).all()
    assert (parted(vector, d)[1] == words).all()


def test_a_mask_is_one_stream_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Words of 64 bits begin in the middle of a block of the cipher, and of ours.
    monkeypatch.setattr(masks, "BLOCK", 64)
    vector = np.zeros(size_of(37, 11), np.uint8)
    add_masks(vector, 37, [Mask(Secret(bytes(32)), True)])
    stream = masks._stream(bytes(32)).update(bytes(len(vector)))
    assert vector.tobytes() == stream


def test_masks_of_a_pair_cancel() -> None:
    vector = np.zeros(size_of(100, 3), np.uint8)
    both = [pair_mask(b"shared", b"session", 3, 9)]
    both.append(pair_mask(b"shared", b"session", 9, 3))
    assert [mask.is_added for mask in both] == [False, True]  # by the greater id
    add_masks(vector, 100, both[:1])
    assert vector.any()
    add_masks(vector, 100, both[1:])
    assert not vector.any()


def test_keys_of_masks_differ_by_session_pair_and_purpose() -> None:
    keys = {
        bytes(pair_mask(b"k", session, own, other).key)
        for session in (b"a", b"b")
        for own, other in ((1, 2), (1, 3), (2, 3))
    }
    keys.add(bytes(self_mask(b"k", b"a").key))
    assert len(keys) == 7


def test_secrets_are_not_shown_or_pickled() -> None:
    secret = derived(b"x", "test")
    assert repr(secret) == str(secret) == f"{secret}" == "<secret>"
    assert repr(Mask(secret, True)) == "Mask(key=<secret>, is_added=True)"
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            take(secret)


def test_digests_keep_parts_apart() -> None:
    assert digest("a", "b") != digest("ab") != digest("ab", "")
    assert digest("a", [1, 2], 3) != digest("a", [1, 2, 3])
    with pytest.raises(TypeError, match="no canonical form"):
        digest(object())


def test_thresholds_of_complete_graphs_are_two_thirds() -> None:
    found = {n: threshold(n) for n in (3, 4, 5, 10, 30, 64, 100)}
    assert found == {3: 2, 4: 3, 5: 4, 10: 7, 30: 20, 64: 43, 100: 67}
    for n in range(3, 300):
        assert graph_fault(n, degree(n), threshold(n)) is None, n
        assert tolerated(degree(n), threshold(n)) >= 0


def test_rings_follow_the_rule() -> None:
    # An active server among 1000 clients: shares that collude, and that are lost.
    found = {}
    for colluding, lost in ((0, 0.1), (0.05, 0.1), (0.1, 0.1), (0.05, 0.2)):
        rule = degree_rule(1000, colluding, lost)
        assert rule is not None
        found[colluding, lost] = rule.k, rule.lowest
    assert found == {
        (0, 0.1): (36, 19),
        # Exact tails: floating point takes 4.63e-16 for less than 2^-41 / 1000, and
        # comes to 74 and 49.
        (0.05, 0.1): (78, 52),
        (0.1, 0.1): (96, 67),
        (0.05, 0.2): (148, 90),
    }
    assert degree_rule(10, 0.3, 0.3) is None
    curious = degree_rule(1000, 0.05, 0.1, is_active=False)
    assert curious is not None
    assert curious.k < 78


@pytest.mark.slow
def test_rings_with_many_that_collude() -> None:
    for lost, wanted in ((0.1, (218, 171)), (0.3, (926, 629))):
        rule = degree_rule(1000, 0.33, lost)
        assert rule is not None
        assert (rule.k, rule.lowest) == wanted


def test_tails_are_those_of_the_hypergeometric_distribution() -> None:
    from scipy.stats import hypergeom

    for n, k in ((200, 100), (500, 100), (1000, 100), (40, 12)):
        t = threshold(n, k)
        lost = hypergeom(n, n - n // 10, k)
        assert lost.cdf(t - 1) < 2**-20 / n <= lost.cdf(t)


@several
@given(st.sets(st.integers(0, 5000), min_size=3, max_size=60), st.integers(1, 20))
def test_neighbours_are_mutual_distinct_and_as_many_as_asked(
    clients: set[int], half: int
) -> None:
    ids = sorted(clients)
    k = degree(len(ids), 2 * half)
    near = neighbours_of(ids, k, b"seed")
    for client, others in near.items():
        assert others == sorted(set(others))
        assert len(others) == k
        assert client not in others
        for other in others:
            assert client in near[other]


def test_the_order_of_a_ring_changes_with_its_seed() -> None:
    ids = list(range(40))
    assert neighbours_of(ids, 12, b"a") != neighbours_of(ids, 12, b"b")


@pytest.mark.parametrize(
    ("n", "k", "t", "said"),
    [
        (2, 1, 2, "a sum of 2 clients"),
        (10, 9, 5, "a threshold of 5 among 10 clients"),
        (10, 9, 11, "a threshold of 11 among 10 clients"),
        (10, 12, 7, "12 neighbours of 10 clients"),
        (40, 11, 9, "11 neighbours of 40 clients"),
        (1000, 2, 2, "2 neighbours in a ring of 1000 clients: expected at least 36"),
        (40, 0, 1, "0 neighbours"),
        (10, -2, 1, "-2 neighbours"),
    ],
)
def test_graphs_that_are_not_safe_are_refused(
    n: int, k: int, t: int, said: str
) -> None:
    assert said in str(graph_fault(n, k, t))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, 0.0, 0.0, 0.0], "a weight of 1 in a sum of 1"),
        ([1.0, 1.0, 1.0, 5.0], "expected at most a third"),
        ([0.0, 0.0, 0.0, 0.0], "a weight of 0"),
        ([1.0, 1.0, 1.0, float("nan")], "a weight of nan: expected 0 to 8"),
        ([1.0, 1.0, 1.0, -1.0], "a weight of -1"),
        ([1.0, 1.0, 1.0, 9.0], "a weight of 9: expected 0 to 8"),
        ([1.0, 1.0, 1.0, 0.0], "those of 3.0 clients: expected at least 4"),
    ],
)
def test_weights_that_single_a_client_out_are_refused(
    weights: list[float], said: str
) -> None:
    assert said in str(weights_fault(weights, 4, 8.0))


@several
@given(st.integers(3, 50), st.floats(1e-300, 1e300))
def test_equal_weights_are_as_many_clients_as_there_are(n: int, weight: float) -> None:
    assert weights_fault([weight] * n, n, 1e300) is None


def test_terms_travel_and_differ_in_their_digest() -> None:
    terms = Terms("s/0/0/train", 10, 8.0, 64.0, ("a", "b"), ("listed", "equally"))
    found, weights = read_offer(terms.offer([3.0]))
    assert (found, weights) == (terms, [3.0])
    others: list[dict[str, Any]] = [
        {"run": "s/1/0/train"},
        {"n_max": 11},
        {"reach": 4.0},
        {"cap": 1.0},
        {"fields": ("a", "c")},
        {"rules": ("listed", "examples")},
        {"news": "news"},
        {"settings": "x"},
        {"is_signed": False},
    ]
    assert {name for change in others for name in change} == set(Terms._fields)
    digests = {terms.digest(b"model"), terms.digest(b"another")}
    for change in others:
        digests.add(terms._replace(**change).digest(b"model"))
    assert len(digests) == len(others) + 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_max": 2}, "sums of at most 2 clients"),
        ({"reach": 3.0}, "a reach of 3: expected a power of two"),
        ({"reach": float("nan")}, "a reach of nan"),
        ({"reach": float("inf")}, "a reach of inf"),
        ({"cap": 0.0}, "a cap of 0"),
        ({"cap": 1}, '"cap" is not a float'),
        ({"rules": ["mine"]}, 'weights "mine": expected one of'),
        ({"rules": []}, "1 fields and 0 rules"),
        ({"fields": "all"}, '"fields" is str, expected a list'),
        ({"is_signed": 2}, '"is_signed" is 2'),
        ({"weights": b"1"}, '"weights" has 1 bytes, expected 0'),
        ({"run": 1}, '"run" is int, expected text'),
        ({"more": 1}, 'found a field "more"'),
        (
            {"rules": ["listed"], "weights": np.array([65.0]).tobytes()},
            "an own weight of 65: expected 0 to 64",
        ),
    ],
)
def test_terms_that_no_client_accepts_are_refused(
    change: dict[str, Any], said: str
) -> None:
    message = Terms("s/0/0/train", 10, 8.0, 64.0).offer() | change
    with pytest.raises(Refused) as caught:
        read_offer(message)
    assert said in str(caught.value)
