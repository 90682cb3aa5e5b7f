"""Statistics of batches: the layers that keep them, and those that a client may keep.

A mean over clients of the running statistics of BatchNorm cannot be trusted, so models
with such layers are refused. `StatisticLayer` is the way to keep statistics on the
client: they are entries of the tree of parameters, and stay where personal parameters
stay. They take no steps along a gradient; a forward in training mode says what they
become, and `fedcore.local.local_sgd` puts that in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from fedcore.errors import SettingsError
from fedcore.types import Params

__all__ = [
    "Moves",
    "StatisticLayer",
    "check_layers",
    "real_rows",
    "refuse_shared",
    "statistic_names",
    "statistics_moved",
    "with_statistics",
]

CANNOT_SHARE = "keeps running statistics of its batches, which clients cannot share"
BATCH_NORM = (
    "convert the model by to_group_norm, freeze_batch_norm or personal_batch_norm of "
    "fedcore.models.norms (docs/batch-norm.md)"
)
INSTANCE_NORM = (
    "write track_running_stats=False, so that each example is normalised by itself, or "
    "convert the model by freeze_batch_norm of fedcore.models.norms"
)
OTHER = "use a layer without them, such as GroupNorm"


class Moves:
    """The statistics that a forward moved, by the tensors that the model was given."""

    def __init__(self) -> None:
        # With the tensors that stood in the parameters, whose ids must stay taken.
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def latest(self, given: Tensor) -> Tensor:
        """The value of a statistic after what was moved so far."""
        return self._moved.get(id(given), (given, given))[1]

    def move(self, given: Tensor, value: Tensor) -> None:
        self._moved[id(given)] = given, value

    def of(self, params: Params) -> Params:
        """The new values of these parameters, of those that were moved."""
        moved: Params = {}
        for name, given in params.items() if self._moved else ():
            if id(given) in self._moved:
                moved[name] = self.latest(given)
        return moved


_mask: ContextVar[Tensor | None] = ContextVar("mask of the batch", default=None)
_moves: ContextVar[Moves | None] = ContextVar("moved statistics", default=None)


@contextmanager
def real_rows(mask: Tensor) -> Iterator[None]:
    """Inside, models are called on a batch whose mask [B] is 1 for real examples."""
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


@contextmanager
def statistics_moved() -> Iterator[Moves]:
    """Inside, forwards in training mode note what statistics become."""
    moves = Moves()
    token = _moves.set(moves)
    try:
        yield moves
    finally:
        _moves.reset(token)


class StatisticLayer(nn.Module):
    """A layer whose statistics are parameters that a client keeps for itself.

    In training mode it may mix the real examples of a batch, and no others.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of its parameters that are statistics. They require no gradient."""

    mixes_examples_with_mask: ClassVar[bool] = True
    """It looks at the batch's mask, so that padding changes nothing."""

    def rows(self, x: Tensor) -> Tensor:
        """Whether each row of x [B, ...] is a real example, bool [B].

        All are where no mask is known. Raises SettingsError where the first axis is not
        that of the batch.
        """
        mask = _mask.get()
        if mask is None:
            return torch.ones(len(x), dtype=torch.bool, device=x.device)
        if len(mask) != len(x):
            raise SettingsError(
                f"{type(self).__name__} got inputs of shape {tuple(x.shape)} for a "
                f"batch of {len(mask)} examples: statistics of a client need the batch "
                "as the first axis; use another norm there (to_group_norm)"
            )
        return mask > 0

    def moves(self) -> Moves | None:
        """The place to note what statistics become; None where nobody reads it."""
        return _moves.get()


def statistic_names(model: nn.Module) -> set[str]:
    """Names of the model's parameters that are statistics."""
    names = set()
    for prefix, layer in model.named_modules():
        if isinstance(layer, StatisticLayer):
            for name in layer.statistics:
                names.add(f"{prefix}.{name}".removeprefix("."))
    return names


def with_statistics(
    model: nn.Module, trained: Params, fixed: Params
) -> tuple[Params, Params]:
    """(trained, fixed), after the statistics among `fixed` went to `trained`.

    Every forward in training mode moves statistics, whichever parameters it trains.
    """
    names = statistic_names(model)
    if names.isdisjoint(fixed):
        return trained, fixed
    moved: Params = dict(trained)
    kept: Params = {}
    for name, value in fixed.items():
        target = moved if name in names else kept
        target[name] = value
    return moved, kept


def refuse_shared(model: nn.Module, shared: Params) -> None:
    """Raise SettingsError where statistics are among the parameters that are shared."""
    names = statistic_names(model)
    for name in shared:
        if name in names:
            raise SettingsError(
                f'"{name}" is a statistic of single clients, which the method would '
                "share: personal_batch_norm needs a method whose method.personal holds "
                '"norm", as in strategies/fedbn.toml'
            )


def check_layers(model: nn.Module) -> None:
    """Raise SettingsError for a layer with statistics that clients would share.

    And for one that has no shape yet.
    """
    for name, layer in model.named_modules():
        if has_no_shape(layer):
            raise SettingsError(
                f"{described(name, layer)} has no shape yet: call the model once on a "
                "batch of examples before you give it to a Task"
            )
        if getattr(layer, "track_running_stats", False):
            way = OTHER
            if isinstance(layer, _BatchNorm):
                way = BATCH_NORM
            elif isinstance(layer, _InstanceNorm):
                way = INSTANCE_NORM
            raise SettingsError(f"{described(name, layer)} {CANNOT_SHARE}: {way}")


def has_no_shape(layer: nn.Module) -> bool:
    """Whether the layer is a lazy one that has not been called."""
    tensors: list[Any] = [*layer._parameters.values(), *layer._buffers.values()]
    return any(is_lazy(tensor) for tensor in tensors)


def described(name: str, layer: nn.Module) -> str:
    """The layer, at the start of a message."""
    kind = type(layer).__name__
    return f'the model\'s "{name}" ({kind})' if name else f"the model ({kind})"
