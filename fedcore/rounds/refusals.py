"""Settings that disagree with the task, the method or the process.

They are refused before anything is written.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import privacy
from fedcore.clock.settings import buffered_of
from fedcore.errors import SettingsError
from fedcore.local_settings import LocalSettings
from fedcore.messages.links import LinkSettings
from fedcore.method import TRAINING
from fedcore.rounds import example_privacy
from fedcore.rounds.participation import Process, Tiers, Uniform, UniformProcess
from fedcore.rounds.schedule_checks import expected_seconds, has_clock
from fedcore.statistics import statistic_names

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.method import Method
    from fedcore.task import Task


def refuse_nothing_to_train_on(task: Task) -> None:
    """Raises SettingsError where no client that runs here holds an example."""
    if len(task.data.order) == 0:
        raise SettingsError(
            f"order is empty: none of {task.population} clients holds an example; "
            "give one client some at least"
        )


def participation_process(experiment: Experiment, task: Task) -> Process:
    """The participation process. Raises SettingsError for faults of later rounds."""

    def label_counts() -> np.ndarray:
        classes = task.data.num_classes()
        if classes is None:
            raise SettingsError(
                "participation.alpha ties rates to classes, but the task's targets are "
                f"no classes: {_found_in(task.data.y)}; leave participation.alpha out, "
                "or such rows"
            )
        return task.data.label_counts(classes)

    settings, buffer = experiment.participation, buffered_of(experiment.schedule)
    if buffer is not None:
        # Whoever is idle works; rules are about as many answers as a buffer has.
        size = min(buffer.buffer, task.population)
        return UniformProcess(task.population, experiment.seed, size)
    if isinstance(settings, Uniform) and (settings.cohort or 0) > task.population:
        raise SettingsError(_too_large_a_cohort(experiment, task))
    if isinstance(settings, Tiers) and has_clock(experiment):
        seconds = expected_seconds(experiment, task, experiment.build_method())
        process = settings.of_speeds(seconds, experiment.seed)
    else:
        process = settings.process(task.population, experiment.seed, label_counts)
    process.check(experiment.rounds)
    if isinstance(process, UniformProcess) and process.size < experiment.min_reports:
        raise SettingsError(
            f"min_reports = {experiment.min_reports}, but a cohort has {process.size} "
            "clients: set it to at most that"
        )
    return process


def _found_in(y: Tensor) -> str:
    """What keeps targets from being classes, in words, with the first bad row."""
    if y.is_floating_point() or y.ndim != 1:
        shape = f"of shape {tuple(y.shape[1:])}" if y.ndim > 1 else "numbers"
        return f"train.y is {str(y.dtype).removeprefix('torch.')}, {shape}"
    negative = (y < 0).nonzero()
    row = int(negative[0]) if len(negative) else int(y.argmax())
    return f"train.y[{row}] = {int(y[row])}"


def _too_large_a_cohort(experiment: Experiment, task: Task) -> str:
    """The line for a cohort that is larger than the population, with the way out."""
    cohort = getattr(experiment.participation, "cohort", None)
    line = (
        f'participation.cohort = {cohort}, but the task "{experiment.task}" has '
        f"{task.population} clients: set participation.cohort to at most that, e.g. "
        f"--set participation.cohort={task.population}, or a share of them, e.g. "
        "--set participation.fraction=0.5"
    )
    if experiment.population == task.population:
        line += f"; or raise population, which is {experiment.population}"
    return line


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


def refuse_training(experiment: Experiment, task: Task, method: Method[Any]) -> None:
    """Raises SettingsError where local steps of this kind do not fit the run."""
    local, usual = experiment.local, LocalSettings()
    name = experiment.method.name
    for setting in TRAINING:
        value = getattr(local, setting)
        if value == getattr(usual, setting):
            continue
        reason = method.refuses(setting)
        if reason is not None:
            raise SettingsError(
                f"local.{setting} = {json.dumps(value)} does not fit {name}: {reason}; "
                "leave it out, or choose another method, e.g. fedavg"
            )
    if local.micro > 1:
        _refuse_pieces(local.micro, task)
    if local.is_rounded:
        _refuse_rounding(task)
    if local.dp.is_active:
        example_privacy.refuse(experiment, task, method)


def _refuse_pieces(micro: int, task: Task) -> None:
    """Refuse a loss that is no sum over the pieces of a batch."""
    reason = None
    if task.penalty is not None:
        reason = "the model has a penalty of its own, which need not be a sum over them"
    elif statistic_names(task.model):
        reason = "the model's statistics are those of whole batches"
    if reason is not None:
        raise SettingsError(
            f"local.micro = {micro} cuts batches into pieces, but {reason}: set "
            "local.micro = 1, and lower local.batch_size or engine.chunk"
        )


def _refuse_rounding(task: Task) -> None:
    """Refuse parameters that stay as they are, or that are rounded already."""
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise SettingsError(
                'local.precision = "bfloat16" rounds the products of float32 '
                f'parameters, and the model\'s "{name}" is {dtype}: leave it out'
            )


def refuse_same_noise_twice(
    experiment: Experiment, mechanism: privacy.Mechanism | None, is_changed: bool
) -> None:
    """Raises SettingsError where a run that goes back would spoil its own privacy.

    Noise has a key of function, round and client. Rounds that are run again with other
    messages, by other settings or by devices that train anew, draw the same noise: the
    difference of the two has none.
    """
    has_noise = mechanism is not None and mechanism.noise_multiplier > 0
    if not has_noise and not experiment.local.dp.noise:
        return
    if is_changed or experiment.engine.name == "grid":
        raise SettingsError(
            "--round: this run adds noise for privacy, and rounds that are run again "
            "would add the same noise to other messages, whose difference has none: "
            "start a new run"
        )
