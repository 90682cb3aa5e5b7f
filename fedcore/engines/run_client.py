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
    """The client function: (what is sent, the client's new state)."""
    up, new, _ = run_checked(fn, task, t, down, state, batches)
    return up, new


def run_checked(
    fn: ClientFunction,
    task: Task,
    t: Tensor,
    down: Tree,
    state: Tree,
    batches: Batches | Tuning,
) -> tuple[Tree, Tree, Tree]:
    """(what is sent, the client's new state, whether both are finite: 0-d).

    A client whose work is not finite keeps its old state: one diverged round must not
    stay with it for good. Without a state nothing is checked, and the last is ().
    """
    up, new = fn(task, t, down, state, batches)
    if not trees.leaves(new):
        return up, new, ()
    is_finite = trees.finite(up) & trees.finite(new)
    return up, trees.where(is_finite, new, state), is_finite
