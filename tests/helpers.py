"""Small experiments, and tensors compared in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedcore import trees
from fedcore.config import Experiment
from fedcore.loop import Loop, Quiet
from fedcore.types import Tree

STRATEGIES = sorted(p.stem for p in (Path(__file__).parent.parent / "strategies").glob("[!_]*.py"))
TOYS = ["tests.methods:Scaffold", "tests.methods:Two"]

SMALL: dict[str, Any] = {
    "task": "least-squares",
    "population": 12,
    "rounds": 4,
    "seed": 3,
    "options": {"examples": 11, "features": 5},
    "local": {"batch_size": 4},
    "participation": {"name": "uniform", "cohort": 5},
    "evaluation": {"every": 2},
    "checkpoint": {"seconds": 0.0},
    "engine": {"name": "sequential"},
}


def small(method: str, **settings: Any) -> Experiment:
    """A run of milliseconds; `settings` are dotted keys with __ for the dot."""
    values = {**SMALL, "method": {"name": method, "local_lr": 0.05}}
    return Experiment.parse(values, {key.replace("__", "."): value for key, value in settings.items()})


def loop_of(e: Experiment, folder: Path, resume: bool = False) -> Loop:
    folder.mkdir(parents=True, exist_ok=True)
    return Loop(e, folder, Quiet(), None, resume)


def assert_close(a: Tree, b: Tree, tolerance: float, what: str) -> None:
    """Every leaf within `tolerance`, or a message that names the leaf and the difference."""
    left, right = trees.flatten(a), trees.flatten(b)
    assert left.keys() == right.keys(), f"{what}: {left.keys() ^ right.keys()}"
    for path, x in left.items():
        difference = (x.double() - right[path].double()).abs().max().item() if x.numel() else 0.0
        assert difference <= tolerance, f"{what}: {path} differs by {difference:.2e}, allowed {tolerance:.0e}"


def equal(a: Tree, b: Tree) -> bool:
    """Bit for bit."""
    left, right = trees.flatten(a), trees.flatten(b)
    return left.keys() == right.keys() and all(torch.equal(x, right[path]) for path, x in left.items())
