"""FedAMD's linear rate with small batches and a constant step: `python -m benchmarks.linear_rate`.

Softmax regression with L2 0.01 on scikit-learn's digits, 50 clients with two shards each, 10 a round, 10 local steps of
batch 8. Prints the gap F(x_t) - F* of the mean over clients at three rounds, mean over seeds; F* by L-BFGS in float64.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedcore import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.task import Task
from fedcore.types import Params
from fedcore.views.compare import compare
from fedcore.views.terminal import Terminal

L2, CLIENTS = 0.01, 50
RATES = (0.05, 0.1, 0.2)


class Regularised(Task):
    """The task's loss plus L2 / 2 |params|^2, and the gap to its minimum on all training examples."""

    def __init__(self, model: nn.Module, data: FederatedData) -> None:
        super().__init__(model, data)
        self.least = self._minimum()

    def loss(self, params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        # A batch that is all padding has no loss, the penalty included.
        return super().loss(params, x, y, mask) + L2 / 2 * squares * (mask.sum() > 0)

    def objective(self, params: Params) -> Tensor:
        params = {name: p.double() for name, p in params.items()}
        rows = torch.from_numpy(
            self.data.order
        )  # equal clients: the mean over examples is the mean over clients
        x, y = self.data.x[rows].double(), self.data.y[rows]
        return self.loss(params, x, y, torch.ones(len(y), dtype=torch.float64))

    def _minimum(self) -> float:
        params = {
            name: p.double().requires_grad_() for name, p in self.init_params().items()
        }
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
        return {
            **super().test(params, batch_size),
            "gap": self.objective(params).item() - self.least,
        }


def make_task(e: Experiment) -> Task:
    digits = sources.load("digits", None)
    x, test = (
        torch.cat([v.flatten(1), torch.ones(len(v), 1)], 1)
        for v in (digits.x_train, digits.x_test)
    )
    part = e.partition.split(digits.y_train.numpy(), None, CLIENTS, e.seed)
    model = nn.Linear(x.shape[1], 10, bias=False)
    nn.init.zeros_(model.weight)
    return Regularised(
        model,
        FederatedData(
            Examples(x, digits.y_train),
            Examples(test, digits.y_test),
            part.order,
            part.offsets,
        ),
    )


def methods() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "FedAvg": {"name": "fedavg"},
        "SCAFFOLD": {"name": "scaffold"},
    }
    found |= {
        f"FedAMD, p = {p}": {"name": "fedamd", "p": p} for p in (0.3, 0.5, 0.8, 0.9)
    }
    return found | {
        f"FedAMD, period {tau}": {"name": "fedamd", "period": tau} for tau in (2, 5)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path("runs/linear-rate"))
    a = parser.parse_args()
    at = (a.rounds // 16, a.rounds // 4, a.rounds)
    base: dict[str, Any] = {
        "task": "benchmarks.linear_rate:make_task",
        "rounds": a.rounds,
        "holdout": 0.0,
        "partition": {"name": "shards", "per_client": 2},
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"steps": 10, "batch_size": 8},
        "evaluation": {"every": a.rounds // 16, "clients": 0},
    }
    print(
        f"| gap after {', '.join(map(str, at))} rounds | {' | '.join(f'eta_l = {lr}' for lr in RATES)} |"
    )
    print(f"|---|{'---|' * len(RATES)}")
    table: dict[str, list[str]] = {label: [] for label in methods()}
    for lr in RATES:
        runs = [
            (label, Experiment.parse({**base, "method": {**m, "local_lr": lr}}))
            for label, m in methods().items()
        ]
        c = compare(runs, a.seeds, a.out / f"lr-{lr}", Terminal())
        for label in table:
            gaps = [
                [run.history.rows[t - 1].get("test_gap") for run in c.runs[label]]
                for t in at
            ]
            table[label].append(
                " ".join(
                    f"{statistics.fmean(g):.0e}" if g and None not in g else "diverges"
                    for g in gaps
                )
            )
    for label, cells in table.items():
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
