"""Small experiments, and tensors compared in words."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore import methods, trees
from fedcore.config import Experiment
from fedcore.engines.base import Engine
from fedcore.engines.message_shape import message_shape
from fedcore.errors import TooFewReports
from fedcore.method import Round
from fedcore.reports import Reports
from fedcore.rounds.loop import Loop, Quiet, Result
from fedcore.rounds.observer import Observer
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.types import ClientFunction, News, Tree

PATIENCE = 900.0  # seconds, for any wait of a test: a busy machine is no failure

STRATEGIES = sorted(
    p.stem for p in (Path(__file__).parent.parent / "strategies").glob("[!_]*.py")
)
TOYS = ["tests.methods:Two"]
# One method of each kind: a mean, states of clients, personal parameters, single
# updates on a proxy set, a memory at the server, and two kinds of work in a round.
REPRESENTATIVES = ["fedavg", "scaffold", "fedalt", "fedlaw", "admm", *TOYS]
EXACT: dict[str, Any] = {
    "task": "weighted-least-squares",
    "options": {"examples": [9, 13], "features": 5, "noise": 0.5},
}
LAYERED: dict[str, Any] = {"task": "tests.methods:layered"}
ADAPTED: dict[str, Any] = {
    **LAYERED,
    "lora": {"rank": 2, "alpha": 2, "targets": ["0", "1"]},
}
# What a method needs beside its own settings.
NEEDS: dict[str, dict[str, Any]] = {
    "fedlaw": {"proxy": 24},
    "dpfedavg": {
        "method": {"name": "dpfedavg", "local_lr": 0.05, "noise_multiplier": 0.0}
    },  # any participation; clipped, in every round
    "fedsim": LAYERED,
    "fedalt": LAYERED,
    "rolora": ADAPTED,
    "exactlora": ADAPTED,
    # With its default of 0.1 a step overshoots where lambda plus curvature exceeds 20,
    # and the difference of two engines grows.
    "pfedme": {"method": {"name": "pfedme", "local_lr": 0.05, "personal_lr": 0.02}},
}
# Settings with which a method uses other client functions than by default, by the name
# that tests call them.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "admm exact": ("admm", {"solver": "exact"}, EXACT),
    "rerce exact": ("rerce", {"solver": "exact", "start": "paper"}, EXACT),
    "clu exact": ("clu", {"solver": "exact"}, EXACT),
    "dpfedavg by quantile": (
        "dpfedavg",
        {},
        {
            "method": {
                "name": "dpfedavg",
                "local_lr": 0.05,
                "noise_multiplier": 0.0,
                "quantile": 0.5,
            }
        },
    ),
    "rolora A": ("rolora", {"first": "A"}, {}),
    "flora": ("exactlora", {"form": "flora", "ranks": [1, 2]}, {}),
    "flexlora": (
        "exactlora",
        {"form": "flexlora", "ranks": [1, 2]},
        # Singular vectors of small values magnify what is rounded.
        {"task": "tests.lora:layered_in_float64"},
    ),
    "hetlora": ("exactlora", {"form": "hetlora", "ranks": [1, 2]}, {}),
}


def slow(*values: Any, id: str | None = None) -> Any:
    """One set of a test's parameters that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def per_method(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each method: a representative's is fast, the others' are slow."""
    params = [name if name in REPRESENTATIVES else slow(name) for name in names]
    return pytest.mark.parametrize("name", params)


SMALL: dict[str, Any] = {
    "task": "least-squares",
    "population": 12,
    "rounds": 4,
    "seed": 3,
    "options": {"examples": 11, "features": 5},
    "local": {"batch_size": 4},
    "participation": {"name": "uniform", "cohort": 5},
    "evaluation": {"every": 2},
    "checkpoint": {"seconds": 0.0},
    "engine": {"name": "sequential"},
}
NOISY: dict[str, Any] = {
    "links__downlink__variance": 1e-4,
    "links__uplink__snr_db": 20.0,
}


# The server optimizers of fedopt, by the names of their presets.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fedavgm": {"optimizer": "momentum", "server_lr": 1.0},
    "fedadagrad": {"optimizer": "adagrad", "server_lr": 0.1, "beta1": 0.0},
    "fedadam": {"optimizer": "adam"},
    "fedyogi": {"optimizer": "yogi"},
}


def small(method: str, **settings: Any) -> Experiment:
    """A run of milliseconds; `method` may be one of VARIANTS or OPTIMIZERS.

    `settings` are dotted keys with __ for the dot.
    """
    name, variant, others = VARIANTS.get(method, (method, {}, {}))
    if method in OPTIMIZERS:
        name, variant = "fedopt", OPTIMIZERS[method]
    values = {
        **SMALL,
        "method": {"name": name, "local_lr": 0.05, **variant},
        **NEEDS.get(name, {}),
        **others,
    }
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment.parse(values, overrides)


Reference = Callable[..., Result]
"""(method, **settings of `small`) -> the result of that run, done once a session."""


def loop_of(
    e: Experiment, folder: Path, resume: bool = False, observer: Observer | None = None
) -> Loop:
    folder.mkdir(parents=True, exist_ok=True)
    return Loop(e, folder, observer or Quiet(), None, resume)


# The doors between methods, rounds and engines. No other test makes a round, or asks an
# engine: where the doors change, these functions do.

Each = Callable[[ClientFunction, Tensor, Tree], Iterator[Reports]]
"""(client function, ids, what is sent) -> reports."""


def answers(
    engine: Engine,
    fn: ClientFunction,
    clients: Sequence[int] | Tensor,
    down: Tree,
    t: int,
) -> Iterator[Reports]:
    """The reports of these clients in round `t`."""
    return engine.each(fn, torch.as_tensor(clients, dtype=torch.int64), down, t)


def asking(engine: Engine, t: int) -> Each:
    """The engine's clients, as a round of this number asks them."""
    return lambda fn, clients, down: answers(engine, fn, clients, down, t)


def no_answers(fn: ClientFunction, clients: Tensor, down: Tree) -> Iterator[Reports]:
    return iter(())


Zeros = Callable[[ClientFunction, Tree], Tree]
"""(client function, what is sent) -> zeros in the shape of a message."""


@dataclass(frozen=True)
class AnsweredRound(Round):
    """A round whose clients answer what a test says."""

    answer: Each = field(kw_only=True)
    zeros: Zeros = field(kw_only=True)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        return self.answer(fn, clients, down)

    def zero_message(
        self, fn: ClientFunction, down: Tree, news: News | None = None
    ) -> Tree:
        message = self.zeros(fn, down)
        if news is None:
            return message
        nobody = torch.tensor([0])
        one = trees.map(lambda x: x[None], message)
        made, _ = news(one, self.memory.gather(nobody), torch.ones(1))
        return trees.map(torch.zeros_like, trees.at(made, 0))


def no_zeros(fn: ClientFunction, down: Tree) -> Tree:
    pytest.fail(f"the round asks for a message of zeros of {fn.__name__}")


def round_of(
    t: int,
    cohort: Sequence[int] | Tensor,
    population: int,
    each: Each,
    memory: StateStore,
    task: Task | None = None,
    seed: int = 0,
    rates: Tensor | None = None,
    zeros: Zeros = no_zeros,
) -> Round:
    """Round `t`, whose clients answer through `each`."""
    ids = torch.as_tensor(cohort, dtype=torch.int64)
    return AnsweredRound(
        t,
        ids,
        population,
        task,  # type: ignore[arg-type]
        memory,
        seed,
        rates,
        answer=each,
        zeros=zeros,
    )


def loop_round(
    loop: Loop, t: int, cohort: Sequence[int] | Tensor, each: Each | None = None
) -> Round:
    """Round `t` of a loop, with this cohort; by default its engine's clients answer."""

    def zeros(fn: ClientFunction, down: Tree) -> Tree:
        return trees.zeros_like(message_shape(loop.desk.work, fn, down, t))

    return round_of(
        t,
        cohort,
        loop.task.population,
        each or asking(loop.engine, t),
        loop.memory,
        loop.task,
        loop.experiment.seed,
        loop.parts.rates,
        zeros,
    )


def redirected(r: Round, each: Each) -> Round:
    """The same round, whose clients answer through `each`."""
    return AnsweredRound(
        r.t,
        r.cohort,
        r.population,
        r.task,
        r.memory,
        r.seed,
        r.rates,
        r.log,
        answer=each,
        zeros=r.zero_message,
    )


def assert_close(a: Tree, b: Tree, tolerance: float, what: str) -> None:
    """Every leaf within `tolerance`; the message names the leaf and the difference."""
    left, right = trees.flatten(a), trees.flatten(b)
    assert left.keys() == right.keys(), f"{what}: {left.keys() ^ right.keys()}"
    for path, x in left.items():
        gap = (x.double() - right[path].double()).abs()
        largest = gap.max().item() if x.numel() else 0.0
        assert largest <= tolerance, (
            f"{what}: {path} differs by {largest:.2e}, allowed {tolerance:.0e}"
        )


def equal(a: Tree, b: Tree) -> bool:
    """Bit for bit."""
    left, right = trees.flatten(a), trees.flatten(b)
    return left.keys() == right.keys() and all(
        torch.equal(x, right[path]) for path, x in left.items()
    )


class Server:
    """A method's server alone: clients send what the test says, the model is one "w".

    For methods whose clients send a NamedTuple with `delta`. FedAMD's send other
    things, and it is tested with clients that train. Client i holds i + 1 examples
    unless `sizes` are changed.
    """

    def __init__(
        self, name: str, population: int, w: Sequence[float] = (0.0,), **settings: Any
    ) -> None:
        module = importlib.import_module(f"fedcore.strategies.{name}")
        cls = methods.load(name)
        self.up: Any = module.Up
        self.method = cls(methods.settings_of(cls)(name=name, **settings))
        self.population, self.t = population, 0
        self.sizes: Sequence[float] = range(1, population + 1)
        params = {"w": torch.tensor(w)}
        self.memory = StateStore(self.method.init_memory(params), 10**9, Path)
        self.state = self.method.init_server(params, population)
        self.log: dict[str, float] = {}

    @property
    def w(self) -> Tensor:
        """The model after the last round."""
        return self.state.params["w"]

    def round(
        self,
        deltas: Mapping[int, Sequence[float]],
        rates: Sequence[float] | None = None,
        lost: Sequence[int] = (),
    ) -> Tensor:
        """One round in which these clients' updates arrive; the step of the model.

        Those of `lost` are asked, too, and do not answer.
        """
        before = self.w

        def each(fn: Any, clients: Tensor, down: Tree) -> Iterator[Reports]:
            for i in clients.tolist():
                if i in lost:
                    continue
                delta = {"w": torch.tensor(deltas[i], dtype=before.dtype)[None]}
                fields = {"delta": delta, "loss": torch.zeros(1)}
                if "dc" in self.up._fields:
                    fields["dc"] = trees.zeros_like(delta)
                num_examples = torch.tensor([float(self.sizes[i])])
                yield Reports(torch.tensor([i]), self.up(**fields), num_examples)

        p = None if rates is None else torch.tensor(rates, dtype=torch.float64)
        r = round_of(
            self.t,
            sorted({*deltas, *lost}),
            self.population,
            each,
            self.memory,
            rates=p,
            zeros=self._zeros,
        )
        try:
            self.state = self.method.round(self.state, r)
            self.memory.commit()
        except TooFewReports:  # as in the loop: the round is skipped
            self.memory.rollback()
        self.t, self.log = self.t + 1, r.log
        return self.w - before

    def _zeros(self, fn: ClientFunction, down: Tree) -> Tree:
        zeros = {"w": torch.zeros_like(self.w)}
        fields = {"delta": zeros, "loss": torch.zeros(()), "dc": zeros}
        return self.up(**{name: fields[name] for name in self.up._fields})
