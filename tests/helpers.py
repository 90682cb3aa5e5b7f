"""Small experiments, and tensors compared in words."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore import method as methods
from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import TooFewReports
from fedcore.rounds.loop import Loop, Quiet
from fedcore.storage.rows import StateStore
from fedcore.types import Reports, Round, Tree

PATIENCE = 900.0  # seconds, for any wait of a test: a busy machine is no failure

STRATEGIES = sorted(
    p.stem for p in (Path(__file__).parent.parent / "strategies").glob("[!_]*.py")
)
TOYS = ["tests.methods:Two"]
EXACT: dict[str, Any] = {
    "task": "weighted-least-squares",
    "options": {"examples": [9, 13], "features": 5, "noise": 0.5},
}
LAYERED: dict[str, Any] = {"task": "tests.methods:layered"}
# What a method needs beside its own settings.
NEEDS: dict[str, dict[str, Any]] = {
    "fedlaw": {"proxy": 24},
    "dpfedavg": {
        "method": {"name": "dpfedavg", "local_lr": 0.05, "noise_multiplier": 0.0}
    },  # any participation; clipped, in every round
    "fedsim": LAYERED,
    "fedalt": LAYERED,
    # With its default of 0.1 a step overshoots where lambda plus curvature exceeds 20, and the difference of two engines grows.
    "pfedme": {"method": {"name": "pfedme", "local_lr": 0.05, "personal_lr": 0.02}},
}
# Settings of a method that has other client functions than its defaults have, by the name that tests call it.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "admm exact": ("admm", {"solver": "exact"}, EXACT),
    "rerce exact": ("rerce", {"solver": "exact", "start": "paper"}, EXACT),
    "clu exact": ("clu", {"solver": "exact"}, EXACT),
}

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
NOISY: dict[str, Any] = {
    "links__downlink__variance": 1e-4,
    "links__uplink__snr_db": 20.0,
}


def small(method: str, **settings: Any) -> Experiment:
    """A run of milliseconds; `method` may be one of VARIANTS; `settings` are dotted keys with __ for the dot."""
    name, own, others = VARIANTS.get(method, (method, {}, {}))
    values = {
        **SMALL,
        "method": {"name": name, "local_lr": 0.05, **own},
        **NEEDS.get(name, {}),
        **others,
    }
    return Experiment.parse(
        values, {key.replace("__", "."): value for key, value in settings.items()}
    )


def loop_of(e: Experiment, folder: Path, resume: bool = False) -> Loop:
    folder.mkdir(parents=True, exist_ok=True)
    return Loop(e, folder, Quiet(), None, resume)


def assert_close(a: Tree, b: Tree, tolerance: float, what: str) -> None:
    """Every leaf within `tolerance`, or a message that names the leaf and the difference."""
    left, right = trees.flatten(a), trees.flatten(b)
    assert left.keys() == right.keys(), f"{what}: {left.keys() ^ right.keys()}"
    for path, x in left.items():
        difference = (
            (x.double() - right[path].double()).abs().max().item() if x.numel() else 0.0
        )
        assert difference <= tolerance, (
            f"{what}: {path} differs by {difference:.2e}, allowed {tolerance:.0e}"
        )


def equal(a: Tree, b: Tree) -> bool:
    """Bit for bit."""
    left, right = trees.flatten(a), trees.flatten(b)
    return left.keys() == right.keys() and all(
        torch.equal(x, right[path]) for path, x in left.items()
    )


class Server:
    """A method's server alone: rounds in which clients send what the test says. The model is one vector "w".

    Methods whose clients send a NamedTuple with `delta`; FedAMD sends other things, and is tested with real clients.
    """

    def __init__(
        self, name: str, population: int, w: Sequence[float] = (0.0,), **settings: Any
    ) -> None:
        module = importlib.import_module(f"strategies.{name}")
        cls = methods.load(name)
        self.up: Any = module.Up
        self.method = cls(methods.settings_of(cls)(name=name, **settings))
        self.population, self.t = population, 0
        params = {"w": torch.tensor(w)}
        self.memory = StateStore(self.method.init_memory(params), 10**9, Path)
        self.state = self.method.init_server(params, population)
        self.log: dict[str, float] = {}

    @property
    def w(self) -> Tensor:
        """The model after the last round."""
        return self.state.params["w"]

    def round(
        self,
        deltas: Mapping[int, Sequence[float]],
        rates: Sequence[float] | None = None,
    ) -> Tensor:
        """One round in which these clients' updates arrive; the step that the model makes."""
        before, ids = self.w, sorted(deltas)

        def each(fn: Any, clients: Tensor, down: Tree) -> Iterator[Reports]:
            for i in clients.tolist():
                delta = torch.tensor(deltas[i], dtype=before.dtype)
                extra = (
                    {"dc": {"w": torch.zeros_like(delta)[None]}}
                    if "dc" in self.up._fields
                    else {}
                )
                up = self.up(delta={"w": delta[None]}, loss=torch.zeros(1), **extra)
                yield Reports(torch.tensor([i]), up, torch.ones(1))

        p = None if rates is None else torch.tensor(rates, dtype=torch.float64)
        r = Round(
            self.t,
            torch.tensor(ids, dtype=torch.int64),
            self.population,
            None,
            each,
            self.memory,
            0,
            p,
        )  # type: ignore[arg-type]
        try:
            self.state = self.method.round(self.state, r)
            self.memory.commit()
        except TooFewReports:  # as in the loop: the round is skipped
            self.memory.rollback()
        self.t, self.log = self.t + 1, r.log
        return self.w - before
