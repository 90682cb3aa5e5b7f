"""Models, tasks and plain PyTorch that the tests of norms share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.models.norms import (
    freeze_batch_norm,
    personal_batch_norm,
    to_group_norm,
)
from fedcore.rounds.loop import Loop
from fedcore.task import Task
from fedcore.types import Batches, Params
from tests.helpers import loop_of, small

EVEN = (23, 12, 18, 17, 7, 22)  # examples of clients; of 5 a batch, none has one
UNEVEN = (23, 11, 16, 1, 0, 21)
CLASSES = 3
LR = 0.05


# Models and tasks


class Net(nn.Module):
    """Convolution, two norms, and a third that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4, 6)
        self.bn2 = nn.BatchNorm1d(6)
        self.fc2 = nn.Linear(6, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv(x)).tanh().mean((2, 3))
        h = self.bn2(self.fc1(h)).tanh()
        h = self.bn2(self.fc2(h)).tanh()
        out: Tensor = self.out(h)
        return out


def trained_net() -> Net:
    """A net whose statistics are no longer those of a new one."""
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(5):
        model(torch.randn(16, 1, 6, 6) + 1)
    return model


def rows_of(n: int, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=g) * 2 + 1
    return Examples(x, torch.randint(CLASSES, (n,), generator=g))


def make_task(e: Experiment) -> Task:
    """Six clients of uneven sizes; `options.way` converts the net."""
    sizes = e.options.get("sizes", EVEN)
    rows = rows_of(sum(sizes))
    order, offsets = np.arange(sum(sizes)), np.cumsum([0, *sizes])
    model = trained_net().to(getattr(torch, e.options.get("dtype", "float32")))
    rows = Examples(rows.x.to(model.out.weight.dtype), rows.y)
    data = FederatedData(rows, rows, order, offsets)
    return Task(WAYS[e.options["way"]](model), data)


WAYS: dict[str, Any] = {
    "group": lambda model: to_group_norm(model, 2),
    "frozen": freeze_batch_norm,
    "personal": personal_batch_norm,
}


def experiment(way: str, method: str = "fedsim", **settings: Any) -> Experiment:
    values: dict[str, Any] = {
        "task": "tests.norms:make_task",
        "options": {"way": way},
        "population": None,
        "holdout": 0.0,
        "local__batch_size": 5,
        "local__epochs": 2,
        "participation__cohort": 4,
        "rounds": 4,
    }
    if method in ("fedsim", "fedalt"):
        values["method__personal"] = ["norm"] if way == "personal" else []
    return small(method, **(values | settings))


def ran(e: Experiment, folder: Path, rounds: int | None = None) -> Loop:
    loop = loop_of(e, folder)
    for _ in range(e.rounds if rounds is None else rounds):
        loop.round()
    return loop


def everything(loop: Loop) -> list[Params]:
    """The server's parameters and every client's own."""
    assert loop.engine.states is not None
    own = [loop.engine.states.get(i) for i in range(len(EVEN))]
    parts = [loop.state.server.params, *(getattr(state, "v", {}) for state in own)]
    copies: list[Params] = trees.map(torch.clone, parts)
    return copies


def assert_close(a: Any, b: Any, limit: float = 1e-5) -> None:
    for one, other in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)


# In plain PyTorch


def unconverted(model: nn.Module) -> Net:
    """The same model with BatchNorm of PyTorch."""
    assert isinstance(model, Net)
    net = Net().to(model.out.weight.dtype)
    missing, unexpected = net.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("num_batches" in name for name in missing)
    return net


def batches_of(
    task: Task, client: int, e: Experiment, t: int, plan: int = 0
) -> Batches:
    ids = np.array([client])
    stacked = task.data.batches(ids, "train", e.local, e.seed, t, plan)
    return Batches(*(part[0] for part in stacked))


def plain(
    model: Net, client: int, task: Task, e: Experiment, t: int
) -> dict[str, Tensor]:
    """A client's training in plain PyTorch, on its real rows only."""
    model = copy.deepcopy(model)
    train_plainly(model, list(model.parameters()), batches_of(task, client, e, t))
    return model.state_dict()


def train_plainly(model: Net, parameters: list[nn.Parameter], batches: Batches) -> None:
    optimizer = torch.optim.SGD(parameters, LR)
    for x, y, mask in zip(*batches, strict=True):
        real = mask > 0
        if real.any():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[real]), y[real])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
