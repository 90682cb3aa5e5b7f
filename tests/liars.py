"""Clients that send what they like: an engine that alters what honest ones sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.engines.sequential import Sequential
from fedcore.method import evaluates
from fedcore.reports import Reports
from fedcore.rounds.loop import Result, run
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Tree

Lie = Callable[[Tree, Tensor], tuple[Tree, Tensor]]
"""(honest message, honest number of examples) -> what the liar sends of both."""


class Lying(Sequential):
    """`sequential`, in which some clients lie."""

    def __init__(
        self,
        work: Work,
        states: StateStore,
        liars: Set[int],
        lie: Lie,
        in_evaluation: bool = False,
    ) -> None:
        super().__init__(work, states)
        self.liars, self.lie, self.in_evaluation = liars, lie, in_evaluation

    def arrivals(self) -> list[Arrival]:
        """As of an engine whose clients are devices."""
        return []

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        for reports in super().each(fn, clients, down, t):
            is_liar = len(reports.clients) and int(reports.clients[0]) in self.liars
            if not is_liar or evaluates(fn) != self.in_evaluation:
                yield reports
                continue
            up, num_examples = self.lie(reports.up, reports.num_examples)
            yield reports._replace(up=up, num_examples=num_examples)


def run_among(
    liars: Set[int],
    lie: Lie,
    experiment: Experiment,
    folder: Path,
    in_evaluation: bool = False,
) -> Result:
    """The result of a run in which these clients lie: in training, or of the model."""

    def engine(work: Work) -> Any:
        states = StateStore(
            work.method.init_client(work.task.init_params()), 10**9, Path
        )
        return Lying(work, states, liars, lie, in_evaluation)

    return run(experiment, folder, engine=engine)


def flipped(up: Tree, num_examples: Tensor) -> tuple[Tree, Tensor]:
    """The negative of the update, and 9e18 examples."""
    return trees.scale(up, -1.0), torch.full_like(num_examples, 9e18)


def enormous(up: Tree, num_examples: Tensor) -> tuple[Tree, Tensor]:
    """2e34 in every entry: finite."""
    return trees.map(lambda x: torch.full_like(x, 2e34), up), num_examples
