"""Synthetic first rounds: observations without a run, of clients made for the audit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit.observe import (
    Subject,
    Truth,
    observation,
    public_of,
    rows_of,
    truth_of,
)
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.engines.sequential import Sequential
from fedcore.errors import RunError, SettingsError
from fedcore.method import Round
from fedcore.reports import Reports
from fedcore.rng import rng
from fedcore.rounds.captures import Exchange, exchanges
from fedcore.rounds.participation import UniformProcess
from fedcore.statistics import refuse_shared
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.types import ClientFunction, News, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment

IN_MEMORY = 10**9  # bytes of client state that are not moved to files


def simulate(
    experiment: Experiment, task: Task, clients: int, examples: int
) -> list[Subject]:
    """One round of the method with `clients` clients of `examples` examples each.

    Clients are drawn from those of the partition that have as many, so that their
    classes are as skewed as the run's. Raises SettingsError where there are too few,
    or where messages cannot be inverted; RunError where a client fails.
    """
    chosen = _clients_with(experiment, task, clients, examples)
    few = task.with_data(_data_of_few(task, chosen, examples))
    # A method may ask its clients more than once: its last question counts.
    last = {kept.client: kept for kept in _one_round(experiment, few)}
    if not last:
        raise SettingsError(
            f'method "{experiment.method.name}": its messages hold no change of '
            "parameters that an attack could invert"
        )
    method, public = experiment.build_method(), public_of(experiment, task)
    subjects = []
    for client, kept in sorted(last.items()):
        seen = observation(method, public, kept)
        others = _untouched(task, int(chosen[client]), examples)
        subjects.append(Subject(seen, truth_of(few, client), others=others))
    return subjects


def _untouched(task: Task, client: int, examples: int) -> Truth | None:
    """The client's rows after those that a synthetic round trains on, if any."""
    first, end = task.data.offsets[client : client + 2]
    rows = task.data.order[first + examples : end]
    return rows_of(task, rows) if len(rows) else None


def _clients_with(
    experiment: Experiment, task: Task, clients: int, examples: int
) -> np.ndarray:
    """So many clients, drawn from those with so many examples, ascending."""
    data = task.data
    able = np.flatnonzero(data.sizes >= examples)
    if len(able) < clients:
        raise SettingsError(
            f"{examples} examples of each of {clients} clients: only {len(able)} of "
            f"{task.population} clients have as many; lower one of the two, or the "
            "number of clients in the population"
        )
    draw = rng(experiment.seed, "audit clients")
    return np.sort(draw.choice(able, clients, replace=False, shuffle=False))


def _data_of_few(task: Task, chosen: np.ndarray, examples: int) -> FederatedData:
    """The first `examples` training examples of each of the chosen clients."""
    data = task.data
    first = data.offsets[chosen]
    rows = [data.order[start : start + examples] for start in first]
    offsets = np.arange(len(chosen) + 1) * examples
    train = Examples(data.x, data.y)
    return FederatedData(train, data.test, np.concatenate(rows), offsets)


def _one_round(experiment: Experiment, task: Task) -> list[Exchange]:
    """Every exchange in a first round in which all clients of the task take part."""
    method, everyone = experiment.build_method(), frozenset(range(task.population))
    params = task.init_params()
    work = Work(
        task,
        method,
        experiment.local,
        experiment.seed,
        experiment.links,
        experiment.defence,
        rounds=experiment.rounds,
    )
    states = StateStore(work.first_state(params), IN_MEMORY, Path)
    n = task.population
    rates = UniformProcess(n, experiment.seed, n).rates
    r = SyntheticRound(
        0,
        torch.arange(n),
        n,
        task,
        StateStore(method.init_memory(params), IN_MEMORY, Path),
        experiment.seed,
        torch.from_numpy(np.asarray(rates)),
        engine=Sequential(work, states),
        everyone=everyone,
        kept=[],
    )
    server = method.init_server(params, n)
    refuse_shared(task.model, server.params)
    method.round(server, r)
    return r.kept


@dataclass(frozen=True)
class SyntheticRound(Round):
    """A round whose exchanges are kept."""

    engine: Sequential = field(kw_only=True)
    everyone: frozenset[int] = field(kw_only=True)
    kept: list[Exchange] = field(kw_only=True)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        method = self.engine.work.method
        for reports in self.engine.each(fn, clients, down, self.t):
            for client, reason in reports.failed.items():
                raise RunError(f"client {client} failed in a synthetic round: {reason}")
            self.kept.extend(
                exchanges(method, self.t, fn, down, reports, self.everyone)
            )
            yield reports

    def zero_message(
        self, fn: ClientFunction, down: Tree, news: News | None = None
    ) -> Tree:
        message = message_shape(self.engine.work, fn, down, self.t, news)
        return trees.zeros_like(message)
