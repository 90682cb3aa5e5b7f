"""The command that trains a base: the same twice, in steps or minutes, whole or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore import Experiment
from fedcore.data.text.texts import by_client, divided
from fedcore.errors import FedcoreError, SettingsError
from fedcore.models import base as bases
from fedcore.pretraining import command, training
from fedcore.pretraining.command import SHAKESPEARE
from fedcore.pretraining.pretrain import Budget, pretrain
from fedcore.tasks.text import texts_of
from tests.texts import speakers

SHARE = {"text__base": 0.4}


class Silent:
    """An observer that counts."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def started(self, text: str, steps: int) -> None:
        self.planned = steps

    def stepped(self, step: int, loss: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)


def made(folder: Path, name: str, steps: int = 4, **settings: Any) -> dict[str, Any]:
    experiment = speakers(folder, **{**SHARE, **settings})
    return pretrain(experiment, folder / name, Budget(steps), Silent())


def test_a_base_learns_its_text(tmp_path: Path) -> None:
    seen = Silent()
    experiment = speakers(tmp_path, **SHARE)
    facts = pretrain(experiment, tmp_path / "base", Budget(60), seen)
    assert (seen.planned, seen.steps) == (60, list(range(1, 61)))
    before, after = (facts["losses"][when] for when in ("before", "after"))
    for text in ("base", "clients"):
        assert after[text]["nats_a_character"] < before[text]["nats_a_character"] - 0.3
    assert {file.name for file in (tmp_path / "base").iterdir()} == {
        "base.safetensors",
        "base.json",
        "tokenizer.json",
    }
    assert json.loads((tmp_path / "base/base.json").read_text()) == facts


def test_the_same_steps_make_the_same_base(tmp_path: Path) -> None:
    facts = [made(tmp_path, name) for name in "ab"]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert facts[0]["losses"] == facts[1]["losses"]
    assert made(tmp_path, "c", seed=1)["sha256"] != facts[0]["sha256"]
    assert made(tmp_path, "d", steps=5)["sha256"] != facts[0]["sha256"]


def test_minutes_are_steps_that_can_be_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock) / 4)
    experiment = speakers(tmp_path, **SHARE)
    budget = Budget(minutes=0.1)  # 6 s, of steps that take 0.25 s
    facts = pretrain(experiment, tmp_path / "a", budget, Silent())
    assert facts["steps"] == 24
    assert made(tmp_path, "b", steps=24)["sha256"] == facts["sha256"]


def test_a_base_sees_no_text_of_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = speakers(tmp_path, **SHARE)
    division = divided(by_client(texts_of(experiment)), 0.4, 0)
    seen: list[int] = []

    def train(model: Any, ids: Any, *_: Any) -> None:
        seen.append(len(ids))

    monkeypatch.setattr("fedcore.pretraining.pretrain.train", train)
    facts = pretrain(experiment, tmp_path / "a", Budget(1), Silent())
    characters = sum(map(len, division.base.values())) + len(division.base) - 1
    assert seen == [characters]
    assert facts["characters"]["base"] == characters
    assert len(facts["texts"]) == len(division.base)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"text__base": 0}, r"text\.base = 0: no text is the base's"),
    "images": ({"task": "digits"}, r'task = "digits": a base is trained on text'),
    "image model": ({"model__name": "mlp"}, "it takes images"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_text_is_refused(fault: str, tmp_path: Path) -> None:
    settings, expected = REFUSED[fault]
    with pytest.raises(SettingsError, match=expected):
        made(tmp_path, "base", **settings)
    assert not (tmp_path / "base").exists()


def test_a_folder_in_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match="file is a file; give a folder"):
        made(tmp_path, "file/deep/base")


@pytest.mark.parametrize("minutes", ["nan", "inf"])
def test_minutes_are_a_number(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"--minutes {minutes}: expected a number"):
        command.pretrain("shakespeare", minutes=float(minutes), out=tmp_path / "base")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    first = made(tmp_path, "base")
    with pytest.raises(
        SettingsError, match="is there already: delete it, or give anot"
    ):
        made(tmp_path, "base", seed=1)
    assert bases.read_facts(tmp_path / "base") == first


def test_a_base_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bases.Path, "write_text", full)
    with pytest.raises(FedcoreError, match=r"is full: .* make room"):
        pretrain(speakers_of(tmp_path), tmp_path / "b/base", Budget(1), Silent())
    assert list((tmp_path / "b").iterdir()) == []


def speakers_of(folder: Path) -> Any:
    """As `speakers`, whose file is written before the disk is full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases.Path, "write_text", WRITE_TEXT)
        return speakers(folder, **SHARE)


WRITE_TEXT = Path.write_text


@pytest.mark.parametrize(("step", "share"), [(0, 0.2), (4, 1.0), (99, 0.1)])
def test_the_step_size_rises_and_falls(step: int, share: float) -> None:
    assert training.share_of_rate(step, 100) == pytest.approx(share)
    assert training.share_of_rate(0, 1) == 1


def test_the_command_says_what_it_made(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = speakers(tmp_path, **SHARE)
    Path("text.toml").write_text(experiment.to_toml())
    status, printed, progress = cli("pretrain", "text.toml", "--steps", "2", "--json")
    assert status == 0, progress
    facts = json.loads(printed)
    assert facts["base"] == "bases/texts"
    assert facts["steps"] == 2
    assert "step 2/2: loss" in progress
    _, printed, _ = cli("pretrain", "text.toml", "--steps", "2", "--out", "other")
    assert "nats a character, clients" in printed
    for name in ("base.safetensors", "tokenizer.json"):
        first = (Path("bases/texts") / name).read_bytes()
        assert (Path("other") / name).read_bytes() == first
    status, _, said = cli("pretrain", "text.toml", "--steps", "2", "--minutes", "1")
    assert "--steps 2 and --minutes 1: give one of the two" in said
    assert status == 2


def presets_with_a_base() -> list[str]:
    folder = Path(__file__).parent.parent / "strategies"
    files = sorted(folder.glob("*.toml"))
    return [file.stem for file in files if "\nbase = " in file.read_text()]


@pytest.mark.parametrize("name", presets_with_a_base())
def test_the_bundled_base_is_that_of_the_presets(name: str) -> None:
    """`fedcore pretrain shakespeare` and `fedcore run fedit` are for each other."""
    bundled, preset = Experiment.parse(SHAKESPEARE), Experiment.load(name)
    assert preset.base == bundled.base
    assert (preset.model, preset.text) == (bundled.model, bundled.text)
    assert preset.task == bundled.task


def test_the_seed_decides_where_windows_begin() -> None:
    drawn = []
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        x, y = training._drawn(np.arange(1000), 4, seed, step)
        assert torch.equal(x[:, 1:], y[:, :-1])
        drawn.append(x)
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
