"""Models made to leak, and models that only train."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedcore.audit.inspection import inspect_model
from fedcore.audit.observe import Observation
from tests.audits import cnn, data, mlp, see


def changed(seen: Observation, name: str, value: Tensor) -> Observation:
    return replace(seen, w0={**seen.w0, name: value})


def test_a_model_as_it_was_initialised_is_not_suspected() -> None:
    x, y = data(3, 6)
    assert inspect_model(see(cnn(), x, y)) == []
    (line,) = inspect_model(see(mlp(), x, y))
    assert "is linear on the raw input" in line


def test_an_imprint_layer_is_found() -> None:
    x, y = data(3, 6)
    layers = nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    seen = see(nn.Sequential(*layers), x, y)
    alike = changed(seen, "1.weight", torch.ones(32, 64) / 64)
    planted = changed(alike, "1.bias", torch.linspace(-1, 0, 32))
    lines = "\n".join(inspect_model(planted))
    assert '32 of 32 rows of "1.weight" are one direction' in lines
    equal_biases = changed(alike, "1.bias", torch.zeros(32))
    assert "one direction" not in "\n".join(inspect_model(equal_biases))


@pytest.mark.parametrize(("kind", "factor"), [("weight", 20.0), ("bias", 1e4)])
def test_parameters_out_of_range_are_found(kind: str, factor: float) -> None:
    seen = see(cnn(), *data(3, 6))
    last = [name for name in seen.w0 if name.endswith(kind)][-1]
    (line,) = inspect_model(changed(seen, last, factor * seen.w0[last]))
    assert line.startswith(f'"{last}" is ')


def test_a_model_after_long_training_is_not_suspected() -> None:
    trained = see(cnn(), *data(3, 6), epochs=40, lr=0.1)
    assert inspect_model(replace(trained, w0=trained.wT)) == []
