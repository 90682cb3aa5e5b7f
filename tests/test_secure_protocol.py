"""Secure sums between honest parties: exact, whoever is lost, and nothing else seen."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from fedcore.errors import TooFewReports
from fedcore.messages.secure import client_session
from fedcore.messages.secure.client_session import ClientSession
from fedcore.messages.secure.client_state import ClientState
from fedcore.messages.secure.graph import threshold
from fedcore.messages.secure.masks import add_masks, joined, pair_mask, self_mask
from fedcore.messages.secure.primitives import Refused, Secret, agreed
from fedcore.messages.secure.transcript import mask_key
from tests.secure_sums import DOWN, SecureSum, identity_of

Lost = dict[int, tuple[int, ...]]


def expected_survivors(n: int, lost: Lost) -> list[int] | None:
    """U3 of clients 0 ... n - 1 that are all neighbours; None for a round skipped."""
    here = set(range(n)) - set(lost.get(1, ()))
    if len(here) < 3:
        return None
    t = threshold(len(here))
    survivors: list[int] = []
    for number in (2, 3, 4):
        here -= set(lost.get(number, ()))
        if len(here) < max(t, 3):
            return None
        if number == 3:
            survivors = sorted(here)
    here -= set(lost.get(5, ()))
    return survivors if len(here) >= t else None


def check_against_expectation(n: int, lost: Lost) -> None:
    secure = SecureSum(range(n), d=3, is_signed=False, lost=lost)
    wanted = expected_survivors(n, lost)
    if wanted is None:
        with pytest.raises(TooFewReports):
            secure.run().server.total()
        return
    secure.run()
    assert secure.server.clients == wanted, lost
    assert secure.is_exact(), lost
    assert not secure.server.blame
    assert not secure.refused


def test_a_signed_sum_of_four_is_exact() -> None:
    secure = SecureSum(range(4)).run()
    assert secure.is_exact()
    assert secure.server.clients == [0, 1, 2, 3]
    assert (secure.server.blame, secure.refused) == ({}, {})


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_any_client_can_be_lost_in_any_exchange(number: int) -> None:
    for client in range(5):
        check_against_expectation(5, {number: (client,)})


@pytest.mark.parametrize("n", [3, 4])
def test_small_cohorts_are_skipped_or_exact(n: int) -> None:
    for number, client in itertools.product((1, 2, 3, 4, 5), range(n)):
        check_against_expectation(n, {number: (client,)})


def test_clients_lost_in_all_exchanges_of_one_sum() -> None:
    lost: Lost = {1: (0,), 2: (1,), 3: (2,), 4: (3,)}
    secure = SecureSum(range(10), lost=lost).run()
    assert secure.server.plan.t == 6
    assert secure.server.clients == [3, 4, 5, 6, 7, 8, 9]
    assert secure.is_exact()


def test_six_of_ten_are_too_few() -> None:
    four = (0, 1, 2, 3)
    said = {
        2: "6 clients sent shares, expected at least 7",
        3: "6 clients sent their vectors, expected at least 7",
        4: "6 clients signed the list of survivors, expected at least 7",
        5: "6 shares of client 0, expected 7",
    }
    for number, words in said.items():
        secure = SecureSum(range(10), is_signed=False, lost={number: four})
        with pytest.raises(TooFewReports, match=words):
            secure.run().server.total()


@pytest.mark.slow
def test_every_combination_of_five_that_are_lost_in_five_exchanges() -> None:
    # Each of the five exchanges loses one of the five clients, or none.
    for who in itertools.product((None, *range(5)), repeat=5):
        lost: Lost = {}
        for number, client in enumerate(who, 1):
            if client is not None:
                lost[number] = (client,)
        check_against_expectation(5, lost)


def random_losses(n: int, seed: int) -> Lost:
    """Up to n / 3 clients in all, each lost in one exchange."""
    draw = np.random.default_rng(seed)
    number = int(draw.integers(0, n // 3 + 2))
    clients = draw.permutation(n)[:number].tolist()
    exchanges = draw.integers(1, 6, number).tolist()
    lost: Lost = {}
    for client, exchange in zip(clients, exchanges, strict=True):
        lost[exchange] = (*lost.get(exchange, ()), client)
    return lost


def test_losses_at_random_of_sixteen() -> None:
    for seed in range(6):
        check_against_expectation(16, random_losses(16, seed))


@pytest.mark.slow
def test_losses_at_random_of_sixty_four() -> None:
    for seed in range(12):
        check_against_expectation(64, random_losses(64, seed))


def test_a_ring_of_forty_with_twelve_neighbours() -> None:
    lost = {2: (9,), 3: (11, 30), 5: (20,)}
    clients = range(5, 45)
    secure = SecureSum(clients, is_signed=False, lost=lost, neighbours=12).run()
    assert {len(near) for near in secure.server.plan.near.values()} == {12}
    assert len(secure.server.clients) == 37
    assert secure.is_exact()


def test_ids_may_be_any_whole_numbers() -> None:
    secure = SecureSum([0, 7, 10**6, 2**40], is_signed=False, lost={3: (7,)}).run()
    assert secure.server.clients == [0, 10**6, 2**40]
    assert secure.is_exact()


def test_weights_of_the_server_are_those_of_the_roster() -> None:
    weights = {i: (1.0 + i % 2, 1.0) for i in range(7)}
    terms = SecureSum(range(7)).terms._replace(
        fields=("fresh", "other", "news"), rules=("listed", "examples", "listed")
    )
    secure = SecureSum(range(7), terms=terms, weights=weights, lost={3: (4,)}).run()
    assert secure.is_exact()
    assert not secure.refused


def top_bytes(numbers: np.ndarray) -> float:
    """Chi-squared of the top byte of words of 32 bits, with 255 degrees of freedom."""
    counts = np.bincount(numbers >> 24, minlength=256)
    mean = len(numbers) / 256
    return float(((counts - mean) ** 2 / mean).sum())


def secrets_of(session: ClientSession) -> tuple[Secret, Secret]:
    """seed_u and b_u of a session before E3."""
    return session._state.seed, session._state.b


def test_a_masked_vector_is_uniform_until_the_last_mask_is_off() -> None:
    secure = SecureSum(range(5), d=100_000)
    small = np.arange(100_000, dtype=np.uint32) % 100
    for client in secure.vectors:
        secure.vectors[client] = small, secure.vectors[client][1]
    secure.run(until=2)
    seeds = {i: secrets_of(secure.sessions[i]) for i in secure.sessions}
    secure.mask()
    plain = joined(*secure.vectors[0])
    vector = secure.masked[0].copy()
    assert top_bytes(small) > 1e7
    assert top_bytes(vector[:400_000].view(np.uint32)) < 350
    session = secure.server.plan.session
    taken_off = [self_mask(seeds[0][1], session)._replace(is_added=False)]
    for other in (1, 2, 3, 4):
        own = mask_key(seeds[other][0])
        shared = agreed(own, secure.answers[1][0]["s"])
        taken_off.append(pair_mask(shared, session, other, 0))
    for mask in taken_off:
        assert (vector != plain).any()
        assert top_bytes(vector[:400_000].view(np.uint32)) < 350
        add_masks(vector, 100_000, [mask])
    assert (vector == plain).all()


def test_two_sums_of_the_same_vectors_have_nothing_in_common() -> None:
    first = SecureSum(range(4)).run()
    second = SecureSum(range(4)).run()
    assert (first.server.total()[0] == second.server.total()[0]).all()
    for client in range(4):
        assert (first.masked[client] != second.masked[client]).mean() > 0.9
        for number in (1, 2, 5):
            one, other = (secure.answers[number][client] for secure in (first, second))
            for name in set(one) - {"terms"}:
                assert one[name] != other[name], name


def test_a_session_shows_and_pickles_nothing() -> None:
    secure = SecureSum(range(4), d=3).run(until=2)
    session = secure.sessions[2]
    assert repr(session) == "<session of client 2, after exchange 2>"
    secret = session._state.seed.hex()
    assert secret not in repr(vars(session))
    assert secret not in str(session._state.held)
    for thing in (session, session._state, secure.server, identity_of(2)):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(thing)


def is_empty(session: ClientSession) -> bool:
    nothing, state = ClientState(), session._state
    return all(
        getattr(state, name) == getattr(nothing, name) for name in state.__slots__
    )


def test_secrets_are_dropped_as_soon_as_they_have_done_their_work() -> None:
    secure = SecureSum(range(4)).run(until=3)
    state = secure.sessions[0]._state
    assert state.vector is None
    assert (state.c, state.seed, state.b, state.shared) == (b"", b"", b"", {})
    secure.sign()
    secure.unmask()
    for session in secure.sessions.values():
        assert session.has_ended
        assert is_empty(session)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_session_goes_on_from_its_bytes(number: int) -> None:
    secure = SecureSum(range(4), lost={3: (1,)}).run(until=number)
    for client, session in secure.sessions.items():
        secure.sessions[client] = ClientSession.unpacked(
            session.packed(), client, secure.terms, (), identity_of(client)
        )
    rest: list[Callable[[], None]] = [secure.shares, secure.mask, secure.sign]
    for step in [*rest, secure.unmask][number - 1 :]:
        step()
    assert secure.is_exact()
    assert not secure.refused
    with pytest.raises(Refused, match="has ended"):
        secure.sessions[0].packed()


def test_the_vector_of_the_caller_is_left_alone() -> None:
    secure = SecureSum(range(4))
    before = {client: joined(*both) for client, both in secure.vectors.items()}
    secure.run()
    for client, both in secure.vectors.items():
        assert (joined(*both) == before[client]).all()


def test_bytes_of_a_client_are_few() -> None:
    secure = SecureSum(range(30), d=10, is_signed=False).run()

    def size(message: dict[str, object]) -> int:
        total = 0
        for value in message.values():
            total += len(value) if isinstance(value, bytes) else 8
        return total

    sent = sum(size(secure.answers[number][0]) for number in (1, 2, 4, 5))
    assert sent < 29 * 145 + 200
    assert DOWN not in secure.answers[1][0].values()


def seen_by(secure: SecureSum) -> bytes:
    """All that a server was sent, and all that it holds."""
    pieces = [vector.tobytes() for vector in secure.masked.values()]
    for answers in secure.answers.values():
        for answer in answers.values():
            pieces += [value for value in answer.values() if isinstance(value, bytes)]
    total = secure.server._total
    assert total is not None
    return b"".join([*pieces, total.tobytes()])


@pytest.mark.parametrize("is_masked", [True, False])
def test_no_update_is_in_what_a_server_has(
    is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_masked:  # so that the search can find something
        monkeypatch.setattr(client_session, "add_masks", lambda *_: None)
    secure = SecureSum(range(5), d=1000, lost={3: (4,)}).run()
    before = seen_by(secure)
    if is_masked:
        assert secure.is_exact()
    seen = before + seen_by(secure)
    for client in range(4):
        numbers, words = secure.vectors[client]
        for content in (numbers.tobytes(), words[:2].tobytes()):
            found = [content[i : i + 8] in seen for i in range(0, len(content), 8)]
            assert any(found) != is_masked


def test_masked_vectors_tell_nothing_of_the_updates() -> None:
    # Client 0 sends more and client 1 less by as much: the sum is the same, and what
    # each sent has nothing to do with either.
    change = np.random.default_rng(3).integers(0, 2**32, 50_000, dtype=np.uint32)
    sums = []
    for scale in (0, 1):
        secure = SecureSum(range(5), d=50_000, is_signed=False)
        for client, sign in ((0, 1), (1, -1)):
            numbers, words = secure.vectors[client]
            moved = numbers + change * np.uint32(scale * sign % 2**32)
            secure.vectors[client] = moved, words
        secure.run()
        sums.append(secure.server.total()[0])
        for client in (0, 1):
            sent = secure.masked[client][:200_000].view(np.uint32)
            for other in (change, secure.vectors[client][0]):
                assert abs(np.corrcoef(sent, other)[0, 1]) < 0.025
                assert top_bytes(sent - other) < 350
    assert (sums[0] == sums[1]).all()
