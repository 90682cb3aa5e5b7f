"""The channel: what is disturbed, by how much, and what a user can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError
from fedcore.messages.links import Links, LinksSettings
from fedcore.rounds.loop import run
from strategies.fedavg import FedAvg
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


def test_tensors_are_disturbed_by_the_variance_and_scalars_and_integers_are_not() -> (
    None
):
    heard = links(uplink={"variance": 0.04}).carry(
        MESSAGE, "uplink", FedAvg.train, 3, 5
    )
    noise = heard.w["a"] - 2.0
    assert noise.var().item() == pytest.approx(
        0.04, rel=0.03
    )  # 60 000 draws: standard error 0.6 %
    assert abs(noise.mean().item()) < 4 * 0.2 / 60_000**0.5
    assert heard.w["b"].dtype == torch.float64
    assert heard.w["b"].abs().min() > 0
    assert (heard.loss, heard.count.tolist()) == (MESSAGE.loss, [0, 1, 2, 3])
    assert bool((MESSAGE.w["a"] == 2).all()), "the message that was sent is as it was"


def test_the_snr_is_over_all_entries_of_a_message() -> None:
    heard = links(downlink={"snr_db": 20.0}).carry(
        MESSAGE, "downlink", FedAvg.train, 0, 0
    )
    power = 60_000 * 4 / 60_003
    assert (heard.w["a"] - 2.0).var().item() == pytest.approx(power / 100, rel=0.03)
    quiet = trees.zeros_like(MESSAGE)
    assert equal(
        links(downlink={"snr_db": 20.0}).carry(quiet, "downlink", FedAvg.train, 0, 0),
        quiet,
    )


def test_noise_has_a_key_and_differs_by_seed_round_client_direction_and_function() -> (
    None
):
    def heard(
        seed: int = 0,
        direction: str = "uplink",
        fn=FedAvg.train,
        t: int = 1,
        client: int = 2,
    ):  # type: ignore[no-untyped-def]
        both = links(seed, uplink={"variance": 1.0}, downlink={"variance": 1.0})
        return both.carry(MESSAGE, direction, fn, t, client).w["a"]  # type: ignore[arg-type]

    def other(self, down) -> None:  # type: ignore[no-untyped-def]
        pass

    other.client_data = "train"  # type: ignore[attr-defined]
    assert torch.equal(heard(), heard())
    for change in (
        {"seed": 1},
        {"direction": "downlink"},
        {"fn": other},
        {"t": 2},
        {"client": 3},
    ):
        assert not torch.equal(heard(), heard(**change)), change  # type: ignore[arg-type]


def test_two_tensors_of_one_message_hear_different_noise() -> None:
    same = {"a": torch.zeros(50), "b": torch.zeros(50)}
    for direction in ("uplink", "downlink"):
        both = links(uplink={"variance": 1.0}, downlink={"variance": 1.0})
        heard = both.carry(same, direction, FedAvg.train, 1, 2)  # type: ignore[arg-type]
        assert not bool((heard["a"] == heard["b"]).any()), direction


def test_a_measurement_hears_no_noise(tmp_path: Path) -> None:
    loop = loop_of(
        small("fedavg", links__downlink__variance=1.0, links__uplink__variance=1.0),
        tmp_path,
    )
    silent = loop_of(small("fedavg"), tmp_path / "silent")
    assert loop.evaluate() == silent.evaluate()


def test_a_client_keeps_what_it_sent_undisturbed(tmp_path: Path) -> None:
    noisy = loop_of(small("scaffold", links__uplink__variance=1.0), tmp_path / "noisy")
    silent = loop_of(small("scaffold"), tmp_path / "silent")
    for loop in (noisy, silent):
        loop.round()
    client = int(noisy.process.sample(0, {})[0][0])
    assert equal(noisy.engine.states.get(client), silent.engine.states.get(client))  # type: ignore[union-attr]
    assert not equal(noisy.state.server, silent.state.server)


def test_variance_or_snr_and_what_is_given_last_replaces_the_preset() -> None:
    with pytest.raises(
        SettingsError,
        match=r"links\.uplink: variance = 1\.0 and snr_db = 3\.0: give one of the two",
    ):
        small("fedavg", links__uplink={"variance": 1.0, "snr_db": 3.0})
    with pytest.raises(
        SettingsError, match=r"links\.uplink\.variance = -1.*greater than or equal to 0"
    ):
        small("fedavg", links__uplink__variance=-1)
    e = Experiment.load("strategies/rerce.toml", ["links.uplink.snr_db=10"])
    assert (
        e.links.uplink.snr_db,
        e.links.uplink.variance,
        e.links.downlink.variance,
    ) == (10, 0, 6.25e-4)


def test_noise_that_drowns_everything_ends_the_run_in_words_and_leaves_its_files(
    tmp_path: Path,
) -> None:
    e = small("fedavg", links__uplink__variance=1e300)
    with pytest.raises(RunError, match="no usable update in 3 round"):
        run(e, tmp_path / "r")
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count("\n") == 3
