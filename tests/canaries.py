"""What tests of canaries share: small runs with them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fedcore import Experiment
from fedcore.rounds.loop import Result, run

PLANTED: dict[str, Any] = {
    "method": {"name": "dpfedavg", "noise_multiplier": 1.0, "clip": 0.5},
    "task": "least-squares",
    "options": {"features": 400, "examples": 10},
    "population": 10,
    "rounds": 5,
    "local": {"steps": 1, "batch_size": 10},
    "participation": {"name": "uniform", "fraction": 1.0},
    "evaluation": {"every": 5, "clients": 0},
    "min_reports": 0,
    "engine": {"name": "sequential"},
    "checkpoint": {"seconds": 1000.0},
    "audit": {"canaries": 20},
}
NOISY_MESSAGES: dict[str, Any] = {
    "method": {"name": "fedavg", "weighting": "participating"},
    "defence": {"clip": 0.5, "noise_multiplier": 1.0},
}
SECRET_NOISE: dict[str, Any] = {
    "method": {"name": "fedavg", "weighting": "participating"},
    "aggregation": {"secure": True},
    "defence": {"distributed": {"clip": 0.5, "noise_multiplier": 1.0}},
}


def planted(settings: dict[str, Any] | None = None, **overrides: Any) -> Experiment:
    """A run of a quarter of a second; overrides are dotted keys with __ for the dot."""
    values = PLANTED | (settings or {})
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Experiment.parse(values, dotted)


def outcome_of(experiment: Experiment) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return run(experiment, Path(folder) / "run")


def found_in(experiment: Experiment) -> dict[str, Any]:
    """What the canaries of a run found."""
    found: dict[str, Any] = outcome_of(experiment).final["canaries"]
    return found
