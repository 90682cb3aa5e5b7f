"""A task: model, loss, metrics, data and an optional proxy set.

It is where users plug in their own model and data.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.arrays import as_examples
from fedcore.checks.task import check_task
from fedcore.errors import SettingsError
from fedcore.inputs import model_outputs
from fedcore.metrics import (
    Metric,
    PerExample,
    check_names,
    cross_entropy,
    default_metrics,
    is_higher_better,
    is_of_a_set,
)
from fedcore.set_metrics import SetMetric, added_states
from fedcore.statistics import check_layers, real_rows, statistic_names
from fedcore.types import Batches, Params, Tree

if TYPE_CHECKING:
    from fedcore.data.federated import Examples, FederatedData
    from fedcore.data.sources import Pixels

__all__ = ["Penalty", "Task"]

Penalty = Callable[[Callable[[Params], Tensor], Params], Tensor]
"""(mean loss as a function of parameters, parameters) -> what is added to it, 0-d."""


RESERVED = {
    "loss": "what is trained on",
    "nmsd": "the deviation from a known optimum",
    "distance": "the distance to a known optimum",
    "client": "a column of clients.parquet",
    "function": "a column of clients.parquet",
    "num_examples": "a column of clients.parquet",
    "round": "a column of clients.parquet",
    "left_out": "a column of clients.parquet",
    "clipped": "a column of clients.parquet",
    "capped": "a column of clients.parquet",
    "weight": "a column of clients.parquet",
    "norm_ratio": "a column of clients.parquet",
}  # names that a metric cannot have, and their meaning


class Task:
    """A model, the data that it learns from, and how it is judged.

    `loss` and each of `metrics` map (outputs, targets) to one value an example; means
    over real examples are taken here. They may depend on what they are given and on
    what never changes; on nothing that changes from round to round. A metric of
    torchmetrics measures whole sets of examples. The first metric judges a run.

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
        metrics: Mapping[str, PerExample | Metric | Any] | None = None,
        proxy: Examples | None = None,
        optimum: Params | None = None,
        pixels: Pixels | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        """Raises SettingsError for a metric with a name that is taken.

        And for a model with running statistics: no mean over clients can be trusted
        with them; `fedcore.models.norms` has the ways out. `metrics` are reported
        beside the loss: functions, metrics of torchmetrics, or either in a `Metric`;
        default: accuracy for classes. `proxy` is data that the server itself holds, for
        methods that need it. `optimum` is the minimiser of the population's objective,
        where it is known. `pixels` says that inputs are images, and how they were
        scaled: an audit shows and compares pixels. `penalty` is added to the mean loss
        of a batch, and depends on the parameters.
        """
        if is_of_a_set(loss) or not callable(loss) or isinstance(loss, type):
            raise SettingsError(
                f"the loss is {loss!r}, expected a function of (outputs, targets) "
                "with one value an example, e.g. fedcore.cross_entropy"
            )
        metrics = default_metrics(loss) if metrics is None else metrics
        check_names(metrics, RESERVED)
        check_layers(model)
        self.model = model
        self.data = data
        if proxy is not None:
            x, y = as_examples("proxy", proxy)
            proxy = data.test._replace(x=x, y=y)
            if len(proxy.y) == 0:
                raise SettingsError("proxy has no rows: give it some, or leave it out")
        self.proxy = proxy
        self.optimum = optimum
        self.pixels = pixels
        self.penalty = penalty
        self.metrics: dict[str, PerExample] = {"loss": loss}  # means of examples
        self.set_metrics: dict[str, SetMetric] = {}  # of whole sets
        # Whether higher is better, the measure that judges a run first.
        self.measures: dict[str, bool] = {}
        for name, metric in metrics.items():
            self.measures[name] = is_higher_better(name, metric)
            if is_of_a_set(metric):
                self.set_metrics[name] = SetMetric(name, metric, loss)
            else:
                self.metrics[name] = metric
        self.measures["loss"] = False

    def with_model(self, model: nn.Module, penalty: Penalty | None = None) -> Task:
        """The same task for another model, with that model's penalty."""
        check_layers(model)
        task = copy.copy(self)
        task.model = model
        task.penalty = penalty
        return task

    def with_data(self, data: FederatedData) -> Task:
        """The same task on other data, on the same device."""
        task = copy.copy(self)
        task.data = data
        return task

    def check(self) -> None:
        """Try model, loss and metrics on a few examples, and look at all labels.

        Raises SettingsError when they do not fit each other, cannot be trained, or are
        not functions of parameters, inputs and PyTorch's generator, each example by
        itself.
        """
        check_task(self)

    @property
    def population(self) -> int:
        """The number of clients."""
        return self.data.population

    @property
    def device(self) -> torch.device:
        """Where data and model are."""
        return self.data.device

    def to(self, device: torch.device) -> Task:
        """This task, moved to the device: in place, as `nn.Module.to` does it."""
        self.model.to(device)
        self.data.to(device)
        self.proxy = trees.to(self.proxy, device) if self.proxy is not None else None
        for whole in self.set_metrics.values():
            whole.to(device)
        if self.optimum is not None:
            self.optimum = trees.to(self.optimum, device)
        for metric in self.metrics.values():
            if isinstance(metric, nn.Module):  # its class weights
                metric.to(device)
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

    @property
    def base_sha256(self) -> str:
        """SHA-256 over frozen parameters and persistent buffers; "" if none is frozen.

        Over names, types, shapes and bytes, in order of names.
        """
        statistics = statistic_names(self.model)
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad and name not in statistics:
                frozen[name] = parameter
        if not frozen:
            return ""
        kept = self.model.state_dict()
        for name, buffer in self.model.named_buffers():
            if name in kept:
                frozen[name] = buffer
        digest = hashlib.sha256()
        for name in sorted(frozen):
            value = frozen[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def predict(self, params: Params, x: Tree) -> Tensor:
        """Outputs of the model with these parameters for inputs [B, ...], [B, ...].

        A dict or a tuple is spread over the model's arguments, and of outputs with
        logits the logits are returned: `fedcore.inputs` says how.
        """
        outputs: Tensor = model_outputs(self.model, params, x)
        return outputs

    def loss(self, params: Params, x: Tree, y: Tensor, mask: Tensor) -> Tensor:
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

        Of a metric of torchmetrics its states, as `name/state`, from which
        `SetMetric.value` computes it. Measured in evaluation mode. `nmsd`, the
        normalised square deviation |w - w*|^2 / |w*|^2, comes with them where the
        optimum w* is known.
        """
        sums = dict.fromkeys(self.metrics, torch.zeros((), device=batches.mask.device))
        states: dict[str, Tensor] = {}
        if self.set_metrics and len(batches.mask) == 0:
            # States of nobody, in the shapes that an update leaves.
            batches = trees.map(lambda v: v.new_zeros(1, 1, *v.shape[2:]), batches)
        with self.evaluating():
            for x, y, mask in trees.unbind(batches):
                outputs = self.predict(params, x)
                for name, metric in self.metrics.items():
                    values = metric(outputs, y)
                    # Not a product with the mask: a value of padding may be NaN.
                    values = torch.where(mask > 0, values, mask)
                    sums[name] = sums[name] + values.sum()
                for whole in self.set_metrics.values():
                    states = added_states(states, whole.states(outputs, y, mask))
        num_examples = batches.mask.sum().clamp(min=1)
        means = {name: total / num_examples for name, total in sums.items()}
        if self.optimum is not None:
            optimum = trees.double(self.optimum)
            means["nmsd"] = self._deviation(params) / trees.dot(optimum, optimum)
        return means | states

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
        """Every metric over the global test set.

        And the Euclidean `distance` to the optimum, where it is known.
        """
        x, y = self.data.test
        ones = torch.ones(len(y), device=y.device)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(y), batch_size):
            rows = slice(start, start + batch_size)
            batch = trees.map(lambda v: v[rows][None], Batches(x, y, ones))  # noqa: B023
            measured = self.evaluate(params, batch)
            for name in self.metrics:
                measured[name] = measured[name] * batch.mask.sum()
            sums = added_states(sums, measured)
        num_examples = max(len(y), 1)
        values = {}
        for name in self.metrics:
            if name in sums:
                values[name] = (sums[name] / num_examples).item()
        for name, whole in self.set_metrics.items():
            if sums:
                values[name] = whole.value(sums)
        if self.optimum is not None:
            values["distance"] = self._deviation(params).sqrt().item()
        return values
