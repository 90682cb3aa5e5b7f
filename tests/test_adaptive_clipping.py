"""A bound on norms that follows their quantile (Andrew et al., NeurIPS 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedcore.strategies.dpfedavg import Server, UpWithBit
from torch import Tensor

from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.methods import load
from fedcore.reports import Reports
from fedcore.rounds.loop import run
from fedcore.storage.rows import StateStore
from tests.helpers import round_of

CLIENTS = 200


def bounds(start: float, quantile: float, rounds: int = 100, **settings: Any) -> Any:
    """C_0 .. C_T for clients whose updates have norms U(0.5, 1.5), without noise."""
    method = load("dpfedavg")
    made: Any = Experiment.parse(
        {
            "method": {
                "name": "dpfedavg",
                "clip": start,
                "quantile": quantile,
                "noise_multiplier": 0.0,
                **settings,
            }
        }
    ).method
    memory = StateStore((), 0, Path)
    state = method(made).init_server({"w": torch.zeros(1)}, CLIENTS)
    draw, found = np.random.default_rng(0), [state.clip.item()]

    def answer(fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
        norms = torch.from_numpy(draw.uniform(0.5, 1.5, CLIENTS)).float()
        within = (norms <= down.clip).float() - 0.5
        sent = torch.minimum(norms, down.clip)[:, None]
        yield Reports(clients, UpWithBit({"w": sent}, within), torch.ones(CLIENTS))

    for t in range(rounds):
        r = round_of(t, torch.arange(CLIENTS), CLIENTS, answer, memory)
        state = method(made).round(state, r)
        found.append(state.clip.item())
    return found


@pytest.mark.parametrize("start", [0.1, 1.0, 3.0])
def test_the_bound_comes_to_the_median_of_the_norms_from_either_side(
    start: float,
) -> None:
    assert bounds(start, 0.5)[-1] == pytest.approx(1.0, abs=0.03)


def test_the_bound_comes_to_another_quantile_of_the_norms() -> None:
    assert bounds(1.0, 0.9)[-1] == pytest.approx(1.4, abs=0.03)


def test_one_step_of_the_bound_is_the_papers() -> None:
    # Nobody is within 0.1: b = 0, so C grows by exp(0.2 x 0.5).
    first, second = bounds(0.1, 0.5, rounds=1)
    assert second == pytest.approx(first * math.exp(0.1), rel=1e-6)


def test_both_releases_together_cost_what_the_noise_multiplier_says() -> None:
    settings = {"name": "dpfedavg", "quantile": 0.5, "noise_multiplier": 1.1}
    made: Any = Experiment.parse({"method": settings}).method
    method: Any = load("dpfedavg")(made)
    z_delta, z_bit = method._multiplier(100.0), 2 * method._bit_noise(100.0)
    assert method._bit_noise(100.0) == 5.0
    # Two Gaussian mechanisms cost as much as one of this multiplier.
    assert (z_delta**-2 + z_bit**-2) ** -0.5 == pytest.approx(1.1, rel=1e-12)
    assert z_delta == pytest.approx(1.1067, abs=1e-4)


def test_a_run_logs_its_bound_and_goes_on_with_it(tmp_path: Path) -> None:
    experiment = Experiment.load(
        "dpfedavg",
        {
            "method.quantile": 0.5,
            "method.clip": 0.05,
            "method.noise_multiplier": 0.5,
            "method.bit_noise": 1.0,
            "population": 20,
            "rounds": 4,
            "task": "digits",
        },
    )
    whole = run(experiment, tmp_path / "whole")
    stopped = run(experiment.model_copy(update={"rounds": 2}), tmp_path / "stopped")
    clips = [row["server_clip"] for row in whole.history]
    assert clips[0] == pytest.approx(0.05)
    assert len(set(clips)) == 4
    assert [row["server_clip"] for row in stopped.history] == clips[:2]
    assert isinstance(load("dpfedavg")(experiment.method).init_server({}, 5), Server)


def test_a_count_of_bits_that_costs_too_much_is_refused(tmp_path: Path) -> None:
    experiment = Experiment.load(
        "dpfedavg",
        {"method.quantile": 0.5, "method.bit_noise": 0.4, "population": 20},
    )
    with pytest.raises(SettingsError, match=r"set bit_noise above 0\.5"):
        run(experiment, tmp_path / "run")


def test_settings_of_a_bound_that_stays_are_refused() -> None:
    with pytest.raises(SettingsError, match="set quantile"):
        Experiment.load("dpfedavg", {"method.bit_noise": 0.1})
