"""FedAMD's linear rate with small batches and a constant step.

`python -m benchmarks.linear_rate`: softmax regression with L2 0.01 on scikit-learn's
digits, 50 clients with two shards each, 10 a round, 10 local steps of batch 8. Prints
the gap F(x_t) - F* of the mean over clients at three rounds, mean over seeds; F* by
L-BFGS in float64.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tables import print_head, print_row
from fedcore import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.task import Task
from fedcore.types import Params
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal

L2, CLIENTS = 0.01, 50
RATES = (0.05, 0.1, 0.2)


class Regularised(Task):
    """The task's loss plus L2 / 2 |params|^2, and the gap to its minimum.

    The minimum is that on all training examples.
    """

    def __init__(self, model: nn.Module, data: FederatedData) -> None:
        super().__init__(model, data)
        self.least = self._minimum()

    def loss(self, params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        # A batch that is all padding has no loss, the penalty included.
        return super().loss(params, x, y, mask) + L2 / 2 * squares * (mask.sum() > 0)

    def objective(self, params: Params) -> Tensor:
        params = {name: p.double() for name, p in params.items()}
        # Equal clients: the mean over examples is the mean over clients.
        rows = torch.from_numpy(self.data.order)
        x, y = self.data.x[rows].double(), self.data.y[rows]
        return self.loss(params, x, y, torch.ones(len(y), dtype=torch.float64))

    def _minimum(self) -> float:
        params: Params = {}
        for name, p in self.init_params().items():
            params[name] = p.double().requires_grad_()
        solver = torch.optim.LBFGS(
            list(params.values()),
            max_iter=2000,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            value = self.objective(params)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(closure)  # type: ignore[no-untyped-call]
        return self.objective(params).item()

    def test(self, params: Params, batch_size: int = 1000) -> dict[str, float]:
        gap = self.objective(params).item() - self.least
        return {**super().test(params, batch_size), "gap": gap}


def with_ones(x: Tensor) -> Tensor:
    """Flat examples with a last feature of ones, for the bias, [n, d + 1]."""
    return torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)


def make_task(settings: Experiment) -> Task:
    digits = sources.load("digits", None)
    train = Examples(with_ones(digits.x_train), digits.y_train)
    test = Examples(with_ones(digits.x_test), digits.y_test)
    labels = digits.y_train.numpy()
    part = settings.partition.split(labels, None, CLIENTS, settings.seed)
    model = nn.Linear(train.x.shape[1], 10, bias=False)
    nn.init.zeros_(model.weight)
    return Regularised(model, FederatedData(train, test, part.order, part.offsets))


def methods() -> dict[str, dict[str, Any]]:
    """Settings of each method by label."""
    settings: dict[str, dict[str, Any]] = {
        "FedAvg": {"name": "fedavg"},
        "SCAFFOLD": {"name": "scaffold"},
    }
    for p in (0.3, 0.5, 0.8, 0.9):
        settings[f"FedAMD, p = {p}"] = {"name": "fedamd", "p": p}
    for tau in (2, 5):
        settings[f"FedAMD, period {tau}"] = {"name": "fedamd", "period": tau}
    return settings


def gap_after(runs: Sequence[Run], t: int) -> str:
    """Mean over seeds of the gap after t rounds."""
    gaps = []
    for run in runs:
        gap = run.history.rows[t - 1].get("test_gap")
        if gap is None:
            return "diverges"
        gaps.append(gap)
    return f"{statistics.fmean(gaps):.0e}"


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path("runs/linear-rate"))
    arguments = parser.parse_args()
    rounds: int = arguments.rounds
    marks = (rounds // 16, rounds // 4, rounds)
    base: dict[str, Any] = {
        "task": "benchmarks.linear_rate:make_task",
        "rounds": rounds,
        "holdout": 0.0,
        "partition": {"name": "shards", "per_client": 2},
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"steps": 10, "batch_size": 8},
        "evaluation": {"every": rounds // 16, "clients": 0},
    }
    columns = [f"eta_l = {lr}" for lr in RATES]
    print_head([f"gap after {', '.join(map(str, marks))} rounds", *columns])
    rows = {label: [label] for label in methods()}
    for lr in RATES:
        experiments = []
        for label, method in methods().items():
            settings = Experiment.parse({**base, "method": {**method, "local_lr": lr}})
            experiments.append((label, settings))
        folder = arguments.out / f"lr-{lr}"
        results = compare(experiments, arguments.seeds, folder, Terminal()).runs
        for label, cells in rows.items():
            cells.append(" ".join(gap_after(results[label], t) for t in marks))
    for cells in rows.values():
        print_row(cells)


if __name__ == "__main__":
    main()
