"""The bundled tasks, and the way to a user's own: from an Experiment to a Task."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedcore.checks.gradient import in_short, place_of
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import carve
from fedcore.errors import FedcoreError, SettingsError
from fedcore.metrics import squared_error
from fedcore.models.base import load_base
from fedcore.models.image import ImageModel
from fedcore.models.lora import with_lora
from fedcore.models.lowrank import JacobianCorrection, lowrank
from fedcore.rng import rng, torch_seed
from fedcore.storage.checkpoint import Checkpoint
from fedcore.task import Task
from fedcore.users import user_function

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = [
    "TASKS",
    "LeastSquares",
    "Options",
    "WeightedLeastSquares",
    "build_task",
    "images",
    "least_squares",
    "start_from",
    "weighted_least_squares",
    "weighted_squared_error",
]

DEFAULT_POPULATION = 100
Options = TypeVar("Options", bound=BaseModel)


def images(experiment: Experiment, name: str) -> Task:
    """Classification of a bundled image data set, spread over clients by `partition`.

    Raises SettingsError for options, for a folder that has not the files, and for a
    partition or proxy set that the data does not allow.
    """
    if experiment.options:
        option = next(iter(experiment.options))
        raise SettingsError(
            f'options.{option}: "{name}" has no options; '
            "least-squares and your own tasks have"
        )
    if name == "digits":
        _refuse_folder(experiment, "the digits come with scikit-learn")
    source = sources.load(name, experiment.data_folder)
    population = experiment.population
    if population is None and experiment.partition.name != "natural":
        population = DEFAULT_POPULATION
    train = Examples(source.x_train, source.y_train)
    test = Examples(source.x_test, source.y_test)
    labels = source.y_train.numpy()
    proxy_rows, pool = carve(labels, experiment.proxy, experiment.seed)
    groups = None if source.groups is None else source.groups[pool]
    part = experiment.partition.split(labels[pool], groups, population, experiment.seed)
    data = FederatedData(
        train,
        test,
        pool[part.order],
        part.offsets,
        experiment.holdout,
        experiment.seed,
    )
    proxy = None
    if experiment.proxy:
        proxy = Examples(train.x[proxy_rows], train.y[proxy_rows])
    shape = tuple(source.x_train.shape[1:])
    model = image_model(experiment).build(shape, source.num_classes)
    return Task(model, data, proxy=proxy, pixels=source.pixels)


def image_model(experiment: Experiment) -> ImageModel:
    """The settings of the model. Raises SettingsError for one of text."""
    settings = experiment.model
    if isinstance(settings, ImageModel):
        return settings
    raise SettingsError(
        f'model.name = "{settings.name}": it reads text, and the task '
        f'"{experiment.task}" has images; use mlp, cnn, resnet or vit, or a task of '
        "text (shakespeare, texts)"
    )


def _refuse_folder(experiment: Experiment, reason: str) -> None:
    """Refuse a folder of data that would not be read."""
    if experiment.data_folder is not None:
        raise SettingsError(
            f"data_folder = {experiment.data_folder}: {reason}; leave it out"
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


def least_squares(experiment: Experiment) -> Task:
    """Linear regression with a known optimum: y = x w_i + noise.

    The w_i of each client lies around a common w. `task.optimum` minimises the mean
    over all training examples, hence FedAvg's objective with weights by example count.
    The task is tested on the examples that it trains on. Sections `model` and
    `partition` do not apply.
    """
    _refuse_folder(experiment, f"{experiment.task} draws its data itself")
    options = _options(experiment, LeastSquares)
    n, d, seed = options.examples, options.features, experiment.seed
    clients = experiment.population or DEFAULT_POPULATION
    draw = rng(seed, "least-squares")
    w = draw.standard_normal((1, d, 1))
    w = w + options.heterogeneity * draw.standard_normal((clients, d, 1))
    x = draw.standard_normal((clients, n, d), dtype=np.float32)
    # einsum, not @: its sums depend neither on the BLAS at hand nor on the
    # floating-point flags that some of them leave behind.
    exact = np.einsum("knd,kdo->kno", x, w.astype(np.float32))
    y = exact + options.noise * draw.standard_normal((clients, n, 1))
    examples = Examples(
        torch.from_numpy(x.reshape(-1, d)),
        torch.from_numpy(y.astype(np.float32).reshape(-1, 1)),
    )
    offsets = np.arange(clients + 1) * n
    data = FederatedData(
        examples, examples, np.arange(clients * n), offsets, experiment.holdout, seed
    )
    rows = _trained_on(data)
    inputs, targets = examples.x[rows].double(), examples.y[rows].double()
    optimum = torch.linalg.lstsq(inputs, targets).solution
    proxy = None
    if experiment.proxy:
        proxy = _more_examples(w, experiment.proxy, options.noise, seed)
    return Task(
        _linear(d),
        data,
        loss=squared_error,
        metrics={},
        proxy=proxy,
        optimum={"weight": optimum.T.float()},
    )


def _more_examples(w: np.ndarray, number: int, noise: float, seed: int) -> Examples:
    """Fresh examples of one client after another: the population's mixture.

    `w` [clients, features, 1].
    """
    clients, d, _ = w.shape
    draw = rng(seed, "least-squares proxy")
    x = draw.standard_normal((number, 1, d))
    y = np.einsum("knd,kdo->kno", x, w[np.arange(number) % clients])
    y += noise * draw.standard_normal((number, 1, 1))
    return Examples(
        torch.from_numpy(x[:, 0]).float(), torch.from_numpy(y[:, 0]).float()
    )


def _linear(features: int) -> nn.Linear:
    """A linear model without a bias, started at zero."""
    model = nn.Linear(features, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def _trained_on(data: FederatedData) -> Tensor:
    """Row numbers of all clients' training examples."""
    rows = [data.rows(client, "train") for client in range(data.population)]
    return torch.from_numpy(np.concatenate(rows))


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
        description="sigma_nu, standard deviation of the noise in y; "
        "examples weigh 1 / sigma_nu^2",
    )

    @model_validator(mode="after")
    def _is_ordered(self) -> WeightedLeastSquares:
        if not 1 <= self.examples[0] <= self.examples[1]:
            raise ValueError(
                f"{list(self.examples)}: expected two whole numbers, "
                "least and most, from 1 on"
            )
        return self


def weighted_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Weight times squared distance, without a factor 1/2, [B].

    `outputs` [B, 1]; `y` [B, 2] holds target and weight.
    """
    return y[:, 1] * (outputs[:, 0] - y[:, 0]).square()


def weighted_least_squares(experiment: Experiment) -> Task:
    """Linear regression in float64, every client with fewer examples than features.

    As Lari et al. (2024) have it for RERCE-Fed: y = X_k w + nu, w and nu standard
    normal (nu times sigma_nu), entries of X_k of mean U(-0.5, 0.5) and variance
    U(0.5, 1.5), both a client's own. `task.optimum` is the centralised solution over
    all training examples, on which the task is also tested. Sections `model` and
    `partition` do not apply.
    """
    _refuse_folder(experiment, f"{experiment.task} draws its data itself")
    options = _options(experiment, WeightedLeastSquares)
    clients = experiment.population or DEFAULT_POPULATION
    draw = rng(experiment.seed, "weighted-least-squares")
    w = draw.standard_normal(options.features)
    sizes = draw.integers(*options.examples, clients, endpoint=True)
    mean = draw.uniform(-0.5, 0.5, clients)
    deviation = np.sqrt(draw.uniform(0.5, 1.5, clients))
    client = np.repeat(np.arange(clients), sizes)
    noise = draw.standard_normal((len(client), options.features))
    x = mean[client, None] + deviation[client, None] * noise
    y = np.einsum("nd,d->n", x, w) + options.noise * draw.standard_normal(len(client))
    weights = np.full(len(y), options.noise**-2)
    targets = torch.from_numpy(np.stack([y, weights], axis=1))
    examples = Examples(torch.from_numpy(x), targets)
    data = FederatedData(
        examples,
        examples,
        np.arange(len(client)),
        np.append(0, np.cumsum(sizes)),
        experiment.holdout,
        experiment.seed,
    )
    rows = _trained_on(data)
    root = examples.y[rows, 1:].sqrt()
    solution = torch.linalg.lstsq(root * examples.x[rows], root * examples.y[rows, :1])
    # Its last bits are not the same in every process.
    optimum = solution.solution.round(decimals=10)
    return Task(
        _linear(options.features).double(),
        data,
        loss=weighted_squared_error,
        metrics={},
        optimum={"weight": optimum.T},
    )


def _options(experiment: Experiment, model: type[Options]) -> Options:
    """The options of a bundled task.

    Raises SettingsError with the key and what it expects.
    """
    try:
        return model(**experiment.options)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(["options", *map(str, fault["loc"])])
        raise SettingsError(
            f"{key} = {fault['input']!r}: {fault['msg'].lower()}; "
            f"{experiment.task} knows {', '.join(model.model_fields)}"
        ) from error


TASKS: dict[str, Callable[[Experiment], Task]] = {
    "digits": partial(images, name="digits"),
    "fashion-mnist": partial(images, name="fashion-mnist"),
    "cifar10": partial(images, name="cifar10"),
    "least-squares": least_squares,
    "weighted-least-squares": weighted_least_squares,
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
    return task.with_model(with_lora(task.model, settings))


def start_from(model: nn.Module, source: Path) -> None:
    """Give the model the parameters of a run directory, or of a safetensors file.

    Parameters that the source lacks (a personal part) stay as they are. Raises
    SettingsError when there is nothing to read, or when it does not fit the model.
    """
    values = _saved_params(source)
    params = dict(model.named_parameters())
    for name, value in values.items():
        if name in params and params[name].shape == value.shape:
            continue
        fits = "no such parameter"
        if name in params:
            fits = f"of shape {tuple(params[name].shape)}"
        raise SettingsError(
            f'initial = {source}: it holds "{name}" of shape {tuple(value.shape)}, '
            f"the model has {fits}"
        )
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)


def _saved_params(source: Path) -> dict[str, Tensor]:
    """The parameters of a run directory, or of a safetensors file, by name."""
    try:
        if source.is_dir():
            checkpoint = Checkpoint(source / "checkpoint")
            checkpoint.read()
            flat = checkpoint.part("server")
        else:
            flat = load_file(source)
    except (OSError, SafetensorError, SettingsError) as error:
        raise SettingsError(
            f"initial = {source}: {error}; expected a run directory with a "
            "checkpoint, or a .safetensors file"
        ) from error
    prefix = "params/" if source.is_dir() else ""
    values = {}
    for path, value in flat.items():
        if path.startswith(prefix):
            values[path.removeprefix(prefix)] = value
    if not values:
        raise SettingsError(f"initial = {source}: it holds no parameters")
    return values


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
