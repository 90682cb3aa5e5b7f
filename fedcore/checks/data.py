"""Data that a task's model or loss cannot take, found before a run, with the row.

One pass over all labels, and a trial of the rows that hold the smallest and the largest
whole numbers of each array: the label or the token that is out of range is among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.arrays import leaves
from fedcore.checks.gradient import in_short
from fedcore.checks.sizes import check_sizes, check_tokens
from fedcore.errors import SettingsError
from fedcore.types import Params, Tree

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["check_data", "check_labels", "ignored_label"]

IGNORED = -100  # the label that PyTorch's losses ignore by default


class _Set(NamedTuple):
    name: str
    x: Tree
    y: Tensor


@torch.no_grad()
def check_data(task: Task) -> None:
    """Try a task's training, test and proxy examples.

    Raises SettingsError for a model without trainable parameters, labels that are no
    class of the model, and examples that model, loss or a metric cannot take.
    """
    params = task.init_params()
    if not params:
        frozen = len(list(task.model.parameters()))
        found = f"all {frozen} are frozen" if frozen else "it has none at all"
        raise SettingsError(
            f"the model {type(task.model).__name__} has no trainable parameters "
            f"({found}): there is nothing to train; set requires_grad = True on some"
        )
    sets = [_Set("train", task.data.x, task.data.y), _Set("test", *task.data.test)]
    if task.proxy is not None:
        sets.append(_Set("proxy", *task.proxy))
    for name, examples in task.extra_tests.items():
        sets.append(_Set(f'extra_tests["{name}"]', *examples))
    for name, _, y in sets:
        check_sizes(task, name, y)
    with task.evaluating(), torch.random.fork_rng(devices=[]):
        for tried in sets:
            if len(tried.y) and not _fits(task, params, tried):
                return  # the task's own trial tells, and what follows may fail as well


def ignored_label(loss: Callable[..., Any]) -> int | None:
    """The label that a loss over classes ignores; None for a loss of another kind.

    >>> ignored_label(nn.CrossEntropyLoss(reduction="none"))
    -100
    """
    keywords: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        keywords = {**loss.keywords, **keywords}
        loss = loss.func
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return loss.ignore_index
    functions = (nn.functional.cross_entropy, nn.functional.nll_loss)
    is_bundled = (
        getattr(loss, "__name__", "") == "cross_entropy"
        and getattr(loss, "__module__", "").partition(".")[0] == "fedcore"
    )
    if is_bundled or loss in functions:
        ignored: int = keywords.get("ignore_index", IGNORED)
        return ignored
    return None


def _fits(task: Task, params: Params, examples: _Set) -> bool:
    """Whether model, loss and metrics take the telling rows.

    Raises SettingsError where they take others, or where it is known why not.
    """
    rows = _telling_rows(examples)
    if examples.y.is_cuda:
        rows = rows[:2]  # an index out of range would spoil the process
    outputs = _outputs(task, params, examples, rows)
    if not isinstance(outputs, Tensor):
        return False
    counts = None if task.size is None else task.size(examples.y) > 0
    loss = task.metrics["loss"]
    check_labels(examples.name, examples.y, loss, outputs, counts)
    check_tokens(task, examples.name, examples.y, outputs)
    for name, metric in task.metrics.items():
        if not _takes(name, metric, examples, outputs, rows):
            return False
    return True


def _telling_rows(examples: _Set) -> list[int]:
    """The first two rows, and those with an extreme whole number; no row twice."""
    rows = list(range(min(2, len(examples.y))))
    for leaf in [*trees.leaves(examples.x), examples.y]:
        if leaf.is_floating_point() or leaf.dtype == torch.bool or not leaf.numel():
            continue
        width = leaf.numel() // len(leaf)
        rows += [int(leaf.argmin()) // width, int(leaf.argmax()) // width]
    return list(dict.fromkeys(rows))


def _outputs(task: Task, params: Params, examples: _Set, rows: list[int]) -> Any:
    """The model's outputs for these rows.

    None where it takes none of them, which the task's own trial tells.
    """
    try:
        return task.predict(params, _taken(examples.x, rows))
    except Exception as error:
        problem = error
    failures: dict[int, Exception] = {}
    for row in rows:
        try:
            task.predict(params, _taken(examples.x, [row]))
        except Exception as error:
            failures[row] = error
    if not failures:
        return None
    if len(failures) == len(rows):
        _explain_types(task, params, examples, rows)
        if examples.name != "test":
            return None
    row, problem = next(iter(failures.items()))
    raise SettingsError(
        f"the model cannot take row {row} of {_named(examples)}, "
        f"{_values(examples, row)}: {in_short(problem)}"
    ) from problem


def _taken(tree: Tree, rows: list[int]) -> Tree:
    """Copies of these rows, [len(rows), ...]: a model may write to its inputs."""
    return trees.map(lambda v: v[torch.tensor(rows, device=v.device)], tree)


def _named(examples: _Set) -> str:
    return ", ".join(leaves(f"{examples.name}.x", examples.x))


def _values(examples: _Set, row: int) -> str:
    """The row's shapes, and the range of its whole numbers."""
    parts = []
    for leaf in trees.leaves(examples.x):
        part = f"of shape {tuple(leaf.shape[1:])}"
        if not leaf.is_floating_point() and leaf[row].numel():
            low, high = leaf[row].min().item(), leaf[row].max().item()
            part += f" with values from {low} to {high}"
        parts.append(part)
    return " and ".join(parts)


def _explain_types(task: Task, params: Params, examples: _Set, rows: list[int]) -> None:
    """Raises SettingsError where the model takes the same numbers in another type."""
    wanted = next(iter(params.values())).dtype
    x = _taken(examples.x, rows)
    named = leaves(f"{examples.name}.x", x)
    others = {name: leaf for name, leaf in named.items() if leaf.dtype != wanted}
    if not others:
        return
    try:
        task.predict(params, trees.map(lambda v: v.to(wanted), x))
    except Exception:
        return
    name, leaf = next(iter(others.items()))
    write = f"{name}.to({wanted})"
    if wanted == torch.float32:
        write = f"{name}.float()"
    if leaf.dtype == torch.uint8:
        write += " / 255 for images"
    elif leaf.dtype == torch.float64:
        write += ", or model.double()"
    raise SettingsError(
        f"{name} is {_type_name(leaf)}, and the model's parameters are "
        f"{str(wanted).removeprefix('torch.')}: write {write}"
    )


def _type_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def check_labels(
    name: str,
    y: Tensor,
    loss: Callable[..., Any],
    outputs: Tensor,
    counts: Tensor | None = None,
) -> None:
    """Raises SettingsError for labels y of the set `name` that are no class.

    `y` [n, ...], `outputs` [B, classes, ...] of any B; only losses that are known to be
    over classes are looked at. `counts` [n] says which examples count, by default all:
    others need no label.
    """
    ignored = ignored_label(loss)
    if ignored is None or outputs.ndim < 2 or y.ndim != outputs.ndim - 1:
        return
    if y.is_floating_point() or y.dtype == torch.bool:
        remedy = "write y.long()"
        if y.is_floating_point():
            remedy += ", or give Task loss=squared_error for a regression"
        raise SettingsError(
            f"{name}.y is {_type_name(y)}: the loss is over classes, which are whole "
            f"numbers; {remedy}"
        )
    classes, low, high = outputs.shape[1], int(y.min()), int(y.max())
    if low >= 0 and high < classes:
        return
    is_bad = ((y < 0) | (y >= classes)).reshape(len(y), -1)
    if y.ndim > 1:
        # A position may be ignored, beside others of its example that count.
        is_ignored = (y == ignored).reshape(len(y), -1)
        has_none = is_ignored.all(1, keepdim=True)
        if counts is not None:
            has_none &= counts[:, None]
        is_bad &= ~is_ignored | has_none
    if not bool(is_bad.any()):
        return
    row = int(is_bad.any(1).nonzero()[0])
    label = int(y[row].reshape(-1)[is_bad[row]][0])
    expected = f"the model has {classes} outputs, for classes 0 to {classes - 1}"
    if label == ignored:
        remedy = (
            "PyTorch would ignore it, and here every example counts; leave rows "
            f"without any other label out of {name}"
        )
    elif low == 1 and high == classes:
        remedy = "do labels start at 1? Write y - 1"
    elif label < 0:
        remedy = f"number the classes from 0, or leave such rows out of {name}"
    else:
        remedy = f"correct the label, or give the model {high + 1} outputs"
    raise SettingsError(f"{name}.y[{row}] = {label}: {expected}; {remedy}")


def _takes(
    name: str,
    metric: Callable[[Tensor, Tensor], Tensor],
    examples: _Set,
    outputs: Tensor,
    rows: list[int],
) -> bool:
    """Whether a metric takes these rows.

    Raises SettingsError for one that it cannot take where it takes others.
    """
    targets = _taken(examples.y, rows)
    if _failure(metric, outputs, targets) is None:
        return True
    failures: dict[int, Exception] = {}
    for i, row in enumerate(rows):
        error = _failure(metric, outputs[i : i + 1], targets[i : i + 1])
        if error is not None:
            failures[row] = error
    if not failures:
        return False
    # Of class 0 it might take the first row, which tells a label from a shape.
    is_label = not targets.is_floating_point() and not _failure(
        metric, outputs[:1], torch.zeros_like(targets[:1])
    )
    if len(failures) == len(rows) and examples.name != "test" and not is_label:
        return False
    row, problem = next(iter(failures.items()))
    label = examples.y[row].tolist() if examples.y[row].numel() <= 4 else "..."
    raise SettingsError(
        f'the metric "{name}" cannot take {examples.name}.y[{row}] = {label}, with '
        f"outputs of shape {tuple(outputs.shape[1:])}: {in_short(problem)}"
    ) from problem


def _failure(
    metric: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, y: Tensor
) -> Exception | None:
    """Why a metric cannot take these; None where it can."""
    try:
        metric(outputs, y)
    except Exception as error:
        return error
    return None
