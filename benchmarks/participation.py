"""Unequal participation: which methods still find the optimum of the population.

python -m benchmarks.participation quadratic
    distance to the known optimum, and docs/participation.svg
python -m benchmarks.participation fashion
    Fashion-MNIST, 250 clients, rates as in the FedAU paper

Every method under Bernoulli, Markov and cyclic participation with the same rates, on
the same seeds, hence the same participation. Options: --out DIR (runs there are read,
or gone on with), --seeds N, --rounds T, --process NAME. Prints tables in Markdown.
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

from benchmarks.tables import print_head, print_row
from fedcore import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import squared_error
from fedcore.rng import rng
from fedcore.task import Task
from fedcore.views.compare import compare
from fedcore.views.comparison import Comparison, curve
from fedcore.views.figures import SERIES, STYLE, svg
from fedcore.views.terminal import Terminal

PROCESSES = ("bernoulli", "markov", "cyclic")
QUADRATIC_RATES = (0.9, 0.1)  # of the first and the second half of the clients


def quadratic(settings: Experiment) -> Task:
    """Least squares; clients in the order of the first coordinate of their optimum.

    So rates by id follow the data.
    """
    draw = rng(settings.seed, "quadratic")
    clients, n, d = settings.population or 50, 20, 10
    w = draw.standard_normal((clients, d, 1))
    w = w[np.argsort(w[:, 0, 0])]
    x = draw.standard_normal((clients, n, d))
    y = x @ w
    examples = Examples(rows_of(x), rows_of(y))
    model = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(model.weight)
    best = torch.linalg.lstsq(examples.x.double(), examples.y.double()).solution.T
    order, offsets = np.arange(clients * n), np.arange(clients + 1) * n
    data = FederatedData(examples, examples, order, offsets)
    return Task(model, data, loss=squared_error, metrics={}, optimum={"weight": best})


def rows_of(values: np.ndarray) -> torch.Tensor:
    """[clients, n, d] float64 to [clients * n, d] float32."""
    rows = values.reshape(values.shape[0] * values.shape[1], -1)
    return torch.from_numpy(rows.astype(np.float32))


def methods(average_all_lr: float) -> dict[str, dict[str, Any]]:
    """Settings of each method by label.

    The mean over all clients is slower by the mean rate, and gets that much more step.
    """
    average_all = {"name": "fedavg", "weighting": "all", "server_lr": average_all_lr}
    return {
        "average participating": {"name": "fedavg", "weighting": "participating"},
        "average all": average_all,
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
        first, second = QUADRATIC_RATES
        rates = (first,) * (population // 2) + (second,) * (population // 2)
        base |= {
            "task": "benchmarks.participation:quadratic",
            "population": population,
            "local": {"steps": 1, "batch_size": 20},
            "participation": {"name": process, "p": rates},
        }
        lr, average_all_lr = 0.02, 1 / statistics.mean(rates)
    else:
        rates_of_paper = {"mean": 0.1, "alpha": 0.1, "floor": 0.02}
        base |= {
            "task": "fashion-mnist",
            "population": 250,
            "partition": {"name": "dirichlet", "alpha": 0.1},
            "model": {"name": "mlp", "hidden": [64]},
            "local": {"steps": 5, "batch_size": 16},
            "participation": {"name": process, **rates_of_paper},
        }
        lr, average_all_lr = 0.05, 10.0
    cases = []
    for label, method in methods(average_all_lr).items():
        settings = Experiment.parse({**base, "method": {"local_lr": lr, **method}})
        cases.append((label, settings))
    return cases


def late(comparison: Comparison, label: str, key: str) -> tuple[float, float]:
    """A metric's mean over the last quarter of the run.

    Mean and standard deviation over seeds.
    """
    values = []
    for run in comparison.runs[label]:
        rows = run.history.rows
        first = 0.75 * len(rows)
        last = [row[key] for row in rows if key in row and row["round"] > first]
        values.append(statistics.fmean(last))
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), std


def draw(study: str, results: dict[str, Comparison], key: str, file: Path) -> None:
    """Curves of every method, a panel for each process."""
    is_quadratic = study == "quadratic"
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(results), 3.9), layout="constrained")
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axes, (process, comparison) in zip(panels, results.items(), strict=True):
            for number, (label, runs) in enumerate(comparison.runs.items()):
                x, _, values = curve(runs, key)
                mean, color = values.mean(0), SERIES[number]
                axes.plot(x, mean, label=label, color=color, linewidth=1.3)
            axes.set(xlabel="round", title=process)
            if is_quadratic:
                axes.set_yscale("log")
        ylabel = "distance to the optimum" if is_quadratic else "test accuracy"
        panels[0].set_ylabel(ylabel)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        file.write_text(svg(figure, transparent=False, facecolor="white"))
    print(f"\n{file}")


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("study", choices=("quadratic", "fashion"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--process", choices=PROCESSES, action="append")
    arguments = parser.parse_args()
    study, rounds = arguments.study, arguments.rounds or 1000
    is_quadratic = study == "quadratic"
    out = arguments.out or Path("runs") / f"participation-{study}"
    seeds = arguments.seeds or (3 if is_quadratic else 5)
    results = {}
    for process in arguments.process or PROCESSES:
        cases = experiments(study, process, rounds)
        results[process] = compare(cases, seeds, out / process, Terminal())
    key = "test_distance" if is_quadratic else "test_accuracy"
    form = ".3f" if is_quadratic else ".2%"
    print_head([key.replace("_", " "), *results])
    for label in methods(1.0):
        cells = [label]
        for comparison in results.values():
            mean, std = late(comparison, label, key)
            cells.append(f"{mean:{form}} ± {std:{form}}")
        print_row(cells)
    draw(study, results, key, out / "curves.svg")


if __name__ == "__main__":
    main()
