"""Values from outside that a model or a loss reads, watched from round to round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fedcore.checks.hidden import Value, changed, hidden_state
from fedcore.checks.trials import (
    Subject,
    Trial,
    are_alike,
    judges,
    spread,
    taken,
    undisturbed,
)
from fedcore.errors import RunError

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["Watch", "put_values"]

WATCHED = 64  # examples whose results show whether a changed value has consequences


class Watch:
    """The values that a task's model, loss and penalty read besides their arguments.

    They are looked at when a round begins: a recording, and a copy of the task in
    another process, would go on with the old ones.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.latest: dict[str, Any] = {}  # the values that changed last, by place
        before = self._values()
        self._result = self._trial()
        self._before = self._values()
        # By themselves, in a forward pass; the trials before a run know about those.
        self._moving = changed(before, self._before)

    def _values(self) -> dict[str, Value]:
        return hidden_state(judges(self._task))

    def _trial(self) -> Trial | None:
        task = self._task
        if len(task.data.order) == 0:
            return None
        subject = Subject(task)
        x, y = taken(task, spread(task, WATCHED).tolist())
        with undisturbed(task), torch.no_grad():
            task.model.train()
            return subject.trial(x=x, y=y)

    def change(self) -> str | None:
        """A value that differs from that at the last look, with consequences; in words.

        >>> import numpy as np
        >>> from torch import nn
        >>> from fedcore import Examples, FederatedData, Task
        >>> rows = Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
        >>> data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Softplus(1.0))
        >>> watch = Watch(Task(model, data))
        >>> model[1].beta = 2.0
        >>> print(watch.change())
        the model's "1.beta" was 1.0 and is 2.0
        >>> watch.change()
        """
        before, after = self._before, self._values()
        paths = changed(before, after)
        if not paths:
            return None
        result, self._result = self._result, self._trial()
        self._before = self._values()
        if are_alike(result, self._result):
            return None
        self.latest = _contents(after, paths)
        paths.sort(key=self._moving.__contains__)
        old, new = before.get(paths[0]), after.get(paths[0])
        if old is None or new is None:
            return f"{paths[0]} is {'new' if old is None else 'gone'}"
        return f"{paths[0]} was {old.text} and is {new.text}"


def put_values(task: Task, contents: dict[str, Any]) -> None:
    """Set values that a task's model, loss and penalty read, by place.

    Raises RunError for a place that this task does not have.
    """
    values = hidden_state(judges(task))
    for place, content in contents.items():
        value = values.get(place)
        if value is None or value.set is None:
            raise RunError(f"{place} has changed, and cannot be set in a worker")
        value.set(content)


def _contents(values: dict[str, Value], places: list[str]) -> dict[str, Any]:
    """The contents of the values that are at these places."""
    contents = {}
    for place in places:
        if place in values and values[place].set is not None:
            contents[place] = values[place].content
    return contents
