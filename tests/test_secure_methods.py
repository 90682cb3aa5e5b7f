"""Which methods may have a secure sum, and noise of the clients in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcore import methods
from fedcore.config import Experiment

PRESETS = sorted((Path(__file__).parent.parent / "strategies").glob("*.toml"))
# What each preset says to "secure": None, or a part of its reason.
SECURE: dict[str, str | None] = {
    "fedlaw": "inner products",
    "fedau": "method.cutoff",
    "fedstale": "method.cutoff",
    "fedexlora": "product of every client",
    "flora": "product of every client",
    "flexlora": "product of every client",
    "hetlora": "product of every client",
}
CHANGED = [
    ("fedau", {"cutoff": 50}, "secure", None),
    ("fedstale", {"cutoff": 50}, "secure", None),
    ("fedstale", {"cutoff": 50, "weights": "examples"}, "secure", "weights"),
    ("admm", {"solver": "sgd"}, "secure", None),
    ("admm", {"solver": "exact"}, "secure", "solver"),
    ("clu", {"solver": "exact"}, "secure", "solver"),
    ("rerce", {"solver": "exact"}, "secure", "solver"),
    ("rerce", {"solver": "sgd"}, "secure", None),
    ("fedavg", {"weighting": "participating"}, "distributed", None),
    ("fedavg", {"weighting": "examples"}, "distributed", "counts examples"),
    ("fedavg", {"weighting": "known"}, "distributed", "counts examples"),
    ("mifa", {}, "distributed", "remembers the last message"),
    ("rerce", {"solver": "sgd"}, "distributed", "no differences"),
    ("dpfedavg", {}, "distributed", "adds noise already"),
    ("fedlaw", {}, "distributed", "every single update"),
]


def answer(preset: str, settings: dict[str, Any], setting: Any) -> str | None:
    experiment = Experiment.load(
        preset, {f"method.{name}": value for name, value in settings.items()}
    )
    return methods.load(experiment.method.name)(experiment.method).refuses(setting)


@pytest.mark.parametrize("preset", [file.stem for file in PRESETS])
def test_every_preset_takes_a_secure_sum_or_says_why_not(preset: str) -> None:
    reason, expected = answer(preset, {}, "secure"), SECURE.get(preset)
    if "exact" in str(getattr(Experiment.load(preset).method, "solver", "")):
        expected = "solver"
    if expected is None:
        assert reason is None
    else:
        assert reason is not None
        assert expected in reason


@pytest.mark.parametrize(("preset", "settings", "setting", "expected"), CHANGED)
def test_a_methods_settings_decide(
    preset: str, settings: dict[str, Any], setting: str, expected: str | None
) -> None:
    reason = answer(preset, settings, setting)
    if expected is None:
        assert reason is None
    else:
        assert reason is not None
        assert expected in reason


def test_methods_that_clip_steps_refuse_gradients_of_single_examples() -> None:
    assert answer("scaffold", {}, "dp") == answer("scaffold", {}, "clip")
    assert answer("fedavg", {}, "dp") is None
