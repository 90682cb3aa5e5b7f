"""Targets of tokens, and the sizes of examples, looked at before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.checks.gradient import in_short
from fedcore.errors import SettingsError
from fedcore.measuring import sizes
from fedcore.token_metrics import next_token_loss

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["check_sizes", "check_tokens"]

TRIED = 8  # examples whose sizes are compared with those that each has by itself


def check_tokens(task: Task, name: str, y: Tensor, outputs: Tensor) -> None:
    """Raises SettingsError for next tokens that the model has no output for.

    `y` [n, L] are the targets of the set `name`, `outputs` [B, L, V] those of any B of
    its examples. And for an example without a target, where each example counts.
    """
    is_known = task.metrics["loss"] is next_token_loss
    if not is_known or outputs.ndim != 3 or y.ndim != 2 or y.numel() == 0:
        return
    entries, high = outputs.shape[-1], int(y.max())
    if high >= entries:
        row = int((y >= entries).any(1).nonzero()[0])
        raise SettingsError(
            f"{name}.y[{row}] holds the token {int(y[row].max())}: the model has "
            f"{entries} outputs, for tokens 0 to {entries - 1}; give the model "
            f"{high + 1} outputs, or correct the tokens"
        )
    if task.size is not None:
        return
    is_empty = (y < 0).all(1)
    if bool(is_empty.any()):
        raise SettingsError(
            f"{name}.y[{int(is_empty.nonzero()[0])}] has no target, and every example "
            "counts the same: give Task size=fedcore.num_targets, or "
            f"leave such rows out of {name}"
        )


def check_sizes(task: Task, name: str, y: Tensor) -> None:
    """Raises SettingsError for a task's `size` that gives no weights of the set `name`.

    Expected is one number an example, 0 or more, that follows from its own targets, and
    more than 0 for one example at least.
    """
    if task.size is None or len(y) == 0:
        return
    try:
        given = task.size(y[:TRIED])
    except Exception as error:
        raise SettingsError(
            f"size cannot take targets of shape {tuple(y[:TRIED].shape)}: "
            f"{in_short(error)}"
        ) from error
    tried = min(len(y), TRIED)
    if not isinstance(given, Tensor) or given.shape != (tried,):
        is_tensor = isinstance(given, Tensor)
        found = f"shape {tuple(given.shape)}" if is_tensor else f"{given!r:.80}"
        raise SettingsError(
            f"size gives {found} for {tried} examples, expected one number an "
            f"example: ({tried},)"
        )
    every = torch.from_numpy(sizes(task.size, y))
    is_bad = ~(every.isfinite() & (every >= 0))
    if bool(is_bad.any()):
        row = int(is_bad.nonzero()[0])
        raise SettingsError(
            f"size gives {every[row].item():g} for {name}.y[{row}]: expected 0 or more"
        )
    if not bool(every.any()):
        raise SettingsError(
            f"size gives 0 for each of the {len(y)} examples of {name}, so that none "
            "counts: expected more for one at least; is there no target?"
        )
    for i in range(tried):
        alone = task.size(y[i : i + 1])
        if alone.shape != (1,) or not torch.isclose(alone[0].double().cpu(), every[i]):
            raise SettingsError(
                f"size mixes examples: {name}.y[{i}] gets {every[i].item():g}, and "
                f"{alone.flatten()[:1].tolist()} by itself"
            )
