"""Which methods survive a noisy channel.

    python -m benchmarks.noisy_links           every method under the same channels
    python -m benchmarks.noisy_links rounds    FedAvg and the ADMM family round by round: 10 clients, all or half of them scheduled

Digits, Dirichlet 0.5, 5 local steps of batch 16, MLP 64-32-10, 150 rounds, the same Gaussian noise on both links; the first study
has 30 clients, 10 a round. Every method keeps the step sizes of its preset; the ADMM family solves by SGD, with the rho that is
best without noise, or those that `rounds` names. Test accuracy, mean of the last five evaluations (`rounds`: at that round); where
clients have models of their own, the mean accuracy of clients on their own held-out examples, beside FedAvg's. Mean and standard
deviation over seeds. Options: --out DIR (runs there are read, or gone on with), --seeds N, --method NAME (some only). Prints
Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcore import Experiment
from fedcore import method as methods
from fedcore.config import read_preset
from fedcore.errors import RunError
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal

CHANNELS: dict[str, dict[str, float]] = {
    "no noise": {},
    "variance 1e-3": {"variance": 1e-3},
    "variance 1e-2": {"variance": 1e-2},
    "SNR 10 dB": {"snr_db": 10.0},
}
ADMM = {
    "admm": 1.0,
    "rerce": 4.0,
    "clu": 0.01,
}  # rho, of 0.01, 0.03, 0.1, 0.3, 1, 2 and 4


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


def test_accuracy(row: dict[str, Any]) -> float:
    return float(row["test_accuracy"])


def client_accuracy(row: dict[str, Any]) -> float:
    return float(row["client_accuracy"]["mean"])


def score(
    runs: list[Run],
    accuracy: Callable[[dict[str, Any]], float],
    until: int = 150,
    evaluations: int = 5,
) -> str:
    """Mean over the last evaluations until that round."""
    values = []
    for run in runs:
        rows = [row for row in run.history.rows[:until] if "test_accuracy" in row][
            -evaluations:
        ]
        values.append(100 * statistics.fmean(map(accuracy, rows)))
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def every_method(out: Path, seeds: int, some: list[str]) -> None:
    own = [name for name in some if experiment(name, {}).build_method().personalises()]
    for measure, names in (
        (test_accuracy, [n for n in some if n not in own]),
        (client_accuracy, [*own, "fedavg"] if own else []),
    ):
        if not names:
            continue
        what = "test accuracy" if measure is test_accuracy else "accuracy of clients"
        print(
            f"| {what}, % | {' | '.join(CHANNELS)} |\n|---|{'---|' * len(CHANNELS)}",
            flush=True,
        )
        for name in names:
            cells = []
            for label, channel in CHANNELS.items():
                try:
                    found = compare(
                        [(name, experiment(name, channel))],
                        seeds,
                        out / label.replace(" ", "-"),
                        Terminal(),
                    )
                    cells.append(score(found.runs[name], measure))
                except RunError:  # three rounds without a finite update
                    cells.append("diverges")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print()


def by_round(out: Path, seeds: int, some: list[str]) -> None:
    marks = (10, 50, 150)
    head = [
        *(f"variance 1e-3, round {t}" for t in marks),
        f"no noise, round {marks[-1]}",
    ]
    for cohort in (10, 5):
        print(
            f"| {cohort} of 10 clients, test accuracy, % | {' | '.join(head)} |\n|---|{'---|' * len(head)}",
            flush=True,
        )
        for name in (name for name in ("fedavg", *ADMM) if name in some):
            for rho in (0.1, 1.0) if name in ADMM else (None,):
                changed = {"population": 10, "participation.cohort": cohort} | (
                    {} if rho is None else {"method.rho": rho}
                )
                label, cells = name if rho is None else f"{name}, rho {rho:g}", []
                for noise in ("variance 1e-3", "no noise"):
                    e = experiment(name, CHANNELS[noise], **changed)
                    runs = compare(
                        [(label, e)],
                        seeds,
                        out / f"{cohort}-of-10" / noise.replace(" ", "-"),
                        Terminal(),
                    ).runs[label]
                    cells += [
                        score(runs, test_accuracy, t, 1)
                        for t in (marks if noise != "no noise" else marks[-1:])
                    ]
                print(f"| {label} | {' | '.join(cells)} |", flush=True)
        print()


def main() -> None:
    studies = {"methods": every_method, "rounds": by_round}
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("study", nargs="?", choices=studies, default="methods")
    parser.add_argument("--out", type=Path, default=Path("runs") / "noisy-links")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", choices=methods.names(), action="append")
    a = parser.parse_args()
    studies[a.study](a.out, a.seeds, a.method or methods.names())


if __name__ == "__main__":
    main()
