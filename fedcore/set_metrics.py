"""Metrics of a whole set of examples (F1, AUC, R2) over clients, through torchmetrics.

Such a metric is no mean of values of examples, nor of clients. It is computed from
states, such as counts of true positives, that add up over examples: a client sends its
states, and the server computes the metric of one client from its states, and that of
all from their sum, exactly.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.metrics import Metric, binary_cross_entropy, cross_entropy

__all__ = ["SetMetric", "added_states"]

States = dict[str, Tensor]
"""Sums over examples, by the metric's name and the state's: "f1/tp"."""


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.double().softmax(1)  # in float32 near outputs would become ties


def _probabilities(metric: Any, loss: Any) -> Callable[[Tensor], Tensor] | None:
    """What makes probabilities of the model's outputs, for metrics that want them.

    torchmetrics takes a batch for probabilities where all of it is in [0, 1], and for
    logits elsewhere; so one client's outputs would be read in one way, and another's
    in the other. None where the loss does not say that outputs are logits.
    """
    modules = [kind.__module__ for kind in type(metric).__mro__]
    if not any(name.startswith("torchmetrics.classification") for name in modules):
        return None
    if loss is cross_entropy:
        return _softmax
    return torch.sigmoid if loss is binary_cross_entropy else None


class SetMetric:
    """A metric of torchmetrics whose states are sums over examples.

    >>> from torchmetrics.classification import MulticlassF1Score
    >>> f1 = SetMetric("f1", MulticlassF1Score(num_classes=2, average="micro"))
    >>> outputs, y = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
    >>> states = f1.states(outputs, y, mask=torch.ones(2))
    >>> f1.value(states)
    0.5
    """

    def __init__(self, name: str, metric: Any, loss: Any = None) -> None:
        """Raises SettingsError where the metric's states are no sums.

        `loss` is the task's, which says whether outputs are logits.
        """
        given = metric if isinstance(metric, Metric) else Metric(metric)
        self.name = name
        # Its states change as it is used, so the user's own stays as it is.
        self._metric = copy.deepcopy(given.measure)
        self._outputs = given.outputs or _probabilities(self._metric, loss)
        self._refuse_other_states()
        # As they travel, by the metric's own names.
        self.keys = {state: f"{name}/{state}" for state in self._metric.metric_state}

    def _refuse_other_states(self) -> None:
        from torchmetrics.utilities import dim_zero_sum

        kind = type(self._metric).__name__
        states = self._metric.metric_state
        if not states:
            raise SettingsError(
                f'the metric "{self.name}" ({kind}) has no states of its own that '
                "could be summed over clients: give each metric in it a name"
            )
        for state, start in states.items():
            is_sum = self._metric._reductions[state] is dim_zero_sum
            if isinstance(start, Tensor) and is_sum and not bool(start.any()):
                continue
            hint = "use one whose states are sums"
            if isinstance(start, list) and hasattr(self._metric, "thresholds"):
                hint = f"write {kind}(..., thresholds=100)"
            raise SettingsError(
                f'the metric "{self.name}" ({kind}) keeps "{state}", which is no sum '
                f"over examples, so that clients would send all their outputs: {hint}"
            )

    def to(self, device: torch.device) -> None:
        """Move the metric to the device, in place."""
        self._metric.to(device)

    def states(
        self, outputs: Tensor, y: Tensor, mask: Tensor, losses: Tensor | None = None
    ) -> States:
        """Sums over the examples whose mask is 1.

        `outputs` [B, ...], `y` [B, ...], `mask` [B]. Runs under `vmap` too. `losses`
        are for measures that follow from the loss, of which this is none.
        """
        tensors = _Update.apply(self, outputs, y, mask)  # type: ignore[no-untyped-call]
        return dict(zip(self.keys.values(), tensors, strict=True))

    def value(self, states: States) -> float:
        """The metric that these states give; NaN where it is not defined for them."""
        try:
            value = self._computed(states)
        except SettingsError:
            raise
        except Exception:  # too few examples for it, in torchmetrics' many ways
            return math.nan
        return math.nan if self._lacks_a_class(states) else value.item()

    def _lacks_a_class(self, states: States) -> bool:
        """Whether a curve over thresholds has a class without examples.

        torchmetrics gives 0 there, as if the model were as wrong as can be.
        """
        counts = states.get(f"{self.name}/confmat")
        if counts is None or not hasattr(self._metric, "thresholds"):
            return False
        # [thresholds, ..., truth, prediction]: at any threshold all examples.
        of_truth = counts[0].sum(-1)
        if "AUROC" in type(self._metric).__name__:
            return not bool((of_truth > 0).all())
        return not bool((of_truth[..., 1] > 0).all())

    def updated(self, outputs: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """`states` as a tuple, not under `vmap`."""
        is_real = mask > 0
        if bool(is_real.any()):
            return self._update(outputs[is_real], y[is_real])
        # Shapes are those that an update leaves, which may not be those it starts with.
        padding = self._update(outputs[:1], y[:1])
        return tuple(map(torch.zeros_like, padding))

    def _update(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if self._outputs is not None:
            outputs = self._outputs(outputs)
        self._metric.reset()
        self._metric.update(outputs, y)
        return tuple(x.clone() for x in self._metric.metric_state.values())

    def _computed(self, states: States) -> Tensor:
        self._metric.reset()
        for state, key in self.keys.items():
            setattr(self._metric, state, states[key].to(self._metric.device))
        with warnings.catch_warnings():
            # Such as that no update has been called, or that a class is missing.
            warnings.simplefilter("ignore", UserWarning)
            value = self._metric.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise SettingsError(
                f'the metric "{self.name}" ({type(self._metric).__name__}) gives '
                f"{shape or 'a ' + type(value).__name__}, expected one number: "
                'average it, e.g. average="macro"'
            )
        return value

    def check(self, outputs: Tensor, y: Tensor) -> None:
        """Try the metric on the outputs and targets of a few examples.

        Raises SettingsError where it fails, gives no single number, or where its states
        for all are not the sum of those for each.
        """
        kind = type(self._metric).__name__
        try:
            states = self._update(outputs, y)
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            raise SettingsError(
                f'the metric "{self.name}" ({kind}) cannot take outputs of shape '
                f"{tuple(outputs.shape)} and targets of shape {tuple(y.shape)}: "
                f"{type(error).__name__}: {first_line}"
            ) from error
        self.value(dict(zip(self.keys.values(), states, strict=True)))
        if not self._adds_up(outputs, y):
            raise SettingsError(
                f'the metric "{self.name}" ({kind}) treats an example by the others '
                "of its batch: say what its inputs are, e.g. Metric"
                f"({kind}(...), outputs=torch.sigmoid) for logits"
            )

    def _adds_up(self, outputs: Tensor, y: Tensor) -> bool:
        """Whether states of a batch are the sums of the states of its parts."""
        if not outputs.is_floating_point():
            return True
        parts = [(outputs, y), (outputs.sigmoid(), y), (10 * outputs + 5, y)]
        whole = (torch.cat([o for o, _ in parts]), torch.cat([t for _, t in parts]))
        try:
            together = self._update(*whole)
            single = [self._update(*part) for part in parts]
        except Exception:  # such outputs may be none that the metric can have
            return True
        for total, *summands in zip(together, *single, strict=True):
            expected = torch.stack(summands).double()
            room = 1e-4 * expected.abs().sum(0)
            is_far = (total.double() - expected.sum(0)).abs() > room
            if bool(is_far.any()):
                return False
        return True


def added_states(total: States, more: States) -> States:
    """The sums by key; a key that one of them lacks counts as zero."""
    added = dict(total)
    for key, value in more.items():
        added[key] = added[key] + value if key in added else value
    return added


class _Update(torch.autograd.Function):
    """`SetMetric.updated`, one client after another where clients are batched.

    torchmetrics checks and counts values, which `vmap` cannot; it is no part of what is
    differentiated.
    """

    @staticmethod
    def forward(
        metric: SetMetric, outputs: Tensor, y: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        return metric.updated(outputs, y, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, metric: SetMetric, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        clients = []
        for i in range(info.batch_size):
            own = []
            for x, dim in zip(tensors, in_dims[1:], strict=True):
                own.append(x if dim is None else x.select(dim, i))
            clients.append(metric.updated(*own))
        states = tuple(torch.stack(rows) for rows in zip(*clients, strict=True))
        return states, (0,) * len(states)
