"""Models with adapters, and servers of methods that mean them, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import methods
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.factors import Pair, pair_of
from fedcore.method import Method
from fedcore.metrics import squared_error
from fedcore.models.gpt import Gpt
from fedcore.models.lora import LoraSettings, with_lora
from fedcore.models.text import TextShape
from fedcore.reports import Reports
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.tasks import TASKS
from fedcore.token_metrics import next_token_loss, num_targets
from fedcore.types import ClientFunction, Params, Tree
from tests.helpers import round_of


def matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    """float64."""
    return torch.tensor(rows, dtype=torch.float64)


# Two clients, of 1 and 3 examples, with factors of a layer [3, 2], and what is made of
# them by hand.
A1, B1 = matrix([[1, 2]]), matrix([[1], [0], [-1]])
A2, B2 = matrix([[2, -2]]), matrix([[0], [1], [1]])
CLIENTS = [Pair(B1, A1), Pair(B2, A2)]
EXAMPLES = (1.0, 3.0)
P = matrix([[0.25, 0.5], [1.5, -1.5], [1.25, -2]])
PRODUCT_OF_MEANS = matrix([[0.4375, -0.25], [1.3125, -0.75], [0.875, -0.5]])
R = matrix([[-0.1875, 0.75], [0.1875, -0.75], [0.375, -1.5]])


def layered_in_float64(e: Experiment) -> Task:
    """Least squares through two linear layers."""
    data = TASKS["least-squares"](e).data
    x, y = data.x.double(), data.y.double()
    assert data.test is not None
    test = Examples(data.test.x.double(), data.test.y.double())
    wide = FederatedData(Examples(x, y), test, data.order, data.offsets)
    model = nn.Sequential(nn.Linear(x.shape[1], 4), nn.Linear(4, 1)).double()
    return Task(model, wide, loss=squared_error, metrics={})


def equal_clients(e: Experiment) -> Task:
    """Three clients with the same two examples each, through two layers."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, generator=draw), torch.randn(2, 1, generator=draw)
    rows = Examples(x.repeat(3, 1), y.repeat(3, 1))
    data = FederatedData(rows, rows, np.arange(6), np.arange(0, 7, 2))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    return Task(model, data, loss=squared_error, metrics={})


def tokens(e: Experiment) -> Task:
    """Next tokens of random rows, some of them padded, by a small transformer."""
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.integers(0, 16, (24, 13)))
    x, y = ids[:, :-1].clone(), ids[:, 1:].clone()
    x[::3, 7:] = 16
    y[::3, 7:] = -100
    rows = Examples(x, y)
    data = FederatedData(rows, rows, np.arange(24), np.arange(0, 25, 4))
    shape = TextShape(17, length=12, pad=16)
    model = Gpt(width=16, layers=1, heads=2).build_text(shape)
    return Task(model, data, loss=next_token_loss, size=num_targets)


def one_layer(rank: int, m: int = 3, n: int = 2, **settings: Any) -> Task:
    """A layer [m, n] with an adapter, s = 1 by default, in float64."""
    torch.manual_seed(0)
    values = {"rank": rank, "alpha": rank, "targets": ("0",), **settings}
    dense = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    rows = Examples(torch.eye(n).double(), torch.zeros(n, m).double())
    data = FederatedData(rows, rows, np.arange(n), np.array([0, 1, n]))
    model = with_lora(dense, LoraSettings(**values))
    return Task(model, data, loss=squared_error, metrics={})


class Alone:
    """A method's server, whose clients send the factors that a test says."""

    def __init__(self, task: Task, name: str, **settings: Any) -> None:
        cls = methods.load(name)
        self.method: Method[Any] = cls(methods.settings_of(cls)(name=name, **settings))
        self.task, self.t, self.seed = task, 0, 0
        self.state = self.method.init_server(task.init_params(), task.population)
        self.downs: list[Tree] = []  # of all rounds
        self.log: dict[str, Any] = {}

    @property
    def params(self) -> Params:
        params: Params = self.state.params
        return params

    @property
    def product(self) -> Tensor:
        """B A of the server's factors, [m, n]."""
        return pair_of(self.params, "0").product

    @property
    def update(self) -> Tensor:
        """What the layer's weight has beside W0: the change and s B A, [m, n]."""
        scale: Any = self.task.model[0].scale  # type: ignore[index]
        product: Tensor = self.params.get("0.lora_change", 0) + scale * self.product
        return product

    def round(
        self, factors: Sequence[Pair], examples: Sequence[float] = EXAMPLES
    ) -> None:
        """A round in which client i sends `factors[i]`."""

        def each(fn: ClientFunction, clients: Tensor, down: Tree) -> Iterator[Reports]:
            self.downs.append(down)
            B, A = pair_of(down.params, "0")
            for client in clients.tolist():
                left, right = factors[client]
                delta = {"0.lora_A": (right - A)[None], "0.lora_B": (left - B)[None]}
                up = _up(self.method)(delta, torch.zeros(1))
                count = torch.tensor([examples[client]])
                yield Reports(torch.tensor([client]), up, count)

        memory = StateStore(self.method.init_memory({}), 10**9, Path)
        cohort = range(len(factors))
        r = round_of(
            self.t, cohort, len(factors), each, memory, self.task, seed=self.seed
        )
        self.state = self.method.round(self.state, r)
        self.t, self.log = self.t + 1, r.log


def _up(method: Method[Any]) -> Any:
    """The type of the messages of a method."""
    module = __import__(type(method).__module__, fromlist=["Up"])
    return module.Up


def random_pairs(
    count: int, rank: int, m: int = 5, n: int = 7, seed: int = 0
) -> list[Pair]:
    """Factors of clients, normal, in float64."""
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        left = torch.randn(m, rank, generator=draw, dtype=torch.float64)
        right = torch.randn(rank, n, generator=draw, dtype=torch.float64)
        pairs.append(Pair(left, right))
    return pairs
