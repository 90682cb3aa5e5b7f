"""The bundled tasks, and the way to a user's own: a function of the Experiment that returns a Task."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from fedcore.config import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.rng import rng, torch_seed
from fedcore.task import Task, squared_error

DEFAULT_POPULATION = 100


def images(e: Experiment, name: str) -> Task:
    """Classification of a bundled image data set, spread over clients by `e.partition`."""
    if e.options:
        raise SettingsError(f'options.{next(iter(e.options))}: "{name}" has no options; least-squares and your own tasks have')
    if name == "digits" and e.data_folder is not None:
        raise SettingsError(f"data_folder = {e.data_folder}: the digits come with scikit-learn; leave it out")
    source = sources.load(name, e.data_folder)
    population = e.population or (None if e.partition.name == "natural" else DEFAULT_POPULATION)
    part = e.partition.split(source.y_train.numpy(), source.groups, population, e.seed)
    train, test = Examples(source.x_train, source.y_train), Examples(source.x_test, source.y_test)
    data = FederatedData(train, test, part.order, part.offsets, e.holdout, e.seed)
    return Task(e.model.build(tuple(source.x_train.shape[1:]), source.num_classes), data)


class LeastSquares(BaseModel):
    """Options of `least_squares`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    examples: int = Field(20, ge=1, description="examples a client")
    features: int = Field(10, ge=1, description="dimension of w")
    heterogeneity: float = Field(1.0, ge=0, description="standard deviation of the clients' own w_i")
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise in y")


def least_squares(e: Experiment) -> Task:
    """Linear regression with a known optimum: y = x w_i + noise, each client with a w_i of its own around a common one.

    `task.optimum` minimises the mean over all training examples, hence FedAvg's objective with weights by example count. It is
    tested on the examples that it trains on. Sections `model` and `partition` do not apply.
    """
    try:
        o = LeastSquares(**e.options)
    except ValidationError as error:
        fault = error.errors()[0]
        key, known = ".".join(map(str, fault["loc"])), ", ".join(LeastSquares.model_fields)
        raise SettingsError(f"options.{key} = {fault['input']!r}: {fault['msg'].lower()}; least-squares knows {known}") from error
    clients, n, d = e.population or DEFAULT_POPULATION, o.examples, o.features
    draw = rng(e.seed, "least-squares")
    w = draw.standard_normal((1, d, 1)) + o.heterogeneity * draw.standard_normal((clients, d, 1))
    x = draw.standard_normal((clients, n, d), dtype=np.float32)
    y = (x @ w.astype(np.float32) + o.noise * draw.standard_normal((clients, n, 1))).astype(np.float32)
    examples = Examples(torch.from_numpy(x.reshape(-1, d)), torch.from_numpy(y.reshape(-1, 1)))
    offsets = np.arange(clients + 1) * n
    data = FederatedData(examples, examples, np.arange(clients * n), offsets, e.holdout, e.seed)
    model = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(model.weight)
    kept = torch.from_numpy(
        np.concatenate([data.order[a : b - h] for a, b, h in zip(offsets, offsets[1:], data.held, strict=False)])
    )
    optimum = torch.linalg.lstsq(examples.x[kept].double(), examples.y[kept].double()).solution
    return Task(model, data, loss=squared_error, metrics={}, optimum={"weight": optimum.T.float()})


TASKS: dict[str, Callable[[Experiment], Task]] = {
    "digits": partial(images, name="digits"),
    "fashion-mnist": partial(images, name="fashion-mnist"),
    "cifar10": partial(images, name="cifar10"),
    "least-squares": least_squares,
}


def build_task(e: Experiment) -> Task:
    """The task that `e.task` names, with weights initialised from the seed. Raises SettingsError when it cannot be built."""
    make = TASKS.get(e.task) or _users(e.task)
    with torch_seed(e.seed, "init"):
        task = make(e)
    if not isinstance(task, Task):
        raise SettingsError(f'task = "{e.task}": expected the function to return a fedcore.Task, it returned {type(task).__name__}')
    if e.population is not None and task.population != e.population:
        raise SettingsError(
            f"population = {e.population}, but the task has {task.population} clients: set population to that, or leave it out"
        )
    return task


def _users(name: str) -> Callable[[Experiment], Task]:
    module_name, colon, function = name.partition(":")
    if not colon:
        raise SettingsError(f'task = "{name}": expected one of {", ".join(TASKS)}, or your own as "package.module:make_task"')
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as e:
        raise SettingsError(
            f'task = "{name}": cannot import {module_name}: {e}; run from the folder that holds it, or install it'
        ) from e
    make: Callable[[Experiment], Task] | None = getattr(module, function, None)
    if make is None:
        raise SettingsError(f'task = "{name}": {module_name} has no {function}')
    return make
