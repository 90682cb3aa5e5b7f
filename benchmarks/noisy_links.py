"""Which methods survive a noisy channel: `python -m benchmarks.noisy_links`.

Every method of strategies/ on digits: 30 clients, Dirichlet 0.5, 10 a round, 5 local steps of batch 16, MLP 64-32-10, 150 rounds,
under the same Gaussian noise on both links. Each keeps the step sizes of its preset; the ADMM family solves by SGD, with the rho
that is best without noise. Test accuracy, mean of the last five evaluations, mean and standard deviation over seeds. Options: --out
DIR (runs there are read, or gone on with), --seeds N, --method NAME (some only). Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from fedcore import Experiment
from fedcore import method as methods
from fedcore.compare import Run, compare
from fedcore.config import read_preset
from fedcore.errors import RunError
from fedcore.progress import Terminal

CHANNELS: dict[str, dict[str, float]] = {
    "no noise": {},
    "variance 1e-3": {"variance": 1e-3},
    "variance 1e-2": {"variance": 1e-2},
    "SNR 10 dB": {"snr_db": 10.0},
}
ADMM = {"admm": 1.0, "rerce": 4.0, "clu": 0.01}  # rho, of 0.01, 0.03, 0.1, 0.3, 1, 2 and 4


def experiment(name: str, channel: dict[str, float]) -> Experiment:
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
        "evaluation": {"every": 5, "clients": 0},
        "links": {"downlink": channel, "uplink": channel},
    }
    return Experiment.parse(values)


def score(runs: list[Run]) -> str:
    values = [100 * statistics.fmean([row["test_accuracy"] for row in run.rows if "test_accuracy" in row][-5:]) for run in runs]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs") / "noisy-links")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", choices=methods.names(), action="append")
    a = parser.parse_args()
    print(f"| test accuracy, % | {' | '.join(CHANNELS)} |\n|---|{'---|' * len(CHANNELS)}", flush=True)
    for name in a.method or methods.names():
        cells = []
        for label, channel in CHANNELS.items():
            try:
                found = compare([(name, experiment(name, channel))], a.seeds, a.out / label.replace(" ", "-"), Terminal())
                cells.append(score(found.runs[name]))
            except RunError:  # three rounds without a finite update
                cells.append("diverges")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
