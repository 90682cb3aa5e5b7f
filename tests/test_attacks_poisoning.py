"""Attacks on messages: which rows they replace, by what, and what they remember."""

from __future__ import annotations

import io
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from fedcore.strategies.fedavg import FedAvg
from fedcore.strategies.scaffold import Scaffold
from torch import Tensor

from fedcore import trees
from fedcore.messages.adversary import attacks
from fedcore.messages.adversary.adversary import Adversary
from fedcore.messages.adversary.sending import WARM_UP
from fedcore.messages.adversary.settings import AdversarySettings, AttackName
from fedcore.messages.links import Links, LinkSettings, LinksSettings
from fedcore.messages.vectors import layout
from fedcore.reports import Reports
from fedcore.types import Model
from tests.attacked import assert_near, multi_krum
from tests.helpers import equal

TRAIN = FedAvg.train
HOSTILE = (3, 9)
CLIENTS = [1, 3, 4, 5, 8, 9]
DOWN = Model({"w": torch.full((2, 3), 0.5), "b": torch.ones(2), "n": torch.tensor(1)})
# Attacks that replace messages.
ON_MESSAGES = sorted({*get_args(AttackName)} - {"none", "absent", "label_flip"})


class Message(NamedTuple):
    delta: dict[str, Tensor]
    dc: dict[str, Tensor]
    loss: Tensor
    metrics: dict[str, Tensor]


def message(seed: int = 0, clients: list[int] = CLIENTS) -> Message:
    """Messages of these clients, each drawn by itself."""
    rows = []
    for client in clients:
        draw = torch.Generator().manual_seed(1000 * seed + client)
        w, b = torch.randn(2, 3, generator=draw), torch.randn(2, generator=draw)
        loss, accuracy = torch.rand(2, generator=draw)
        delta = {"w": w, "b": b, "n": torch.tensor(client)}
        dc = {"w": w.double() * 3 + 1}
        rows.append(Message(delta, dc, loss, {"accuracy": accuracy}))
    stacked: Message = trees.stack(rows)
    return stacked


def reports(seed: int = 0, clients: list[int] = CLIENTS) -> Reports:
    ids = torch.tensor(clients)
    return Reports(ids, message(seed, clients), torch.full((len(clients),), 5.0))


def adversary(attack: Any, **settings: Any) -> Adversary:
    if attack == "backdoor":
        settings.setdefault("scale", 3.0)
    given = {"clients": HOSTILE, **settings}
    return Adversary(AdversarySettings(attack=attack, **given), 10, seed=7)


def replaced(attack: Any, r: Reports | None = None, **given: Any) -> Message:
    """The messages of the first round, under this attack."""
    several = {"rule", "weights", "links"}
    extra = {key: given.pop(key) for key in several & given.keys()}
    made = adversary(attack, **given)
    after, _ = made.replaced(r or reports(), TRAIN, 0, DOWN, {}, **extra)
    up: Message = after.up
    return up


def rows_of(up: Message, places: list[int]) -> Tensor:
    """The vectors `delta` of some rows, float64 [n, 8]."""
    flat = [up.delta[name][places].flatten(1).double() for name in ("w", "b")]
    return torch.cat(flat, 1)


HONEST_PLACES, HOSTILE_PLACES = [0, 2, 3, 4], [1, 5]


def honest_rows() -> Tensor:
    return rows_of(message(), HONEST_PLACES)


# Optimised


@pytest.mark.parametrize("attack", ["alie_optimised", "ipm_optimised"])
def test_an_optimised_attack_hurts_the_rule_in_force_more_than_fixed_ones(
    attack: str,
) -> None:
    asked = []

    def rule(rows: Tensor, weights: Tensor, number: int) -> Tensor:
        asked.append((weights.tolist(), number))
        return multi_krum(rows.double(), 2)

    mu, sigma = attacks.mean(honest_rows()), attacks.deviation(honest_rows())
    given = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    up = replaced(attack, rule=rule, weights=torch.tensor(given))
    assert {number for _, number in asked} == {0, 1}, "each vector by itself"
    assert all(weights == given for weights, _ in asked)

    def damage(sent: Tensor) -> float:
        rows = rows_of(message(), [*range(6)])
        rows[HOSTILE_PLACES] = sent.float().double()
        return float((multi_krum(rows, 2) - mu).norm())

    reached = damage(rows_of(up, [1])[0])
    for tau in (0.0, 0.5, 1.5, -0.5, -1.5):
        fixed = mu + tau * sigma if attack == "alie_optimised" else -tau * mu
        assert reached >= damage(fixed) - 1e-9, f"tau = {tau} hurts more"


def test_without_a_rule_the_weighted_mean_is_attacked() -> None:
    """Its damage grows with tau, so that the search doubles its step each time."""
    up = replaced("ipm_optimised", weights=torch.ones(6))
    mu = attacks.mean(honest_rows())
    tau = rows_of(up, [1])[0] / mu
    assert float(tau.abs().min()) == pytest.approx(10 * (2**19 - 1), rel=1e-5)


# Who, and which rows


def test_malicious_clients_are_drawn_by_the_seed_and_by_nothing_else() -> None:
    s = AdversarySettings(attack="sign_flip", fraction=0.29)
    made = Adversary(s, 100, seed=3)
    assert len(made.clients) == 29
    assert made.clients == Adversary(s, 100, seed=3).clients
    assert made.clients != Adversary(s, 100, seed=4).clients
    fewer = AdversarySettings(attack="zero", fraction=0.1)
    assert Adversary(fewer, 100, seed=3).clients < made.clients


@pytest.mark.parametrize("attack", ON_MESSAGES)
def test_only_rows_of_malicious_clients_change(attack: str) -> None:
    before, after = message(), replaced(attack)
    assert equal(trees.at(after, HONEST_PLACES), trees.at(before, HONEST_PLACES))
    for field in ("delta", "dc"):
        old, new = getattr(before, field)["w"], getattr(after, field)["w"]
        assert new.dtype == old.dtype
        assert not torch.equal(new[HOSTILE_PLACES], old[HOSTILE_PLACES])
    assert torch.equal(after.delta["n"], before.delta["n"]), "whole numbers stay"
    assert equal(message(), before), "the messages themselves are not written to"


@pytest.mark.parametrize("attack", ON_MESSAGES)
def test_scalars_of_malicious_clients_are_the_honest_median(attack: str) -> None:
    before, after = message(), replaced(attack)
    for old, new in (
        (before.loss, after.loss),
        (before.metrics["accuracy"], after.metrics["accuracy"]),
    ):
        median = old[HONEST_PLACES].double().median().float()
        middle = old[HONEST_PLACES].double().quantile(0.5).float()
        assert torch.equal(new[HOSTILE_PLACES], middle.repeat(2)), median


def test_each_attack_sends_the_vector_of_its_formula() -> None:
    rows, own = honest_rows(), rows_of(message(), HOSTILE_PLACES)
    expected = {
        "sign_flip": -own,
        "scaled": own * 3,  # six clients of equal weight, of whom two are malicious
        "zero": torch.zeros(2, 8),
        "stale": torch.zeros(2, 8),  # in the first round nothing was heard before
        "alie": (rows.mean(0) + 1.5 * rows.std(0)).repeat(2, 1),
        "ipm": (-0.5 * rows.mean(0)).repeat(2, 1),
        "minmax": attacks.minmax(rows, "std").repeat(2, 1),
        "minsum": attacks.minsum(rows, "std").repeat(2, 1),
        "backdoor": own * 3,
    }
    for attack, values in expected.items():
        assert_near(rows_of(replaced(attack), HOSTILE_PLACES), values, digits=6)


def test_strengths_are_those_of_the_settings() -> None:
    rows, own = honest_rows(), rows_of(message(), HOSTILE_PLACES)
    flipped = replaced("sign_flip", scale=10)
    assert_near(rows_of(flipped, HOSTILE_PLACES), -10 * own, digits=5)
    scaled = replaced("scaled", scale=-2)
    assert_near(rows_of(scaled, HOSTILE_PLACES), -2 * own, digits=6)
    weights = torch.tensor([1.0, 2, 1, 1, 1, 0.5])
    by_weight = replaced("backdoor", scale="auto", weights=weights)
    assert_near(rows_of(by_weight, HOSTILE_PLACES), own * 6.5 / 2.5, digits=5)
    little = replaced("alie", scale="auto")
    z = attacks.z_max(6, 2)
    expected = (rows.mean(0) + z * rows.std(0)).repeat(2, 1)
    assert_near(rows_of(little, HOSTILE_PLACES), expected, digits=6)


def test_model_replacement_among_silent_clients_makes_the_mean_its_own() -> None:
    r, weights = reports(), torch.tensor([2.0, 3, 1, 4, 1, 0])
    silent = {"w": torch.zeros(6, 2, 3), "b": torch.zeros(6, 2)}
    silent["w"][1], silent["b"][1] = 0.25, -1.5
    up = {name: x.clone() for name, x in silent.items()}
    made = adversary("scaled", clients=(3,))
    after, _ = made.replaced(r._replace(up=up), TRAIN, 0, DOWN, {}, weights=weights)
    mean = trees.scale(trees.weighted_sum(after.up, weights), 1 / weights.sum())
    assert equal(mean, trees.at(silent, 1))


def test_noise_of_gaussian_attackers_has_the_mean_norm_and_a_key_of_its_own() -> None:
    clients = [*range(40)]
    draw = torch.Generator().manual_seed(0)
    up = {"w": torch.randn(40, 5000, generator=draw) + 1}
    r = Reports(torch.tensor(clients), up, torch.ones(40))
    made = adversary("gaussian", clients=(0, 1), scale=2.0)
    after, _ = made.replaced(r, TRAIN, 4, DOWN, {})
    mu = float(up["w"][2:].mean(0).norm())
    for row in after.up["w"][:2]:
        assert float(row.norm()) == pytest.approx(2 * mu, rel=0.05)
        assert abs(float(row.mean())) < 0.2
    assert not torch.equal(after.up["w"][0], after.up["w"][1])
    later, _ = made.replaced(r, TRAIN, 5, DOWN, {})
    assert not torch.equal(after.up["w"][0], later.up["w"][0])
    alone = trees.at(up, [0, *range(2, 40)])
    ids = torch.tensor([0, *range(2, 40)])
    again, _ = made.replaced(Reports(ids, alone, torch.ones(39)), TRAIN, 4, DOWN, {})
    assert torch.equal(again.up["w"][0], after.up["w"][0]), "whoever else is there"


def test_absent_clients_are_named_and_their_reports_gone() -> None:
    r = reports()._replace(failed={0: "error: its own"})
    after, kept = adversary("absent").replaced(r, TRAIN, 0, DOWN, {})
    assert after.clients.tolist() == [1, 4, 5, 8]
    assert equal(after.up, trees.at(message(), HONEST_PLACES))
    assert after.num_examples.tolist() == [5.0] * 4
    assert sorted(after.failed) == [0, 3, 9]
    assert after.failed[9].startswith("absent: ")
    assert kept == {}


@pytest.mark.parametrize("attack", ON_MESSAGES)
def test_nothing_happens_without_a_malicious_or_without_an_honest_client(
    attack: str,
) -> None:
    made = adversary(attack)
    for clients in ([1, 4, 5], [3, 9]):
        r = reports(clients=clients)
        after, kept = made.replaced(r, TRAIN, 0, DOWN, {})
        assert after is r
        assert kept == {}


def test_attacks_begin_in_their_first_round_and_leave_evaluations_alone() -> None:
    made = adversary("zero", start=3)
    assert [made.is_due(TRAIN, t) for t in range(4)] == [False, False, True, True]
    assert not made.is_due(FedAvg.evaluate, 5)
    assert not made.is_due(FedAvg.finetune, 5)
    assert not adversary("label_flip").is_due(TRAIN, 5)
    assert not adversary("backdoor", scale=None).is_due(TRAIN, 5)
    assert adversary("backdoor", scale="auto").is_due(TRAIN, 5)
    nobody = Adversary(AdversarySettings(), 10, 0)
    assert nobody.clients == frozenset()
    assert not nobody.is_due(TRAIN, 5)
    early, _ = made.replaced(reports(), TRAIN, 1, DOWN, {})
    assert equal(early.up, message())


@pytest.mark.parametrize("attack", ["alie", "minmax", "ipm_optimised", "mimic"])
def test_an_honest_message_that_is_not_finite_is_no_part_of_an_attack(
    attack: str,
) -> None:
    r = reports()
    r.up.delta["w"][2, 0, 0] = torch.nan
    r.up.dc["w"][4] = torch.inf
    fewer = [1, 3, 5, 9]
    expected = replaced(attack, reports(clients=fewer))
    found = replaced(attack, r)
    assert torch.equal(rows_of(found, [1, 5]), rows_of(expected, [1, 3]))
    assert bool(found.delta["w"][2, 0, 0].isnan()), "it is refused later, by the server"


# Layouts of messages


def test_vectors_are_the_dicts_of_a_message_and_scalars_its_numbers() -> None:
    assert layout(message()) == ([[0, 1], [3]], [4, 5], ["delta", "dc"])
    assert layout(DOWN, axes=0) == ([[0, 1]], [], ["params"])
    assert layout(torch.zeros(3, 2)) == ([[0]], [], [""])


def test_rows_that_are_one_row_in_memory_can_be_replaced() -> None:
    up = {"w": torch.ones(2, 3).expand(6, 2, 3)}
    r = Reports(torch.tensor(CLIENTS), up, torch.ones(6))
    after, _ = adversary("zero").replaced(r, TRAIN, 0, DOWN, {})
    assert after.up["w"].sum((1, 2)).tolist() == [6, 0, 6, 6, 6, 0]
    assert float(up["w"].sum()) == 36


# Memory


def stored(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file)
    return loaded


def test_a_stale_client_sends_the_change_of_the_last_broadcasts_it_heard() -> None:
    made, kept = adversary("stale"), dict[str, Tensor]()
    sent = []
    for t, clients in enumerate([CLIENTS, [1, 4, 5], CLIENTS]):
        down = Model({"w": torch.full((2, 3), t * t + 0.5), "b": torch.full((2,), -t)})
        down.params["b"] = down.params["b"].float()
        after, kept = made.replaced(reports(t, clients), TRAIN, t, down, stored(kept))
        sent.append(after.up)
    assert rows_of(sent[0], [1]).abs().sum() == 0
    assert_near(rows_of(sent[2], [1, 5]), [[4.0] * 6 + [-2.0] * 2] * 2)


def test_a_stale_client_of_scaffold_has_the_change_of_each_vector() -> None:
    made, kept = adversary("stale"), dict[str, Tensor]()
    shape = {"w": torch.zeros(2, 3)}
    for t in (1, 2):
        down = (trees.scale(shape, 0), trees.map(lambda x: x + 5, shape))
        down = trees.map(lambda x, t=t: x + t * (1 + x), down)
        up = (trees.stack([shape] * 6), trees.stack([shape] * 6))
        r = Reports(torch.tensor(CLIENTS), up, torch.ones(6))
        after, kept = made.replaced(r, Scaffold.train, t, down, stored(kept))
    assert after.up[0]["w"][1].unique().tolist() == [1.0]
    assert after.up[1]["w"][1].unique().tolist() == [6.0]


def power_step(rows: np.ndarray, z: np.ndarray, k: int) -> np.ndarray:
    differences = rows - rows.mean(0)
    s = ((differences @ z)[:, None] * differences).sum(0)
    z = (k * z + s / np.linalg.norm(s)) / (k + 1)
    return np.asarray(z / np.linalg.norm(z))


def test_mimic_copies_one_client_and_keeps_to_it_after_the_warm_up() -> None:
    made, kept = adversary("mimic"), dict[str, Tensor]()
    ids, z = np.array([1, 4, 5, 8]), None
    for t in range(WARM_UP):
        after, new = made.replaced(reports(t), TRAIN, t, DOWN, stored(kept))
        rows = rows_of(message(t), HONEST_PLACES).numpy()
        if z is not None:
            z = power_step(rows, z, t)
            assert np.allclose(new["mimic train 0 z"].numpy(), z, atol=1e-6)
        z, kept = new["mimic train 0 z"].double().numpy(), new
        copied = int(np.argmax(rows @ z))
        assert torch.equal(rows_of(after.up, [1])[0], torch.from_numpy(rows[copied]))
        assert int(kept["mimic train 0 target"]) == ids[copied]
    target = int(kept["mimic train 0 target"])
    place = CLIENTS.index(target)
    for t in range(WARM_UP, WARM_UP + 4):
        after, new = made.replaced(reports(t), TRAIN, t, DOWN, stored(kept))
        assert equal(new, kept), "it remembers, and learns no more"
        sent, own = rows_of(after.up, HOSTILE_PLACES), rows_of(message(t), [place])
        assert torch.equal(sent, own.repeat(2, 1))
    others = [client for client in CLIENTS if client != target]
    r = reports(99, others)
    after, new = made.replaced(r, TRAIN, 30, DOWN, kept)
    assert equal(new, kept)
    row = rows_of(after.up, [others.index(9)])[0]
    honest = [i for i, client in enumerate(others) if client not in HOSTILE]
    along = rows_of(r.up, honest) @ kept["mimic train 0 z"].double()
    assert torch.equal(row, rows_of(r.up, [honest[int(along.argmax())]])[0])


@pytest.mark.parametrize("attack", ["mimic", "stale", "gaussian"])
def test_memory_comes_back_bit_for_bit(attack: str) -> None:
    def sent(is_stopped: bool) -> list[Tensor]:
        made, kept, rows = adversary(attack), dict[str, Tensor](), []
        for t in range(WARM_UP + 3):
            down = Model({"w": torch.full((2, 3), 0.1 * t), "b": torch.zeros(2)})
            if is_stopped:
                made, kept = adversary(attack), stored(kept)
            after, kept = made.replaced(reports(t), TRAIN, t, down, kept)
            rows.append(rows_of(after.up, HOSTILE_PLACES))
        return rows

    assert equal(sent(is_stopped=True), sent(is_stopped=False))


def test_a_round_that_does_not_count_leaves_no_memory() -> None:
    made, kept = adversary("mimic"), dict[str, Tensor]()
    _, kept = made.replaced(reports(0), TRAIN, 0, DOWN, kept)
    before = stored(kept)
    made.replaced(reports(1), TRAIN, 1, DOWN, kept)
    assert equal(kept, before)


# The uplink


def test_noise_of_the_uplink_is_on_malicious_messages_too() -> None:
    links = Links(LinksSettings(uplink=LinkSettings(variance=0.01)), seed=7)
    quiet, noisy = replaced("alie"), replaced("alie", links=links)
    assert equal(trees.at(noisy, HONEST_PLACES), trees.at(quiet, HONEST_PLACES))
    for place in HOSTILE_PLACES:
        message = trees.at(quiet, place)
        arrived = links.carry(message, "uplink", TRAIN, 0, CLIENTS[place])
        assert equal(trees.at(noisy, place), arrived)
        assert not torch.equal(noisy.delta["w"][place], quiet.delta["w"][place])
    # What arrived had its noise already.
    assert equal(replaced("sign_flip", links=links), replaced("sign_flip"))
