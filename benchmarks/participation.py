"""Unequal participation: which methods still find the optimum of the population.

    python -m benchmarks.participation quadratic     distance to the known optimum, and docs/participation.svg
    python -m benchmarks.participation fashion       Fashion-MNIST, 250 clients, rates as in the FedAU paper

Every method under Bernoulli, Markov and cyclic participation with the same rates, on the same seeds, hence the same participation.
Options: --out DIR (runs there are read, or gone on with), --seeds N, --rounds T, --process NAME. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

from fedcore import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.rng import rng
from fedcore.task import Task, squared_error
from fedcore.views.compare import compare
from fedcore.views.comparison import Comparison, curve
from fedcore.views.figures import SERIES, STYLE, svg
from fedcore.views.terminal import Terminal

PROCESSES = ("bernoulli", "markov", "cyclic")
QUADRATIC_RATES = (0.9, 0.1)  # of the first and the second half of the clients


def quadratic(e: Experiment) -> Task:
    """Least squares with clients in the order of the first coordinate of their own optimum, so that rates by id follow the data."""
    draw, clients, n, d = rng(e.seed, "quadratic"), e.population or 50, 20, 10
    w = draw.standard_normal((clients, d, 1))
    w = w[np.argsort(w[:, 0, 0])]
    x = draw.standard_normal((clients, n, d))
    y = x @ w
    examples = Examples(
        *(
            torch.from_numpy(v.reshape(clients * n, -1).astype(np.float32))
            for v in (x, y)
        )
    )
    model = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(model.weight)
    best = torch.linalg.lstsq(examples.x.double(), examples.y.double()).solution.T
    data = FederatedData(
        examples, examples, np.arange(clients * n), np.arange(clients + 1) * n
    )
    return Task(model, data, loss=squared_error, metrics={}, optimum={"weight": best})


def methods(average_all_lr: float) -> dict[str, dict[str, Any]]:
    """Settings of each method by label. The mean over all clients is slower by the mean rate, and gets that much more step."""
    return {
        "average participating": {"name": "fedavg", "weighting": "participating"},
        "average all": {
            "name": "fedavg",
            "weighting": "all",
            "server_lr": average_all_lr,
        },
        "known rates": {"name": "fedavg", "weighting": "known"},
        "FedAU": {"name": "fedau"},
        "FedAU, K = 50": {"name": "fedau", "cutoff": 50},
        "FedStale, beta 0.2": {"name": "fedstale", "beta": 0.2},
        "FedStale, beta 0.8": {"name": "fedstale", "beta": 0.8},
        "FedVARP": {"name": "fedvarp"},
        "MIFA": {"name": "mifa"},
    }


def experiments(study: str, process: str, rounds: int) -> list[tuple[str, Experiment]]:
    base: dict[str, Any] = {
        "rounds": rounds,
        "min_reports": 0,
        "holdout": 0.0,
        "evaluation": {"every": 20, "clients": 0},
    }
    if study == "quadratic":
        population = 50
        rates = tuple(QUADRATIC_RATES[i >= population // 2] for i in range(population))
        base |= {
            "task": "benchmarks.participation:quadratic",
            "population": population,
            "local": {"steps": 1, "batch_size": 20},
        }
        base |= {"participation": {"name": process, "p": rates}}
        lr, average_all_lr = 0.02, 1 / statistics.mean(rates)
    else:
        base |= {
            "task": "fashion-mnist",
            "population": 250,
            "partition": {"name": "dirichlet", "alpha": 0.1},
        }
        base |= {
            "model": {"name": "mlp", "hidden": [64]},
            "local": {"steps": 5, "batch_size": 16},
        }
        base |= {
            "participation": {"name": process, "mean": 0.1, "alpha": 0.1, "floor": 0.02}
        }
        lr, average_all_lr = 0.05, 10.0
    settings = methods(average_all_lr).items()
    return [
        (label, Experiment.parse({**base, "method": {"local_lr": lr, **method}}))
        for label, method in settings
    ]


def late(c: Comparison, label: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds of a metric's mean over the last quarter of the run."""
    values = []
    for run in c.runs[label]:
        last = [
            row[key]
            for row in run.history.rows
            if key in row and row["round"] > 0.75 * len(run.history.rows)
        ]
        values.append(statistics.fmean(last))
    return statistics.fmean(values), statistics.stdev(values) if len(
        values
    ) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("study", choices=("quadratic", "fashion"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--process", choices=PROCESSES, action="append")
    a = parser.parse_args()
    out = a.out or Path("runs") / f"participation-{a.study}"
    seeds, rounds = a.seeds or (3 if a.study == "quadratic" else 5), a.rounds or 1000
    found = {
        process: compare(
            experiments(a.study, process, rounds), seeds, out / process, Terminal()
        )
        for process in a.process or PROCESSES
    }
    key = "test_distance" if a.study == "quadratic" else "test_accuracy"
    print(
        f"| {key.replace('_', ' ')} | {' | '.join(found)} |\n|---|{'---|' * len(found)}"
    )
    for label in methods(1.0):
        cells = [late(c, label, key) for c in found.values()]
        texts = [
            f"{mean:.3f} ± {std:.3f}"
            if a.study == "quadratic"
            else f"{mean:.2%} ± {std:.2%}"
            for mean, std in cells
        ]
        print(f"| {label} | {' | '.join(texts)} |")
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(found), 3.9), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (process, c) in zip(panels, found.items(), strict=True):
            for number, (label, runs) in enumerate(c.runs.items()):
                x, _, values = curve(runs, key)
                axes.plot(
                    x, values.mean(0), label=label, color=SERIES[number], linewidth=1.3
                )
            axes.set(xlabel="round", title=process)
            if a.study == "quadratic":
                axes.set_yscale("log")
        panels[0].set_ylabel(
            "distance to the optimum" if a.study == "quadratic" else "test accuracy"
        )
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        (out / "curves.svg").write_text(
            svg(figure, transparent=False, facecolor="white")
        )
    print(f"\n{out / 'curves.svg'}")


if __name__ == "__main__":
    main()
