"""The bundled tasks, and the way to a user's own: a function of the Experiment that returns a Task."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedcore.config import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import carve
from fedcore.errors import SettingsError
from fedcore.models.lowrank import JacobianCorrection, lowrank
from fedcore.rng import rng, torch_seed
from fedcore.storage.checkpoint import Checkpoint
from fedcore.task import Task, squared_error

DEFAULT_POPULATION = 100
T = TypeVar("T", bound=BaseModel)


def images(e: Experiment, name: str) -> Task:
    """Classification of a bundled image data set, spread over clients by `e.partition`."""
    if e.options:
        raise SettingsError(
            f'options.{next(iter(e.options))}: "{name}" has no options; least-squares and your own tasks have'
        )
    if name == "digits" and e.data_folder is not None:
        raise SettingsError(
            f"data_folder = {e.data_folder}: the digits come with scikit-learn; leave it out"
        )
    source = sources.load(name, e.data_folder)
    population = e.population or (
        None if e.partition.name == "natural" else DEFAULT_POPULATION
    )
    train, test = (
        Examples(source.x_train, source.y_train),
        Examples(source.x_test, source.y_test),
    )
    labels = source.y_train.numpy()
    servers, pool = carve(labels, e.proxy, e.seed)
    part = e.partition.split(
        labels[pool],
        None if source.groups is None else source.groups[pool],
        population,
        e.seed,
    )
    data = FederatedData(train, test, pool[part.order], part.offsets, e.holdout, e.seed)
    proxy = Examples(train.x[servers], train.y[servers]) if e.proxy else None
    return Task(
        e.model.build(tuple(source.x_train.shape[1:]), source.num_classes),
        data,
        proxy=proxy,
        pixels=source.pixels,
    )


class LeastSquares(BaseModel):
    """Options of `least_squares`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    examples: int = Field(20, ge=1, description="examples a client")
    features: int = Field(10, ge=1, description="dimension of w")
    heterogeneity: float = Field(
        1.0, ge=0, description="standard deviation of the clients' own w_i"
    )
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise in y")


def least_squares(e: Experiment) -> Task:
    """Linear regression with a known optimum: y = x w_i + noise, each client with a w_i of its own around a common one.

    `task.optimum` minimises the mean over all training examples, hence FedAvg's objective with weights by example count. It is
    tested on the examples that it trains on. Sections `model` and `partition` do not apply.
    """
    o = _options(e, LeastSquares)
    clients, n, d = e.population or DEFAULT_POPULATION, o.examples, o.features
    draw = rng(e.seed, "least-squares")
    w = draw.standard_normal((1, d, 1)) + o.heterogeneity * draw.standard_normal(
        (clients, d, 1)
    )
    x = draw.standard_normal((clients, n, d), dtype=np.float32)
    # einsum, not @: its sums depend neither on the BLAS at hand nor on the floating-point flags that some of them leave behind.
    y = (
        np.einsum("knd,kdo->kno", x, w.astype(np.float32))
        + o.noise * draw.standard_normal((clients, n, 1))
    ).astype(np.float32)
    examples = Examples(
        torch.from_numpy(x.reshape(-1, d)), torch.from_numpy(y.reshape(-1, 1))
    )
    offsets = np.arange(clients + 1) * n
    data = FederatedData(
        examples, examples, np.arange(clients * n), offsets, e.holdout, e.seed
    )
    model = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(model.weight)
    kept = _trained_on(data)
    optimum = torch.linalg.lstsq(
        examples.x[kept].double(), examples.y[kept].double()
    ).solution
    proxy = None
    if (
        e.proxy
    ):  # examples of their own, of one client after another: the population's mixture
        own = rng(e.seed, "least-squares proxy")
        inputs = own.standard_normal((e.proxy, 1, d))
        targets = np.einsum("knd,kdo->kno", inputs, w[np.arange(e.proxy) % clients])
        targets += o.noise * own.standard_normal((e.proxy, 1, 1))
        proxy = Examples(
            torch.from_numpy(inputs[:, 0]).float(),
            torch.from_numpy(targets[:, 0]).float(),
        )
    return Task(
        model,
        data,
        loss=squared_error,
        metrics={},
        proxy=proxy,
        optimum={"weight": optimum.T.float()},
    )


def _trained_on(data: FederatedData) -> Tensor:
    """Row numbers of all clients' training examples."""
    return torch.from_numpy(
        np.concatenate(
            [data.rows(client, "train") for client in range(data.population)]
        )
    )


class WeightedLeastSquares(BaseModel):
    """Options of `weighted_least_squares`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    examples: tuple[int, int] = Field(
        (50, 90), description="d_k, least and most examples a client; drawn uniformly"
    )
    features: int = Field(128, ge=1, description="L, dimension of w")
    noise: float = Field(
        0.01,
        ge=1e-6,
        description="sigma_nu, standard deviation of the noise in y; examples weigh 1 / sigma_nu^2",
    )

    @model_validator(mode="after")
    def _ordered(self) -> WeightedLeastSquares:
        if not 1 <= self.examples[0] <= self.examples[1]:
            raise ValueError(
                f"{list(self.examples)}: expected two whole numbers, least and most, from 1 on"
            )
        return self


def weighted_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Weight times squared distance, without a factor 1/2, [B]; `y` [B, 2] holds target and weight."""
    return y[:, 1] * (outputs[:, 0] - y[:, 0]).square()


def weighted_least_squares(e: Experiment) -> Task:
    """Linear regression in float64, every client with fewer examples than features (Lari et al., 2024; specification of RERCE-Fed).

    y = X_k w + nu, w and nu standard normal (nu times sigma_nu), entries of X_k of mean U(-0.5, 0.5) and variance U(0.5, 1.5), both
    a client's own. `task.optimum` is the centralised solution over all training examples, on which the task is tested, too.
    Sections `model` and `partition` do not apply.
    """
    o = _options(e, WeightedLeastSquares)
    clients, draw = (
        e.population or DEFAULT_POPULATION,
        rng(e.seed, "weighted-least-squares"),
    )
    w = draw.standard_normal(o.features)
    sizes = draw.integers(o.examples[0], o.examples[1], clients, endpoint=True)
    mean, deviation = (
        draw.uniform(-0.5, 0.5, clients),
        np.sqrt(draw.uniform(0.5, 1.5, clients)),
    )
    client = np.repeat(np.arange(clients), sizes)
    x = mean[client, None] + deviation[client, None] * draw.standard_normal(
        (len(client), o.features)
    )
    y = np.einsum("nd,d->n", x, w) + o.noise * draw.standard_normal(len(client))
    examples = Examples(
        torch.from_numpy(x),
        torch.from_numpy(np.stack([y, np.full(len(y), o.noise**-2)], axis=1)),
    )
    data = FederatedData(
        examples,
        examples,
        np.arange(len(client)),
        np.append(0, np.cumsum(sizes)),
        e.holdout,
        e.seed,
    )
    model = nn.Linear(o.features, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    kept = _trained_on(data)
    root = examples.y[kept, 1:].sqrt()
    optimum = torch.linalg.lstsq(
        root * examples.x[kept], root * examples.y[kept, :1]
    ).solution
    optimum = optimum.round(
        decimals=10
    )  # its last bits are not the same in every process
    return Task(
        model,
        data,
        loss=weighted_squared_error,
        metrics={},
        optimum={"weight": optimum.T},
    )


def _options(e: Experiment, model: type[T]) -> T:
    """The options of a bundled task. Raises SettingsError with the key and what it expects."""
    try:
        return model(**e.options)
    except ValidationError as error:
        fault = error.errors()[0]
        key, known = (
            ".".join(["options", *map(str, fault["loc"])]),
            ", ".join(model.model_fields),
        )
        raise SettingsError(
            f"{key} = {fault['input']!r}: {fault['msg'].lower()}; {e.task} knows {known}"
        ) from error


TASKS: dict[str, Callable[[Experiment], Task]] = {
    "digits": partial(images, name="digits"),
    "fashion-mnist": partial(images, name="fashion-mnist"),
    "cifar10": partial(images, name="cifar10"),
    "least-squares": least_squares,
    "weighted-least-squares": weighted_least_squares,
}


def build_task(e: Experiment) -> Task:
    """The task that `e.task` names, with weights initialised from the seed. Raises SettingsError when it cannot be built."""
    make = TASKS.get(e.task) or _users(e.task)
    with torch_seed(e.seed, "init"):
        task = make(e)
        if not isinstance(task, Task):
            found = f"it returned {type(task).__name__}"
            raise SettingsError(
                f'task = "{e.task}": expected the function to return a fedcore.Task, {found}'
            )
        if e.lowrank.form != "dense":
            if task.optimum is not None:
                raise SettingsError(
                    f'lowrank.form = "{e.lowrank.form}": {e.task} knows its optimum by the names of a dense model'
                )
            task.model = lowrank(task.model, e.lowrank)
            if e.lowrank.jacobian:
                task.penalty = JacobianCorrection(
                    task.model, e.lowrank.jacobian, _step_of(e)
                )
    if e.initial is not None:
        start_from(task.model, e.initial)
    if e.proxy and task.proxy is None:
        raise SettingsError(
            f'proxy = {e.proxy}, but the task "{e.task}" makes no proxy set: leave proxy out, or give Task one'
        )
    if e.population is not None and task.population != e.population:
        raise SettingsError(
            f"population = {e.population}, but the task has {task.population} clients: set population to that, or leave it out"
        )
    return task


def _step_of(e: Experiment) -> float:
    step: float | None = getattr(e.method, "local_lr", None)
    if step is None:
        raise SettingsError(
            f'lowrank.jacobian = {e.lowrank.jacobian}: it needs the local_lr that "{e.method.name}" has not'
        )
    return step


def start_from(model: nn.Module, source: Path) -> None:
    """Give the model the parameters of a run, or of a safetensors file; what the source lacks (a personal part) stays as it is.

    Raises SettingsError when there is nothing to read, or when it does not fit the model.
    """
    try:
        if source.is_dir():
            checkpoint = Checkpoint(source / "checkpoint")
            checkpoint.read()
            flat = checkpoint.part("server")
        else:
            flat = load_file(source)
    except (OSError, SafetensorError, SettingsError) as e:
        raise SettingsError(
            f"initial = {source}: {e}; expected a run directory with a checkpoint, or a .safetensors file"
        ) from e
    prefix = "params/" if source.is_dir() else ""
    found = {
        name.removeprefix(prefix): value
        for name, value in flat.items()
        if name.startswith(prefix)
    }
    own = dict(model.named_parameters())
    for name, value in found.items():
        if name not in own or own[name].shape != value.shape:
            fits = (
                f"of shape {tuple(own[name].shape)}"
                if name in own
                else "no such parameter"
            )
            raise SettingsError(
                f'initial = {source}: it holds "{name}" of shape {tuple(value.shape)}, the model has {fits}'
            )
    if not found:
        raise SettingsError(f"initial = {source}: it holds no parameters")
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)


def _users(name: str) -> Callable[[Experiment], Task]:
    module_name, colon, function = name.partition(":")
    if not colon:
        raise SettingsError(
            f'task = "{name}": expected one of {", ".join(TASKS)}, or your own as "package.module:make_task"'
        )
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
