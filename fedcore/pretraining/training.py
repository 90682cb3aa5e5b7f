"""Training on one text: AdamW on windows that begin anywhere in it.

The step size rises over the first steps and falls as a cosine to a tenth. The same
text, model, seed and number of steps give the same weights on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.data.text.windows import NO_TARGET, Windows
from fedcore.rng import rng

__all__ = ["BATCH", "Loss", "loss_on", "steps_in", "train"]

LEARNING_RATE = 3e-3
LEAST_RATE = 0.1  # of the learning rate, at the end
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
WARMUP = 0.05  # of all steps
CLIP = 1.0  # most that a gradient may have as its norm
BATCH = 48  # windows of a step
BLOCK = 8192  # tokens of one forward pass without gradients
TIMED = (5, 15)  # steps whose time says how many fit into the minutes

Stepped = Callable[[int, float], None]
"""(steps that are done, the loss of the last)."""


class Loss(NamedTuple):
    """The mean loss on a text."""

    nats_a_token: float
    nats_a_character: float


def train(
    model: nn.Module,
    ids: np.ndarray,
    length: int,
    steps: int,
    seed: int,
    stepped: Stepped,
) -> None:
    """Train the model, in place, on windows of `length` of the text `ids` [n]."""
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY
    )
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share_of_rate(step, steps)
        x, y = _drawn(ids, length, seed, step)
        loss = nll(model(x), y).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        stepped(step + 1, loss.item())


def share_of_rate(step: int, steps: int) -> float:
    """The step size at a step, as a share of the largest.

    >>> [round(share_of_rate(step, 100), 3) for step in (0, 4, 51, 99)]
    [0.2, 1.0, 0.557, 0.1]
    """
    warmup = max(round(WARMUP * steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup + 1) / max(steps - warmup, 1)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return LEAST_RATE + (1 - LEAST_RATE) * cosine


def _drawn(ids: np.ndarray, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [BATCH, length] of windows that begin anywhere."""
    length = min(length, len(ids) - 1)
    draw = rng(seed, "pretraining", step)
    first = draw.integers(0, len(ids) - length, BATCH)
    places = first[:, None] + np.arange(length + 1)
    tokens = torch.from_numpy(ids[places])
    return tokens[:, :-1], tokens[:, 1:]


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """The negative log-likelihood of each target, [B, L]; 0 where there is none."""
    losses: Tensor = functional.cross_entropy(
        logits.transpose(1, 2), y, ignore_index=NO_TARGET, reduction="none"
    )
    return losses


def steps_in(
    minutes: float, model: nn.Module, ids: np.ndarray, length: int, seed: int
) -> int:
    """The steps that fit into so many minutes here, by the time of the first few.

    The model is trained by these few.
    """
    times: list[float] = []
    train(model, ids, length, TIMED[1], seed, lambda *_: times.append(time.monotonic()))
    seconds = (times[-1] - times[TIMED[0] - 1]) / (TIMED[1] - TIMED[0])
    return max(int(60 * minutes / seconds), 1)


@torch.no_grad()
def loss_on(model: nn.Module, cut: Windows, characters: np.ndarray) -> Loss:
    """The mean loss over all targets; `characters` [size] is what each stands for."""
    model.eval()
    x, y = torch.from_numpy(cut.x), torch.from_numpy(cut.y)
    total = torch.zeros((), dtype=torch.float64)
    rows = max(BLOCK // x.shape[1], 1)
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        total += nll(model(x[block]), y[block]).double().sum()
    targets = cut.y[cut.y != NO_TARGET]
    nats = float(total)
    return Loss(
        nats / max(len(targets), 1), nats / max(int(characters[targets].sum()), 1)
    )
