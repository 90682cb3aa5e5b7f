"""BatchNorm among clients: the cost in accuracy of each way out, on a small ResNet.

python -m benchmarks.batch_norm

Fashion-MNIST: 500 training images are a proxy set, on which a ResNet with BatchNorm is
pretrained; 10 clients hold 2 000 others (Dirichlet 0.3), a quarter held out. Each way
goes on from the pretrained model for 25 rounds of one local epoch in which all clients
take part. The reference is plain BatchNorm, trained in one place for as many epochs.
`test`: the server's model on 2 000 test images; `clients`: mean over clients of the
accuracy of the model that each would use, on its held-out images. Mean and standard
deviation over seeds. Options: --out DIR (runs there are read, or gone on with),
--seeds N.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.models.norms import freeze_batch_norm, personal_batch_norm, to_group_norm
from fedcore.rng import rng
from fedcore.task import Task, accuracy
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal

PROXY, ROWS, TEST = 500, 2000, 2000
POPULATION, ROUNDS, BATCH = 10, 25, 20
LR = 0.05
FROZEN_LR = 0.005  # at 0.01 the loss oscillates, at 0.02 it overflows

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "group": lambda model: to_group_norm(model, 4),
    "frozen": freeze_batch_norm,
    "personal": personal_batch_norm,
}
CASES: dict[str, tuple[str, list[str]]] = {
    "`to_group_norm`, FedAvg": ("group", []),
    "`to_group_norm`, norms personal": ("group", ["norm"]),
    "`freeze_batch_norm`, FedAvg": ("frozen", []),
    "`personal_batch_norm`, FedBN": ("personal", ["norm"]),
}


class Block(nn.Module):
    """Two convolutions with BatchNorm, and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            around = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.around = nn.Sequential(around, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        out: Tensor = (self.bn2(self.conv2(h)) + self.around(x)).relu()
        return out


class ResNet(nn.Module):
    """Three blocks behind a stem that halves the image: 19 810 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        blocks = [Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2)]
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.bn(self.stem(x)).relu())
        out: Tensor = self.output(h.mean((2, 3)))
        return out


def trained(model: nn.Module, rows: Examples, epochs: int, seed: int) -> nn.Module:
    """The model after plain SGD on these rows in one place; a copy."""
    model, draw = copy.deepcopy(model).train(), rng(seed, "plain SGD")
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for _ in range(epochs):
        order = torch.from_numpy(draw.permutation(len(rows.y)))
        for batch in torch.split(order, BATCH):
            optimizer.zero_grad()
            outputs = model(rows.x[batch])
            loss = nn.functional.cross_entropy(outputs, rows.y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def parts(settings: Experiment) -> tuple[nn.Module, FederatedData]:
    """The pretrained model with BatchNorm, and the clients' images."""
    seed = settings.seed
    source = sources.load("fashion-mnist", settings.data_folder)
    rows = rng(seed, "rows").permutation(len(source.y_train))
    proxy = torch.from_numpy(rows[:PROXY])
    model = trained(
        ResNet(), Examples(source.x_train[proxy], source.y_train[proxy]), 20, seed
    )
    rows = rows[PROXY : PROXY + ROWS]
    labels = source.y_train.numpy()[rows]
    part = settings.partition.split(labels, None, POPULATION, seed)
    train = Examples(source.x_train, source.y_train)
    test = Examples(source.x_test[:TEST], source.y_test[:TEST])
    order = rows[part.order]
    data = FederatedData(train, test, order, part.offsets, settings.holdout, seed)
    return model, data


def make_task(settings: Experiment) -> Task:
    model, data = parts(settings)
    return Task(WAYS[settings.options["way"]](model.train()), data)


def experiment(way: str, personal: list[str], **more: Any) -> Experiment:
    lr = FROZEN_LR if way == "frozen" else LR
    values: dict[str, Any] = {
        "task": "benchmarks.batch_norm:make_task",
        "options": {"way": way},
        "population": POPULATION,
        "rounds": ROUNDS,
        "holdout": 0.25,
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 20},
        "participation": {"name": "uniform", "cohort": POPULATION},
        "local": {"batch_size": BATCH, "epochs": 1},
        "method": {"name": "fedsim", "personal": personal, "local_lr": lr},
        "evaluation": {"every": 10**6},
    }
    return Experiment.parse(values | more)


@torch.no_grad()
def in_one_place(model: nn.Module, data: FederatedData) -> tuple[float, float]:
    """(test accuracy, mean of the clients' accuracies) of a plain model."""
    test = accuracy(model(data.test.x), data.test.y).mean().item()
    accuracies = []
    for client in range(data.population):
        rows = torch.from_numpy(data.rows(client, "test"))
        accuracies.append(accuracy(model(data.x[rows]), data.y[rows]).mean().item())
    return test, float(np.mean(accuracies))


def references(seeds: int) -> list[list[str]]:
    """The pretrained model, and the one trained on in one place."""
    pretrained, pooled = [], []
    for seed in range(seeds):
        settings = experiment("group", [], seed=seed)
        torch.manual_seed(seed)
        model, data = parts(settings)
        clients = range(data.population)
        rows = np.concatenate([data.rows(client, "train") for client in clients])
        own = torch.from_numpy(rows)
        train = Examples(data.x[own], data.y[own])
        pretrained.append(in_one_place(model, data))
        pooled.append(in_one_place(trained(model, train, ROUNDS, seed), data))
    return [
        ["BatchNorm, pretrained on the proxy set alone", *columns(pretrained)],
        ["BatchNorm, trained on in one place", *columns(pooled)],
    ]


def columns(measures: Sequence[tuple[float, float]]) -> list[str]:
    """Mean and standard deviation over seeds of each column, in percent."""
    cells = []
    for column in zip(*measures, strict=True):
        cells.append(mean_and_std([100 * x for x in column]))
    return cells


def of_run(run: Run) -> tuple[float, float]:
    last = run.history.rows[-1]
    return last["test_accuracy"], last["client_accuracy"]["mean"]


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--out", type=Path, default=Path("runs/batch-norm"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = references(options.seeds)
    experiments = []
    for label, (way, personal) in CASES.items():
        experiments.append((label, experiment(way, personal)))
    runs = compare(experiments, options.seeds, options.out, Terminal()).runs
    for label, (_, personal) in CASES.items():
        test, clients = columns([of_run(run) for run in runs[label]])
        # The server has no norms of its own to be tested with.
        rows.append([label, "-" if personal else test, clients])
    print_table(["", "test, %", "clients, %"], rows)


if __name__ == "__main__":
    main()
