"""Padding: a client's own examples, and without effect on any result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData, LocalSettings
from fedcore.engines.base import Work
from fedcore.engines.chunks import Chunks
from fedcore.engines.sequential import Sequential
from fedcore.engines.vectorised import Vectorised
from fedcore.local import full_gradient, local_sgd
from fedcore.method import FinetuneSettings
from fedcore.methods import load, settings_of
from fedcore.metrics import accuracy
from fedcore.models import Cnn, LeNet, Logistic, Mlp, ResNet, Vit
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.types import Model, Tree
from tests.helpers import answers, assert_close, equal

SIZES = [13, 0, 20, 3, 7]  # of the clients
STARTS = np.append(0, np.cumsum(SIZES))
EMPTY = 1
LOCAL = LocalSettings(batch_size=10, epochs=2)


def rows(shape: tuple[int, ...] = (4,), classes: int = 3) -> Examples:
    g = torch.Generator().manual_seed(0)
    n = sum(SIZES)
    return Examples(
        torch.randn(n, *shape, generator=g), torch.arange(n).remainder(classes)
    )


def spread(examples: Examples, holdout: float = 0.0) -> FederatedData:
    """Client i holds a shuffled part of the rows, of SIZES[i]."""
    order = np.random.default_rng(1).permutation(len(examples.y))
    return FederatedData(examples, examples, order, STARTS, holdout)


def linear(model: nn.Module | None = None, **others: Any) -> Task:
    torch.manual_seed(2)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return Task(model, spread(rows()), **others)


class Cohort:
    """All clients, at work in one engine."""

    def __init__(self, task: Task, method: str, engine: str, **settings: Any) -> None:
        cls = load(method)
        chosen = settings_of(cls)(name=method, **settings)
        self.method = cls(chosen, FinetuneSettings(epochs=2))
        self.params = task.init_params()
        self.work = Work(task, self.method, LOCAL, seed=5)
        self.states = StateStore(self.method.init_client(self.params), 10**8, Path)
        self.engine: Any = Sequential(self.work, self.states)
        if engine == "vectorised":
            self.engine = Vectorised(self.work, self.states, chunk=len(SIZES))
            # One chunk: clients of unlike lengths would be kept apart.
            self.engine.chunks = lambda fn, clients: [clients.tolist()]

    def of_all(self, function: str) -> list[Tree]:
        """(message, new state) of each client."""
        fn, clients, ups = getattr(self.method, function), range(len(SIZES)), {}
        for reports in answers(self.engine, fn, clients, Model(self.params), 0):
            assert not reports.failed
            for i, who in enumerate(reports.clients.tolist()):
                ups[who] = trees.at(reports.up, i)
        self.engine.close()
        assert sorted(ups) == list(clients)
        return [(ups[client], self.states.get(client)) for client in clients]


ENGINES = ["sequential", "vectorised"]
WORK = [  # (method, its settings, client function)
    ("fedavg", {}, "train"),
    ("fedamd", {}, "anchor"),  # full_gradient
    ("ditto", {}, "train"),  # two plans of batches, and a personal state
    ("pfedme", {"personal_lr": 0.02}, "train"),
    ("fedavg", {}, "evaluate"),
    ("fedavg", {}, "finetune"),
]


@pytest.mark.parametrize("holdout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["train", "all", "test"])
def test_every_row_of_a_batch_is_the_clients_own_or_zero(
    kind: str, holdout: float
) -> None:
    owner = np.zeros(sum(SIZES))
    data = spread(rows(), holdout)
    for client in range(len(SIZES)):
        owner[data.order[STARTS[client] : STARTS[client + 1]]] = client + 1
    marks = torch.from_numpy(owner)
    data.x = marks[:, None]
    data.y = marks
    for even in (False, True):
        everybody = np.arange(len(SIZES))
        batches = data.batches(everybody, kind, LOCAL, 0, 3, even=even)
        for client, size in enumerate(data.num_examples(everybody, kind)):
            expected = {client + 1.0} if size else {0.0}
            assert set(batches.x[client].unique().tolist()) == expected
            assert set(batches.y[client].unique().tolist()) == expected
        real = batches.mask.sum((1, 2)).numpy()
        passes = LOCAL.epochs if kind == "train" else 1
        assert np.array_equal(real, passes * data.num_examples(everybody, kind))


def test_a_batch_is_filled_with_its_own_first_row() -> None:
    """So that a loss of padding is finite where the batch's own is."""
    batches = spread(rows()).batches(np.array([0]), "train", LOCAL, 0, 0)
    x, mask = batches.x[0], batches.mask[0]
    assert mask[1].tolist() == [1.0] * 3 + [0.0] * 7
    assert torch.equal(x[1, 3:], x[1, :1].expand(7, 4))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("method", "settings", "function"), WORK)
def test_nothing_of_a_client_depends_on_another_clients_rows(
    method: str, settings: dict[str, Any], function: str, engine: str
) -> None:
    for client in (0, EMPTY, 3):
        results = []
        for change in (0.0, 50.0, math.nan):
            task = linear()
            is_other = np.ones(sum(SIZES), dtype=bool)
            is_other[task.data.order[STARTS[client] : STARTS[client + 1]]] = False
            task.data.x[torch.from_numpy(is_other)] += change
            task.data.y[torch.from_numpy(is_other)] = 0 if change else 1
            cohort = Cohort(task, method, engine, **settings)
            results.append(cohort.of_all(function)[client])
        what = f"{method}.{function} of client {client}"
        assert all(equal(r, results[0]) for r in results[1:]), what


def roots(outputs: Tensor, y: Tensor) -> Tensor:
    """A loss without a derivative at zero, where inputs of zeros lead."""
    return (outputs.sum(1) - y.float()).abs().sqrt()


def logarithms(outputs: Tensor, y: Tensor) -> Tensor:
    """A loss that is not a number once training has moved the outputs below zero."""
    return outputs.sum(1).log()


def not_numbers(outputs: Tensor, y: Tensor) -> Tensor:
    """NaN for inputs of zeros alone."""
    return outputs.sum(1) / outputs.sum(1)


def positive(loss: Any) -> Task:
    """Outputs are positive at first, and of zeros zero."""
    model = nn.Linear(4, 3, bias=False)
    nn.init.constant_(model.weight, 0.05)
    examples = rows()
    examples = Examples(examples.x.abs() + 0.1, examples.y * 0)
    metrics = {"accuracy": accuracy, "not_numbers": not_numbers}
    return Task(model, spread(examples), loss=loss, metrics=metrics)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", [roots, logarithms, not_numbers])
@pytest.mark.parametrize(("method", "settings", "function"), WORK)
def test_what_padding_makes_of_a_loss_reaches_nobody(
    method: str, settings: dict[str, Any], function: str, loss: Any, engine: str
) -> None:
    """The longest client's steps are padding for the others."""
    settings = {**settings, "local_lr": 0.02}
    if "personal_lr" in settings:
        settings["local_lr"] = 0.002
    work = Cohort(positive(loss), method, "sequential", **settings)
    fn, down = getattr(work.method, function), Model(work.params)
    together = Cohort(positive(loss), method, engine, **settings).of_all(function)
    for client, got in enumerate(together):
        state = trees.at(work.states.gather([client]), 0)
        alone = trees.flatten(work.work.one(fn, client, down, state, 0))
        for path, x in trees.flatten(got).items():
            what = f"{path} of client {client}: {x}, alone {alone[path]}"
            assert torch.equal(x.isnan(), alone[path].isnan()), what
            torch.testing.assert_close(
                x, alone[path], rtol=1e-5, atol=1e-6, equal_nan=True
            )
    assert bool(trees.finite(together[EMPTY]))


def test_steps_of_padding_spoil_a_client_that_is_batched_and_it_is_asked_again() -> (
    None
):
    """Otherwise the test before shows nothing."""
    together = Cohort(positive(roots), "fedavg", "vectorised")
    chunks, fn = Chunks(together.work), together.method.train
    batches = together.work.batches(fn, [0, EMPTY, 2], 0)
    up, _, _ = chunks.batched(fn, Model(together.params), (), batches, 0, [0, EMPTY, 2])
    assert not bool(trees.finite(trees.at(up, 1)))
    weights = torch.tensor([1.0, 0.0, 2.0])
    done = chunks.run(fn, [0, EMPTY, 2], Model(together.params), (), 0, 3, weights)
    assert [d.reports.clients.tolist() for d in done] == [[0, 2], [EMPTY]]
    assert bool(trees.finite(done[0].total))
    assert not any(x.any() for x in trees.leaves(done[1].reports.up))


SHAPE = (1, 16, 16)
MODELS = [
    Logistic(),
    Mlp(hidden=(9, 7)),
    LeNet(),
    Cnn(kernel=3),
    ResNet(depth=10, width=8, groups=2),
    Vit(depth=1, patch=4),
]


class Attention(nn.Module):
    """Rows as sequences of four tokens: attention inside an example, none across."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)
        self.embed = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1).unflatten(1, (4, 64)))
        mixed, _ = self.attend(tokens, tokens, tokens, need_weights=False)
        out: Tensor = self.out(self.norm(tokens + mixed).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(64, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cell(x.flatten(1).unflatten(1, (4, 64)))[0][:, -1])
        return out


def built(settings: Any) -> nn.Module:
    torch.manual_seed(3)
    return settings() if isinstance(settings, type) else settings.build(SHAPE, 3)


@pytest.mark.parametrize("settings", [*MODELS, Attention, Recurrent], ids=str)
def test_a_client_padded_to_more_and_larger_batches_learns_the_same(
    settings: Any,
) -> None:
    """Client 3 has 3 rows: alone K = 2, B = 3; beside client 2 K = 4, B = 10."""
    task = Task(built(settings), spread(rows(SHAPE)))
    params = task.init_params()
    alone = task.data.batches(np.array([3]), "train", LOCAL, 0, 0)
    padded = task.data.batches(np.array([3, 2]), "train", LOCAL, 0, 0)
    alone, padded = trees.at(alone, 0), trees.at(padded, 0)
    assert alone.mask.shape == (2, 3)
    assert padded.mask.shape == (4, 10)
    for work in (
        lambda batches: local_sgd(task.loss, params, batches, 0.1),
        lambda batches: full_gradient(task.loss, params, batches),
        lambda batches: task.evaluate(params, batches),
    ):
        assert_close(work(padded), work(alone), 1e-6, "padded, and alone")


def test_a_client_alone_without_examples_has_no_step() -> None:
    data = spread(rows())
    batches = data.batches(np.array([EMPTY]), "train", LOCAL, 0, 0)
    assert batches.mask.shape == (1, 0, 1)
    assert batches.x.shape == (1, 0, 1, 4)
    assert data.batches(np.array([EMPTY, 3]), "train", LOCAL, 0, 0).mask[0].sum() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cohort_without_any_example_changes_nothing(engine: str) -> None:
    examples = rows()
    starts = np.array([0] * (len(SIZES) + 1) + [4])  # one who was not asked has some
    data = FederatedData(examples, examples, np.arange(4), starts)
    for method, settings, function in WORK:
        task = Task(linear().model, data)
        up, _ = Cohort(task, method, engine, **settings).of_all(function)[EMPTY]
        assert not any(x.any() for x in trees.leaves(up)), f"{method}.{function}"
