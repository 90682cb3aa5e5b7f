"""A small task of next tokens, and its measures by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import (
    Examples,
    Experiment,
    FederatedData,
    Task,
)
from fedcore.token_metrics import (
    nats_a_character,
    next_token_loss,
    num_targets,
    perplexity,
    token_accuracy,
)

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


def accuracy_by_hand(task: Task, params: dict[str, Tensor], rows: Examples) -> float:
    """Share of all targets that are the likeliest token."""
    right, targets = 0, 0
    for ids, wanted in zip(rows.x, rows.y, strict=True):
        likeliest = task.predict(params, ids[None])[0].argmax(1)
        for found, target in zip(likeliest.tolist(), wanted.tolist(), strict=True):
            targets += target >= 0
            right += target >= 0 and found == target
    return right / targets


def settings(**changed: Any) -> Experiment:
    values = {
        "task": "tests.tokens:language",
        "rounds": 2,
        "holdout": 0.3,
        "participation.name": "uniform",
        "participation.cohort": 3,
        "evaluation.every": 1,
        "engine.name": "sequential",
        "local.batch_size": 4,
        **{key.replace("__", "."): value for key, value in changed.items()},
    }
    return Experiment.parse({"method": "fedavg"}, values)


def held_rows(data: FederatedData) -> Examples:
    rows = np.concatenate([data.rows(i, "test") for i in range(data.population)])
    return Examples(data.x[rows], data.y[rows])
