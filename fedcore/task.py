"""A task: model, loss, metrics, data and an optional proxy set.

It is where users plug in their own model and data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import measuring, trees
from fedcore.arrays import as_examples
from fedcore.checks.task import check_task
from fedcore.errors import SettingsError
from fedcore.frozen import frozen_sha256
from fedcore.inputs import model_outputs
from fedcore.metrics import (
    Metric,
    PerExample,
    Ratio,
    check_names,
    cross_entropy,
    default_metrics,
    is_higher_better,
    is_of_a_set,
)
from fedcore.ratio_metrics import RatioMetric
from fedcore.set_metrics import SetMetric
from fedcore.statistics import check_layers, real_rows, statistic_names
from fedcore.types import Batches, Params, Tree

if TYPE_CHECKING:
    from fedcore.data.federated import Examples, FederatedData, Totals
    from fedcore.data.sources import Pixels

__all__ = ["Penalty", "Sample", "Size", "Task"]

Penalty = Callable[[Callable[[Params], Tensor], Params], Tensor]
"""(mean loss as a function of parameters, parameters) -> what is added to it, 0-d."""

Size = Callable[[Tensor], Tensor]
"""Targets [B, ...] -> how much each example counts, 0 or more, [B]."""

Sample = Callable[[Params], str]
"""Parameters -> text that the model writes."""

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
    torchmetrics and a `Ratio` measure whole sets of examples. The first metric judges a
    run.

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
        size: Size | None = None,
        extra_tests: Mapping[str, Examples] | None = None,
        sample: Sample | None = None,
    ) -> None:
        """Raises SettingsError for a metric with a name that is taken.

        And for a model with running statistics: no mean over clients can be trusted
        with them; `fedcore.models.norms` has the ways out. `metrics` are reported
        beside the loss: functions, metrics of torchmetrics, or either in a `Metric`;
        default: accuracy for classes. `proxy` is data that the server itself holds, for
        methods that need it. `optimum` is the minimiser of the population's objective,
        where it is known. `pixels` says that inputs are images, and how they were
        scaled: an audit shows and compares pixels. `penalty` is added to the mean loss
        of a batch, and depends on the parameters. `size` says how much each example
        counts in means, and in the weight of its client: with `num_targets` means are
        over tokens; default: one each. `extra_tests` are further test sets by name,
        measured as `name_metric`. `sample` writes text that a report shows.
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
        self.size = size
        self.sample = sample
        self.extra_tests = measuring.checked_tests(extra_tests or {}, data)
        self._totals: tuple[FederatedData, Totals] | None = None  # of sizes, once
        self._base_sha256: str | None = None
        self.metrics: dict[str, PerExample] = {"loss": loss}  # means of examples
        self.set_metrics: dict[str, SetMetric | RatioMetric] = {}  # of whole sets
        # Whether higher is better, the measure that judges a run first.
        self.measures: dict[str, bool] = {}
        self._sort(metrics)
        self.measures["loss"] = False

    def _sort(self, metrics: Mapping[str, PerExample | Metric | Any]) -> None:
        """Tell measures of whole sets from means of examples."""
        loss = self.metrics["loss"]
        for name, metric in metrics.items():
            self.measures[name] = is_higher_better(name, metric)
            measure = metric.measure if isinstance(metric, Metric) else metric
            if isinstance(measure, Ratio):
                self.set_metrics[name] = RatioMetric(name, metric, loss)
            elif is_of_a_set(metric):
                self.set_metrics[name] = SetMetric(name, metric, loss)
            else:
                self.metrics[name] = metric

    def with_model(self, model: nn.Module, penalty: Penalty | None = None) -> Task:
        """The same task for another model, with that model's penalty."""
        check_layers(model)
        task = copy.copy(self)
        task.model = model
        task.penalty = penalty
        task._base_sha256 = None
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
        self.extra_tests = trees.to(self.extra_tests, device)
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
            if self.size is None:
                value: Tensor = (losses * mask).sum() / mask.sum().clamp(min=1)
                return value
            weights = self.weights(y, mask)
            return (losses * weights).sum() / measuring.divisor(weights.sum())

        if self.penalty is None:
            return mean(params)
        return mean(params) + self.penalty(mean, params)

    def weights(self, y: Tensor, mask: Tensor) -> Tensor:
        """How much each example of a batch counts: its size where mask is 1, [B]."""
        return mask if self.size is None else mask * self.size(y)

    def num_examples(self, clients: np.ndarray, data: str) -> np.ndarray:
        """The weight of each client in work on this kind of data, [n].

        The examples that it works on; with a `size`, the sum of their sizes, float64.
        """
        if self.size is None:
            return self.data.num_examples(clients, data)
        if self._totals is None or self._totals[0] is not self.data:
            sizes = measuring.sizes(self.size, self.data.y)
            self._totals = (self.data, self.data.totals(sizes))
        return self.data.num_examples(clients, data, self._totals[1])

    @property
    def base_sha256(self) -> str:
        """SHA-256 of all that is frozen; "" where nothing is.

        Over the model's frozen parameters and persistent buffers by sorted name: name,
        type, shape and bytes. Computed once.
        """
        if self._base_sha256 is None:
            self._base_sha256 = frozen_sha256(self.model)
        return self._base_sha256

    @torch.no_grad()
    def evaluate(self, params: Params, batches: Batches) -> dict[str, Tensor]:
        """The mean of every metric over all real examples of `batches`, each 0-d.

        Of a metric of a whole set its states, as `name/state`, from which its `value`
        computes it. Measured in evaluation mode. `nmsd`, the normalised square
        deviation |w - w*|^2 / |w*|^2, comes with them where the optimum w* is known.
        """
        return measuring.evaluate(self, params, batches)

    @torch.no_grad()
    def test(self, params: Params, batch_size: int = 1000) -> dict[str, float]:
        """Every metric over the global test set.

        And the Euclidean `distance` to the optimum, where it is known.
        """
        values = measuring.measure(self, params, self.data.test, batch_size)
        if self.optimum is not None:
            distance = measuring.deviation(self, params).sqrt()
            values["distance"] = distance.item()
        return values

    @torch.no_grad()
    def test_extra(self, params: Params, batch_size: int = 1000) -> dict[str, float]:
        """Every metric over each of the extra test sets, as `name_metric`."""
        return measuring.measure_extra(self, params, batch_size)
