"""From an Experiment to a Task: a bundled one, or a user's own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedcore.checks.gradient import in_short, place_of
from fedcore.errors import FedcoreError, SettingsError
from fedcore.models.base import load_base
from fedcore.models.lora import with_lora
from fedcore.models.lowrank import JacobianCorrection, lowrank
from fedcore.models.writing import Writer
from fedcore.rng import torch_seed
from fedcore.task import Task
from fedcore.tasks.classes import classes_of_texts
from fedcore.tasks.image import images
from fedcore.tasks.initial import start_from
from fedcore.tasks.regression import least_squares, weighted_least_squares
from fedcore.tasks.text import TEXTS
from fedcore.tasks.tokens import next_tokens
from fedcore.users import user_function

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["TASKS", "build_task"]


def text_task(experiment: Experiment) -> Task:
    """The task of text that `experiment.task` names: next tokens, or classes."""
    if experiment.text.target == "label":
        return classes_of_texts(experiment)
    return next_tokens(experiment)


HEAD = (r"(.*\.)?(pre_classifier|classifier|score)\..+",)
"""The layer that tells classes apart: no base has it, so that frozen it is noise."""

TASKS: dict[str, Callable[[Experiment], Task]] = {
    "digits": partial(images, name="digits"),
    "fashion-mnist": partial(images, name="fashion-mnist"),
    "cifar10": partial(images, name="cifar10"),
    "least-squares": least_squares,
    "weighted-least-squares": weighted_least_squares,
    "shakespeare": text_task,
    "texts": text_task,
}


def build_task(experiment: Experiment) -> Task:
    """The task that `experiment.task` names, with weights initialised from the seed.

    On the CPU. A task of your own has as many clients as its data say, whatever
    `population` says, which it may read; a run notes the difference. Raises
    SettingsError when it cannot be built.

    >>> from fedcore import Experiment
    >>> settings = {"method": "fedavg", "task": "least-squares", "population": 7}
    >>> build_task(Experiment.parse(settings)).population
    7
    """
    make = TASKS.get(experiment.task) or _users_function(experiment.task)
    with torch_seed(experiment.seed, "init"):
        _refuse_signature(experiment, make)
        task = _made(experiment, make)
        if not isinstance(task, Task):
            raise SettingsError(
                f'task = "{experiment.task}": expected the function to return a '
                f"fedcore.Task, it returned {type(task).__name__}"
            )
        if experiment.base is not None:
            load_base(task.model, experiment.base)
        if experiment.lowrank.form != "dense":
            task = _with_factors(experiment, task)
        if experiment.lora.rank:
            task = _with_adapters(experiment, task)
        if isinstance(task.sample, Writer):
            # It writes with the model that is trained, which may be another by now.
            task.sample = replace(task.sample, model=task.model)
    if experiment.initial is not None:
        start_from(task.model, experiment.initial)
    if experiment.proxy and task.proxy is None:
        raise SettingsError(
            f'proxy = {experiment.proxy}, but the task "{experiment.task}" makes no '
            "proxy set: leave proxy out, or give Task one"
        )
    is_bundled = experiment.task in TASKS
    if is_bundled and experiment.population not in (None, task.population):
        raise SettingsError(
            f"population = {experiment.population}, but the task has "
            f"{task.population} clients: set population to that, or leave it out"
        )
    return task


def _refuse_signature(
    experiment: Experiment, make: Callable[[Experiment], Task]
) -> None:
    """Raise SettingsError for a function that cannot be called with an Experiment."""
    try:
        inspect.signature(make).bind(experiment)
    except ValueError:
        return  # it does not say how it is called
    except TypeError as error:
        raise SettingsError(
            f'task = "{experiment.task}": expected a function of one argument, the '
            f"Experiment, found {inspect.signature(make)}"
        ) from error


def _with_factors(experiment: Experiment, task: Task) -> Task:
    """The task for the model with factored layers, as `lowrank` says."""
    settings = experiment.lowrank
    if task.optimum is not None:
        raise SettingsError(
            f'lowrank.form = "{settings.form}": {experiment.task} knows its optimum by '
            "the names of a dense model"
        )
    model = lowrank(task.model, settings)
    if not settings.jacobian:
        return task.with_model(model)
    step: float | None = getattr(experiment.method, "local_lr", None)
    if step is None:
        raise SettingsError(
            f"lowrank.jacobian = {settings.jacobian}: it needs the local_lr that "
            f'"{experiment.method.name}" has not'
        )
    penalty = JacobianCorrection(model, settings.jacobian, step)
    return task.with_model(model, penalty)


def _with_adapters(experiment: Experiment, task: Task) -> Task:
    """The task for the model with adapters, as `lora` says."""
    settings = experiment.lora
    if task.optimum is not None:
        raise SettingsError(
            f"lora.rank = {settings.rank}: {experiment.task} knows its optimum by the "
            "names of a model without adapters"
        )
    if experiment.lowrank.form != "dense":
        raise SettingsError(
            f'lora.rank = {settings.rank} and lowrank.form = "'
            f'{experiment.lowrank.form}": a layer has one or the other; leave one out'
        )
    is_of_classes = experiment.text.target == "label" and experiment.task in TEXTS
    if is_of_classes and not settings.train:
        settings = settings.model_copy(update={"train": HEAD})
    return task.with_model(with_lora(task.model, settings))


def _made(experiment: Experiment, make: Callable[[Experiment], Task]) -> Task:
    """What the function returns; an error in it is told in one line, with its place."""
    try:
        return make(experiment)
    except FedcoreError:
        raise
    except Exception as error:
        raise SettingsError(
            f'task = "{experiment.task}": the function failed{place_of(error)}: '
            f"{in_short(error)}"
        ) from error


def _users_function(name: str) -> Callable[[Experiment], Task]:
    """The function that "package.module:make_task" names."""
    if ":" not in name:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise SettingsError(
            f'task = "{name}": expected one of {", ".join(TASKS)}, '
            f'or your own as "package.module:make_task"{hint}'
        )
    return user_function(f'task = "{name}"', name)
