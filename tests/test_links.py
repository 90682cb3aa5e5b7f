"""The channel: what is disturbed, by how much, and settings that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from fedcore.strategies.fedavg import FedAvg
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError
from fedcore.messages.links import Direction, Links, LinkSettings, LinksSettings
from fedcore.method import on_client
from fedcore.rounds.loop import run
from fedcore.types import ClientFunction
from tests.helpers import equal, loop_of, small


class Message(NamedTuple):
    w: dict[str, Tensor]
    loss: Tensor
    count: Tensor


MESSAGE = Message(
    {"a": torch.full((300, 200), 2.0), "b": torch.zeros(3, dtype=torch.float64)},
    torch.tensor(1.0),
    torch.arange(4),
)


def links(seed: int = 0, **direction: dict[str, float]) -> Links:
    return Links(LinksSettings.model_validate(direction), seed)


def test_tensors_are_disturbed_by_the_variance_and_scalars_are_not() -> None:
    uplink = links(uplink={"variance": 0.04})
    heard = uplink.carry(MESSAGE, "uplink", FedAvg.train, 3, 5)
    noise = heard.w["a"] - 2.0
    # 60 000 draws: standard error 0.6 %
    assert noise.var().item() == pytest.approx(0.04, rel=0.03)
    assert abs(noise.mean().item()) < 4 * 0.2 / 60_000**0.5
    assert heard.w["b"].dtype == torch.float64
    assert heard.w["b"].abs().min() > 0
    assert (heard.loss, heard.count.tolist()) == (MESSAGE.loss, [0, 1, 2, 3])
    assert bool((MESSAGE.w["a"] == 2).all()), "the message that was sent is as it was"


def test_the_snr_is_over_all_entries_of_a_message() -> None:
    downlink = links(downlink={"snr_db": 20.0})
    heard = downlink.carry(MESSAGE, "downlink", FedAvg.train, 0, 0)
    power = 60_000 * 4 / 60_003
    assert (heard.w["a"] - 2.0).var().item() == pytest.approx(power / 100, rel=0.03)
    quiet = trees.zeros_like(MESSAGE)
    assert equal(downlink.carry(quiet, "downlink", FedAvg.train, 0, 0), quiet)


@on_client
def other(self: Any, down: Any) -> Any:
    """Another client function than FedAvg's."""


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"direction": "downlink"}, {"fn": other}, {"t": 2}, {"client": 3}],
    ids=lambda change: next(iter(change)),
)
def test_noise_has_a_key(change: dict[str, Any]) -> None:
    def heard(
        seed: int = 0,
        direction: Direction = "uplink",
        fn: ClientFunction = FedAvg.train,
        t: int = 1,
        client: int = 2,
    ) -> Tensor:
        both = links(seed, uplink={"variance": 1.0}, downlink={"variance": 1.0})
        noisy: Tensor = both.carry(MESSAGE, direction, fn, t, client).w["a"]
        return noisy

    assert torch.equal(heard(), heard())
    assert not torch.equal(heard(), heard(**change))


def test_two_tensors_of_one_message_hear_different_noise() -> None:
    same = {"a": torch.zeros(50), "b": torch.zeros(50)}
    for direction in get_args(Direction):
        both = links(uplink={"variance": 1.0}, downlink={"variance": 1.0})
        heard = both.carry(same, direction, FedAvg.train, 1, 2)
        assert not bool((heard["a"] == heard["b"]).any()), direction


def test_a_measurement_hears_no_noise(tmp_path: Path) -> None:
    both = {"links__downlink__variance": 1.0, "links__uplink__variance": 1.0}
    noisy = loop_of(small("fedavg", **both), tmp_path)
    quiet = loop_of(small("fedavg"), tmp_path / "quiet")
    assert noisy.evaluate() == quiet.evaluate()


def test_a_client_keeps_what_it_sent_undisturbed(tmp_path: Path) -> None:
    noisy = loop_of(small("scaffold", links__uplink__variance=1.0), tmp_path / "noisy")
    quiet = loop_of(small("scaffold"), tmp_path / "quiet")
    kept = []
    for loop in (noisy, quiet):
        loop.round()
        cohort, _ = loop.process.sample(0, {})
        assert loop.engine.states is not None
        kept.append(loop.engine.states.get(int(cohort[0])))
    assert equal(*kept)
    assert not equal(noisy.state.server, quiet.state.server)


def test_variance_or_snr_and_what_is_given_last_replaces_the_preset() -> None:
    both = r"links\.uplink: variance = 1\.0 and snr_db = 3\.0: give one of the two"
    with pytest.raises(SettingsError, match=both):
        small("fedavg", links__uplink={"variance": 1.0, "snr_db": 3.0})
    negative = r"links\.uplink\.variance = -1.*greater than or equal to 0"
    with pytest.raises(SettingsError, match=negative):
        small("fedavg", links__uplink__variance=-1)
    e = Experiment.load("strategies/rerce.toml", ["links.uplink.snr_db=10"])
    assert e.links.uplink == LinkSettings(snr_db=10)
    assert e.links.downlink == LinkSettings(variance=6.25e-4)


def test_noise_that_drowns_everything_ends_the_run_in_words_and_leaves_its_files(
    tmp_path: Path,
) -> None:
    e = small("fedavg", links__uplink__snr_db=-200, rounds=12)
    with pytest.raises(RunError, match="no usable update in 3 round"):
        run(e, tmp_path / "r")
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count("\n") >= 3
