"""Accuracy against epsilon: noise of devices in secure sums, and noise of a server.

python -m benchmarks.private                  the table, one seed; 14 runs of a minute
python -m benchmarks.private --seeds 3
python -m benchmarks.private --svg > docs/private.svg

Fashion-MNIST, 1 000 clients, cohort 100, MLP 784-32-10, 100 rounds, bound C = 0.5:
plain sums, secure sums, and three levels of noise, each added

    devices    by the clients themselves, in a secure sum (defence.distributed); the
               noise of 67 of 100 is counted on, so that 33 may leave
    few leave  the same, with secure.threshold = 95: 5 may leave
    server     by a server that sees every update, the same z: epsilon for those who
               know when a client took part, as with the devices' noise
    secret     by such a server, with as much epsilon: for those who do not know when a
               client took part, which makes the same epsilon cheaper (DP-FedAvg)

Epsilon is by RDP, for the client that took part most often. Runs in --out (default:
runs/private) are read, or gone on with: stop it in any way, and call it again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment, run
from fedcore.privacy import default_delta, epsilon_rdp
from fedcore.views.figures import STYLE, svg

PRESET = "benchmarks/fashion.toml"
CLIP = 0.5
LEVELS = (1.0, 2.0, 4.0)  # z of the devices' noise
FEW = 95  # threshold where few leave
RATE = 0.1  # cohort 100 of 1 000
SETTINGS: dict[str, Any] = {
    "model.hidden": [32],
    "method.weighting": "participating",
    "evaluation.every": 100,
    "evaluation.clients": 0,
}
SECURE = {**SETTINGS, "aggregation.secure": True}
WHO = {
    "devices": "devices, 33 of 100 may leave",
    "few": "devices, 5 of 100 may leave",
    "server": "a trusted server, cohorts known",
    "secret": "a trusted server, cohorts secret",
}


class Row(NamedTuple):
    """A row of the table."""

    title: str
    accuracies: list[float]  # by seed
    epsilon: float | None
    noise: float | None  # z


# Runs


def of_devices(z: float) -> dict[str, Any]:
    """Settings of a run with the devices' own noise."""
    noise = {"noise_multiplier": z, "clip": CLIP}
    return {**SECURE, "defence.distributed": noise}


def of_server(z: float) -> dict[str, Any]:
    """Settings of DP-FedAvg, whose server adds noise to the sum."""
    settings = {key: SETTINGS[key] for key in SETTINGS if key != "method.weighting"}
    method = {"name": "dpfedavg", "local_lr": 0.1, "clip": CLIP, "noise_multiplier": z}
    cohort = {"name": "bernoulli", "mean": RATE}
    return {**settings, "method": method, "participation": cohort, "min_reports": 0}


def final(settings: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """The last row of a run; read where it is done."""
    place = folder / f"seed{seed}"
    file = place / "result.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    print(place, file=sys.stderr)
    experiment = Experiment.load(PRESET, {**settings, "seed": seed})
    if (place / "checkpoint").is_dir():
        result = run(experiment, resume=place, progress=False)
    else:
        result = run(experiment, place, progress=False)
    last = dict(result.final)
    file.write_text(json.dumps(last))
    return last


def accuracies_of(settings: dict[str, Any], folder: Path, seeds: int) -> list[float]:
    """The accuracy on the test set, by seed."""
    finals = [final(settings, seed, folder) for seed in range(seeds)]
    return [last["test_accuracy"] for last in finals]


def multiplier_for(epsilon: float, rounds: int, delta: float) -> float:
    """z of a server whose cohorts are secret, for this epsilon: by bisection."""
    low, high = 0.1, 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if epsilon_rdp(middle, RATE, rounds, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def rows_of(out: Path, seeds: int) -> list[Row]:
    """Every run, from the one without noise to the one with most."""
    rows = [
        Row(
            "nothing, plain sums",
            accuracies_of(SETTINGS, out / "plain", seeds),
            *[None] * 2,
        ),
        Row(
            "nothing, secure sums",
            accuracies_of(SECURE, out / "secure", seeds),
            *[None] * 2,
        ),
    ]
    experiment = Experiment.load(PRESET)
    delta = default_delta(experiment.population or 0)
    for z in LEVELS:
        folder = out / f"devices-{z:g}"
        accuracies = accuracies_of(of_devices(z), folder, seeds)
        spent = [
            final(of_devices(z), seed, folder)["privacy"]["epsilon_rdp"]
            for seed in range(seeds)
        ]
        epsilon = statistics.fmean(spent)
        rows.append(Row(WHO["devices"], accuracies, epsilon, z))
        stay = {**of_devices(z), "secure.threshold": FEW}
        closer = accuracies_of(stay, out / f"few-{z:g}", seeds)
        rows.append(Row(WHO["few"], closer, epsilon, z))
        same = accuracies_of(of_server(z), out / f"server-{z:g}", seeds)
        rows.append(Row(WHO["server"], same, epsilon, z))
        less = round(multiplier_for(epsilon, experiment.rounds, delta), 3)
        cheaper = accuracies_of(of_server(less), out / f"secret-{z:g}", seeds)
        rows.append(Row(WHO["secret"], cheaper, epsilon, less))
    return rows


# What is shown


def show_table(rows: list[Row]) -> None:
    lines = []
    for row in rows:
        accuracy = mean_and_std([100 * value for value in row.accuracies])
        epsilon = "-" if row.epsilon is None else f"{row.epsilon:.1f}"
        noise = "-" if row.noise is None else f"{row.noise:g}"
        lines.append([row.title, epsilon, noise, accuracy])
    print_table(["noise is added by", "epsilon", "z", "test accuracy, %"], lines)


def show_picture(rows: list[Row]) -> None:
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for title in WHO.values():
            points = [row for row in rows if row.title == title]
            epsilons = [row.epsilon or 0.0 for row in points]
            means = [statistics.fmean(row.accuracies) for row in points]
            axes.plot(epsilons, means, marker="o", label=title)
        plain = statistics.fmean(rows[0].accuracies)
        axes.axhline(plain, linestyle="--", color="grey", label="no noise")
        axes.set(xlabel="epsilon", ylabel="test accuracy", xscale="log")
        axes.minorticks_off()
        marked = sorted({row.epsilon for row in rows if row.epsilon is not None})
        axes.set_xticks(marked, [f"{epsilon:.3g}" for epsilon in marked])
        axes.legend(frameon=False, loc="lower right")
        print(svg(figure))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/private"))
    parser.add_argument("--svg", action="store_true", help="the picture, not the table")
    arguments = parser.parse_args()
    rows = rows_of(arguments.out, arguments.seeds)
    if arguments.svg:
        show_picture(rows)
    else:
        show_table(rows)


if __name__ == "__main__":
    main()
