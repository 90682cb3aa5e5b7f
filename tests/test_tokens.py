"""Means over tokens, perplexity formed once, extra test sets, an ordered holdout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import Examples, Experiment, FederatedData, Task, run
from fedcore.token_metrics import (
    nats_a_character,
    next_token_loss,
    num_targets,
    perplexity,
    token_accuracy,
)
from fedcore.types import Batches
from tests.measured import assert_same_measures

V, L = 5, 6  # tokens of the vocabulary (the last is padding), tokens of an example


class Tokens(nn.Module):
    """A causal model of tokens [B, L]: the next follows from this one and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 4)
        self.head = nn.Linear(4, V)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.embedding(ids))
        return found


def windows(n: int, seed: int = 0) -> Examples:
    """Windows of 1 to L tokens, padded."""
    draw = np.random.default_rng(seed)
    x, y = np.full((n, L), V - 1), np.full((n, L), -100)
    for i in range(n):
        length = int(draw.integers(1, L + 1))
        text = draw.integers(0, V - 1, length + 1)
        x[i, :length], y[i, :length] = text[:-1], text[1:]
    return Examples(torch.from_numpy(x), torch.from_numpy(y))


def language(experiment: Experiment | None = None) -> Task:
    """Five clients of 3 to 14 windows; the third has one."""
    torch.manual_seed(0)
    offsets = np.cumsum([0, 3, 9, 1, 14, 7])
    holdout = 0.0 if experiment is None else experiment.holdout
    data = FederatedData(
        windows(34), windows(21, seed=1), np.arange(34), offsets, holdout, ordered=True
    )
    return Task(
        Tokens(),
        data,
        next_token_loss,
        {
            "perplexity": perplexity,
            "token_accuracy": token_accuracy,
            "nats_a_character": nats_a_character(torch.tensor([1, 2, 3, 1, 0])),
        },
        size=num_targets,
        extra_tests={"unseen": windows(8, seed=2)},
    )


def nll_by_hand(task: Task, params: dict[str, Tensor], rows: Examples) -> list[float]:
    """Nats of every target, one after another in the order of rows, in float64."""
    nats = []
    for ids, targets in zip(rows.x, rows.y, strict=True):
        logits = task.predict(params, ids[None])[0].double()
        for at, target in enumerate(targets.tolist()):
            if target >= 0:
                likely = logits[at].softmax(0)[target]
                nats.append(-math.log(likely))
    return nats


# The oracle: one token at 2 nats, three tokens at 1 nat


class Given(nn.Module):
    """Gives logits by which the target of row 0 costs 2 nats, those of row 1 one."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, nats: Tensor) -> Tensor:
        likely = -nats
        other = torch.log1p(-likely.exp())
        return torch.stack([likely, other], -1) + self.shift


def oracle() -> Task:
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    y = torch.tensor([[0, -100, -100], [0, 0, 0]])
    rows = Examples(x, y)
    holders = np.array([0, 1]), np.array([0, 1, 2])
    return Task(
        Given(), FederatedData(rows, rows, *holders), next_token_loss, size=num_targets
    )


def test_a_mean_is_over_tokens_and_perplexity_is_formed_once() -> None:
    task = oracle()
    params, (x, y) = task.init_params(), task.data.test
    assert next_token_loss(task.predict(params, x), y).tolist() == pytest.approx([2, 1])
    ones = torch.ones(2)
    assert task.loss(params, x, y, ones).item() == pytest.approx(1.25)
    assert task.num_examples(np.array([0, 1]), "train").tolist() == [1, 3]
    for batch_size in (1, 2, 1000):
        tested = task.test(params, batch_size)
        assert tested["loss"] == pytest.approx(1.25)
        assert tested["perplexity"] == pytest.approx(3.4903, abs=5e-5)
    by_client = []
    for i in range(2):
        batches = Batches(x[None, i : i + 1], y[None, i : i + 1], ones[None, :1])
        states = task.evaluate(params, batches)
        by_client.append(task.set_metrics["perplexity"].value(states))
    assert np.mean(by_client) == pytest.approx(5.0537, abs=5e-5)  # never shown


def settings(**given: Any) -> Experiment:
    values = {
        "task": "tests.test_tokens:language",
        "rounds": 2,
        "holdout": 0.3,
        "participation.name": "uniform",
        "participation.cohort": 3,
        "evaluation.every": 1,
        "engine.name": "sequential",
        "local.batch_size": 4,
        **{key.replace("__", "."): value for key, value in given.items()},
    }
    return Experiment.parse({"method": "fedavg"}, values)


def held_rows(data: FederatedData) -> Examples:
    rows = np.concatenate([data.rows(i, "test") for i in range(data.population)])
    return Examples(data.x[rows], data.y[rows])


def test_a_run_measures_tokens_of_all_clients_of_the_test_set_and_of_others(
    tmp_path: Path,
) -> None:
    experiment = settings()
    result = run(experiment, tmp_path / "run")
    task = language(experiment)
    data, final = task.data, result.final
    for kind, rows in (
        ("test", data.test),
        ("unseen", task.extra_tests["unseen"]),
        ("client", held_rows(data)),
    ):
        nats = nll_by_hand(task, result.params, rows)
        table = torch.tensor([1, 2, 3, 1, 0])
        characters = int(table[rows.y[rows.y >= 0]].sum())
        expected = {
            "loss": np.mean(nats),
            "perplexity": math.exp(np.mean(nats)),
            "nats_a_character": np.sum(nats) / characters,
        }
        for name, value in expected.items():
            found = final[f"{kind}_{name}"]
            if kind == "client":
                found = found["pooled"]
            assert found == pytest.approx(value, rel=1e-5), (kind, name)
    assert final["measures"]["perplexity"] == "lower"
    assert final["measures"]["nats_a_character"] == "lower"


@pytest.mark.parametrize(
    "engine",
    [
        {"engine__name": "vectorised", "engine__chunk": 2},
        {"engine__name": "vectorised", "engine__chunk": 5},
        pytest.param({"engine__name": "ray"}, marks=pytest.mark.slow),
    ],
)
def test_every_engine_weighs_by_tokens(engine: dict[str, Any], tmp_path: Path) -> None:
    one = run(settings(), tmp_path / "one")
    other = run(settings(**engine), tmp_path / "other")
    for name, value in one.params.items():
        assert torch.allclose(value, other.params[name], atol=1e-6)
    for name in ("test_perplexity", "unseen_perplexity"):
        assert other.final[name] == pytest.approx(one.final[name], rel=1e-5)
    assert_same_measures(one, other)
