"""Noise of devices in secure sums: their own, and refused where it is too little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedcore.config import Experiment
from fedcore.errors import RunError
from fedcore.messages.secure.distributed import DistributedNoise
from fedcore.rng import rng
from fedcore.rounds.loop import run
from tests.flower.fake import FakeGrid
from tests.flower.test_grid import over_flower, preset_of
from tests.flower.test_secure import Edit, facts_of, gone
from tests.helpers import slow, small

NOISE: dict[str, Any] = {
    "aggregation": {"secure": True},
    "participation": {"name": "uniform", "cohort": 6},
    "defence": {"distributed": {"noise_multiplier": 0.5, "clip": 0.05}},
}


def noisy(name: str, **settings: Any) -> Experiment:
    if name == "fedavg":
        settings["method__weighting"] = "participating"
    return small(name, **{**NOISE, **settings})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def keyed(self: DistributedNoise, function: str, t: int, client: int) -> bytes:
    return rng(self.seed, f"noise {function}", t, client).bytes(32)


@pytest.mark.parametrize("name", ["fedavg", slow("scaffold")])
def test_with_the_simulations_noise_devices_have_its_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = noisy(name)
    one = run(e, tmp_path / "sequential")
    monkeypatch.setattr(DistributedNoise, "_key", keyed)
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12))
    assert other.params_sha256 == one.params_sha256
    assert other.dropped == {}


def test_devices_draw_other_noise_each_time_and_the_run_says_so(
    tmp_path: Path,
) -> None:
    e, shas = noisy("fedavg", rounds=2, engine__name="grid"), set()
    for place in ("a", "b"):
        folder = tmp_path / place
        folder.mkdir()
        result = over_flower(e, folder, FakeGrid(preset_of(e, folder), 12))
        shas.add(result.params_sha256)
        assert result.dropped == {}
        spent = result.final["privacy"]
        assert spent["noise"] == "drawn by each device from its operating system"
        assert spent["view"] == "secure_sum"
    assert len(shas) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"honest": 5}, "a threshold of 4 clients: noise is counted on from 5"),
        ({"colluding": 1}, "colluding of 1, and by this client's settings 0"),
        ({"deviation": 7}, "a deviation of 7 steps"),
        ({"clip": 2.0}, "clip of 2, and by this client's settings"),
        ({"noise_multiplier": 0.25}, "noise_multiplier of 0.25, and by this client's"),
    ],
)
def test_a_server_that_asks_for_less_noise_gets_no_sum(
    changes: dict[str, float],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    terms = DistributedNoise.terms

    def lying(self: DistributedNoise) -> str:
        return json.dumps(json.loads(terms(self)) | changes, sort_keys=True)

    monkeypatch.setattr(DistributedNoise, "terms", lying)
    e = noisy("fedavg", rounds=1)
    with pytest.raises(RunError, match=r"refused \(6\)"):
        over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12))
    assert reason in caplog.text


def test_a_server_that_asks_for_no_noise_gets_no_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(DistributedNoise, "terms", lambda self: "")
    e = noisy("fedavg", rounds=1)
    with pytest.raises(RunError, match=r"refused \(6\)"):
        over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12))
    assert "noise by terms of ''" in caplog.text


def test_the_threshold_is_that_of_the_noise(tmp_path: Path) -> None:
    """Of 12 clients 8 are counted on, also in a round in which three do not answer."""
    everybody = {"name": "uniform"}
    e = noisy("fedavg", participation=everybody, rounds=2)
    grid = FakeGrid(preset_of(e, tmp_path), 12, losing_in_keys({0, 1, 2}))
    over_flower(e, tmp_path, grid)
    first, second = rows_of(tmp_path)
    assert first["secure"]["train"] == second["secure"]["train"] | {"clients": 9}
    assert first["secure"]["train"]["threshold"] == 8


def losing_in_keys(clients: set[int]) -> Edit:
    """These clients are gone before they answer to anything in the first round."""

    def weather(reply: Message) -> list[Message]:
        facts = facts_of(reply)
        is_it = facts.get("exchange") == 1 and facts["t"] == 0
        if is_it and not clients.isdisjoint(facts["clients"]):
            return gone(reply)
        return [reply]

    return weather
