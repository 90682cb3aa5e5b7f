"""FedPara against the dense model and a plain low-rank one of the same size.

python -m benchmarks.fedpara
    the study: a table, and docs/fedpara.svg with --picture
python -m benchmarks.fedpara rates
    the step sizes that it uses, chosen on a seed that it does not use

Accuracy against bytes, on Fashion-MNIST. The CNN of McMahan et al. (1.66 M parameters);
its second convolution and its large dense layer are factored, which are 99.6 % of it.
100 clients, Dirichlet 0.5 or IID, 6 000 training images; 10 clients a round, two local
epochs, batch 16, 40 rounds. FedAvg. Options: --out DIR (runs there are read, or gone on
with), --seeds N.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment
from fedcore.errors import RunError
from fedcore.storage.memory import size_text
from fedcore.views.compare import compare
from fedcore.views.comparison import Run, curve
from fedcore.views.figures import SERIES, STYLE, svg
from fedcore.views.page import THEME
from fedcore.views.terminal import Terminal

Values = dict[str, Any]
KEEP = ["input", "output"]  # one channel cannot be factored, ten classes need not be
FORMS: dict[str, Values] = {
    "dense": {"form": "dense"},
    "FedPara, gamma 0": {"form": "fedpara", "gamma": 0.0, "keep": KEEP},
    "low rank, same size": {"form": "lowrank", "gamma": 0.0, "keep": KEEP},
}
# The best of `rates`; 0.05 makes the last one diverge.
RATES = {"dense": 0.1, "FedPara, gamma 0": 0.2, "low rank, same size": 0.025}
SPREADS: dict[str, Values] = {
    "IID": {"name": "iid"},
    "Dirichlet 0.5": {"name": "dirichlet", "alpha": 0.5, "min_size": 10},
}
STEPS = (0.0125, 0.025, 0.05, 0.1, 0.2)  # the step sizes that `rates` tries
TARGETS = (0.75, 0.80)


def experiment(form: str, spread: str, lr: float, **more: Any) -> Experiment:
    values: Values = {
        "task": "benchmarks.personal:some_images",
        "options": {"source": "fashion-mnist", "rows": 6000},
        "population": 100,
        "rounds": 40,
        "method": {"name": "fedavg", "local_lr": lr},
        "model": {"name": "cnn"},
        "lowrank": FORMS[form],
        "partition": SPREADS[spread],
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"batch_size": 16, "epochs": 2},
        "evaluation": {"every": 2, "clients": 0},
    }
    return Experiment.parse(values | more)


def to_target(runs: list[Run], target: float) -> str:
    """Bytes sent until the mean over seeds first reaches the target."""
    _, sent, values = curve(runs, "test_accuracy")
    reached = np.flatnonzero(values.mean(0) >= target)
    return size_text(float(sent[reached[0]])) if len(reached) else "not reached"


def in_all(run: Run) -> str:
    """Bytes sent."""
    rows = run.history.rows
    return size_text(sum(row["bytes_down"] + row["bytes_up"] for row in rows))


def study(out: Path, seeds: int, picture: Path | None) -> None:
    rows: list[list[str]] = []
    results: dict[str, dict[str, list[Run]]] = {}
    for spread in SPREADS:
        experiments = [(form, experiment(form, spread, RATES[form])) for form in FORMS]
        folder = out / spread.lower().replace(" ", "-")
        results[spread] = compare(experiments, seeds, folder, Terminal()).runs
        for form, runs in results[spread].items():
            last = [100 * run.history.rows[-1]["test_accuracy"] for run in runs]
            at_targets = [to_target(runs, target) for target in TARGETS]
            scores = [mean_and_std(last), *at_targets, in_all(runs[0])]
            rows.append([spread, form, *scores])
    columns = [f"sent to {target:.0%}" for target in TARGETS]
    print_table(["", "", "test accuracy, %", *columns, "sent in all"], rows)
    if picture:
        draw(results, picture)


def draw(results: dict[str, dict[str, list[Run]]], file: Path) -> None:
    """Accuracy against bytes sent, on a logarithmic axis.

    Mean over seeds, lowest to highest.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(results), sharey=True)
        for axes, (spread, forms) in zip(panels, results.items(), strict=True):
            for number, (form, runs) in enumerate(forms.items()):
                _, sent, values = curve(runs, "test_accuracy")
                x, y, color = sent / 1e6, 100 * values, SERIES[number]
                axes.plot(x, y.mean(0), color=color, label=form)
                low, high = y.min(0), y.max(0)
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            axes.set(xscale="log", xlabel="MB sent", title=spread, ylim=(60, 92))
        panels[0].set_ylabel("test accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        file.write_text(svg(figure, transparent=False, facecolor=THEME["card"][0]))


def rates(out: Path) -> None:
    """One seed, Dirichlet 0.5, as many rounds as the study."""
    rows = []
    for form in FORMS:
        cells = [last_accuracy(form, lr, out / "rates") for lr in STEPS]
        rows.append([form, *cells])
    print_table(["test accuracy, %", *map(str, STEPS)], rows)


def last_accuracy(form: str, lr: float, out: Path) -> str:
    label = f"{form} {lr}"
    settings = experiment(form, "Dirichlet 0.5", lr, seed=100)
    try:
        (run,) = compare([(label, settings)], 1, out, Terminal()).runs[label]
    except RunError:
        return "diverges"
    return f"{100 * run.history.rows[-1]['test_accuracy']:.1f}"


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("what", nargs="?", choices=["study", "rates"], default="study")
    parser.add_argument("--out", type=Path, default=Path("runs/fedpara"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "rates":
        rates(arguments.out)
    else:
        study(arguments.out, arguments.seeds, arguments.picture)


if __name__ == "__main__":
    main()
