"""Optimisations that change no result: without this room everything runs, slower."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcore.speed.recording import Recorder
    from fedcore.task import Task

log = logging.getLogger("fedcore")


def loss_recorder(task: Task) -> Recorder | None:
    """`step_recorder` for local training on the task's loss."""
    loss = task.metrics["loss"]
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return step_recorder(f'the loss "{named.__module__}.{named.__qualname__}"')


def step_recorder(subject: str) -> Recorder | None:
    """A recorder of steps; None, after one warning, where PyTorch lacks a name.

    `subject` names in messages what the steps compute.
    """
    recorder_class = _recorder_class()
    return None if recorder_class is None else recorder_class(subject)


@functools.cache
def _recorder_class() -> type[Recorder] | None:
    try:
        from fedcore.speed.recording import Recorder
    except (ImportError, AttributeError) as missing:
        log.warning(
            "local steps are not recorded, which is slower and changes no result: "
            "this release of PyTorch lacks a name that recordings need (%s)",
            missing,
        )
        return None
    return Recorder
