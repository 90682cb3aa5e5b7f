"""FedLAW against FedAvg, and what it learns: gamma by local epochs and heterogeneity, weights by who is worth listening to.

    python -m benchmarks.fedlaw accuracy    FedAvg, GWS, attentive LAW, FedLAW on Fashion-MNIST and digits, by heterogeneity; and
                                            FedAvg with SGD on the proxy set: what the same data is worth without weights
    python -m benchmarks.fedlaw gamma       learned gamma against local epochs, IID and not (the paper's figure 2)
    python -m benchmarks.fedlaw fixed       accuracy against a fixed gamma (the paper's figure 1)
    python -m benchmarks.fedlaw weights     half of the clients imbalanced (figure 5), and 4 of 10 with random labels

Small on purpose: 2 000 training images over 10 clients, 20 proxy images a class (10 on digits), MLP 784-32-10, 30 rounds, everybody
takes part. FedAvg is FedLAW with neither weights nor gamma learned, so that clients train alike. Scores are means of the last
ten rounds, mean and standard deviation over seeds. Options: --out DIR (runs there are read, or gone on with), --seeds N.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcore import Experiment, trees
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import Dirichlet, Partition, carve
from fedcore.local import local_sgd
from fedcore.method import Round
from fedcore.rng import rng
from fedcore.task import Task
from fedcore.types import Batches, Model
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal
from strategies import fedlaw


class OnTheServerToo(fedlaw.FedLAW):
    """FedAvg whose server goes on where the clients end: FedLAW's number of passes over the proxy set, by SGD without momentum."""

    def round(self, server: fedlaw.Server, r: Round) -> fedlaw.Server:
        assert r.task.proxy is not None
        mean = r.mean(self.train, r.cohort, Model(server.params)).value
        w = trees.add(server.params, mean.delta)
        (x, y), B, s = r.task.proxy, self.s.server_batch, self.s
        for epoch in range(s.server_epochs):
            for rows in torch.from_numpy(
                rng(r.seed, "proxy", r.t, epoch).permutation(len(x))
            ).split(B):
                one = Batches(
                    x[rows][None],
                    y[rows][None],
                    torch.ones(1, len(rows), device=x.device),
                )
                w, _, _ = local_sgd(
                    r.task.loss,
                    w,
                    one,
                    s.local_lr * s.lr_decay**r.t,
                    weight_decay=s.weight_decay,
                )
        return fedlaw.Server(w, server.gamma_product)


METHODS: dict[str, dict[str, Any]] = {
    "FedAvg": {"learn_lambda": False, "learn_gamma": False},
    "adaptive GWS": {"learn_lambda": False},
    "attentive LAW": {"learn_gamma": False},
    "FedLAW": {},
}
TUNED = {"name": "benchmarks.fedlaw:OnTheServerToo"}
CLIENTS, LAST = 10, 10


def small(e: Experiment) -> Task:
    """`options.source` with at most 2 000 training rows beside the proxy set, spread by `options.kind`.

    plain: Dirichlet(`partition.alpha`). hybrid: the first half of the clients by Dirichlet(100), the second by Dirichlet(0.1), half
    of the rows each. noisy: Dirichlet(100), and the labels of the first four clients are random.
    """
    source = sources.load(e.options["source"], e.data_folder)
    labels, x, test = (
        source.y_train.clone(),
        source.x_train,
        Examples(source.x_test, source.y_test),
    )
    servers, pool = carve(labels.numpy(), e.proxy, e.seed)
    rows = rng(e.seed, "rows").permutation(pool)[:2000]
    proxy = Examples(x[servers], labels[servers])
    kind = e.options.get("kind", "plain")

    def spread(rows: np.ndarray, alpha: float, clients: int, seed: int) -> Partition:
        part = Dirichlet(alpha=alpha, min_size=10).split(
            labels[rows].numpy(), None, clients, seed
        )
        return Partition(rows[part.order], part.offsets)

    if kind == "hybrid":
        halves = [
            spread(half, alpha, CLIENTS // 2, e.seed)
            for half, alpha in zip(np.array_split(rows, 2), (100.0, 0.1), strict=True)
        ]
        order = np.concatenate([half.order for half in halves])
        offsets = np.append(
            halves[0].offsets, halves[0].offsets[-1] + halves[1].offsets[1:]
        )
    else:
        assert isinstance(e.partition, Dirichlet)
        order, offsets = spread(
            rows, e.partition.alpha if kind == "plain" else 100.0, CLIENTS, e.seed
        )
    if kind == "noisy":
        mislabelled = order[: offsets[4]]
        labels[mislabelled] = labels.new_tensor(
            rng(e.seed, "labels").integers(0, source.num_classes, len(mislabelled))
        )
    data = FederatedData(Examples(x, labels), test, order, offsets, e.holdout, e.seed)
    return Task(
        e.model.build(tuple(x.shape[1:]), source.num_classes), data, proxy=proxy
    )


def experiment(
    source: str,
    epochs: int,
    method: dict[str, Any],
    alpha: float = 100.0,
    kind: str = "plain",
) -> Experiment:
    values: dict[str, Any] = {
        "method": {"name": "fedlaw", "local_lr": 0.05, **method},
        "task": "benchmarks.fedlaw:small",
        "options": {"source": source, "kind": kind},
        "population": CLIENTS,
        "proxy": 200 if source == "fashion-mnist" else 100,
        "rounds": 30,
        "holdout": 0.0,
        "partition": {"name": "dirichlet", "alpha": alpha},
        "model": {"name": "mlp", "hidden": [32]},
        "local": {"batch_size": 32, "epochs": epochs},
        "evaluation": {"every": 1, "clients": 0},
    }
    return Experiment.parse(values)


def late(runs: list[Run], value: Callable[[dict[str, Any]], float]) -> str:
    """Of the last ten rounds, mean and standard deviation over seeds."""
    means = [
        statistics.fmean(value(row) for row in run.history.rows[-LAST:]) for run in runs
    ]
    return f"{statistics.fmean(means):.3f} ± {statistics.stdev(means) if len(means) > 1 else 0:.3f}"


def percent(runs: list[Run]) -> str:
    means = [
        100 * statistics.fmean(row["test_accuracy"] for row in run.history.rows[-LAST:])
        for run in runs
    ]
    return f"{statistics.fmean(means):.1f} ± {statistics.stdev(means) if len(means) > 1 else 0:.1f}"


def table(head: list[str], rows: dict[str, list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for label, cells in rows.items():
        print(f"| {' | '.join([label, *cells])} |")
    print(flush=True)


def accuracy(out: Path, seeds: int) -> None:
    for source in ("fashion-mnist", "digits"):
        judged = METHODS | {"FedAvg, then SGD on the proxy set": TUNED}
        rows: dict[str, list[str]] = {
            label: [] for label in [*judged, "gamma of adaptive GWS", "gamma of FedLAW"]
        }
        alphas = (0.1, 1.0, 100.0)
        for alpha in alphas:
            experiments = [
                (label, experiment(source, 3, method, alpha))
                for label, method in judged.items()
            ]
            found = compare(
                experiments, seeds, out / f"{source}-{alpha}", Terminal()
            ).runs
            for label in judged:
                rows[label].append(percent(found[label]))
            for label in ("adaptive GWS", "FedLAW"):
                rows[f"gamma of {label}"].append(
                    late(found[label], lambda row: row["server_gamma"])
                )
        table(
            [
                f"{source}, test accuracy, %",
                *(f"Dirichlet {alpha:g}" for alpha in alphas),
            ],
            rows,
        )


def gamma(out: Path, seeds: int) -> None:
    epochs, rows = (1, 2, 5, 10), {}
    for alpha in (100.0, 1.0):
        experiments = [
            (f"E = {n}", experiment("fashion-mnist", n, METHODS["adaptive GWS"], alpha))
            for n in epochs
        ]
        found = compare(experiments, seeds, out / f"gamma-{alpha}", Terminal()).runs
        rows[f"Dirichlet {alpha:g}"] = [
            late(runs, lambda row: row["server_gamma"]) for runs in found.values()
        ]
    table(["learned gamma", *(f"E = {n}" for n in epochs)], rows)


def fixed(out: Path, seeds: int) -> None:
    gammas = (1.0, 0.99, 0.97, 0.95, 0.93, 0.9)
    experiments = [
        (
            f"gamma {g}",
            experiment("fashion-mnist", 3, {**METHODS["FedAvg"], "gamma": g}, 100.0),
        )
        for g in gammas
    ]
    found = compare(experiments, seeds, out / "fixed", Terminal()).runs
    table(
        ["fixed gamma", *map(str, gammas)],
        {"test accuracy, %": [percent(runs) for runs in found.values()]},
    )


def weights(out: Path, seeds: int) -> None:
    for kind, those, first in (
        ("hybrid", "the balanced half", 5),
        ("noisy", "the four with random labels", 4),
    ):
        experiments = [
            (label, experiment("fashion-mnist", 3, method, kind=kind))
            for label, method in METHODS.items()
        ]
        found = compare(experiments, seeds, out / kind, Terminal()).runs
        rows = {label: [percent(runs)] for label, runs in found.items()}

        def share(runs: list[Run], t: int, first: int = first) -> str:
            values = [
                sum(run.history.rows[t - 1]["server_lambda"][:first]) for run in runs
            ]
            return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"

        for label in ("attentive LAW", "FedLAW"):
            rows[label] += [share(found[label], t) for t in (1, 5, 30)]
        for label in ("FedAvg", "adaptive GWS"):
            rows[label] += ["", "", ""]
        head = [
            f"{kind}",
            "test accuracy, %",
            *(f"weight of {those}, round {t}" for t in (1, 5, 30)),
        ]
        table(head, rows)


def main() -> None:
    studies = {"accuracy": accuracy, "gamma": gamma, "fixed": fixed, "weights": weights}
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("study", choices=studies)
    parser.add_argument("--out", type=Path, default=Path("runs") / "fedlaw")
    parser.add_argument("--seeds", type=int, default=5)
    a = parser.parse_args()
    studies[a.study](a.out, a.seeds)


if __name__ == "__main__":
    main()
