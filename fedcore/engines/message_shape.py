"""The shape of a client function's message, found by running it on one example."""

from __future__ import annotations

import torch

from fedcore import trees
from fedcore.engines.base import Work, one_thread
from fedcore.engines.run_client import run_client
from fedcore.method import data_of
from fedcore.types import Batches, ClientFunction, News, Tree, Tuning


def message_shape(
    work: Work, fn: ClientFunction, down: Tree, t: int, news: News | None = None
) -> Tree:
    """A message as one client sends it, of which shapes and types count.

    With `news` what the method makes of it.

    The values are those of a client that holds the first training example alone.
    Every message of `fn` in this run must have the same names, shapes and types.
    """
    task = work.task
    # [K = 1, B = 1, ...]
    x, y = trees.map(lambda v: v[:1][None], (task.data.x, task.data.y))
    example = Batches(x, y, torch.ones(1, 1, device=task.device))
    batches: Tree = Tuning(example, example) if data_of(fn) == "tune" else example
    if work.draws is not None and data_of(fn) == "train":
        batches = work.draws.example(example)
    state, now = work.first_state(task.init_params()), torch.tensor(float(t))
    with one_thread():
        up, _ = run_client(fn, task, now, down, state, batches, work.training)
    if news is None:
        return up
    memory = work.method.init_memory(task.init_params())
    sent, remembered = trees.map(lambda x: x[None], (up, trees.to(memory, task.device)))
    message, _ = news(sent, remembered, torch.ones(1, device=task.device))
    return trees.at(message, 0)
