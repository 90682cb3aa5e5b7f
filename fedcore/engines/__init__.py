"""The engines, by name: where client functions run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from fedcore.checks.trials import drawing
from fedcore.engines.base import Engine, Work, device_for
from fedcore.errors import SettingsError

if TYPE_CHECKING:
    from fedcore.config import EngineSettings
    from fedcore.storage.rows import StateStore

log = logging.getLogger("fedcore")


def task_device(settings: EngineSettings) -> torch.device:
    """The device of this process's task; Ray's workers move tasks of their own.

    Raises SettingsError for cuda without a CUDA device.
    """
    device = device_for(settings)
    return torch.device("cpu") if settings.name == "ray" else device


def make(settings: EngineSettings, work: Work, states: StateStore) -> Engine:
    """The in-process engine that the settings name."""
    if settings.name != "sequential" and (settings.chunk or 1) > 1:
        _note_draws(settings, work)
    if settings.name == "ray":
        from fedcore.engines.ray import Ray

        return Ray(work, states, settings, device_for(settings))
    if settings.name == "sequential":
        from fedcore.engines.sequential import Sequential

        return Sequential(work, states)
    if settings.name == "vectorised":
        from fedcore.engines.vectorised import Vectorised

        return Vectorised(work, states, settings.chunk)
    raise SettingsError(
        'engine.name = "grid": clients are Flower nodes, which a Flower server has to '
        'start: use "flwr run .", see docs/flower.md'
    )


def _note_draws(settings: EngineSettings, work: Work) -> None:
    """Say so where clients of a chunk draw other numbers than one by one."""
    layer = drawing(work.task)
    if layer is not None:
        log.warning(
            "engine.chunk = %s: %s draws for the clients of a chunk together, so that "
            "results differ from those of other chunks and of engine.name = "
            '"sequential"; with engine.chunk = 1 they are the same',
            settings.chunk,
            layer,
        )
