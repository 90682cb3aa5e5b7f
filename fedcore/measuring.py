"""How a task measures: metrics over batches, over a test set, and sizes of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.arrays import as_examples
from fedcore.errors import SettingsError
from fedcore.set_metrics import added_states
from fedcore.types import Batches, Params

if TYPE_CHECKING:
    from fedcore.data.federated import Examples, FederatedData
    from fedcore.task import Task

__all__ = [
    "checked_tests",
    "deviation",
    "divisor",
    "evaluate",
    "measure",
    "measure_extra",
    "rows_at_once",
    "sizes",
]

TARGETS_AT_ONCE = 8192  # targets in one forward pass of an evaluation
ROWS_AT_ONCE = 2**16  # whose sizes are asked for at once
TAKEN = frozenset(
    [
        "test",
        "train",
        "client",
        "finetuned",
        "server",
        "evaluation",
        "backdoor",
        "first",
        "late",
        "changed",
        "round",
        "extra",
        "bytes",
        "nmsd",
        "measures",
        "privacy",
        "jump",
        "cohort",
        "reports",
        "seconds",
        "dropped",
        "skipped",
    ]
)  # names of a row's own columns, or their first words


def rows_at_once(y: Tensor, most: int) -> int:
    """Examples in one forward pass of an evaluation, `most` at most.

    As many as have `TARGETS_AT_ONCE` targets together, where each has several: a model
    of language gives a number for each entry of its vocabulary, for each of them.

    >>> rows_at_once(torch.zeros(9, 512), 64), rows_at_once(torch.zeros(9), 64)
    (16, 64)
    """
    if y.ndim < 2:
        return most
    return min(most, max(TARGETS_AT_ONCE // max(y.shape[1:].numel(), 1), 1))


def divisor(total: Tensor) -> Tensor:
    """The sum of weights that a mean is divided by; 1 where there are none."""
    return torch.where(total > 0, total, 1.0)


def sizes(size: Callable[[Tensor], Tensor], y: Tensor) -> np.ndarray:
    """The size of each example, float64 [n], for targets y [n, ...]."""
    parts = [np.zeros(0)]
    for start in range(0, len(y), ROWS_AT_ONCE):
        some = size(y[start : start + ROWS_AT_ONCE])
        parts.append(some.detach().cpu().double().numpy())
    return np.concatenate(parts)


def evaluate(task: Task, params: Params, batches: Batches) -> dict[str, Tensor]:
    """What `Task.evaluate` says."""
    zero = torch.zeros((), device=batches.mask.device)
    sums, total = dict.fromkeys(task.metrics, zero), zero
    states: dict[str, Tensor] = {}
    if task.set_metrics and len(batches.mask) == 0:
        # States of nobody, in the shapes that an update leaves.
        batches = trees.map(lambda v: v.new_zeros(1, 1, *v.shape[2:]), batches)
    with task.evaluating():
        for x, y, mask in trees.unbind(batches):
            outputs = task.predict(params, x)
            losses = mask
            for name, metric in task.metrics.items():
                values = metric(outputs, y)
                losses = values if name == "loss" else losses
                # Not a product with the mask: a value of padding may be NaN.
                values = torch.where(mask > 0, values, mask)
                if task.size is not None:
                    values = values * task.size(y)
                sums[name] = sums[name] + values.sum()
            for whole in task.set_metrics.values():
                states = added_states(states, whole.states(outputs, y, mask, losses))
            if task.size is not None:
                total = total + task.weights(y, mask).sum()
    is_counted = task.size is None
    total = batches.mask.sum().clamp(min=1) if is_counted else divisor(total)
    means = {name: value / total for name, value in sums.items()}
    if task.optimum is not None:
        optimum = trees.double(task.optimum)
        means["nmsd"] = deviation(task, params) / trees.dot(optimum, optimum)
    return means | states


def deviation(task: Task, params: Params) -> Tensor:
    """Squared distance to the task's optimum, float64 0-d."""
    assert task.optimum is not None
    # A parameter that `params` lacks is personal, and as it was initialised.
    whole = {**dict(task.model.named_parameters()), **params}
    distances = []
    for name, best in task.optimum.items():
        distances.append((whole[name].double() - best.double()).square().sum())
    return torch.stack(distances).sum()


def measure(
    task: Task, params: Params, examples: Examples, batch_size: int
) -> dict[str, float]:
    """Every metric over these examples, `batch_size` or fewer at once."""
    x, y = examples
    ones = torch.ones(len(y), device=y.device)
    batch_size = rows_at_once(y, batch_size)
    sums: dict[str, Tensor] = {}
    total: Any = 0.0
    for start in range(0, len(y), batch_size):
        rows = slice(start, start + batch_size)
        batch = trees.map(lambda v: v[None], trees.at(Batches(x, y, ones), rows))
        measured = task.evaluate(params, batch)
        weight = batch.mask.sum()
        if task.size is not None:
            weight = task.weights(batch.y[0], batch.mask[0]).double().sum()
        total = total + weight
        for name in task.metrics:
            measured[name] = measured[name] * weight
        sums = added_states(sums, measured)
    total = divisor(total) if task.size is not None and sums else max(len(y), 1)
    values = {}
    for name in task.metrics:
        if name in sums:
            values[name] = (sums[name] / total).item()
    for name, whole in task.set_metrics.items():
        if sums:
            values[name] = whole.value(sums)
    return values


def measure_extra(task: Task, params: Params, batch_size: int) -> dict[str, float]:
    """What `Task.test_extra` says."""
    values = {}
    for name, examples in task.extra_tests.items():
        measured = measure(task, params, examples, batch_size)
        for metric, value in measured.items():
            values[f"{name}_{metric}"] = value
    return values


def checked_tests(
    tests: Mapping[str, Examples], data: FederatedData
) -> dict[str, Examples]:
    """Extra test sets as tensors. Raises SettingsError for names and rows."""
    if not hasattr(tests, "items"):
        raise SettingsError(
            f"extra_tests is a {type(tests).__name__}, expected a dict of Examples by "
            'name, e.g. {"unseen": Examples(x, y)}'
        )
    checked = {}
    for name, examples in tests.items():
        is_word = isinstance(name, str) and name.isascii() and name.isalnum()
        if not is_word or name[0].isdigit() or name in TAKEN:
            raise SettingsError(
                f"extra_tests holds {name!r}: expected a name of letters and digits "
                f"other than {', '.join(sorted(TAKEN))}, e.g. "
                '{"unseen": Examples(x, y)}'
            )
        x, y = as_examples(f'extra_tests["{name}"]', examples)
        if len(y) == 0:
            raise SettingsError(
                f'extra_tests["{name}"] has no rows: give it some, or leave it out'
            )
        checked[name] = data.test._replace(x=x, y=y)
    return checked
