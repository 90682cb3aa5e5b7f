"""The vocabulary: trees of tensors, what a client reads, what comes back, and one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from fedcore.errors import SettingsError

if TYPE_CHECKING:
    from fedcore.task import Task

Tree = Any
"""A tensor, or a nested NamedTuple or dict of tensors: what `torch.utils._pytree` flattens."""

Params = dict[str, Tensor]
"""Parameters by name, as `nn.Module.named_parameters` gives them."""


class Batches(NamedTuple):
    """The examples of one client's work in one round, in the order in which they are to be used."""

    x: Tensor  # [K, B, ...]
    y: Tensor  # [K, B, ...]
    mask: Tensor  # [K, B]  1.0 = a real example, 0.0 = padding


class Tuning(NamedTuple):
    """The examples of one client's fine-tuning: batches to train on, and the held-out ones."""

    train: Batches
    test: Batches


class Stateless(NamedTuple):
    """The state of a client that keeps nothing between rounds."""


class Model(NamedTuple):
    """What a client needs to evaluate: the server's parameters."""

    params: Params


class Metrics(NamedTuple):
    """What a client answers to an evaluation: means over its examples, by name."""

    metrics: dict[str, Tensor]  # each 0-d


class Reports(NamedTuple):
    """What came back from n clients; every tensor but those of `total` has a leading client axis."""

    clients: Tensor  # [n] int64 logical ids, ascending
    up: Tree  # [n, ...]
    num_examples: Tensor  # [n] float32, the examples that the work was done on
    failed: Mapping[int, str] = MappingProxyType(
        {}
    )  # clients that did not report, with the reason
    total: Tree = None  # sum_i weight_i up_i, where nothing else was asked for: `up` then has the scalars, and is empty elsewhere

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The scalars among what the clients sent, by field name, each [n]; the loop logs them."""
        fields: dict[str, Any] = (
            self.up._asdict() if hasattr(self.up, "_asdict") else {}
        )
        found = {
            name: value
            for name, value in fields.items()
            if isinstance(value, Tensor) and value.ndim == 1
        }
        return found | dict(fields.get("metrics", {}))


Weight = Callable[[Reports], Tensor]
"""How much each client counts, [n], by the reports."""


class Answers(Iterator[Reports]):
    """What comes back from clients, who are asked when the first of it is: who needs their sum alone says so before that."""

    def __init__(self, ask: Callable[[Weight | None], Iterator[Reports]]) -> None:
        self._ask = ask
        self._reports: Iterator[Reports] | None = None

    def summed(self, weight: Weight) -> None:
        """Reports of several clients may come with their `total`; too late, and without effect, once the first is there.

        `weight` is a function that other processes find by its name.
        """
        if self._reports is None:
            self._reports = self._ask(weight)

    def __next__(self) -> Reports:
        if self._reports is None:
            self._reports = self._ask(None)
        return next(self._reports)


ClientFunction = Callable[..., tuple[Tree, Tree]]
"""(task, t, down, state, batches) -> (up, new state)."""

Each = Callable[[ClientFunction, Tensor, Tree], Iterator[Reports]]
"""(client function, client ids, down) -> what came back: the only door between a method and its clients."""


class Memory(Protocol):
    """What the server keeps of single clients between rounds: one row a client, `Method.init_memory` before its first write.

    A round that fails or is skipped leaves no trace in it.
    """

    def gather(self, clients: Tensor) -> Tree:
        """Rows stacked, [n, ...], on the task's device."""
        ...

    def put(self, clients: Tensor, rows: Tree) -> None:
        """New rows, stacked [n, ...]; `gather` sees them at once."""
        ...


@dataclass(frozen=True)
class Round:
    """What a method is told of a round."""

    t: int
    cohort: (
        Tensor  # [m] int64, ascending: who was asked. Who answered is in the reports.
    )
    population: int
    task: Task
    each: Each
    memory: Memory
    seed: int  # for what the method draws itself: rng(r.seed, "purpose", r.t, ...)
    rates: Tensor | None = (
        None  # p_i, [population] float64: how often the update of client i arrives, where that is known
    )
    log: dict[str, Any] = field(
        default_factory=dict
    )  # for this round's line in metrics.jsonl, as server_<name>: a number, or a list

    def known_rates(self) -> Tensor:
        """p_i of every client, float64 [population], for methods that are told. Raises SettingsError where nobody knows them."""
        if self.rates is None:
            raise SettingsError(
                "this participation process has no rates p_i, which the method's settings ask for: use another"
            )
        return self.rates
