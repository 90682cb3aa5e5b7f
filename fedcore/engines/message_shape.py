"""The shape of a client function's message, found by running it on one example."""

from __future__ import annotations

import torch

from fedcore.engines.base import Work, one_thread
from fedcore.engines.run_client import run_client
from fedcore.method import data_of
from fedcore.types import Batches, ClientFunction, Tree, Tuning


def message_shape(work: Work, fn: ClientFunction, down: Tree, t: int) -> Tree:
    """A message such as `fn` sends when it is sent `down`; its values mean nothing."""
    task = work.task
    ones = torch.ones(1, 1, device=task.device)
    one = Batches(task.data.x[:1][None], task.data.y[:1][None], ones)
    batches = Tuning(one, one) if data_of(fn) == "tune" else one
    state = work.method.init_client(task.init_params())
    with one_thread():
        up, _ = run_client(fn, task, torch.tensor(float(t)), down, state, batches)
    return up
