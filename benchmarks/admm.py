"""ADMM over noisy links on weighted least squares: the figures of a thesis, and more.

Lari (2025), chapter 4.

python -m benchmarks.admm 4.1
    two variables against dual-free, everybody scheduled
python -m benchmarks.admm 4.2
    two variables with 4 of 100 scheduled
python -m benchmarks.admm 4.3
    how fast RERCE-Fed settles, by clients scheduled
python -m benchmarks.admm 4.4
    continual local updates or none, 4 of 100 scheduled, two noise levels; 4.5: 10,
    4.6: 25
python -m benchmarks.admm 4.7
    is w_n biased, and by noise? 6 clients, 6 features, means over up to 1 000 runs
python -m benchmarks.admm 4.8
    steady state by uplink noise; 4.9: by downlink noise; 4.10: by clients asked; and
    predicted
python -m benchmarks.admm walk
    rho as large as the curvature: dual-free noise is integrated, with two variables it
    is not

Prints tables in Markdown, in dB: 10 log10 of |w_k - w*|^2 / |w*|^2, mean over clients,
seeds and the last quarter of the rounds. "Predicted" is the exact second moment of the
recursion: the covariance of all errors, stepped through every schedule of one round.
Options: --out DIR (runs there are read, or gone on with), --seeds N (each draws data,
noise and schedule anew; 4.7: not the data).
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables import print_table
from fedcore import Experiment
from fedcore.rounds.loop import run
from fedcore.task import Task
from fedcore.tasks import TASKS, build_task
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.figures import SERIES, STYLE, svg
from fedcore.views.terminal import Terminal

LOW, HIGH = 6.25e-4, 1e-2
GRID = (0.0, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2)  # noise powers of figures 4.8 and 4.9
PAPER: dict[str, Any] = {"population": 100}
SMALL: dict[str, Any] = {
    "population": 6,
    "options": {"examples": [4, 5], "features": 6, "noise": 0.1},
}

Measured = dict[str, list[Run]]
"""Runs of all seeds, by label."""

Curves = dict[str, tuple[Sequence[float], Sequence[float]]]
"""(x, y) of each line of a plot, by label."""


def experiment(
    method: str,
    scheduled: int,
    rounds: int,
    down: float,
    up: float,
    base: dict[str, Any] = PAPER,
    every: int = 5,
    **settings: Any,
) -> Experiment:
    values = {
        "task": "weighted-least-squares",
        "rounds": rounds,
        "holdout": 0.0,
        "method": {"name": method, "solver": "exact", **settings},
        "participation": {"name": "uniform", "cohort": scheduled},
        "links": {"downlink": {"variance": down}, "uplink": {"variance": up}},
        "evaluation": {"every": every},
        **base,
    }
    return Experiment.parse(values)


def with_seed(settings: Experiment, seed: int) -> Experiment:
    return settings.model_copy(update={"seed": seed})


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def texts(levels: Sequence[float]) -> list[str]:
    return [f"{level:.1f}" for level in levels]


def measured_rows(run: Run) -> list[dict[str, Any]]:
    """The rounds that were evaluated."""
    return [row for row in run.history.rows if "client_nmsd" in row]


def nmsd(runs: list[Run], first: float, last: float) -> float:
    """Mean over seeds and the rounds in (first, last], in dB."""
    values = []
    for one in runs:
        for row in measured_rows(one):
            if first < row["round"] <= last:
                values.append(row["client_nmsd"]["mean"])
    return decibels(float(np.mean(values)))


def settled(runs: list[Run]) -> float:
    rounds = len(runs[0].history.rows)
    return nmsd(runs, 0.75 * rounds, rounds)


def optimum(task: Task) -> np.ndarray:
    """w*, [features] float64."""
    assert task.optimum is not None
    best: np.ndarray = task.optimum["weight"].numpy()[0]
    return best


def floor(settings: Experiment, seeds: int) -> float:
    """The error that is left in the paper's regime, in dB.

    Downlink noise in the directions that a client's data do not determine.
    """
    variance = settings.links.downlink.variance
    levels = []
    for seed in range(seeds):
        task = build_task(with_seed(settings, seed))
        best = optimum(task)
        undetermined = best.size - task.data.kept.mean()
        levels.append(variance * undetermined / (best**2).sum())
    return decibels(float(np.mean(levels)))


def predicted(settings: Experiment, seeds: int) -> float:
    """The NMSD that second moments give for RERCE-Fed, in dB.

    Mean over the last quarter of the rounds, and over seeds.
    """
    values = [_predicted(with_seed(settings, seed)) for seed in range(seeds)]
    return decibels(float(np.mean(values)))


class Step(NamedTuple):
    """One round with one schedule: error' = F error + noise, over K + 2 blocks of L.

    The blocks are the errors of w_1 .. w_K, w_n and w_{n-1}.
    """

    F: np.ndarray  # [(K + 2) L, (K + 2) L]
    covariance: np.ndarray  # of the noise, in the same shape


def _predicted(settings: Experiment) -> float:
    task = build_task(settings)
    best, K = optimum(task), task.population
    L, cohort = len(best), int(settings.model_dump()["participation"]["cohort"])
    A, error = _first_errors(settings, task)
    steps = []
    for chosen in itertools.combinations(range(K), cohort):
        steps.append(_step(settings, A, chosen))
    P, values = np.outer(error, error), []
    for n in range(1, settings.rounds + 1):
        P = np.mean([F @ P @ F.T + covariance for F, covariance in steps], axis=0)
        if n > 0.75 * settings.rounds:
            values.append(np.trace(P[: K * L, : K * L]) / K / (best**2).sum())
    return float(np.mean(values))


def _first_errors(settings: Experiment, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(rho N_k, [K, L, L]; the errors before the first round, [K + 2, L])."""
    rho, best = settings.method.model_dump()["rho"], optimum(task)
    K, L = task.population, len(best)
    A, error = np.zeros((K, L, L)), np.zeros((K + 2, L))
    for k in range(K):
        rows = task.data.rows(k, "train")
        x, (y, weight) = task.data.x[rows].numpy(), task.data.y[rows].numpy().T
        H, b = 2 * x.T @ (weight[:, None] * x), 2 * x.T @ (weight * y)
        A[k] = rho * np.linalg.inv(H + rho * np.eye(L))
        error[k] = np.linalg.pinv(H, hermitian=True) @ b - best
    error[K:] = -best  # w_0 = w_{-1} = 0
    return A, error


def _step(settings: Experiment, A: np.ndarray, chosen: tuple[int, ...]) -> Step:
    """A round in which these clients are scheduled."""
    (K, L, _), C, identity = A.shape, len(chosen), np.eye(A.shape[1])
    # error' = F error + G (zeta, eta), with noise zeta downlink and eta uplink
    F, G = np.zeros((K + 2, L, K + 2, L)), np.zeros((K + 2, L, 2, K, L))
    for k in range(K):
        F[k, :, k] = identity
    for k in chosen:
        F[k, :, k] = identity - A[k]
        F[k, :, K] = 2 * A[k]
        F[k, :, K + 1] = -A[k]
        G[k, :, 0, k] = A[k]
        G[K, :, 1, k] = identity / C
    F[K] = sum(F[k] for k in chosen) / C
    F[K + 1, :, K] = identity
    G[K, :, 0] = sum(G[k, :, 0] for k in chosen) / C
    size = (K + 2) * L
    noise = G.reshape(size, 2, K * L)
    zeta, eta = noise[:, 0], noise[:, 1]
    down, up = settings.links.downlink.variance, settings.links.uplink.variance
    covariance = down * zeta @ zeta.T + up * eta @ eta.T
    return Step(F.reshape(size, size), covariance)


def draw(file: Path, curves: Curves, xlabel: str, log: bool = False) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, (x, y)) in enumerate(curves.items()):
            axes.plot(
                x,
                y,
                "--" if "predicted" in label else "-",
                color=SERIES[number],
                label=label,
                marker="o" if len(x) < 20 else "",
            )
        axes.set(xlabel=xlabel, ylabel="NMSD, dB", xscale="log" if log else "linear")
        figure.legend(loc="outside right upper")
        file.write_text(svg(figure, transparent=False, facecolor="white"))
    print(file)


def by_round(measured: Measured) -> Curves:
    """NMSD by round: the mean over seeds, in dB."""
    curves: Curves = {}
    for label, runs in measured.items():
        values = []
        for one in runs:
            values.append([row["client_nmsd"]["mean"] for row in measured_rows(one)])
        levels = 10 * np.log10(np.mean(values, axis=0))
        curves[label] = [row["round"] for row in measured_rows(runs[0])], list(levels)
    return curves


# Figures


def figure_1(out: Path, seeds: int) -> None:
    experiments = [
        ("two variables", experiment("admm", 100, 100, LOW, LOW, every=1)),
        ("dual-free", experiment("rerce", 100, 100, LOW, LOW, every=1)),
    ]
    measured = compare(experiments, seeds, out, Terminal()).runs
    level = floor(experiments[0][1], seeds)
    levels = [settled(runs) for runs in measured.values()]
    print_table(
        ["C = K = 100, noise 6.25e-4", "two variables", "dual-free"],
        [
            ["measured", *texts(levels)],
            ["predicted", *texts([level + decibels(5), level])],
            ["thesis", "-26.8", "-34.7"],
        ],
    )
    draw(out / "figure.svg", by_round(measured), "round")


def figure_2(out: Path, seeds: int) -> None:
    experiments = []
    for absent in ("zero", "last"):
        settings = experiment("admm", 4, 250, LOW, LOW, absent=absent)
        experiments.append((f"absent: {absent}", settings))
    measured = compare(experiments, seeds, out, Terminal()).runs
    rows = []
    for label, runs in measured.items():
        rows.append([label, *texts([nmsd(runs, 95, 100), nmsd(runs, 245, 250)])])
    rows.append(["thesis", "-4.5", "-5.3"])
    print_table(["two variables, 4 of 100", "round 100", "round 250"], rows)
    draw(out / "figure.svg", by_round(measured), "round")


def figure_3(out: Path, seeds: int) -> None:
    experiments = []
    for scheduled, rounds in ((4, 500), (10, 250), (25, 100)):
        settings = experiment("rerce", scheduled, rounds, LOW, LOW)
        experiments.append((f"C = {scheduled}", settings))
    measured = compare(experiments, seeds, out, Terminal()).runs
    curves = by_round(measured)
    rows = []
    for label, runs in measured.items():
        level = settled(runs)
        points = zip(*curves[label], strict=True)
        flat = next(t for t, value in points if value < level + 0.5)
        rows.append([label, f"{level:.1f}", f"{flat:.0f}"])
    head = ["RERCE-Fed, noise 6.25e-4", "settled at", "within 0.5 dB of it from round"]
    print_table(head, rows)
    draw(out / "figure.svg", curves, "round")


def figure_456(
    scheduled: int, thesis: tuple[str, str, str, str]
) -> Callable[[Path, int], None]:
    rounds = {4: 500, 10: 300, 25: 150}[scheduled]

    def figure(out: Path, seeds: int) -> None:
        experiments, floors = [], []
        for noise in (LOW, HIGH):
            plain = experiment("rerce", scheduled, rounds, noise, noise)
            continual = experiment("clu", scheduled, rounds, noise, noise)
            experiments.append((f"RERCE-Fed, {noise:g}", plain))
            experiments.append((f"with CLU, {noise:g}", continual))
            floors += [floor(plain, seeds)] * 2
        measured = compare(experiments, seeds, out, Terminal()).runs
        levels = [settled(runs) for runs in measured.values()]
        print_table(
            [f"{scheduled} of 100", *measured],
            [
                ["measured", *texts(levels)],
                ["thesis", *thesis],
                ["predicted with everybody", *texts(floors)],
            ],
        )
        draw(out / "figure.svg", by_round(measured), "round")

    return figure


def one_data_set(settings: Experiment) -> Task:
    """The data of seed 0, whatever the seed of noise and schedule."""
    return TASKS["weighted-least-squares"](with_seed(settings, 0))


def figure_7(out: Path, seeds: int) -> None:
    base = {**SMALL, "task": "benchmarks.admm:one_data_set"}
    noisy = experiment("rerce", 3, 200, 1e-4, 1e-4, base, every=10**6)
    noiseless = experiment("rerce", 3, 200, 0.0, 0.0, base, every=10**6)
    best = optimum(build_task(noisy))
    to_best, to_noiseless = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            models = []
            for i, settings in enumerate((noisy, noiseless)):  # on the same schedule
                result = run(with_seed(settings, seed), Path(folder) / f"{seed}-{i}")
                models.append(result.params["weight"].numpy()[0])
            to_best.append(models[0] - best)
            to_noiseless.append(models[0] - models[1])
    scale = float((best**2).sum())
    counts = [m for m in (10, 30, 100, 300, 1000, 3000, 10000) if m <= seeds]
    rows: list[list[str]] = []
    curves: Curves = {}
    for label, differences in (
        ("w_n - w*", to_best),
        ("w_n - w_n without noise", to_noiseless),
    ):
        errors = np.array(differences)
        bias, unbiased = [], []
        for m in counts:
            bias.append(decibels((errors[:m].mean(0) ** 2).sum() / scale))
            single = (errors[:m] ** 2).sum(1).mean()
            unbiased.append(decibels(single / m / scale))
        rows.append([f"mean of {label}, squared, dB", *texts(bias)])
        rows.append(["if unbiased", *texts(unbiased)])
        curves[label] = counts, bias
        curves[f"{label}, if unbiased"] = counts, unbiased
    print_table(["runs M", *map(str, counts)], rows)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "figure.svg", curves, "runs", log=True)


Cases = dict[str, list[tuple[float, Experiment]]]
"""The points (x, experiment) of each curve, by label."""


def steady(out: Path, seeds: int, cases: Cases, xlabel: str) -> None:
    """Tabulate and draw a curve for each case, simulated and predicted."""
    experiments = []
    for label, points in cases.items():
        experiments += [(f"{label}, {x:g}", settings) for x, settings in points]
    measured = compare(experiments, seeds, out, Terminal()).runs
    curves: Curves = {}
    rows: list[list[str]] = []
    head = [xlabel]
    for label, points in cases.items():
        x = [value for value, _ in points]
        head[1:] = [f"{value:g}" for value in x]
        levels = [settled(measured[f"{label}, {value:g}"]) for value in x]
        expected = [predicted(settings, seeds) for _, settings in points]
        curves[label], curves[f"{label}, predicted"] = (x, levels), (x, expected)
        rows += [[label, *texts(levels)], ["predicted", *texts(expected)]]
    print_table(head, rows)
    draw(out / "figure.svg", curves, xlabel)


def figure_8(out: Path, seeds: int) -> None:
    cases: Cases = {}
    for down in (0.0, HIGH):
        points = [(up, experiment("rerce", 3, 400, down, up, SMALL)) for up in GRID]
        cases[f"downlink {down:g}"] = points
    steady(out, seeds, cases, "uplink noise power")


def figure_9(out: Path, seeds: int) -> None:
    cases: Cases = {}
    for up in (0.0, HIGH):
        points = [(down, experiment("rerce", 3, 400, down, up, SMALL)) for down in GRID]
        cases[f"uplink {up:g}"] = points
    steady(out, seeds, cases, "downlink noise power")


def figure_10(out: Path, seeds: int) -> None:
    cases: Cases = {}
    for noise in (LOW, HIGH):
        points: list[tuple[float, Experiment]] = []
        for scheduled in range(2, 7):
            settings = experiment("rerce", scheduled, 400, noise, noise, SMALL)
            points.append((scheduled, settings))
        cases[f"noise {noise:g}"] = points
    steady(out, seeds, cases, "clients scheduled of 6")


def walk(out: Path, seeds: int) -> None:
    clients, features, rounds = 10, 4, 10_000
    base: dict[str, Any] = {
        "population": clients,
        "options": {"examples": [12, 22], "features": features, "noise": 1.0},
    }
    task = build_task(experiment("rerce", clients, 1, 0, 0, base))
    eigenvalues = []
    for k in range(clients):
        x = task.data.x[task.data.rows(k, "train")].numpy()
        eigenvalues.append(np.trace(2 * x.T @ x) / features)
    mean = float(np.mean(eigenvalues))
    measured: Measured = {}
    for label, value in (
        ("rho = mean eigenvalue of H_k", mean),
        ("rho 100 times smaller", mean / 100),
    ):
        more: dict[str, Any] = {"base": base, "every": 50, "rho": round(value, 6)}
        two = experiment("admm", clients, rounds, 1e-2, 1e-2, **more)
        dual_free = experiment("rerce", clients, rounds, 1e-2, 1e-2, **more)
        experiments = [
            (f"two variables, {label}", two),
            (f"dual-free, {label}", dual_free),
        ]
        measured |= compare(experiments, seeds, out / f"{value:.3g}", Terminal()).runs
    marks = (100, 1000, rounds)
    columns = [f"rounds {n // 2} to {n}" for n in marks]
    rows = []
    for label, runs in measured.items():
        rows.append([label, *texts([nmsd(runs, 0.5 * n, n) for n in marks])])
    title = "10 clients, 4 features, noise 1e-2, all scheduled"
    print_table([title, *columns], rows)
    draw(out / "figure.svg", by_round(measured), "round", log=True)


FIGURES: dict[str, Callable[[Path, int], None]] = {
    "4.1": figure_1,
    "4.2": figure_2,
    "4.3": figure_3,
    "4.4": figure_456(4, ("-29.7", "-35.1", "-17.8", "-23.1")),
    "4.5": figure_456(10, ("-32.8", "-35.1", "-20.8", "-23.1")),
    "4.6": figure_456(25, ("-34.2", "-35.2", "-22.2", "-23.2")),
    "4.7": figure_7,
    "4.8": figure_8,
    "4.9": figure_9,
    "4.10": figure_10,
    "walk": walk,
}
SEEDS = {"4.7": 1000, "4.8": 10, "4.9": 10, "4.10": 10}  # of the others: 3


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    figure = arguments.figure
    out = arguments.out or Path("runs") / f"admm-{figure}"
    FIGURES[figure](out, arguments.seeds or SEEDS.get(figure, 3))


if __name__ == "__main__":
    main()
