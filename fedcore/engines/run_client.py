"""The one function that every engine calls for a client's work."""

from __future__ import annotations

from torch import Tensor

from fedcore import trees
from fedcore.task import Task
from fedcore.types import Batches, ClientFunction, Tree, Tuning


def run_client(
    fn: ClientFunction,
    task: Task,
    t: Tensor,
    down: Tree,
    state: Tree,
    batches: Batches | Tuning,
) -> tuple[Tree, Tree]:
    """The client function: (what is sent, the client's new state).

    A client whose work is not finite keeps its old state: one diverged round must not
    stay with it for good.
    """
    up, new = fn(task, t, down, state, batches)
    if trees.leaves(new):
        is_finite = trees.finite(up) & trees.finite(new)
        new = trees.where(is_finite, new, state)
    return up, new
