"""FedLAW against FedAvg, and what it learns: gamma, and the weights of clients.

python -m benchmarks.fedlaw accuracy
    FedAvg, GWS, attentive LAW, FedLAW on Fashion-MNIST and digits, by heterogeneity;
    and FedAvg with SGD on the proxy set: the worth of the same data without weights
python -m benchmarks.fedlaw gamma
    learned gamma against local epochs, IID and not (the paper's figure 2)
python -m benchmarks.fedlaw fixed
    accuracy against a fixed gamma (the paper's figure 1)
python -m benchmarks.fedlaw weights
    half of the clients imbalanced (figure 5), and 4 of 10 with random labels

Small on purpose: 2 000 training images over 10 clients, 20 proxy images a class (10 on
digits), MLP 784-32-10, 30 rounds, full participation. FedAvg is FedLAW with neither
weights nor gamma learned, so that clients train alike. Scores are means of the last ten
rounds, mean and standard deviation over seeds. Options: --out DIR (runs there are read,
or gone on with), --seeds N.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedcore.strategies import fedlaw

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment, trees
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import Dirichlet, Partition, carve
from fedcore.local import local_sgd
from fedcore.method import Round
from fedcore.rng import rng
from fedcore.task import Task
from fedcore.types import Batches, Model, Params
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal


class OnTheServerToo(fedlaw.FedLAW):
    """FedAvg whose server goes on where the clients end.

    FedLAW's number of passes over the proxy set, by SGD without momentum.
    """

    def round(self, server: fedlaw.Server, r: Round) -> fedlaw.Server:
        assert r.task.proxy is not None
        mean = r.mean(self.train, r.cohort, Model(server.params)).value
        params = trees.add(server.params, mean.delta)
        num_examples = len(r.task.proxy.x)
        for epoch in range(self.s.server_epochs):
            order = rng(r.seed, "proxy", r.t, epoch).permutation(num_examples)
            for start in range(0, num_examples, self.s.server_batch):
                rows = order[start : start + self.s.server_batch]
                params = self._step(params, r, torch.from_numpy(rows))
        return fedlaw.Server(params, server.gamma_product)

    def _step(self, params: Params, r: Round, rows: torch.Tensor) -> Params:
        """The parameters after one step on these proxy examples."""
        assert r.task.proxy is not None
        x, y = r.task.proxy
        mask = torch.ones(1, len(rows), device=x.device)
        return local_sgd(
            r.task.loss,
            params,
            Batches(x[rows][None], y[rows][None], mask),
            self.s.local_lr * self.s.lr_decay**r.t,
            weight_decay=self.s.weight_decay,
        ).params


METHODS: dict[str, dict[str, Any]] = {
    "FedAvg": {"learn_lambda": False, "learn_gamma": False},
    "adaptive GWS": {"learn_lambda": False},
    "attentive LAW": {"learn_gamma": False},
    "FedLAW": {},
}
TUNED = {"name": "benchmarks.fedlaw:OnTheServerToo"}
CLIENTS = 10
LAST = 10  # rounds that a score is the mean of
ROWS = 2000


def small(settings: Experiment) -> Task:
    """`options.source` with at most 2 000 training rows beside the proxy set.

    They are spread by `options.kind`:
    plain: Dirichlet(`partition.alpha`).
    hybrid: the first half of the clients by Dirichlet(100), the second by
    Dirichlet(0.1), half of the rows each.
    noisy: Dirichlet(100), and the labels of the first four clients are random.
    """
    seed, kind = settings.seed, settings.options.get("kind", "plain")
    source = sources.load(settings.options["source"], settings.data_folder)
    x, labels = source.x_train, source.y_train.clone()
    servers, pool = carve(labels.numpy(), settings.proxy, seed)
    rows = rng(seed, "rows").permutation(pool)[:ROWS]
    proxy = Examples(x[servers], labels[servers])

    def spread(rows: np.ndarray, alpha: float, clients: int) -> Partition:
        process = Dirichlet(alpha=alpha, min_size=10)
        part = process.split(labels[rows].numpy(), None, clients, seed)
        return Partition(rows[part.order], part.offsets)

    if kind == "hybrid":
        first_rows, second_rows = np.array_split(rows, 2)
        first = spread(first_rows, 100.0, CLIENTS // 2)
        second = spread(second_rows, 0.1, CLIENTS // 2)
        order = np.concatenate([first.order, second.order])
        moved = first.offsets[-1] + second.offsets[1:]
        offsets = np.append(first.offsets, moved)
    else:
        assert isinstance(settings.partition, Dirichlet)
        alpha = settings.partition.alpha if kind == "plain" else 100.0
        order, offsets = spread(rows, alpha, CLIENTS)
    if kind == "noisy":
        mislabelled = order[: offsets[4]]
        draw = rng(seed, "labels")
        wrong = draw.integers(0, source.num_classes, len(mislabelled))
        labels[mislabelled] = labels.new_tensor(wrong)
    train, test = Examples(x, labels), Examples(source.x_test, source.y_test)
    data = FederatedData(train, test, order, offsets, settings.holdout, seed)
    model = settings.model.build(tuple(x.shape[1:]), source.num_classes)
    return Task(model, data, proxy=proxy)


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


Row = dict[str, Any]


def mean_late(run: Run, measure: Callable[[Row], float]) -> float:
    """The mean of the last ten rounds."""
    return statistics.fmean(measure(row) for row in run.history.rows[-LAST:])


def learned_gamma(runs: list[Run]) -> str:
    gammas = [mean_late(run, lambda row: row["server_gamma"]) for run in runs]
    return mean_and_std(gammas, ".3f")


def percent(runs: list[Run]) -> str:
    scores = [100 * mean_late(run, lambda row: row["test_accuracy"]) for run in runs]
    return mean_and_std(scores)


def share(runs: list[Run], t: int, clients: int) -> str:
    """The weight of the first `clients` clients together in round t."""
    shares = []
    for run in runs:
        weights = run.history.rows[t - 1]["server_lambda"]
        shares.append(sum(weights[:clients]))
    return mean_and_std(shares, ".2f")


def table(head: list[str], rows: dict[str, list[str]]) -> None:
    """A table whose rows begin with their label."""
    print_table(head, [[label, *cells] for label, cells in rows.items()])


def accuracy(out: Path, seeds: int) -> None:
    judged = METHODS | {"FedAvg, then SGD on the proxy set": TUNED}
    learning = ("adaptive GWS", "FedLAW")
    alphas = (0.1, 1.0, 100.0)
    for source in ("fashion-mnist", "digits"):
        head = [f"{source}, test accuracy, %"]
        rows: dict[str, list[str]] = {label: [] for label in judged}
        rows |= {f"gamma of {label}": [] for label in learning}
        for alpha in alphas:
            head.append(f"Dirichlet {alpha:g}")
            experiments = []
            for label, method in judged.items():
                experiments.append((label, experiment(source, 3, method, alpha)))
            folder = out / f"{source}-{alpha}"
            runs = compare(experiments, seeds, folder, Terminal()).runs
            for label in judged:
                rows[label].append(percent(runs[label]))
            for label in learning:
                rows[f"gamma of {label}"].append(learned_gamma(runs[label]))
        table(head, rows)


def gamma(out: Path, seeds: int) -> None:
    method, labels = METHODS["adaptive GWS"], [f"E = {n}" for n in (1, 2, 5, 10)]
    rows = {}
    for alpha in (100.0, 1.0):
        experiments = []
        for label, epochs in zip(labels, (1, 2, 5, 10), strict=True):
            settings = experiment("fashion-mnist", epochs, method, alpha)
            experiments.append((label, settings))
        runs = compare(experiments, seeds, out / f"gamma-{alpha}", Terminal()).runs
        rows[f"Dirichlet {alpha:g}"] = list(map(learned_gamma, runs.values()))
    table(["learned gamma", *labels], rows)


def fixed(out: Path, seeds: int) -> None:
    gammas = (1.0, 0.99, 0.97, 0.95, 0.93, 0.9)
    experiments = []
    for value in gammas:
        method = METHODS["FedAvg"] | {"gamma": value}
        settings = experiment("fashion-mnist", 3, method, 100.0)
        experiments.append((f"gamma {value}", settings))
    runs = compare(experiments, seeds, out / "fixed", Terminal()).runs
    head = ["fixed gamma", *map(str, gammas)]
    table(head, {"test accuracy, %": list(map(percent, runs.values()))})


def weights(out: Path, seeds: int) -> None:
    rounds = (1, 5, 30)
    for kind, group, clients in (
        ("hybrid", "the balanced half", 5),
        ("noisy", "the four with random labels", 4),
    ):
        experiments = []
        for label, method in METHODS.items():
            settings = experiment("fashion-mnist", 3, method, kind=kind)
            experiments.append((label, settings))
        runs = compare(experiments, seeds, out / kind, Terminal()).runs
        rows = {label: [percent(runs[label])] for label in METHODS}
        for label in ("attentive LAW", "FedLAW"):
            rows[label] += [share(runs[label], t, clients) for t in rounds]
        for label in ("FedAvg", "adaptive GWS"):
            rows[label] += ["", "", ""]
        columns = [f"weight of {group}, round {t}" for t in rounds]
        table([kind, "test accuracy, %", *columns], rows)


def main() -> None:
    studies = {"accuracy": accuracy, "gamma": gamma, "fixed": fixed, "weights": weights}
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("study", choices=studies)
    parser.add_argument("--out", type=Path, default=Path("runs") / "fedlaw")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    studies[arguments.study](arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
