"""A task tried before a run: its parts fit each other, and are what a run takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore import trees
from fedcore.checks.data import check_data
from fedcore.checks.gradient import check_gradient, in_short
from fedcore.checks.probe import examine
from fedcore.checks.trials import undisturbed
from fedcore.errors import SettingsError
from fedcore.inputs import shapes
from fedcore.metrics import check_per_example
from fedcore.types import Tree

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["check_task"]

TRIED = 8  # examples on which a task is tried before a run


def check_task(task: Task) -> None:
    """Raise SettingsError for what `Task.check` refuses."""
    with undisturbed(task), torch.no_grad():
        check_data(task)
        _try(task, "examples", task.data.x, task.data.y)
        if task.proxy is not None:
            _try(task, "proxy examples", task.proxy.x, task.proxy.y)
        for name, examples in task.extra_tests.items():
            _try(task, f'examples of extra_tests["{name}"]', examples.x, examples.y)
    examine(task)


def _try(task: Task, kind: str, x: Tree, y: Tensor) -> None:
    """Try model, loss and metrics on a few of these examples."""
    if len(y) == 0:
        return
    # From everywhere, as rows may be sorted by class; in float64, which has every row's
    # number. Copies: a model might write to its inputs.
    places = torch.linspace(0, len(y) - 1, min(len(y), TRIED), dtype=torch.float64)
    rows = places.long().to(y.device)
    x, y = trees.at((x, y), rows)
    try:
        outputs = task.predict(task.init_params(), x)
    except Exception as error:
        raise SettingsError(
            f"the model cannot take {kind} of shape {shapes(x)}: {in_short(error)}"
        ) from error
    for name, metric in task.metrics.items():
        check_per_example(name, metric, outputs, y)
    for whole in task.set_metrics.values():
        whole.check(outputs, y)
    check_gradient(task, x, y)
