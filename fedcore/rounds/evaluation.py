"""Evaluation: the server's model on the test set, each client's own on its data."""

from __future__ import annotations

import time
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore import privacy, trees
from fedcore.engines.readout import read
from fedcore.errors import FedcoreError, TooFewReports
from fedcore.messages.adversary.poisoning import backdoor_success
from fedcore.metrics import is_higher_better
from fedcore.rng import rng, torch_seed
from fedcore.rounds.doors import Desk
from fedcore.rounds.example_privacy import ExamplePrivacy
from fedcore.rounds.faults import evaluation_fault
from fedcore.rounds.rundir import PERCENTILES
from fedcore.rounds.saving import State
from fedcore.rounds.secret import SecretSums, measured
from fedcore.rounds.setup import Parts, starts_trained
from fedcore.rounds.timing import SECOND, now_of
from fedcore.types import ClientFunction, Model

if TYPE_CHECKING:
    from fedcore.config import Experiment


class Measured(NamedTuple):
    """One metric over the evaluated clients that have examples."""

    values: Tensor  # [n] float64
    num_examples: Tensor  # [n] float64
    pooled: float | None = None  # of a whole set's; of others the mean of examples


class Evaluation:
    """Measures a run's model on the test set and on a fixed sample of clients.

    A row holds `measures`: "higher" or "lower", whichever is better, by measure, that
    which judges the run first.
    """

    def __init__(
        self,
        experiment: Experiment,
        parts: Parts,
        desk: Desk,
    ) -> None:
        self._experiment, self._mechanism = experiment, parts.mechanism
        self._task, self._method, self._desk = parts.task, parts.method, desk
        self._examples = None
        if experiment.local.dp.is_active:
            self._examples = ExamplePrivacy(experiment, parts.task, parts.method)
        self._seed, self._adversary = experiment.seed, experiment.adversary
        # Devices may lie about their own metrics; simulated clients do not.
        is_devices = experiment.engine.name == "grid"
        self._f = experiment.aggregation.f if is_devices else _nobody
        self._capped = desk.receiving.bounds.capped if is_devices else _as_claimed
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

    def due(self, before: State, state: State, folder: Path) -> dict[str, Any]:
        """The row of a state of the run in `folder`, in rounds that are evaluated.

        And the guarantee of its privacy. `before`: the state before the round. A
        failure says what to do.
        """
        t, rounds = state.t, self._experiment.rounds
        if not self._is_due(before, state):
            return {}
        begin = time.perf_counter()
        try:
            row = self.row(state.server, t - 1, t == rounds)
        except FedcoreError:
            raise
        except Exception as error:
            params = state.server.params
            raise evaluation_fault(self._task, params, error, t, folder) from error
        row |= self._spent(state)
        if self._examples is not None:
            row |= self._examples.spent(state.sent, t == rounds)
        row["evaluation_s"] = round(time.perf_counter() - begin, 4)
        return row

    def _is_due(self, before: State, after: State) -> bool:
        """Whether the round between these states ends with an evaluation."""
        settings = self._experiment.evaluation
        if after.t == self._experiment.rounds:
            return True
        if settings.every_s is None:
            return after.t % settings.every == 0
        every = round(settings.every_s * SECOND)
        return now_of(after.timing) // every > now_of(before.timing) // every

    def before(self, state: State, folder: Path) -> dict[str, Any]:
        """Before the first round the `baseline`: measures of the model at its start.

        Nothing later, nor for a model that nobody has trained.
        """
        if state.t > 0 or not starts_trained(self._experiment):
            return {}
        begin = time.perf_counter()
        try:
            row = self.row(state.server, -1, False)
        except FedcoreError:
            raise
        except Exception as error:
            params = state.server.params
            raise evaluation_fault(self._task, params, error, 0, folder) from error
        row["evaluation_s"] = round(time.perf_counter() - begin, 4)
        return {"baseline": row}

    def _spent(self, state: State) -> dict[str, Any]:
        """The privacy guarantee up to now; by the slower accountant after the last."""
        if self._mechanism is None:
            return {}
        t, sent = state.t, state.sent
        # The guarantee of the client that has sent most.
        counts_messages = self._mechanism.counts_messages
        steps = int(sent.max()) if len(sent) and counts_messages else t
        default = privacy.default_delta(self._task.population)
        delta = self._experiment.defence.delta or default
        is_last = t == self._experiment.rounds
        guarantee = privacy.guarantee(self._mechanism, steps, delta, prv=is_last)
        return {"privacy": guarantee.to_dict()}

    def row(self, server: Any, t: int, is_last: bool) -> dict[str, Any]:
        """Measures after round t: of the global test set, and over clients.

        t = -1: before the first round.
        """
        directions = {}
        for name, is_higher in self._task.measures.items():
            directions[name] = "higher" if is_higher else "lower"
        row: dict[str, Any] = {"measures": directions}
        with torch_seed(self._seed, "test", t + 1, device=self._task.device):
            measures = self._task.test(server.params)
            extra = self._task.test_extra(server.params)
        for name, value in measures.items():
            row[f"test_{name}"] = value
        if extra:
            row |= {"extra_tests": list(self._task.extra_tests), **extra}
        if self._task.sample is not None and (is_last or t < 0):
            with torch_seed(self._seed, "sample", device=self._task.device):
                row["sample"] = self._task.sample(server.params)
        if self._adversary.attack == "backdoor":
            success = backdoor_success(self._task, server.params, self._adversary)
            if success is not None:
                row["backdoor_success"] = success
        failed: set[int] = set()
        functions: dict[str, ClientFunction] = {"client": self._method.evaluate}
        if is_last and self._finetunes:
            functions["finetuned"] = self._method.finetune
        for kind, fn in functions.items():
            statistics = self._statistics(fn, server, t, failed)
            for name, over_them in statistics.items():
                row[f"{kind}_{name}"] = over_them
        if "client_nmsd" in row:
            nmsd = max(row["client_nmsd"]["mean"], 1e-300)
            row["nmsd_db"] = 10 * float(np.log10(nmsd))
        if failed:
            row["evaluation_failed"] = len(failed)
        return row

    def _statistics(
        self, fn: ClientFunction, server: Any, t: int, failed: set[int]
    ) -> dict[str, dict[str, float]]:
        """Statistics of each metric over the evaluated clients."""
        secret = self._desk.receiving.secret
        if len(self._clients) == 0:  # evaluation.clients = 0
            return {}
        if secret is not None:
            return self._in_secret(secret, fn, server, t, failed)
        statistics = {}
        for name, metric in self._measure(fn, server, t, failed).items():
            is_higher = self._task.measures.get(name, is_higher_better(name))
            believed = without_extremes(metric, self._f(len(metric.values)))
            statistics[name] = over_clients(believed, is_higher)
        return statistics

    def _in_secret(
        self,
        secret: SecretSums,
        fn: ClientFunction,
        server: Any,
        t: int,
        failed: set[int],
    ) -> dict[str, dict[str, float]]:
        """As `_statistics`, of sums alone; nothing where too few clients answer."""
        ask = secret.ask(fn, self._clients, Model(server.params), max(t, 0))
        try:
            summaries, answered = measured(self._desk, secret, ask, failed)
        except TooFewReports as error:
            message = f"round {t + 1}: clients are not evaluated: {error}"
            self._desk.notes.once("not evaluated", message)
            return {}
        statistics = {}
        for name, summary in summaries.items():
            if summary.clients < answered:
                self._note_undefined(name, answered - summary.clients, answered, t)
            statistics[name] = summary.statistics(PERCENTILES)
        return statistics

    def _measure(
        self, fn: ClientFunction, server: Any, t: int, failed: set[int]
    ) -> dict[str, Measured]:
        """Each metric over the evaluated clients; failures are added to `failed`."""
        pieces: dict[str, list[Tensor]] = {}  # by metric, and by state of a set's
        values: dict[str, Tensor] = {}
        counts: list[Tensor] = []
        down = Model(server.params)
        reports = self._desk.engine.each(fn, self._clients, down, max(t, 0))
        for report, readout in read(reports):
            self._desk.heard(max(t, 0), report.failed)
            failed.update(report.failed)
            if len(report.clients) == 0:
                continue
            has_examples = readout.num_examples > 0
            values = self._values(readout.metrics)
            for name, column in (readout.metrics | values).items():
                pieces.setdefault(name, []).append(column[has_examples])
            num_examples = self._capped(readout.num_examples)
            counts.append(num_examples[has_examples].double())
            if t >= 0:  # the table's rows are those of rounds
                own = readout._replace(metrics=values)
                self._desk.table.add(t + 1, fn.__name__, own)
        if sum(map(len, counts)) == 0:
            return {}
        columns = {name: torch.cat(parts) for name, parts in pieces.items()}
        return self._measured(columns, values.keys(), torch.cat(counts), t)

    def _values(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each metric of each client, [n], where `columns` holds states of some."""
        values = dict(columns)
        for name, whole in self._task.set_metrics.items():
            if not columns.keys() >= set(whole.keys.values()):
                continue  # the method measures in its own way
            states = {key: values.pop(key) for key in whole.keys.values()}
            n = len(next(iter(states.values())))
            each = [whole.value(trees.at(states, i)) for i in range(n)]
            values[name] = torch.tensor(each, dtype=torch.float64)
        return values

    def _measured(
        self, columns: dict[str, Tensor], names: Set[str], num_examples: Tensor, t: int
    ) -> dict[str, Measured]:
        """The metrics of these names; `columns` has the states of sets' too."""
        measured = {}
        for name in names:
            values = columns[name].double()
            whole = self._task.set_metrics.get(name)
            if whole is None:
                measured[name] = Measured(values, num_examples)
                continue
            total = {key: _summed(columns[key]) for key in whole.keys.values()}
            is_defined = ~values.isnan()
            if not bool(is_defined.all()):
                missing = int((~is_defined).sum())
                self._note_undefined(name, missing, len(is_defined), t)
            measured[name] = Measured(
                values[is_defined], num_examples[is_defined], whole.value(total)
            )
        return measured

    def _note_undefined(self, name: str, missing: int, n: int, t: int) -> None:
        self._desk.notes.once(
            f"undefined {name}",
            f'round {t + 1}: the metric "{name}" is not defined on the examples of '
            f"{missing} of {n} clients (too few, or of one class): they are left out "
            "of its spread over clients",
        )


def _summed(states: Tensor) -> Tensor:
    """The sum over clients, [n, ...] to [...]; of floats in float64."""
    return states.sum(0, dtype=torch.float64 if states.is_floating_point() else None)


def _nobody(asked: int) -> int:
    return 0


def _as_claimed(num_examples: Tensor) -> Tensor:
    return num_examples


def without_extremes(metric: Measured, f: int) -> Measured:
    """The metric without its f lowest and f highest values, which may be lies.

    >>> claims = Measured(torch.tensor([0.9, 1e30, 0.8, 0.7]), torch.ones(4))
    >>> without_extremes(claims, 1).values
    tensor([0.9000, 0.8000])
    """
    values, num_examples, pooled = metric
    n = len(values)
    if f == 0 or n <= 2 * f:
        return Measured(values, num_examples, pooled)
    inner = values.argsort(stable=True)[f : n - f].sort().values
    return Measured(values[inner], num_examples[inner], pooled)


def over_clients(metric: Measured, is_higher_better: bool) -> dict[str, float]:
    """Statistics over clients, each counting the same.

    Mean, standard deviation, percentiles, and the mean of the worst tenth; `pooled` is
    the metric over all their examples. Where it is defined for no client, only that.
    """
    values, num_examples, pooled = metric
    if pooled is None:
        pooled = ((values * num_examples).sum() / num_examples.sum()).item()
    if len(values) == 0:
        return {"pooled": pooled}
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    quantiles = torch.quantile(values, shares).tolist()
    ordered = values.sort(descending=not is_higher_better).values
    worst = ordered[: -(-len(values) // 10)]
    statistics = {"mean": values.mean().item(), "std": values.std(correction=0).item()}
    for percent, quantile in zip(PERCENTILES, quantiles, strict=True):
        statistics[f"p{percent}"] = quantile
    statistics["worst_tenth"] = worst.mean().item()
    statistics["pooled"] = pooled
    return statistics
