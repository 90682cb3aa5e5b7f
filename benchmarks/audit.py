"""The audit's attacks measured: SME, gradient inversion and DLFA, labels, defences.

    python -m benchmarks.audit sweep       PSNR against local epochs, and time a client
    python -m benchmarks.audit cifar       the same on CIFAR-10 (--data FOLDER of its
                                           parquet files)
    python -m benchmarks.audit labels      label counts from the output layer's bias, by
                                           number of examples and step size
    python -m benchmarks.audit scale       a shortened update, with and without a
                                           searched path scale; secure aggregation
    python -m benchmarks.audit together    8 clients in one batch of optimisations
                                           against one after another, by model

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
from fedcore.audit import cells, metrics
from fedcore.audit.attacks import labels
from fedcore.audit.attacks.sme import SME, SurrogateSettings
from fedcore.audit.examine import examine
from fedcore.audit.observe import Observation, Subject, aggregate, moved
from fedcore.audit.plan import SME_AUTHORS_IG, Plan
from fedcore.audit.results import CellResult
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
BATCH_SIZE, EXAMPLES = 4, 8
NAMES = {"sme": "SME", "ig": "gradient inversion at w0"}


def experiment(seed: int, lr: float = 0.01, **settings: Any) -> Experiment:
    method = {"name": "fedavg", "local_lr": lr}
    return Experiment.parse({**SMALL, "method": method, "seed": seed, **settings})


class Watch:
    """An observer of an audit that says on stderr where it is."""

    def cell(self, number: int, cells: int, name: str) -> None:
        print(f"{number + 1}/{cells} {name}", flush=True, file=sys.stderr)

    def progress(self, share: float, what: str, objective: float | None) -> None:
        pass

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)

    def training(self) -> Quiet:
        return Quiet()


def mean_text(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


# PSNR against local epochs


def sweep(options: argparse.Namespace, cifar: bool = False) -> None:
    """SME and IG over local epochs; DLFA where it is not too slow."""
    epochs = (1, 5, 20) if cifar else (1, 2, 5, 10, 20)
    rows: dict[str, list[str]] = {}
    curves: dict[str, list[float]] = {}
    levels: list[float] = []
    for place, count in enumerate(epochs):
        for attack in ("sme", "ig", "dlfa"):
            results = attacked(options, attack, count, cifar)
            if not results:
                continue
            for name, text in described(attack, results).items():
                rows.setdefault(name, ["-"] * len(epochs))[place] = text
            summaries = [cell["summary"] for cell in results]
            psnr = [summary["attacks"][attack]["psnr"]["mean"] for summary in summaries]
            curves.setdefault(attack, []).append(statistics.fmean(psnr))
            if attack == "sme":
                for summary in summaries:
                    levels.append(summary["references"]["class means"]["psnr"])
    table(["", *(f"E = {count} (T = {2 * count})" for count in epochs)], rows)
    if options.picture:
        whole = {n: curve for n, curve in curves.items() if len(curve) == len(epochs)}
        steps = [2 * count for count in epochs]
        draw(options.picture, steps, whole, statistics.fmean(levels))


def attacked(
    options: argparse.Namespace, attack: str, epochs: int, cifar: bool
) -> list[CellResult]:
    """The cells of one attack at so many local epochs, one a seed."""
    seeds = options.seeds
    if attack == "dlfa":
        seeds = min(seeds, options.dlfa_seeds) if epochs in options.dlfa else 0
    settings = {"task": "cifar10", "data_folder": options.data} if cifar else {}
    results = []
    for seed in range(seeds):
        e = experiment(seed, **settings)
        plan = Plan(
            attacks=(attack,),
            options={
                "sme": {"iterations": 300},
                "ig": {"iterations": 300, **SME_AUTHORS_IG},
                "dlfa": {"iterations": options.dlfa_iterations},
            },
            budget="paper",
            labels="oracle",
            images=False,
            clients=1 if attack == "dlfa" else 2,
            seed=seed,
        )
        swept = cells.sweep(e, plan, [epochs], [BATCH_SIZE], [EXAMPLES])
        audit = examine("sweep", e, swept, plan, options.out, Watch())
        results += audit.cells
    return results


def described(attack: str, results: Sequence[CellResult]) -> dict[str, str]:
    """Rows of the table, by name."""
    summaries = [cell["summary"]["attacks"][attack] for cell in results]
    psnr = [summary["psnr"]["mean"] for summary in summaries]
    top1 = [summary["top1"]["mean"] for summary in summaries]
    seconds = []
    for cell in results:
        seconds.append(cell["attack_seconds"][attack] / len(cell["clients"]))
    rows = {
        f"{attack}, dB": mean_text(psnr),
        f"{attack}, finds its original": mean_text(top1, 2),
        f"{attack}, s a client": f"{statistics.median(seconds):.1f}",
    }
    if attack == "sme":
        alpha = [summary["alpha"]["mean"] for summary in summaries]
        rows["learned alpha"] = mean_text(alpha, 2)
        for name in results[0]["summary"]["references"]:
            level = [cell["summary"]["references"][name]["psnr"] for cell in results]
            rows[f"{name}, dB"] = mean_text(level)
    return rows


def draw(
    file: Path, steps: Sequence[int], curves: dict[str, list[float]], level: float
) -> None:
    """PSNR by local steps; `level` is that of the mean image of each class."""
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, values in curves.items():
            axes.plot(steps, values, marker="o", label=NAMES.get(name, name))
        axes.axhline(
            level, linestyle="--", linewidth=1, label="mean image of each class"
        )
        axes.set(xlabel="local steps", ylabel="PSNR, dB", xscale="log")
        axes.set_xticks(list(steps), [str(n) for n in steps])
        axes.legend()
        file.write_text(svg(figure))


# Labels


def label_counts(options: argparse.Namespace) -> None:
    rows = {}
    for n, batch_size, epochs, lr in (
        (10, 5, 10, 0.004),
        (50, 10, 20, 0.004),
        (50, 10, 20, 0.02),
    ):
        shares = []
        for seed in range(options.seeds):
            local = {"batch_size": batch_size, "epochs": epochs}
            partition = {"name": "pathological", "classes": 4}
            e = experiment(seed, lr, local=local, partition=partition)
            for subject in simulate(e, build_task(e), 4, n):
                assert subject.truth is not None
                found = labels.recover(subject.seen, seed)
                accuracy = metrics.label_accuracy(found, subject.truth.y)
                shares.append(accuracy["accuracy"])
        name = f"N = {n}, B = {batch_size}, E = {epochs}, lr = {lr}, fresh"
        rows[name] = [mean_text(shares, 2)]
    table(["", "label accuracy"], rows)


# A shortened update, and the mean of several


def psnr_of(subjects: Sequence[Subject], seed: int, **settings: Any) -> float:
    """Mean PSNR of SME with the true labels."""
    attack = SME(SurrogateSettings(iterations=300, **settings))
    truths = [subject.truth for subject in subjects if subject.truth is not None]
    assert len(truths) == len(subjects)
    seen = [subject.seen for subject in subjects]
    known = [truth.y.sort().values for truth in truths]
    scores = []
    found = attack.reconstruct(seen, known, seed)
    for reconstruction, truth in zip(found, truths, strict=True):
        pixels = seen[0].public.pixels
        assert pixels is not None
        score = metrics.score(reconstruction.x, truth, pixels)
        scores.append(score.psnr.mean().item())
    return statistics.fmean(scores)


def shortened(subject: Subject, factor: float) -> Subject:
    """The client, where clipping left so much of its update."""
    seen = subject.seen
    delta = {name: factor * value for name, value in seen.delta.items()}
    public = replace(seen.public, clipped=True)
    return Subject(replace(seen, delta=delta, public=public), subject.truth)


def scale(options: argparse.Namespace) -> None:
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        e = experiment(seed, local={"batch_size": BATCH_SIZE, "epochs": 10})
        subjects = simulate(e, build_task(e), 4, EXAMPLES)
        short = [shortened(subject, 0.1) for subject in subjects]
        values = {
            "the update itself": psnr_of(subjects, seed),
            "a tenth of it, path scale 1": psnr_of(short, seed, path_scale=1.0),
            "a tenth of it, path scale searched": psnr_of(short, seed),
        }
        for many in (2, 4):
            groups = range(0, 4, many)
            means = [aggregate(subjects[i : i + many]) for i in groups]
            name = f"mean of {many} clients, path scale searched"
            values[name] = psnr_of(means, seed)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    rows = {name: [mean_text(values)] for name, values in found.items()}
    table(["SME, E = 10", "PSNR, dB"], rows)


# Many clients at once


def together(options: argparse.Namespace) -> None:
    """Throughput of 8 clients side by side and one after another, the two in turn."""
    models = {
        "MLP 784-32-10": {"name": "mlp", "hidden": [32]},
        "MLP 784-200-10": {"name": "mlp"},
        "LeNet-5": {"name": "lenet"},
        "CNN 16-32-64": CNN,
    }
    rows = {}
    for name, model in models.items():
        local = {"batch_size": BATCH_SIZE, "epochs": 5}
        e = experiment(0, model=model, local=local)
        subjects = simulate(e, build_task(e), 8, EXAMPLES)
        seen = [subject.seen for subject in subjects]
        known = [labels.recover(observation) for observation in seen]
        seen = moved(seen, torch.device(options.device))
        attack = SME(SurrogateSettings(iterations=options.iterations))
        at_once, in_turn = [], []
        for _ in range(options.repeats):
            at_once.append(seconds_of(attack, seen, known, len(seen)))
            in_turn.append(seconds_of(attack, seen, known, 1))
        pairs = zip(in_turn, at_once, strict=True)
        ratios = [one / batch for one, batch in pairs]
        unit = 1000 / (8 * options.iterations)
        rows[name] = [
            f"{unit * statistics.median(in_turn):.2f}",
            f"{unit * statistics.median(at_once):.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ]
    head = ["ms a client and iteration", "one after another", "8 at once", "ratio"]
    table(head, rows)


def seconds_of(
    attack: SME, seen: list[Observation], known: list[torch.Tensor], many: int
) -> float:
    """Time of an attack on all clients, so many of them at once."""
    begin = time.perf_counter()
    for start in range(0, len(seen), many):
        group = slice(start, start + many)
        attack.reconstruct(seen[group], known[group], 0)
    return time.perf_counter() - begin


STUDIES = {
    "sweep": sweep,
    "cifar": lambda options: sweep(options, cifar=True),
    "labels": label_counts,
    "scale": scale,
    "together": together,
}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--out", type=Path, default=Path("runs") / "audit-study")
    add("--seeds", type=int, default=3)
    add("--picture", type=Path)
    add("--data", help="folder of CIFAR-10's parquet files")
    add(
        "--dlfa",
        type=int,
        nargs="*",
        default=[1, 5, 10],
        help="local epochs at which DLFA runs, too",
    )
    add("--dlfa-seeds", type=int, default=3)
    add("--dlfa-iterations", type=int, default=400)
    add("--iterations", type=int, default=30)
    add("--repeats", type=int, default=5)
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of `together`")
    options = parser.parse_args()
    torch.manual_seed(0)
    STUDIES[options.study](options)


if __name__ == "__main__":
    main()
