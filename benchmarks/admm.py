"""ADMM over noisy links on weighted least squares: the figures of the first author's thesis (Lari, 2025, chapter 4), and beyond.

    python -m benchmarks.admm 4.1      two variables against dual-free, everybody scheduled
    python -m benchmarks.admm 4.2      two variables with 4 of 100 scheduled
    python -m benchmarks.admm 4.3      how fast RERCE-Fed settles, by clients scheduled
    python -m benchmarks.admm 4.4      continual local updates or none, 4 of 100 scheduled, two noise levels; 4.5: 10, 4.6: 25
    python -m benchmarks.admm 4.7      is w_n biased, and by noise? 6 clients, 6 features, means over up to 1 000 runs
    python -m benchmarks.admm 4.8      steady state by uplink noise; 4.9: by downlink noise; 4.10: by clients asked; and predicted
    python -m benchmarks.admm walk     rho as large as the curvature: dual-free noise is integrated, with two variables it is not

Prints tables in Markdown, in dB: 10 log10 of |w_k - w*|^2 / |w*|^2, mean over clients, seeds and the last quarter of the rounds.
"Predicted" is the exact second moment of the recursion: the covariance of all errors, stepped through every schedule of one round.
Options: --out DIR (runs there are read, or gone on with), --seeds N (each draws data, noise and schedule anew; 4.7: not the data).
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

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


def nmsd(runs: list[Run], first: float, last: float) -> float:
    """Mean over seeds and the rounds in (first, last], in dB."""
    values = [
        row["client_nmsd"]["mean"]
        for r in runs
        for row in r.history.rows
        if "client_nmsd" in row and first < row["round"] <= last
    ]
    return 10 * math.log10(np.mean(values))


def settled(runs: list[Run]) -> float:
    rounds = len(runs[0].history.rows)
    return nmsd(runs, 0.75 * rounds, rounds)


def floor(e: Experiment, seeds: int) -> float:
    """What is left in the paper's regime, in dB: downlink noise in the directions that a client's data do not determine."""
    levels = []
    for seed in range(seeds):
        task = build_task(e.model_copy(update={"seed": seed}))
        assert task.optimum is not None
        best = task.optimum["weight"].numpy()
        levels.append(
            e.links.downlink.variance
            * (best.size - task.data.kept.mean())
            / (best**2).sum()
        )
    return 10 * math.log10(np.mean(levels))


def predicted(e: Experiment, seeds: int) -> float:
    """Mean over the last quarter of the rounds of the NMSD that second moments give for RERCE-Fed, in dB."""
    return 10 * math.log10(
        np.mean(
            [_predicted(e.model_copy(update={"seed": seed})) for seed in range(seeds)]
        )
    )


def _predicted(e: Experiment) -> float:
    task, rho = build_task(e), e.method.model_dump()["rho"]
    assert task.optimum is not None
    best, K = task.optimum["weight"].numpy()[0], task.population
    L, C = len(best), int(e.model_dump()["participation"]["cohort"])
    A, error = (
        np.zeros((K, L, L)),
        np.zeros((K + 2, L)),
    )  # rho N_k; errors of w_1 .. w_K, w_n, w_{n-1}
    for k in range(K):
        rows = task.data.rows(k, "train")
        x, (y, weight) = task.data.x[rows].numpy(), task.data.y[rows].numpy().T
        H, b = 2 * x.T @ (weight[:, None] * x), 2 * x.T @ (weight * y)
        A[k] = rho * np.linalg.inv(H + rho * np.eye(L))
        error[k] = np.linalg.pinv(H, hermitian=True) @ b - best
    error[K:] = -best  # w_0 = w_{-1} = 0
    identity, steps = np.eye(L), []
    for chosen in itertools.combinations(range(K), C):
        F, G = (
            np.zeros((K + 2, L, K + 2, L)),
            np.zeros((K + 2, L, 2, K, L)),
        )  # error' = F error + G (zeta, eta)
        for k in range(K):
            F[k, :, k] = identity
        for k in chosen:
            F[k, :, k], F[k, :, K], F[k, :, K + 1], G[k, :, 0, k] = (
                identity - A[k],
                2 * A[k],
                -A[k],
                A[k],
            )
            G[K, :, 1, k] = identity / C
        F[K], F[K + 1, :, K] = sum(F[k] for k in chosen) / C, identity
        G[K, :, 0] = sum(G[k, :, 0] for k in chosen) / C
        noise = G.reshape((K + 2) * L, 2, K * L)
        spread = (
            e.links.downlink.variance * noise[:, 0] @ noise[:, 0].T
            + e.links.uplink.variance * noise[:, 1] @ noise[:, 1].T
        )
        steps.append((F.reshape((K + 2) * L, (K + 2) * L), spread))
    P, values = np.outer(error, error), []
    for n in range(1, e.rounds + 1):
        P = np.mean([F @ P @ F.T + spread for F, spread in steps], axis=0)
        if n > 0.75 * e.rounds:
            values.append(np.trace(P[: K * L, : K * L]) / K / (best**2).sum())
    return float(np.mean(values))


def table(head: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def draw(
    file: Path,
    curves: dict[str, tuple[list[float], list[float]]],
    xlabel: str,
    log: bool = False,
) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, (x, y)) in enumerate(curves.items()):
            mark = "--" if "predicted" in label else "-"
            axes.plot(
                x,
                y,
                mark,
                color=SERIES[number],
                label=label,
                marker="o" if len(x) < 20 else "",
            )
        axes.set(xlabel=xlabel, ylabel="NMSD, dB", xscale="log" if log else "linear")
        figure.legend(loc="outside right upper")
        file.write_text(svg(figure, transparent=False, facecolor="white"))
    print(file)


def by_round(found: Measured) -> dict[str, tuple[list[float], list[float]]]:
    curves = {}
    for label, runs in found.items():
        rounds = [row["round"] for row in runs[0].history.rows if "client_nmsd" in row]
        values = np.mean(
            [
                [
                    row["client_nmsd"]["mean"]
                    for row in r.history.rows
                    if "client_nmsd" in row
                ]
                for r in runs
            ],
            axis=0,
        )
        curves[label] = (rounds, list(10 * np.log10(values)))
    return curves


# Figures


def figure_1(out: Path, seeds: int) -> None:
    experiments = [
        ("two variables", experiment("admm", 100, 100, LOW, LOW, every=1)),
        ("dual-free", experiment("rerce", 100, 100, LOW, LOW, every=1)),
    ]
    found = compare(experiments, seeds, out, Terminal()).runs
    level = floor(experiments[0][1], seeds)
    table(
        ["C = K = 100, noise 6.25e-4", "two variables", "dual-free"],
        [
            ["measured", *(f"{settled(runs):.1f}" for runs in found.values())],
            ["predicted", f"{level + 10 * math.log10(5):.1f}", f"{level:.1f}"],
            ["thesis", "-26.8", "-34.7"],
        ],
    )
    draw(out / "figure.svg", by_round(found), "round")


def figure_2(out: Path, seeds: int) -> None:
    experiments = [
        (f"absent: {absent}", experiment("admm", 4, 250, LOW, LOW, absent=absent))
        for absent in ("zero", "last")
    ]
    found = compare(experiments, seeds, out, Terminal()).runs
    rows = [
        [label, f"{nmsd(runs, 95, 100):.1f}", f"{nmsd(runs, 245, 250):.1f}"]
        for label, runs in found.items()
    ]
    table(
        ["two variables, 4 of 100", "round 100", "round 250"],
        [*rows, ["thesis", "-4.5", "-5.3"]],
    )
    draw(out / "figure.svg", by_round(found), "round")


def figure_3(out: Path, seeds: int) -> None:
    experiments = [
        (f"C = {C}", experiment("rerce", C, rounds, LOW, LOW))
        for C, rounds in ((4, 500), (10, 250), (25, 100))
    ]
    found = compare(experiments, seeds, out, Terminal()).runs
    rows = []
    for label, runs in found.items():
        level = settled(runs)
        rounds, curve = by_round({label: runs})[label]
        flat = next(
            t for t, value in zip(rounds, curve, strict=True) if value < level + 0.5
        )
        rows.append([label, f"{level:.1f}", f"{flat:.0f}"])
    table(
        ["RERCE-Fed, noise 6.25e-4", "settled at", "within 0.5 dB of it from round"],
        rows,
    )
    draw(out / "figure.svg", by_round(found), "round")


def figure_456(
    scheduled: int, thesis: tuple[str, str, str, str]
) -> Callable[[Path, int], None]:
    def figure(out: Path, seeds: int) -> None:
        rounds = {4: 500, 10: 300, 25: 150}[scheduled]
        experiments = [
            (f"{label}, {noise:g}", experiment(method, scheduled, rounds, noise, noise))
            for noise in (LOW, HIGH)
            for method, label in (("rerce", "RERCE-Fed"), ("clu", "with CLU"))
        ]
        found = compare(experiments, seeds, out, Terminal()).runs
        levels = [settled(runs) for runs in found.values()]
        full = [f"{floor(experiments[2 * i][1], seeds):.1f}" for i in (0, 1)]
        table(
            [f"{scheduled} of 100", *found],
            [
                ["measured", *(f"{level:.1f}" for level in levels)],
                ["thesis", *thesis],
                ["predicted with everybody", full[0], full[0], full[1], full[1]],
            ],
        )
        draw(out / "figure.svg", by_round(found), "round")

    return figure


def one_data_set(e: Experiment) -> Task:
    """The data of seed 0, whatever the seed of noise and schedule."""
    return TASKS["weighted-least-squares"](e.model_copy(update={"seed": 0}))


def figure_7(out: Path, seeds: int) -> None:
    base = {**SMALL, "task": "benchmarks.admm:one_data_set"}
    noisy, silent = (
        experiment("rerce", 3, 200, noise, noise, base, every=10**6)
        for noise in (1e-4, 0.0)
    )
    best, found = build_task(noisy).optimum, []
    assert best is not None
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            pair = [
                run(e.model_copy(update={"seed": seed}), Path(folder) / f"{seed}-{i}")
                .params["weight"]
                .numpy()[0]
                for i, e in enumerate((noisy, silent))  # on the same schedule
            ]
            found.append((pair[0] - best["weight"].numpy()[0], pair[0] - pair[1]))
    scale, counts = (
        float(best["weight"].square().sum()),
        [m for m in (10, 30, 100, 300, 1000, 3000, 10000) if m <= seeds],
    )
    rows, curves = [], {}
    for label, errors in zip(
        ("w_n - w*", "w_n - w_n without noise"),
        np.array(found).swapaxes(0, 1),
        strict=True,
    ):
        bias = [
            10 * math.log10((errors[:m].mean(0) ** 2).sum() / scale) for m in counts
        ]
        single = [
            10 * math.log10((errors[:m] ** 2).sum(1).mean() / m / scale) for m in counts
        ]
        rows += [
            [f"mean of {label}, squared, dB", *(f"{v:.1f}" for v in bias)],
            ["if unbiased", *(f"{v:.1f}" for v in single)],
        ]
        curves |= {
            label: ([*counts], bias),
            f"{label}, if unbiased": ([*counts], single),
        }
    table(["runs M", *map(str, counts)], rows)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "figure.svg", curves, "runs", log=True)


def steady(
    out: Path, seeds: int, cases: dict[str, list[tuple[float, Experiment]]], xlabel: str
) -> None:
    """A curve a case, simulated and predicted."""
    experiments = [
        (f"{label}, {x:g}", e) for label, points in cases.items() for x, e in points
    ]
    found = compare(experiments, seeds, out, Terminal()).runs
    curves: dict[str, tuple[list[float], list[float]]] = {}
    rows = []
    for label, points in cases.items():
        x = [value for value, _ in points]
        measured = [settled(found[f"{label}, {value:g}"]) for value in x]
        expected = [predicted(e, seeds) for _, e in points]
        curves[label], curves[f"{label}, predicted"] = (x, measured), (x, expected)
        rows += [
            [label, *(f"{v:.1f}" for v in measured)],
            ["predicted", *(f"{v:.1f}" for v in expected)],
        ]
    table([xlabel, *(f"{value:g}" for value, _ in next(iter(cases.values())))], rows)
    draw(out / "figure.svg", curves, xlabel)


def figure_8(out: Path, seeds: int) -> None:
    cases = {
        f"downlink {down:g}": [
            (up, experiment("rerce", 3, 400, down, up, SMALL)) for up in GRID
        ]
        for down in (0.0, HIGH)
    }
    steady(out, seeds, cases, "uplink noise power")


def figure_9(out: Path, seeds: int) -> None:
    cases = {
        f"uplink {up:g}": [
            (down, experiment("rerce", 3, 400, down, up, SMALL)) for down in GRID
        ]
        for up in (0.0, HIGH)
    }
    steady(out, seeds, cases, "downlink noise power")


def figure_10(out: Path, seeds: int) -> None:
    cases = {
        f"noise {noise:g}": [
            (C, experiment("rerce", C, 400, noise, noise, SMALL)) for C in range(2, 7)
        ]
        for noise in (LOW, HIGH)
    }
    steady(out, seeds, cases, "clients scheduled of 6")


def walk(out: Path, seeds: int) -> None:
    base: dict[str, Any] = {
        "population": 10,
        "options": {"examples": [12, 22], "features": 4, "noise": 1.0},
    }
    task = build_task(experiment("rerce", 10, 1, 0, 0, base))
    H = [
        2 * x.T @ x
        for x in (task.data.x[task.data.rows(k, "train")].numpy() for k in range(10))
    ]
    rho = float(np.mean([np.trace(h) / 4 for h in H]))
    found: Measured = {}
    for label, value in (
        ("rho = mean eigenvalue of H_k", rho),
        ("rho 100 times smaller", rho / 100),
    ):
        experiments = [
            (
                f"{name}, {label}",
                experiment(
                    method, 10, 10_000, 1e-2, 1e-2, base, every=50, rho=round(value, 6)
                ),
            )
            for name, method in (("two variables", "admm"), ("dual-free", "rerce"))
        ]
        found |= compare(experiments, seeds, out / f"{value:.3g}", Terminal()).runs
    marks = (100, 1000, 10_000)
    rows = [
        [label, *(f"{nmsd(runs, 0.5 * n, n):.1f}" for n in marks)]
        for label, runs in found.items()
    ]
    table(
        [
            "10 clients, 4 features, noise 1e-2, all scheduled",
            *(f"rounds {n // 2} to {n}" for n in marks),
        ],
        rows,
    )
    draw(out / "figure.svg", by_round(found), "round", log=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int)
    a = parser.parse_args()
    seeds = a.seeds or {"4.7": 1000, "4.8": 10, "4.9": 10, "4.10": 10}.get(a.figure, 3)
    FIGURES[a.figure](a.out or Path("runs") / f"admm-{a.figure}", seeds)


if __name__ == "__main__":
    main()
