"""A task: model, loss, metrics, data and an optional proxy set.

It is where users plug in their own model and data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.statistics import check_layers, real_rows, statistic_names
from fedcore.types import Batches, Params

if TYPE_CHECKING:
    from fedcore.data.federated import Examples, FederatedData
    from fedcore.data.sources import Pixels

__all__ = [
    "Penalty",
    "PerExample",
    "Task",
    "accuracy",
    "cross_entropy",
    "squared_error",
]

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(model outputs [B, ...], targets [B, ...]) -> one value an example, [B]."""

Penalty = Callable[[Callable[[Params], Tensor], Params], Tensor]
"""(mean loss as a function of parameters, parameters) -> what is added to it, 0-d."""

RESERVED = {
    "loss": "what is trained on",
    "nmsd": "the deviation from a known optimum",
}  # names that a metric cannot have, and their meaning


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of each example in nats, [B].

    `outputs` are logits [B, classes], `y` classes [B]; both may have further axes, as
    in `torch.nn.functional.cross_entropy`.

    >>> cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor([0.6931, 0.6931, 0.6931])
    """
    if outputs.ndim == 2 and y.ndim == 1:
        # The same with half the operations, once it is differentiated and batched.
        return -outputs.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """1.0 where the largest output is the class, 0.0 elsewhere, [B].

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor([1., 0.])
    """
    return (outputs.argmax(1) == y).to(outputs.dtype)


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the squared distance of each example, [B]; both arguments are [B, ...].

    >>> squared_error(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
    tensor([2., 0.])
    """
    return 0.5 * (outputs - y).square().flatten(1).sum(1)


class Task:
    """A model, the data that it learns from, and how it is judged.

    `loss` and each of `metrics` map (outputs, targets) to one value an example; means
    over real examples are taken here. They may depend on what they are given and on
    what never changes; on nothing that changes from round to round.

    >>> import numpy as np
    >>> from fedcore import Examples, FederatedData
    >>> rows = Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
    >>> data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
    >>> task = Task(nn.Linear(4, 2), data)
    >>> task.check()
    >>> task.population
    2
    >>> sorted(task.test(task.init_params()))
    ['accuracy', 'loss']
    """

    def __init__(
        self,
        model: nn.Module,
        data: FederatedData,
        loss: PerExample = cross_entropy,
        metrics: dict[str, PerExample] | None = None,
        proxy: Examples | None = None,
        optimum: Params | None = None,
        pixels: Pixels | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        """Raises SettingsError for a metric with a name that is taken.

        And for a model with running statistics: no mean over clients can be trusted
        with them; `fedcore.models.norms` has the ways out. `metrics` are reported
        beside the loss; default: accuracy. `proxy` is data that the server itself
        holds, for methods that need it. `optimum` is the minimiser of the population's
        objective, where it is known. `pixels` says that inputs are images, and how they
        were scaled: an audit shows and compares pixels. `penalty` is added to the mean
        loss of a batch, and depends on the parameters.
        """
        metrics = {"accuracy": accuracy} if metrics is None else metrics
        _check_names(metrics)
        check_layers(model)
        self.model = model
        self.data = data
        self.proxy = proxy
        self.optimum = optimum
        self.pixels = pixels
        self.penalty = penalty
        self.metrics = {"loss": loss, **metrics}

    def with_model(self, model: nn.Module, penalty: Penalty | None = None) -> Task:
        """The same task for another model, with that model's penalty."""
        check_layers(model)
        task = copy.copy(self)
        task.model = model
        task.penalty = penalty
        return task

    @torch.no_grad()
    def check(self) -> None:
        """Try model, loss and metrics on two examples.

        Raises SettingsError when they do not fit each other.
        """
        self._try("examples", self.data.x[:2], self.data.y[:2])
        if self.proxy is not None:
            self._try("proxy examples", self.proxy.x[:2], self.proxy.y[:2])

    def _try(self, kind: str, x: Tensor, y: Tensor) -> None:
        if len(x) == 0:
            return
        try:
            outputs = self.predict(self.init_params(), x)
        except Exception as error:
            raise SettingsError(
                f"the model cannot take {kind} of shape {tuple(x.shape[1:])}: "
                f"{type(error).__name__}: {error}"
            ) from error
        for name, metric in self.metrics.items():
            try:
                values = metric(outputs, y)
            except Exception as error:
                raise SettingsError(
                    f'the metric "{name}" cannot take outputs of shape '
                    f"{tuple(outputs.shape)} and targets of shape {tuple(y.shape)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if values.shape != (len(x),):
                raise SettingsError(
                    f'the metric "{name}" gives shape {tuple(values.shape)} for '
                    f"{len(x)} examples, expected one value an example: ({len(x)},)"
                )

    @property
    def population(self) -> int:
        """The number of clients."""
        return self.data.population

    @property
    def device(self) -> torch.device:
        """Where data and model are."""
        return self.data.x.device

    def to(self, device: torch.device) -> Task:
        """This task, moved to the device: in place, as `nn.Module.to` does it."""
        self.model.to(device)
        self.data.to(device)
        self.proxy = trees.to(self.proxy, device) if self.proxy is not None else None
        if self.optimum is not None:
            self.optimum = trees.to(self.optimum, device)
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode (no dropout); then as it was."""
        if not self.model.training:
            yield
            return
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def init_params(self) -> Params:
        """The model's trainable parameters as it was built. Copies.

        And statistics that clients keep, which are entries of the tree as well.
        """
        params = {}
        statistics = statistic_names(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in statistics:
                params[name] = parameter.detach().clone()
        return params

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Outputs of the model with these parameters for inputs [B, ...], [B, ...]."""
        outputs: Tensor = functional_call(self.model, params, (x,))
        return outputs

    def loss(self, params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Mean loss where mask [B] is 1, and the model's penalty. 0-d.

        The mean is 0 where there is no example.
        """

        def mean(params: Params) -> Tensor:
            with real_rows(mask):
                outputs = self.predict(params, x)
            losses = self.metrics["loss"](outputs, y)
            value: Tensor = (losses * mask).sum() / mask.sum().clamp(min=1)
            return value

        if self.penalty is None:
            return mean(params)
        return mean(params) + self.penalty(mean, params)

    @torch.no_grad()
    def evaluate(self, params: Params, batches: Batches) -> dict[str, Tensor]:
        """The mean of every metric over all real examples of `batches`, each 0-d.

        Measured in evaluation mode. `nmsd`, the normalised square deviation
        |w - w*|^2 / |w*|^2, comes with them where the optimum w* is known.
        """
        sums = dict.fromkeys(self.metrics, torch.zeros((), device=batches.mask.device))
        steps = zip(*(part.unbind() for part in batches), strict=True)
        with self.evaluating():
            for x, y, mask in steps:
                outputs = self.predict(params, x)
                for name, metric in self.metrics.items():
                    sums[name] = sums[name] + (metric(outputs, y) * mask).sum()
        num_examples = batches.mask.sum().clamp(min=1)
        means = {name: total / num_examples for name, total in sums.items()}
        if self.optimum is not None:
            optimum = trees.double(self.optimum)
            means["nmsd"] = self._deviation(params) / trees.dot(optimum, optimum)
        return means

    def _deviation(self, params: Params) -> Tensor:
        """Squared distance to the optimum, float64 0-d."""
        assert self.optimum is not None
        # A parameter that `params` lacks is personal, and as it was initialised.
        whole = {**dict(self.model.named_parameters()), **params}
        distances = []
        for name, best in self.optimum.items():
            distances.append((whole[name].double() - best.double()).square().sum())
        return torch.stack(distances).sum()

    @torch.no_grad()
    def test(self, params: Params, batch_size: int = 1000) -> dict[str, float]:
        """The mean of every metric over the global test set.

        And the Euclidean `distance` to the optimum, where it is known.
        """
        x, y = self.data.test
        ones = torch.ones(len(x), device=x.device)
        zero = torch.zeros((), device=x.device)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            batch = Batches(x[rows][None], y[rows][None], ones[rows][None])
            for name, mean in self.evaluate(params, batch).items():
                sums[name] = sums.get(name, zero) + mean * batch.mask.sum()
        sums.pop("nmsd", None)  # the distance says the same
        num_examples = max(len(x), 1)
        means = {name: (total / num_examples).item() for name, total in sums.items()}
        if self.optimum is not None:
            means["distance"] = self._deviation(params).sqrt().item()
        return means


def _check_names(metrics: dict[str, PerExample]) -> None:
    for name, meaning in RESERVED.items():
        if name in metrics:
            raise SettingsError(
                f'metrics holds "{name}", which is the name of {meaning}: '
                "give it another name"
            )
