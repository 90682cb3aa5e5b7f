"""A server that lies to clients: every lie is refused, or the sum is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings

from fedcore.errors import TooFewReports
from fedcore.messages.secure import server_session
from fedcore.messages.secure.client_session import SENT, ClientSession
from fedcore.messages.secure.graph import lists_fault
from fedcore.messages.secure.identity import Identity
from fedcore.messages.secure.primitives import Message, Refused, chunks
from fedcore.messages.secure.server_session import ServerSession
from fedcore.messages.secure.terms import weights_to
from fedcore.messages.secure.transcript import public_key
from fedcore.messages.secure.unmasking import Keys
from tests.secure_sums import (
    OURS,
    Lie,
    SecureSum,
    authority_certificate,
    authority_key,
    identity_of,
    signed_certificate,
    terms_of,
)

several = settings(max_examples=150, deadline=None, derandomize=True)


def lie_to(clients: set[int], number: int, **changes: Any) -> Lie:
    """Change fields of the messages of one exchange to some clients.

    A change is a value, or a function of the honest one.
    """

    def lie(exchange: int, client: int, message: Message) -> Message:
        if exchange != number or client not in clients:
            return message
        changed = dict(message)
        for name, change in changes.items():
            changed[name] = change(message[name]) if callable(change) else change
        return changed

    return lie


def without(client: int) -> Callable[[list[int]], list[int]]:
    return lambda ids: [other for other in ids if other != client]


def replaced(place: int, new: bytes, size: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        pieces = chunks(content, size)
        pieces[place] = new
        return b"".join(pieces)

    return change


def check_refused(secure: SecureSum, client: int, said: str) -> None:
    """One client refuses with these words, and holds no secret any more."""
    assert said in secure.refused[client]
    assert secure.sessions[client].has_ended
    with pytest.raises(Refused, match="has ended"):
        secure.sessions[client].unmask({})


# The cohort (E2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"t": 3}, "a threshold of 3 among 10 clients: expected more than half"),
        ({"t": 11}, "a threshold of 11 among 10 clients"),
        ({"k": 2, "t": 2}, "2 neighbours in a ring of 10 clients"),
        ({"k": 3}, "3 neighbours of 10 clients"),
        ({"ids": [0, 1]}, "a sum of 2 clients: expected at least 3"),
        ({"ids": without(1)}, "9 neighbours of 9 clients: expected 8"),
        ({"c": lambda c: c[32:]}, '"c" has 288 bytes, expected 320'),
        ({"ids": [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]}, "not a list of clients in asc"),
        ({"ids": [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]}, "this client is not in the list"),
        ({"ids": list(range(11))}, "9 neighbours of 11 clients"),
        ({"c": replaced(1, bytes(32), 32)}, "others than this client sent"),
        ({"s": replaced(1, bytes(32), 32)}, "others than this client sent"),
        ({"c": replaced(4, public_key(b"\x05" * 32), 32)}, "a signature of client 4"),
        ({"s": replaced(4, public_key(b"\x05" * 32), 32)}, "a signature of client 4"),
        ({"s": lambda s: s[:-32] + s[:32]}, "has one key twice"),
        ({"signatures": lambda s: s[1:]}, '"signatures" has 8 entries, expected 9'),
        ({"signatures": []}, '"signatures" has 0 entries, expected 9'),
        ({"certificates": []}, '"certificates" has 0 entries, expected 9'),
        ({"weights": bytes(80)}, '"weights" has 80 bytes, expected 0'),
    ],
)
def test_a_cohort_that_is_not_right_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    secure = SecureSum(range(10), lie=lie_to({1}, 2, **changes)).run(until=2)
    check_refused(secure, 1, said)
    assert len(secure.answers[2]) == 9


def test_a_cohort_of_two_is_refused_by_both_sides() -> None:
    with pytest.raises(TooFewReports, match="2 clients sent keys, expected at least 3"):
        SecureSum(range(2)).run(until=2)


def test_more_clients_than_the_ring_can_add_are_refused() -> None:
    secure = SecureSum(range(6), terms=terms_of(5)).run(until=2)
    assert set(secure.refused.values()) == {"6 clients in a sum of at most 5"}


class Blind(ServerSession):
    """A server that takes any keys: to see what its clients do."""

    def _checked_keys(self, client: int, answer: Message) -> Keys:
        return Keys(answer["c"], answer["s"], answer["signature"])


def blind(secure: SecureSum) -> SecureSum:
    secure.server.__class__ = Blind
    return secure


def test_another_model_to_one_client_is_refused_by_all() -> None:
    for is_blind in (False, True):
        secure = SecureSum(range(6))
        if is_blind:
            blind(secure)
        secure.keys()
        terms, identity = secure.terms, identity_of(4)
        other = ClientSession(4, terms, bytes(32), (), identity)
        secure.sessions[4] = other
        del secure.server._keys[4]
        secure.server.add_keys(4, other.keys(*secure.vectors[4]))
        secure.shares()
        if is_blind:
            assert set(secure.refused) == set(range(6))
            assert "a signature of client 4 does not fit" in secure.refused[1]
        else:
            assert "has another model than was sent" in secure.server.blame[4]
            assert secure.server.plan.ids == [0, 1, 2, 3, 5]


def test_other_terms_to_one_client_are_refused_by_all() -> None:
    lie = lie_to({4}, 1, cap=1.0)
    secure = blind(SecureSum(range(6), lie=lie)).run(until=2)
    assert "a signature of client" in secure.refused[4]
    assert "a signature of client 4" in secure.refused[0]


def test_keys_of_an_earlier_round_are_refused() -> None:
    before = SecureSum(range(6), terms=terms_of(6, run="series/2/0/train"))
    before.keys()
    secure = blind(SecureSum(range(6)))
    secure.keys()
    del secure.server._keys[3]
    secure.server.add_keys(3, before.answers[1][3])
    secure.shares()
    assert "a signature of client 3 does not fit" in secure.refused[1]
    assert "others than this client sent" in secure.refused[3]
    honest = SecureSum(range(6))
    assert not honest.server.add_keys(3, before.answers[1][3])
    assert "other terms" in honest.server.blame[3]


def test_keys_of_another_client_are_refused() -> None:
    secure = SecureSum(range(5))
    secure.keys()
    late = SecureSum(range(5))
    late.server.add_keys(0, secure.answers[1][0])
    assert not late.server.add_keys(1, secure.answers[1][0])
    assert "one of another client" in late.server.blame[1]
    stolen = dict(secure.answers[1][2], signature=secure.answers[1][3]["signature"])
    assert not late.server.add_keys(2, stolen)
    assert "a signature of client 2 does not fit" in late.server.blame[2]


@pytest.mark.parametrize("name", ["c", "s"])
def test_a_key_that_is_no_point_is_named(name: str) -> None:
    secure = SecureSum(range(5), is_signed=False, lost={1: (2,)})
    secure.keys()
    assert not secure.server.add_keys(2, secure.answers[1][2] | {name: bytes(32)})
    assert "not a point" in secure.server.blame[2]


# Weights of the server


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.0, 0.0, 0.0, 0.0, 1.0, 0.0], "expected at most a third"),
        ([1.0, 1.0, 1.0, 0.0, 1.0, 0.0], "those of 4.0 clients: expected at least 4"),
        ([1.0, 1.0, 1.0, 1.0, 2.0, 1.0], "and of 1 when this client was asked"),
        ([1.0, 9000.0, 1.0, 1.0, 1.0, 1.0], "a weight of 9000: expected 0 to 4096"),
        ([1.0, -1.0, 1.0, 1.0, 1.0, 1.0], "a weight of -1"),
    ],
)
def test_weights_that_single_out_a_client_are_refused(
    weights: list[float], said: str
) -> None:
    terms = terms_of(6, rules=("listed",))
    lie = lie_to({4}, 2, weights=weights_to(weights))
    least = 5 if "4.0" in said else None
    ones = dict.fromkeys(range(6), (1.0,))
    secure = SecureSum(range(6), terms=terms, weights=ones, lie=lie, least=least)
    secure.run(until=2)
    check_refused(secure, 4, said.replace("at least 4", "at least 5"))


def test_an_honest_server_asks_nobody_for_such_weights() -> None:
    terms = terms_of(6, rules=("listed",))
    weights = {i: (float(i == 2),) for i in range(6)}
    with pytest.raises(TooFewReports, match="expected at most a third"):
        SecureSum(range(6), terms=terms, weights=weights).run()


def test_weights_are_looked_at_again_when_clients_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms = terms_of(6, rules=("listed",))
    weights = {i: (1.5 if i == 0 else 0.7,) for i in range(6)}
    lost = {3: (4, 5)}
    secure = SecureSum(range(6), terms=terms, weights=weights, lost=lost)
    with pytest.raises(TooFewReports, match="expected at most a third"):
        secure.run()
    assert not secure.refused
    monkeypatch.setattr(server_session, "lists_fault", lambda *_: None)
    secure = SecureSum(range(6), terms=terms, weights=weights, lost=lost)
    with pytest.raises(TooFewReports, match="0 clients signed"):
        secure.run()
    assert "1.5 in a sum of 3.6: expected at most a third" in secure.refused[3]


@pytest.mark.parametrize("rules", [("listed", "equally"), ("listed", "listed")])
def test_two_sums_of_one_message_whose_difference_is_one_client_are_refused(
    rules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedVARP with known rates sends one change twice, with two weights."""
    terms = terms_of(6, fields=("weighed", "delta"), rules=rules)
    weights = {i: (2.0 - (i == 3), 1.0)[: rules.count("listed")] for i in range(6)}
    secure = SecureSum(range(6), terms=terms, weights=weights)
    with pytest.raises(TooFewReports, match="the difference could be that of one"):
        secure.run()
    monkeypatch.setattr(server_session, "lists_fault", lambda *_: None)
    secure = SecureSum(range(6), terms=terms, weights=weights)
    with pytest.raises(TooFewReports):
        secure.run()
    assert len(secure.refused) == 6
    assert "the difference could be that of one client" in secure.refused[0]


def test_no_combination_of_three_lists_of_weights_is_taken() -> None:
    lists = [[1.0] * 6, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]
    assert lists_fault(lists, False, 3, 8.0) is None
    found = lists_fault([*lists, [1.0, 2.0] * 3], False, 3, 8.0)
    assert found == "3 lists of weights for one message: expected at most two"


# Shares and vectors (E3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sent": lambda s: s[SENT : 2 * SENT] + s[:SENT] + s[2 * SENT :]},
            "shares of client 0 are not authentic",
        ),
        (
            {"senders": [0], "sent": lambda s: s[:SENT]},
            "shares of 1 neighbours, expected 3",
        ),
        ({"senders": [0, 1, 3, 4, 9], "sent": bytes(5 * SENT)}, "are no neighbours"),
        ({"senders": [0, 1, 2, 3, 4], "sent": bytes(5 * SENT)}, "are no neighbours"),
        ({"senders": [0, 0, 1, 3, 4]}, "not a list of clients in ascending order"),
        ({"sent": lambda s: s[1:]}, '"sent" has'),
    ],
)
def test_shares_that_are_not_right_are_refused(
    changes: dict[str, Any], said: str
) -> None:
    secure = SecureSum(range(5), is_signed=False, lie=lie_to({2}, 3, **changes))
    secure.run(until=3)
    check_refused(secure, 2, said)


def test_a_masked_vector_is_given_once() -> None:
    secure = SecureSum(range(5), is_signed=False).run(until=2)
    inboxes = secure.server.inboxes()
    secure.sessions[2].masked(inboxes[2])
    with pytest.raises(Refused, match="exchange 3 was asked for after exchange 3"):
        secure.sessions[2].masked(inboxes[2])


def test_one_ciphertext_kept_back_makes_the_sum_noise_and_is_noticed() -> None:
    def keep_back(exchange: int, client: int, message: Message) -> Message:
        if (exchange, client) != (3, 3):
            return message
        kept = message["senders"].index(5)
        sent = chunks(message["sent"], SENT)
        del sent[kept]
        return {"senders": without(5)(message["senders"]), "sent": b"".join(sent)}

    secure = SecureSum(range(10), is_signed=False, lie=keep_back)
    # The liar knows which shares to expect of client 3.
    secure.run(until=4)
    honest = secure.server._masked_with

    def masked_with(client: int) -> list[int]:
        return without(5)(honest(client)) if client == 3 else honest(client)

    secure.server._masked_with = masked_with  # type: ignore[method-assign]
    secure.unmask()
    with pytest.raises(TooFewReports, match=r"counts \d+ clients, expected 10"):
        secure.server.total()


# Survivors (E4) and unmasking (E5)


@pytest.mark.parametrize(
    ("survivors", "said"),
    [
        ([0, 1, 3, 4], "is not among the survivors"),
        ([0, 1, 2, 3, 4, 9], "not among those that sent keys"),
        ([0, 2], "a sum of 2 clients: expected at least 3"),
        ([0, 1, 2], "3 survivors near this client, expected 4"),
        ([2, 1, 0, 3], "not a list of clients in ascending order"),
    ],
)
def test_survivors_that_are_too_few_or_strangers_are_refused(
    survivors: list[int], said: str
) -> None:
    lie = lie_to({2}, 4, survivors=survivors)
    secure = SecureSum(range(5), is_signed=False, lie=lie).run(until=4)
    check_refused(secure, 2, said)


@pytest.mark.parametrize("is_careful", [False, True])
def test_two_versions_of_the_survivors_are_refused(is_careful: bool) -> None:
    # Half of the clients hear that client 0 survived, half that it did not. A careful
    # liar sends each half the signatures of that half alone.
    halves = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])

    def lie(exchange: int, client: int, message: Message) -> Message:
        half = halves[client > 4]
        if exchange == 4 and client > 4:
            return {"survivors": list(range(1, 10))}
        if exchange == 5:
            signers = half if is_careful else message["signers"][client > 4 :]
            signed = dict(zip(message["signers"], message["signatures"], strict=True))
            signatures = [signed[signer] for signer in signers]
            return {"signers": signers, "signatures": signatures}
        return message

    secure = SecureSum(range(10), lie=lie).run(until=3)
    secure.server._authority = None  # the liar takes every signature
    secure.sign()
    secure.unmask()
    assert not secure.answers[5]
    said = "does not fit what it should have signed"
    if is_careful:
        said = "5 signatures, expected 7"
    for client in range(10):
        assert said in secure.refused[client]


def test_both_kinds_of_shares_of_one_client_are_never_given() -> None:
    secure = SecureSum(range(10)).run()
    session = secure.sessions[1]
    for answer in (session.survivors, session.unmask):
        with pytest.raises(Refused, match="has ended"):
            answer({"survivors": list(range(1, 10))})
    secure = SecureSum(range(10)).run(until=4)
    with pytest.raises(Refused, match="exchange 4 was asked for after exchange 4"):
        secure.sessions[1].survivors({"survivors": list(range(1, 10))})
    # One share of each: 32 bytes for the nine neighbours and itself.
    secure.unmask()
    assert {len(answer["shares"]) for answer in secure.answers[5].values()} == {320}


def test_forged_and_replayed_signatures_are_refused() -> None:
    before = SecureSum(range(10), terms=terms_of(10, run="series/2/0/train")).run()
    replayed = [before.answers[4][client]["signature"] for client in range(10)]
    stranger = Identity(
        0,
        ec.derive_private_key(7, ec.SECP384R1()),
        signed_certificate(
            "client-0",
            ec.derive_private_key(7, ec.SECP384R1()).public_key(),
            authority_key(OURS),
        ),
        authority_certificate(OURS),
    )
    forged = [stranger.sign(b"survivors")] * 10
    for signatures in (replayed, forged, [b""] * 10):
        lie = lie_to({1}, 5, signatures=signatures)
        secure = SecureSum(range(10), lie=lie).run()
        check_refused(secure, 1, "a signature of client 0 does not fit")
        assert secure.is_exact()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"signers": [0, 1, 2], "signatures": [b""] * 3},
            "3 signatures, expected 4",
        ),
        ({"signers": [0, 1, 2, 9], "signatures": [b""] * 4}, "not survivors near"),
        ({"signers": [0, 1, 2, 3], "signatures": [b""] * 4}, "not survivors near"),
        ({"signatures": []}, '"signatures" has 0 entries, expected 4'),
        ({"signatures": [1, 2, 3, 4]}, "an entry that is int, expected bytes"),
    ],
)
def test_signatures_that_are_too_few_or_of_strangers_are_refused(
    changes: dict[str, Any], said: str
) -> None:
    lie = lie_to({2}, 5, **changes)
    secure = SecureSum(range(5), is_signed=False, lie=lie, lost={3: (3,)}).run()
    check_refused(secure, 2, said)
