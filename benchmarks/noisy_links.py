"""Methods under a noisy channel: which of them survive it.

python -m benchmarks.noisy_links
    every method under the same channels
python -m benchmarks.noisy_links rounds
    FedAvg and the ADMM family round by round: 10 clients, all or half of them scheduled

Digits, Dirichlet 0.5, 5 local steps of batch 16, MLP 64-32-10, 150 rounds, the same
Gaussian noise on both links; the first study has 30 clients, 10 a round. Every method
keeps the step sizes of its preset; the ADMM family solves by SGD, with the rho that is
best without noise, or those that `rounds` names. Test accuracy, mean of the last five
evaluations (`rounds`: at that round); where clients have models of their own, the mean
accuracy of clients on their own held-out examples, beside FedAvg's. Mean and standard
deviation over seeds. Options: --out DIR (runs there are read, or gone on with),
--seeds N, --method NAME (some only). Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import mean_and_std, print_head, print_row
from fedcore import Experiment, methods
from fedcore.config import read_preset
from fedcore.errors import RunError
from fedcore.method import Method
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal

CHANNELS: dict[str, dict[str, float]] = {
    "no noise": {},
    "variance 1e-3": {"variance": 1e-3},
    "variance 1e-2": {"variance": 1e-2},
    "SNR 10 dB": {"snr_db": 10.0},
}
# The best rho of 0.01, 0.03, 0.1, 0.3, 1, 2 and 4.
ADMM = {"admm": 1.0, "rerce": 4.0, "clu": 0.01}

Measure = Callable[[dict[str, Any]], float]


def experiment(name: str, channel: dict[str, float], **changed: Any) -> Experiment:
    settings = dict(read_preset(name)["method"])
    if name in ADMM:
        settings = {"name": name, "rho": ADMM[name], "local_lr": 0.1}
    values: dict[str, Any] = {
        "method": settings,
        "task": "digits",
        "population": 30,
        "proxy": 100,  # the same pool for all, whether they use it or not
        "rounds": 150,
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "model": {"name": "mlp", "hidden": [32]},
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"steps": 5, "batch_size": 16},
        "evaluation": {"every": 5},
        "links": {"downlink": channel, "uplink": channel},
    }
    return Experiment.parse(values, changed)


def has_own_models(name: str) -> bool:
    method: Method[Any] = experiment(name, {}).build_method()
    return method.personalises()


def test_accuracy(row: dict[str, Any]) -> float:
    return float(row["test_accuracy"])


def client_accuracy(row: dict[str, Any]) -> float:
    return float(row["client_accuracy"]["mean"])


def score(
    runs: list[Run], measure: Measure, until: int = 150, evaluations: int = 5
) -> str:
    """Mean over the last evaluations until that round."""
    values = []
    for run in runs:
        rows = [row for row in run.history.rows[:until] if "test_accuracy" in row]
        values.append(100 * statistics.fmean(map(measure, rows[-evaluations:])))
    return mean_and_std(values)


def every_method(out: Path, seeds: int, names: list[str]) -> None:
    personal = [name for name in names if has_own_models(name)]
    shared = [name for name in names if name not in personal]
    if shared:
        compare_methods(out, seeds, shared, test_accuracy, "test accuracy")
    if personal:
        beside = [*personal, "fedavg"]
        compare_methods(out, seeds, beside, client_accuracy, "accuracy of clients")


def compare_methods(
    out: Path, seeds: int, names: list[str], measure: Measure, title: str
) -> None:
    """Print the scores of these methods by channel."""
    print_head([f"{title}, %", *CHANNELS])
    for name in names:
        cells = [name]
        for label, channel in CHANNELS.items():
            case, folder = (name, experiment(name, channel)), label.replace(" ", "-")
            try:
                runs = compare([case], seeds, out / folder, Terminal()).runs[name]
            except RunError:  # three rounds without a finite update
                cells.append("diverges")
            else:
                cells.append(score(runs, measure))
        print_row(cells)
    print()


def by_round(out: Path, seeds: int, names: list[str]) -> None:
    marks = {"variance 1e-3": (10, 50, 150), "no noise": (150,)}
    head = []
    for noise, rounds in marks.items():
        head += [f"{noise}, round {t}" for t in rounds]
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    if "fedavg" in names:
        cases["fedavg"] = "fedavg", {}
    for name in ADMM:
        if name in names:
            for rho in (0.1, 1.0):
                cases[f"{name}, rho {rho:g}"] = name, {"method.rho": rho}
    for cohort in (10, 5):
        print_head([f"{cohort} of 10 clients, test accuracy, %", *head])
        for label, (name, more) in cases.items():
            changed = {"population": 10, "participation.cohort": cohort, **more}
            cells = [label]
            for noise, rounds in marks.items():
                settings = experiment(name, CHANNELS[noise], **changed)
                folder = out / f"{cohort}-of-10" / noise.replace(" ", "-")
                results = compare([(label, settings)], seeds, folder, Terminal())
                runs = results.runs[label]
                cells += [score(runs, test_accuracy, t, 1) for t in rounds]
            print_row(cells)
        print()


def main() -> None:
    studies = {"methods": every_method, "rounds": by_round}
    names = {*methods.names(), *methods.RENAMED} - {"fedopt"}  # each has a preset
    every_name = sorted(names)
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("study", nargs="?", choices=studies, default="methods")
    parser.add_argument("--out", type=Path, default=Path("runs") / "noisy-links")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", choices=every_name, action="append")
    arguments = parser.parse_args()
    chosen = arguments.method or every_name
    studies[arguments.study](arguments.out, arguments.seeds, chosen)


if __name__ == "__main__":
    main()
