"""Settings that disagree with the task, the method or the process.

They are refused before anything is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore import privacy
from fedcore.errors import SettingsError
from fedcore.messages.links import LinkSettings
from fedcore.rounds.participation import Process, UniformProcess

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.method import Method
    from fedcore.task import Task


def participation_process(experiment: Experiment, task: Task) -> Process:
    """The participation process. Raises SettingsError for faults of later rounds."""

    def label_counts() -> np.ndarray:
        y = task.data.y
        if y.is_floating_point() or y.ndim != 1:
            raise SettingsError(
                "participation.alpha ties rates to classes, but the task's targets are "
                "no classes: leave it out"
            )
        return task.data.label_counts(int(y.max()) + 1)

    settings = experiment.participation
    process = settings.process(task.population, experiment.seed, label_counts)
    process.check(experiment.rounds)
    if isinstance(process, UniformProcess) and process.size < experiment.min_reports:
        raise SettingsError(
            f"min_reports = {experiment.min_reports}, but a cohort has {process.size} "
            "clients: set it to at most that"
        )
    return process


def refuse_unknown_rates(
    experiment: Experiment, method: Method[Any], process: Process
) -> None:
    """Raises SettingsError where the method asks for rates that nobody knows."""
    if process.rates is None and method.needs_rates():
        raise SettingsError(
            f'participation.name = "{experiment.participation.name}" has no known '
            "rates p_i, which the settings of the method ask for"
        )


def noise_mechanism(
    experiment: Experiment, method: Method[Any], process: Process
) -> privacy.Mechanism | None:
    """The noise that the run adds, where it has a defence.

    Raises SettingsError where it would not guarantee what it says.
    """
    defence, name = experiment.defence, experiment.method.name
    needs_differences = defence.clip is not None or defence.top_k < 1
    if not method.differences and needs_differences:
        raise SettingsError(
            "defence.clip and defence.top_k act on differences to the global model, "
            f"but {name} sends other things (whole models, or gradients): leave them "
            "out, or choose a method whose messages are differences, e.g. fedavg"
        )
    try:
        own = method.mechanism(process)
    except SettingsError as error:
        raise SettingsError(
            f'participation.name = "{experiment.participation.name}": {error}'
        ) from error
    if own is None:
        return privacy.local(defence) if defence.is_active else None
    if defence.is_active:
        raise SettingsError(
            f"{name} clips and adds its own noise: leave out defence.clip, "
            "noise_multiplier, top_k and bits"
        )
    if own.noise_multiplier and experiment.links.uplink != LinkSettings():
        raise SettingsError(
            "links.uplink: noise after the clipping is not bounded, as the noise of "
            f"{name} needs it: leave it out"
        )
    if own.noise_multiplier and experiment.min_reports:
        raise SettingsError(
            f"min_reports = {experiment.min_reports}: a round that is skipped would "
            f"tell who was there; with {name} set min_reports = 0"
        )
    return own
