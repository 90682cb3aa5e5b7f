"""Small tasks with metrics of every kind, and the measures of their runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassRecall,
)
from torchmetrics.regression import MeanSquaredError, R2Score

from fedcore import (
    Examples,
    Experiment,
    FederatedData,
    Task,
    absolute_error,
    accuracy,
    squared_error,
)
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import Result

SIZES = (1, 3, 8, 20, 70, 40)  # examples of each client; one more has none
CLASSES = 4


def rows(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Inputs [n, 5], and a number that depends on them, [n, 1]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g)
    noise = torch.randn(n, generator=g)
    return x, (x[:, 0] + 0.5 * x[:, 1] + 0.3 * noise)[:, None]


def data_of(make_y: Callable[[Tensor], Tensor]) -> FederatedData:
    """Clients whose rows are sorted by the target, so that they differ."""
    (x, y), (test_x, test_y) = rows(0, sum(SIZES)), rows(1, 2111)
    order = y[:, 0].argsort().numpy()
    offsets = np.cumsum([0, *SIZES, 0])
    train, test = Examples(x, make_y(y)), Examples(test_x, make_y(test_y))
    return FederatedData(train, test, order, offsets)


def to_classes(y: Tensor) -> Tensor:
    return torch.bucketize(y[:, 0], torch.tensor([-0.8, 0.0, 0.8]))


def classes(e: Experiment) -> Task:
    """Four classes, judged by F1."""
    metrics = {
        "f1": MulticlassF1Score(num_classes=CLASSES),
        "auc": MulticlassAUROC(num_classes=CLASSES, thresholds=50),
        "accuracy": accuracy,
    }
    return Task(nn.Linear(5, CLASSES), data_of(to_classes), metrics=metrics)


def bracketed(e: Experiment) -> Task:
    """A metric whose name looks like markup."""
    recall = MulticlassRecall(num_classes=CLASSES)
    return Task(
        nn.Linear(5, CLASSES), data_of(to_classes), metrics={"recall[red]": recall}
    )


def numbers(e: Experiment) -> Task:
    """Regression, judged by R2."""
    metrics = {
        "r2": R2Score(),
        "mse": MeanSquaredError(),
        "mae": absolute_error,
    }
    model = nn.Linear(5, 1)
    return Task(model, data_of(lambda y: y), loss=squared_error, metrics=metrics)


def by_loss(e: Experiment) -> Task:
    """Regression without a metric, so that the loss judges."""
    return Task(nn.Linear(5, 1), data_of(lambda y: y), squared_error, {})


def experiment(task: str, **settings: Any) -> Experiment:
    values = {
        "task": f"tests.measured:{task}",
        "rounds": 2,
        "holdout": 0.0,
        "participation.name": "uniform",
        "participation.cohort": 4,
        "evaluation.every": 1,
        "engine.name": "sequential",
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return Experiment.parse({"method": "fedavg"}, values)


def last_of(result: Result) -> dict[str, np.ndarray]:
    """Each client's measures at the last evaluation, those without rows left out."""
    table = read_clients(Path(result.run_dir), "evaluate")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    kept = (columns["round"] == result.rounds) & (columns["num_examples"] > 0)
    return {name: column[kept] for name, column in columns.items()}


def assert_same_measures(one: Result, other: Result) -> None:
    ours, theirs = last_of(one), last_of(other)
    for name in one.measures:
        order = np.argsort(theirs["client"]), np.argsort(ours["client"])
        assert theirs[name][order[0]] == pytest.approx(
            ours[name][order[1]], abs=1e-4, nan_ok=True
        ), name
        assert other.final[f"test_{name}"] == pytest.approx(
            one.final[f"test_{name}"], abs=1e-5
        ), name


class Rooted(nn.Module):
    """A model whose gradient is NaN at its start, where its loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).square().sqrt()


def rooted(e: Experiment) -> Task:
    return Task(Rooted(), data_of(lambda y: y), squared_error, {})


def logarithmic(e: Experiment) -> Task:
    """A loss that is NaN from the first example on."""

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs * 0 - 1).log()[:, 0] + y[:, 0]

    return Task(nn.Linear(5, 1), data_of(lambda y: y), loss, {})


def unscaled(e: Experiment) -> Task:
    data = data_of(lambda y: y)
    data.x *= 1e6
    return Task(nn.Linear(5, 1), data, squared_error, {})


def steep(e: Experiment) -> Task:
    """Targets so large that one update has entries above 1."""
    return Task(nn.Linear(5, 1), data_of(lambda y: 1e3 * y), squared_error, {})
