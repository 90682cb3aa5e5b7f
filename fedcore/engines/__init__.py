"""The engines, by name: where client functions run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.engines.base import Engine, Work, device_for
from fedcore.errors import SettingsError

if TYPE_CHECKING:
    from fedcore.config import EngineSettings
    from fedcore.storage.rows import StateStore


def make(settings: EngineSettings, work: Work, states: StateStore) -> Engine:
    """The in-process engine that the settings name, with the task on its device."""
    device = device_for(settings)
    if settings.name == "ray":
        from fedcore.engines.ray import Ray

        return Ray(work, states, settings, device)
    work.task.to(device)
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
