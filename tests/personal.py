"""Tasks and runs that the tests of personal parameters share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import squared_error
from fedcore.rounds.loop import Loop
from fedcore.task import Task
from fedcore.types import Batches, Params
from tests.helpers import loop_of, small

PARTIAL = ["fedsim", "fedalt"]
PERSONAL = [*PARTIAL, "ditto", "pfedme"]
SHARED, OWN = (
    {"0.weight", "0.bias"},
    {"1.weight", "1.bias"},
)  # of the task "layered", with personal = ["output"]
DIGITS: dict[str, Any] = {
    "task": "digits",
    "options": {},
    "population": 10,
    "partition__alpha": 0.3,
    "model__name": "mlp",
    "model__hidden": [8],
    "rounds": 2,
}


# Tasks


class Sum(nn.Module):
    """The output u + v, or the two outputs u x_1 and v x_2, of which neither
    parameter sees the other's."""

    def __init__(self, separate: bool) -> None:
        super().__init__()
        self.separate = separate
        self.u, self.v = (
            nn.Parameter(torch.tensor(start, dtype=torch.float64))
            for start in (1.0, 2.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.stack([self.u * x[:, 0], self.v * x[:, 1]], 1)
            if self.separate
            else (self.u + self.v).expand(len(x), 1)
        )


def coupled(e: Experiment) -> Task:
    """f_i = 1/2 (u + v - c_i)^2 with c_i the options' `c`, one example a client.

    U = 1 and v = 2 at the start.
    """
    c = torch.tensor(e.options["c"], dtype=torch.float64)[:, None]
    rows = Examples(torch.zeros_like(c), c)
    return Task(
        Sum(False),
        FederatedData(rows, rows, np.arange(len(c)), np.arange(len(c) + 1)),
        loss=squared_error,
        metrics={},
    )


def separable(e: Experiment) -> Task:
    """f_i(u) + g_i(v), three clients with 5, 4 and 2 examples."""
    draw = np.random.default_rng(0)
    rows = Examples(
        *(torch.from_numpy(draw.standard_normal((11, 2))) for _ in range(2))
    )
    return Task(
        Sum(True),
        FederatedData(rows, rows, np.arange(11), np.array([0, 5, 9, 11])),
        loss=squared_error,
        metrics={},
    )


def identical(e: Experiment) -> Task:
    """Two linear layers in float64; every client holds the same seven examples."""
    draw, n = np.random.default_rng(1), e.population or 1
    rows = Examples(
        torch.from_numpy(draw.standard_normal((7, 3))),
        torch.from_numpy(draw.standard_normal((7, 1))),
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    return Task(
        model,
        FederatedData(rows, rows, np.tile(np.arange(7), n), np.arange(n + 1) * 7),
        loss=squared_error,
        metrics={},
    )


def toy(name: str, task: str, **settings: Any) -> Experiment:
    """Two local steps on all examples, everybody in every round, nothing held out."""
    everybody = {
        "population": None,
        "participation__fraction": 1.0,
        "participation__cohort": None,
        "holdout": 0.0,
        "rounds": 3,
    }
    batches = {"local__batch_size": 64, "local__steps": 2}
    partial = (
        {"method__personal": ["v"] if task != "identical" else ["output"]}
        if name in PARTIAL
        else {}
    )
    return small(
        name,
        task=f"tests.personal:{task}",
        **{**everybody, **batches, **partial, **settings},
    )


def done(e: Experiment, folder: Path, rounds: int | None = None) -> Loop:
    """After its rounds, or so many."""
    loop = loop_of(e, folder)
    for _ in range(e.rounds if rounds is None else rounds):
        loop.round()
    return loop


def state_of(loop: Loop, client: int) -> Any:
    assert loop.engine.states is not None
    return loop.engine.states.get(client)


def states_of(loop: Loop) -> list[Any]:
    return [
        trees.map(torch.clone, state_of(loop, i)) for i in range(loop.task.population)
    ]


def model_of(loop: Loop, client: int) -> Params:
    return loop.method.model_for(loop.state.server, state_of(loop, client))


def train(loop: Loop, batches: Batches, client: int = 0) -> Any:
    """(up, new state) of one client's training on these batches."""
    return loop.method.train(
        loop.task, torch.tensor(0.0), loop.state.server, state_of(loop, client), batches
    )  # type: ignore[attr-defined]


def plan(loop: Loop, client: int, t: int = 0, number: int = 0) -> Batches:
    """The client's own batches, each plan with a shuffle of its own."""
    found: Batches = trees.at(
        loop.task.data.batches(
            np.array([client]),
            "train",
            loop.experiment.local,
            loop.experiment.seed,
            t,
            number,
        ),
        0,
    )
    return found
