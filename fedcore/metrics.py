"""Losses and metrics: values of single examples, and which way is better.

A loss or a metric maps (outputs, targets) to one value an example. Those bundled here
refuse shapes that would broadcast; those of next tokens are in `fedcore.token_metrics`.
A measure of a whole set (F1, AUC, R2) is a metric of torchmetrics, whose states are
summed over clients: see `fedcore.set_metrics`; or a `Ratio` of sums.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import SettingsError

__all__ = [
    "Metric",
    "PerExample",
    "Ratio",
    "absolute_error",
    "accuracy",
    "binary_accuracy",
    "binary_cross_entropy",
    "check_names",
    "check_per_example",
    "cross_entropy",
    "default_metrics",
    "is_higher_better",
    "is_of_a_set",
    "squared_error",
]

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(model outputs [B, ...], targets [B, ...]) -> one value an example, [B]."""

IGNORED = -100  # a position of a sequence that counts nowhere, as in PyTorch
# Words in the name of a metric.
LOWER_IS_BETTER = frozenset(
    (
        *("loss", "losses", "error", "errors", "cost", "risk", "regret"),
        *("distance", "deviation", "divergence", "perplexity", "brier"),
        *("mae", "mape", "mse", "rmse", "nmsd", "nll", "ce", "bce", "kl", "ppl"),
    )
)


@dataclass(frozen=True)
class Metric:
    """A metric with what cannot be read off a function.

    `measure` maps (outputs, targets) to one value an example, or is a metric of
    torchmetrics. `higher_is_better` = None: by `is_higher_better`. `outputs` is applied
    to the model's outputs first, e.g. torch.sigmoid.

    >>> far = Metric(lambda outputs, y: (outputs - y).abs(), higher_is_better=False)
    >>> is_higher_better("far", far)
    False
    """

    measure: Any
    higher_is_better: bool | None = None
    outputs: Callable[[Tensor], Tensor] | None = None

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """One value an example, [B]."""
        if self.outputs is not None:
            outputs = self.outputs(outputs)
        values: Tensor = self.measure(outputs, y)
        return values


@dataclass(frozen=True)
class Ratio:
    """A measure of a whole set: `of` the ratio of two sums over its examples.

    `numerators` and `denominators` map (outputs, targets) to one value an example. The
    sums are added over batches and clients, and the ratio is formed once, so that the
    measure of all is exact: no mean of ratios. `of` = None: the ratio itself.

    >>> from fedcore.ratio_metrics import RatioMetric
    >>> def misses(outputs, y):
    ...     return (outputs - y).square()
    >>> def squares(outputs, y):
    ...     return y.square()
    >>> measure = RatioMetric("miss", Ratio(misses, squares, higher_is_better=False))
    >>> outputs, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    >>> measure.value(measure.states(outputs, y, mask=torch.ones(2)))
    0.1
    """

    numerators: PerExample
    denominators: PerExample
    of: Callable[[float], float] | None = None
    higher_is_better: bool = True


def is_of_a_set(metric: Any) -> bool:
    """Whether it measures a set of examples: a metric of torchmetrics, or a ratio."""
    if isinstance(metric, Metric):
        metric = metric.measure
    if isinstance(metric, Ratio):
        return True
    # Whoever has made one has imported the package, which takes a second.
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(metric, torchmetrics.Metric)


def is_higher_better(name: str, metric: Any = None) -> bool:
    """Whether a higher value of the metric is better.

    As `Metric` or torchmetrics says. Otherwise not for a bundled loss, nor where the
    metric's name, or its function's, has a word such as error, loss, mae or perplexity.

    >>> is_higher_better("accuracy"), is_higher_better("mean_absolute_error")
    (True, False)
    """
    if isinstance(metric, Metric):
        if metric.higher_is_better is not None:
            return metric.higher_is_better
        metric = metric.measure
    if is_of_a_set(metric) and metric.higher_is_better is not None:
        return bool(metric.higher_is_better)
    names = f"{name} {getattr(metric, '__name__', type(metric).__name__)}"
    # "MeanSquaredError" is three words, "val_loss" two.
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", names)
    if any(metric is loss for loss in BUNDLED_LOSSES):
        return False
    return not LOWER_IS_BETTER.intersection(map(str.lower, words))


# Losses


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of each example in nats, [B].

    `outputs` are logits [B, classes] and `y` classes [B], or shares of the classes
    [B, classes]. Both may have further axes, [B, classes, ...] and [B, ...], over which
    the mean is taken, without positions of class -100. Raises SettingsError for other
    shapes.

    >>> cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor([0.6931, 0.6931, 0.6931])
    """
    _check_classes("cross_entropy", outputs, y, takes_shares=True)
    if outputs.ndim == 2 and y.ndim == 1:
        # The same with half the operations, once it is differentiated and batched.
        return -outputs.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    losses = nn.functional.cross_entropy(outputs, y, reduction="none")
    if outputs.ndim == 2:
        return losses
    if y.is_floating_point():
        return losses.flatten(1).mean(1)
    return _mean_of_positions(losses, y)


def binary_cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of yes or no, in nats, [B].

    `outputs` are logits, one an answer, `y` 0 or 1, both [B] or [B, ...]; the mean is
    taken over further axes. Raises SettingsError for shapes that are not the same.

    >>> binary_cross_entropy(torch.zeros(2, 1), torch.tensor([[0], [1]]))
    tensor([0.6931, 0.6931])
    """
    _check_same("binary_cross_entropy", outputs, y)
    loss = nn.functional.binary_cross_entropy_with_logits
    return _mean_of_axes(loss(outputs, y.to(outputs.dtype), reduction="none"))


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the squared distance of each example, [B].

    Both arguments are [B] or [B, ...]. Raises SettingsError for shapes that are not the
    same.

    >>> squared_error(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
    tensor([2., 0.])
    """
    _check_same("squared_error", outputs, y)
    squares = (outputs - y).square()
    return 0.5 * (squares if squares.ndim == 1 else squares.flatten(1).sum(1))


def absolute_error(outputs: Tensor, y: Tensor) -> Tensor:
    """The absolute error of each example, the mean over its entries, [B].

    Both arguments are [B] or [B, ...]. Raises SettingsError for shapes that are not the
    same.

    >>> absolute_error(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
    tensor([2., 0.])
    """
    _check_same("absolute_error", outputs, y)
    return _mean_of_axes((outputs - y).abs())


BUNDLED_LOSSES = (cross_entropy, binary_cross_entropy, squared_error, absolute_error)


def default_metrics(loss: PerExample) -> dict[str, Any]:
    """What is measured beside a loss where the user names nothing.

    >>> list(default_metrics(cross_entropy)), default_metrics(squared_error)
    (['accuracy'], {})
    """
    from fedcore.token_metrics import next_token_loss, perplexity, token_accuracy

    if loss is next_token_loss:
        return {"perplexity": perplexity, "token_accuracy": token_accuracy}
    if loss is binary_cross_entropy:
        return {"accuracy": binary_accuracy}
    if loss is squared_error or loss is absolute_error:
        return {}
    return {"accuracy": accuracy}


# Metrics


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """1.0 where the largest output is the class, 0.0 elsewhere, [B].

    `outputs` [B, classes], `y` [B]; both may have further axes, as in `cross_entropy`.
    Raises SettingsError for other shapes.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor([1., 0.])
    """
    _check_classes("accuracy", outputs, y, takes_shares=False)
    is_right = (outputs.argmax(1) == y).to(outputs.dtype)
    return is_right if y.ndim == 1 else _mean_of_positions(is_right, y)


def binary_accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """1.0 where the logit's sign says what the target does, 0.0 elsewhere, [B].

    Shapes as in `binary_cross_entropy`; the mean is taken over further axes.

    >>> binary_accuracy(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1, 0, 0]))
    tensor([1., 1., 0.])
    """
    _check_same("binary_accuracy", outputs, y)
    return _mean_of_axes(((outputs > 0) == (y > 0.5)).to(outputs.dtype))


def _mean_of_axes(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _mean_of_positions(values: Tensor, y: Tensor) -> Tensor:
    """Means over the positions of each sequence that count."""
    counts = (y != IGNORED).to(values.dtype).flatten(1)
    return (values.flatten(1) * counts).sum(1) / counts.sum(1).clamp(min=1)


# Shapes


def _check_same(name: str, outputs: Tensor, y: Tensor) -> None:
    if outputs.shape == y.shape and outputs.ndim > 0:
        return
    shape, wanted = tuple(y.shape), tuple(outputs.shape)
    advice = "give the targets the shape of the outputs"
    if outputs.shape == (*y.shape, 1):
        advice = f"write {_indexed(y.ndim, 'None')} for y where the data is made"
    elif y.shape == (*outputs.shape, 1):
        advice = f"write {_indexed(outputs.ndim, '0')} for y where the data is made"
    elif outputs.ndim == 2 and y.ndim == 1:
        advice = (
            "the model must give one number an example, nn.Linear(..., 1), with "
            "y[:, None] as targets; classes need cross_entropy"
        )
    raise SettingsError(
        f"{name}: targets of shape {shape} for outputs of shape {wanted}, expected "
        f"the same shape: {advice}"
    )


def _indexed(axes: int, last: str) -> str:
    """The targets with an axis more, or one less.

    >>> _indexed(1, "None")
    'y[:, None]'
    """
    return f"y[{', '.join([':'] * max(axes, 1) + [last])}]"


def _check_classes(name: str, outputs: Tensor, y: Tensor, takes_shares: bool) -> None:
    """Raises SettingsError where outputs and classes do not fit each other."""
    fault = _fault_of_classes(outputs, y, takes_shares)
    if fault is not None:
        raise SettingsError(
            f"{name}: outputs of shape {tuple(outputs.shape)} with targets of shape "
            f"{tuple(y.shape)} and type {str(y.dtype).removeprefix('torch.')}, {fault}"
        )


def _fault_of_classes(outputs: Tensor, y: Tensor, takes_shares: bool) -> str | None:
    if outputs.ndim < 2:
        return (
            "expected outputs [B, classes]: for one logit an example write "
            "binary_cross_entropy and binary_accuracy of fedcore.metrics"
        )
    if outputs.shape[1] == 1:
        return (
            "expected an output for each class: with one logit an example use "
            "binary_cross_entropy and binary_accuracy of fedcore.metrics, and "
            "y[:, None] as targets; or give the model two outputs"
        )
    expected = (outputs.shape[0], *outputs.shape[2:])
    is_whole = not y.is_floating_point() and y.dtype != torch.bool
    if y.shape == expected:
        return None if is_whole else "expected whole numbers: write y.long()"
    if y.shape == outputs.shape:
        if takes_shares and y.is_floating_point():
            return None
        return "expected classes, not one-hot rows: write y.argmax(1)"
    fault = f"expected classes of shape {expected}"
    if y.shape == (*expected, 1):
        return f"{fault}: write {_indexed(len(expected), '0')}"
    if y.shape == outputs.shape[:-1]:
        return f"{fault}: classes are axis 1, so write outputs.transpose(1, -1)"
    return f"{fault}: give one class for each row of outputs"


# The check of any metric


def check_per_example(name: str, metric: Any, outputs: Tensor, y: Tensor) -> None:
    """Try a loss or metric on the outputs and targets of a few examples.

    Raises SettingsError where it fails, does not give one value an example, or gives an
    example a value that depends on the others.
    """
    subject = "the loss" if name == "loss" else f'the metric "{name}"'
    values = _tried(subject, metric, outputs, y)
    if values.shape != (len(y),):
        advice = ""
        if values.ndim == 0 and isinstance(metric, nn.Module):
            advice = f': write {type(metric).__name__}(reduction="none")'
        elif values.ndim == 0:
            advice = ": leave the mean out, or give a metric of torchmetrics for a set"
        elif values.ndim > 1:
            advice = ": take the sum or mean over further axes, .flatten(1).mean(1)"
        raise SettingsError(
            f"{subject} gives shape {tuple(values.shape)} for {len(y)} examples, "
            f"expected one value an example: ({len(y)},){advice}"
        )
    alone = []
    for i in range(len(y)):
        alone.append(_tried(subject, metric, outputs[i : i + 1], y[i : i + 1]))
    again = _tried(subject, metric, outputs, y)
    if not torch.equal(values.nan_to_num(), again.nan_to_num()):
        return  # it follows from more than its arguments, which is another fault
    if any(one.shape != (1,) for one in alone):
        raise SettingsError(
            f"{subject} gives shape {tuple(alone[0].shape)} for one example, expected "
            "(1,): it must keep the first axis"
        )
    single = torch.cat(alone)
    room = 1e-4 * values.abs().nan_to_num().max().clamp(min=1e-6)
    are_nan = values.isnan() & single.isnan()
    differs = ~((values - single).abs() <= room) & ~are_nan & (values != single)
    if bool(differs.any()):
        i = int(differs.nonzero()[0])
        raise SettingsError(
            f"{subject} mixes examples: example {i} of {len(y)} gets "
            f"{values[i].item():.4g}, and {single[i].item():.4g} by itself; outputs of "
            f"shape {tuple(outputs.shape)} and targets of shape {tuple(y.shape)} may "
            "have been broadcast: give them the same shape, y[:, None]"
        )


def _tried(subject: str, metric: Any, outputs: Tensor, y: Tensor) -> Tensor:
    try:
        values = metric(outputs, y)
    except SettingsError as error:
        raise SettingsError(f"{subject}: {error}") from error
    except Exception as error:
        raise SettingsError(
            f"{subject} cannot take outputs of shape {tuple(outputs.shape)} and "
            f"targets of shape {tuple(y.shape)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, Tensor):
        raise SettingsError(
            f"{subject} gives a {type(values).__name__}, expected a tensor with one "
            "value an example; for a measure of a whole set give a metric of "
            "torchmetrics"
        )
    return values


def check_names(metrics: Mapping[str, Any], taken: Mapping[str, str]) -> None:
    """Raises SettingsError for a metric without a name of its own, or that is none."""
    if not hasattr(metrics, "items"):
        raise SettingsError(
            f"metrics is a {type(metrics).__name__}, expected a dict of functions by "
            'name, e.g. {"mae": absolute_error}'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise SettingsError(
                f"metrics holds {name!r}: expected a name without /, e.g. "
                '{"mae": absolute_error}'
            )
        if name in taken:
            raise SettingsError(
                f'metrics holds "{name}", which is the name of {taken[name]}: '
                "give it another name"
            )
        measure = metric.measure if isinstance(metric, Metric) else metric
        if isinstance(measure, type):
            raise SettingsError(
                f'metrics holds the class {measure.__name__} as "{name}": make one, '
                f"{measure.__name__}(...)"
            )
        if not callable(measure) and not isinstance(measure, Ratio):
            raise SettingsError(
                f'metrics holds a {type(measure).__name__} as "{name}": expected a '
                "function of (outputs, targets), or a metric of torchmetrics"
            )
