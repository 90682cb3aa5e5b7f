"""Evaluation: the server's model on the test set, each client's own on its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.engines.readout import read
from fedcore.method import Method
from fedcore.rng import rng
from fedcore.rounds.doors import Desk
from fedcore.rounds.rundir import PERCENTILES
from fedcore.types import ClientFunction, Model

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.task import Task


class Measured(NamedTuple):
    """One metric over the evaluated clients that have examples."""

    values: Tensor  # [n] float64
    num_examples: Tensor  # [n] float64


class Evaluation:
    """Measures a run's model on the test set and on a fixed sample of clients."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        method: Method[Any],
        desk: Desk,
    ) -> None:
        self._task, self._method, self._desk = task, method, desk
        self._finetunes = experiment.finetune.epochs > 0
        self._clients = self._sample(experiment.evaluation.clients, experiment.seed)

    def _sample(self, wanted: int, seed: int) -> Tensor:
        """A fixed sample, so that the cost does not grow with the population.

        Ascending ids.
        """
        population = self._task.population
        if wanted >= population:
            return torch.arange(population)
        draw = rng(seed, "evaluation")
        drawn = draw.choice(population, wanted, replace=False, shuffle=False)
        return torch.from_numpy(np.sort(drawn))

    def row(self, server: Any, t: int, is_last: bool) -> dict[str, Any]:
        """Measures after round t: of the global test set, and over clients."""
        row: dict[str, Any] = {}
        for name, value in self._task.test(server.params).items():
            row[f"test_{name}"] = value
        failed: set[int] = set()
        measured = {"client": self._measure(self._method.evaluate, server, t, failed)}
        if is_last and self._finetunes:
            tuned = self._measure(self._method.finetune, server, t, failed)
            measured["finetuned"] = tuned
        for kind, metrics in measured.items():
            for name, metric in metrics.items():
                row[f"{kind}_{name}"] = over_clients(metric)
        if "client_nmsd" in row:
            nmsd = max(row["client_nmsd"]["mean"], 1e-300)
            row["nmsd_db"] = 10 * float(np.log10(nmsd))
        if failed:
            row["evaluation_failed"] = len(failed)
        return row

    def _measure(
        self, fn: ClientFunction, server: Any, t: int, failed: set[int]
    ) -> dict[str, Measured]:
        """Each metric over the evaluated clients; failures are added to `failed`."""
        pieces: dict[str, list[Measured]] = {}
        down = Model(server.params)
        reports = self._desk.engine.each(fn, self._clients, down, t)
        for report, readout in read(reports):
            self._desk.heard(t, report.failed)
            failed.update(report.failed)
            if len(report.clients) == 0:
                continue
            self._desk.table.add(t + 1, fn.__name__, readout)
            has_examples = readout.num_examples > 0
            num_examples = readout.num_examples[has_examples].double()
            for name, values in readout.metrics.items():
                piece = Measured(values[has_examples].double(), num_examples)
                pieces.setdefault(name, []).append(piece)
        measured = {}
        for name, parts in pieces.items():
            columns = zip(*parts, strict=True)
            metric = Measured(*(torch.cat(column) for column in columns))
            if len(metric.values):
                measured[name] = metric
        return measured


def over_clients(metric: Measured) -> dict[str, float]:
    """Statistics over clients, each counting the same.

    Mean, standard deviation, percentiles, and the mean of the lowest tenth; `pooled` is
    the mean over all their examples.
    """
    values, num_examples = metric
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    quantiles = torch.quantile(values, shares).tolist()
    lowest = values.sort().values[: -(-len(values) // 10)]
    statistics = {"mean": values.mean().item(), "std": values.std(correction=0).item()}
    for percent, quantile in zip(PERCENTILES, quantiles, strict=True):
        statistics[f"p{percent}"] = quantile
    statistics["lowest_tenth"] = lowest.mean().item()
    pooled = (values * num_examples).sum() / num_examples.sum()
    statistics["pooled"] = pooled.item()
    return statistics
