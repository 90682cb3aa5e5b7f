"""Leakage of updates: SME against gradient inversion and simulated training.

    python -m benchmarks.audit sweep     PSNR against local epochs: SME, IG and DLFA
    python -m benchmarks.audit cifar     the same on CIFAR-10 (--data FOLDER of its
                                         parquet files)
    python -m benchmarks.audit labels    label counts from the output layer's bias, by
                                         number of examples and step size
    python -m benchmarks.audit scale     a shortened update, with and without a searched
                                         path scale; secure aggregation
    python -m benchmarks.audit together  8 clients in one batch of optimisations against
                                         one after another, by model

Fashion-MNIST, the CNN 16-32-64 with average pooling, 8 examples a client in batches of
4, step size 0.01, true labels (as in the paper), 300 iterations; means over clients,
mean and standard deviation over seeds. Options: --seeds N, --out DIR (cells there are
read), --picture FILE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.fedlaw import table
from fedcore import Experiment
from fedcore.audit import cells, examine, metrics, plan
from fedcore.audit.attacks import labels
from fedcore.audit.attacks.sme import SME, SurrogateSettings
from fedcore.audit.observe import Subject, aggregate, moved
from fedcore.audit.simulate import simulate
from fedcore.rounds.loop import Quiet
from fedcore.tasks import build_task
from fedcore.views.figures import STYLE, svg

CNN = {"name": "cnn", "channels": [16, 32], "kernel": 3, "hidden": 64, "pool": "avg"}
SMALL: dict[str, Any] = {
    "task": "fashion-mnist",
    "population": 100,
    "holdout": 0.0,
    "model": CNN,
}
IN_SMES_LOOP = {"iterations": 300, "lr": 1.0, "tv": 0.01}


def experiment(seed: int, lr: float = 0.01, **settings: Any) -> Experiment:
    return Experiment.parse(
        {
            **SMALL,
            "method": {"name": "fedavg", "local_lr": lr},
            "seed": seed,
            **settings,
        }
    )


class Watch:
    """An cells.Observer that says on stderr where it is."""

    def cell(self, number: int, cells: int, name: str) -> None:
        print(f"{number + 1}/{cells} {name}", flush=True, file=sys.stderr)

    def progress(self, share: float, what: str, objective: float | None) -> None:
        pass

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)

    def training(self) -> Quiet:
        return Quiet()


def spread(values: Sequence[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def sweep(a: argparse.Namespace, cifar: bool = False) -> None:
    """SME and IG over local epochs; DLFA where it is not too slow."""
    epochs = (1, 5, 20) if cifar else (1, 2, 5, 10, 20)
    rows: dict[str, list[str]] = {}
    curves: dict[str, list[float]] = {}
    levels: list[float] = []
    settings = {"task": "cifar10", "data_folder": a.data} if cifar else {}
    for E in epochs:
        audited: dict[str, list[dict[str, Any]]] = {}
        for seed in range(a.seeds):
            e = experiment(seed, **settings)
            attacks = (
                ("sme", "ig", "dlfa")
                if E in a.dlfa and seed < a.dlfa_seeds
                else ("sme", "ig")
            )
            for attack in attacks:
                options = {
                    "sme": {"iterations": 300},
                    "ig": IN_SMES_LOOP,
                    "dlfa": {"iterations": a.dlfa_iterations},
                }
                clients = 1 if attack == "dlfa" else 2
                audit_plan = plan.Plan(
                    (attack,),
                    options,
                    "paper",
                    "oracle",
                    images=False,
                    clients=clients,
                    seed=seed,
                )
                found = examine.examine(
                    "sweep",
                    e,
                    cells.sweep(e, audit_plan, [E], [4], [8]),
                    audit_plan,
                    a.out,
                    Watch(),
                )
                audited.setdefault(attack, []).extend(found.cells)
        for attack, of in audited.items():
            value = [cell["summary"]["attacks"][attack]["psnr"]["mean"] for cell in of]
            rows.setdefault(f"{attack}, dB", ["-"] * len(epochs))[epochs.index(E)] = (
                spread(value)
            )
            curves.setdefault(attack, []).append(statistics.fmean(value))
            found_own = [
                cell["summary"]["attacks"][attack]["top1"]["mean"] for cell in of
            ]
            rows.setdefault(f"{attack}, finds its original", ["-"] * len(epochs))[
                epochs.index(E)
            ] = spread(found_own, 2)
            seconds = [
                cell["attack_seconds"][attack] / len(cell["clients"]) for cell in of
            ]
            rows.setdefault(f"{attack}, s a client", ["-"] * len(epochs))[
                epochs.index(E)
            ] = f"{statistics.median(seconds):.1f}"
            if attack == "sme":
                alpha = [
                    cell["summary"]["attacks"]["sme"]["alpha"]["mean"] for cell in of
                ]
                rows.setdefault("learned alpha", ["-"] * len(epochs))[
                    epochs.index(E)
                ] = spread(alpha, 2)
                for name in of[0]["summary"]["references"]:
                    level = [cell["summary"]["references"][name]["psnr"] for cell in of]
                    levels += level if name == "class means" else []
                    rows.setdefault(f"{name}, dB", ["-"] * len(epochs))[
                        epochs.index(E)
                    ] = spread(level)
    table(["", *(f"E = {E} (T = {2 * E})" for E in epochs)], rows)
    if a.picture:
        draw(
            a.picture,
            [2 * E for E in epochs],
            {
                name: values
                for name, values in curves.items()
                if len(values) == len(epochs)
            },
            statistics.fmean(levels),
        )


def draw(
    file: Path, steps: Sequence[int], curves: dict[str, list[float]], level: float
) -> None:
    """`level` is the PSNR of the mean image of each class."""
    names = {"sme": "SME", "ig": "gradient inversion at w0"}
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, values in curves.items():
            axes.plot(steps, values, marker="o", label=names.get(name, name))
        axes.axhline(
            level, linestyle="--", linewidth=1, label="mean image of each class"
        )
        axes.set(xlabel="local steps", ylabel="PSNR, dB", xscale="log")
        axes.set_xticks(list(steps), [str(n) for n in steps])
        axes.legend()
        file.write_text(svg(figure))


def label_counts(a: argparse.Namespace) -> None:
    rows = {}
    for n, batch, epochs, lr in (
        (10, 5, 10, 0.004),
        (50, 10, 20, 0.004),
        (50, 10, 20, 0.02),
    ):
        values = []
        for seed in range(a.seeds):
            e = experiment(
                seed,
                lr,
                local={"batch_size": batch, "epochs": epochs},
                partition={"name": "pathological", "classes": 4},
            )
            for subject in simulate(e, build_task(e), 4, n):
                assert subject.truth is not None
                values.append(
                    metrics.label_accuracy(
                        labels.recover(subject.seen, seed), subject.truth.y
                    )["accuracy"]
                )
        rows[f"N = {n}, B = {batch}, E = {epochs}, lr = {lr}, fresh"] = [
            spread(values, 2)
        ]
    table(["", "label accuracy"], rows)


def attack_of(subjects: Sequence[Subject], seed: int, **settings: Any) -> float:
    """Mean PSNR of SME with the true labels."""
    seen = [replace(s.seen, labels=s.truth.y) for s in subjects if s.truth is not None]
    found = SME(SurrogateSettings(iterations=300, **settings)).reconstruct(
        seen, [labels.recover(o) for o in seen], seed
    )
    scores = []
    for r, s in zip(found, subjects, strict=True):
        assert s.truth is not None
        assert s.seen.public.pixels is not None
        scores.append(
            metrics.score(r.x, s.truth, s.seen.public.pixels).psnr.mean().item()
        )
    return statistics.fmean(scores)


def scale(a: argparse.Namespace) -> None:
    found: dict[str, list[float]] = {}
    for seed in range(a.seeds):
        e = experiment(seed, local={"batch_size": 4, "epochs": 10})
        subjects = simulate(e, build_task(e), 4, 8)
        short = [
            Subject(
                replace(
                    s.seen,
                    delta={k: 0.1 * v for k, v in s.seen.delta.items()},
                    public=replace(s.seen.public, clipped=True),
                ),
                s.truth,
            )
            for s in subjects
        ]
        found.setdefault("the update itself", []).append(attack_of(subjects, seed))
        found.setdefault("a tenth of it, path scale 1", []).append(
            attack_of(short, seed, path_scale=1.0)
        )
        found.setdefault("a tenth of it, path scale searched", []).append(
            attack_of(short, seed)
        )
        for together in (2, 4):
            pairs = [
                aggregate(subjects[i : i + together]) for i in range(0, 4, together)
            ]
            found.setdefault(
                f"mean of {together} clients, path scale searched", []
            ).append(attack_of(pairs, seed))
    table(
        ["SME, E = 10", "PSNR, dB"],
        {name: [spread(values)] for name, values in found.items()},
    )


def together(a: argparse.Namespace) -> None:
    """Throughput of 8 clients side by side and one after another, in turn."""
    models = {
        "MLP 784-32-10": {"name": "mlp", "hidden": [32]},
        "MLP 784-200-10": {"name": "mlp"},
        "LeNet-5": {"name": "lenet"},
        "CNN 16-32-64": CNN,
    }
    rows = {}
    for name, model in models.items():
        e = experiment(0, model=model, local={"batch_size": 4, "epochs": 5})
        seen = [s.seen for s in simulate(e, build_task(e), 8, 8)]
        known = [labels.recover(o) for o in seen]
        seen = moved(seen, torch.device(a.device))
        s = SurrogateSettings(iterations=a.iterations)
        times: dict[str, list[float]] = {"batch": [], "one": []}
        for _ in range(a.repeats):
            for kind in times:
                begin = time.perf_counter()
                if kind == "batch":
                    SME(s).reconstruct(seen, known, 0)
                else:
                    for o, y in zip(seen, known, strict=True):
                        SME(s).reconstruct([o], [y], 0)
                times[kind].append(time.perf_counter() - begin)
        ratios = [
            one / batch for one, batch in zip(times["one"], times["batch"], strict=True)
        ]
        each = {
            kind: 1000 * statistics.median(values) / (8 * a.iterations)
            for kind, values in times.items()
        }
        rows[name] = [
            f"{each['one']:.2f}",
            f"{each['batch']:.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ]
    table(
        ["ms a client and iteration", "one after another", "8 at once", "ratio"], rows
    )


def main() -> None:
    studies = {
        "sweep": sweep,
        "cifar": lambda a: sweep(a, cifar=True),
        "labels": label_counts,
        "scale": scale,
        "together": together,
    }
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("study", choices=studies)
    parser.add_argument("--out", type=Path, default=Path("runs") / "audit-study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--data", help="folder of CIFAR-10's parquet files")
    parser.add_argument(
        "--dlfa",
        type=int,
        nargs="*",
        default=[1, 5, 10],
        help="local epochs at which DLFA runs, too",
    )
    parser.add_argument("--dlfa-seeds", type=int, default=3)
    parser.add_argument("--dlfa-iterations", type=int, default=400)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of `together`"
    )
    a = parser.parse_args()
    torch.manual_seed(0)
    studies[a.study](a)


if __name__ == "__main__":
    main()
