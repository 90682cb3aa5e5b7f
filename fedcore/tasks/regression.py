"""Regression with a known optimum, on data that are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import squared_error
from fedcore.rng import rng
from fedcore.task import Task
from fedcore.tasks.options import read_options, refuse_folder

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = [
    "LeastSquares",
    "WeightedLeastSquares",
    "least_squares",
    "weighted_least_squares",
    "weighted_squared_error",
]

DEFAULT_POPULATION = 100


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
    refuse_folder(experiment, f"{experiment.task} draws its data itself")
    options = read_options(experiment, LeastSquares)
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
    refuse_folder(experiment, f"{experiment.task} draws its data itself")
    options = read_options(experiment, WeightedLeastSquares)
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
