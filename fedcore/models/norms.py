"""Three ways to train a model that has BatchNorm: one call each, in place.

`to_group_norm`        no statistics: each example is normalised by itself
`freeze_batch_norm`    statistics as they are, in training as well: fine-tuning
`personal_batch_norm`  statistics that stay on the client: FedBN (Li et al., ICLR 2021)

They replace layers of the model that they are given, as
`nn.SyncBatchNorm.convert_sync_batchnorm` does, and return the model. Weights and biases
are the same parameters under the same names, so load pretrained weights first, and
convert then. docs/batch-norm.md compares the three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fedcore.errors import SettingsError
from fedcore.statistics import StatisticLayer, described, has_no_shape

__all__ = [
    "FrozenBatchNorm",
    "PersonalBatchNorm",
    "freeze_batch_norm",
    "personal_batch_norm",
    "to_group_norm",
]


def to_group_norm(model: nn.Module, groups: int = 32) -> nn.Module:
    """The model with every BatchNorm replaced by GroupNorm, in place.

    `groups` is the largest number of groups (32 in Wu & He, ECCV 2018): a layer gets
    the largest divisor of its channels up to it that leaves two channels a group.
    BatchNorm1d gets one group, which is layer normalisation: of a vector's entries a
    group would hold too few. Raises SettingsError for a layer that has no shape yet, or
    a forward of its own, and for `groups` below 1.

    >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU())
    >>> to_group_norm(model)[1].num_groups
    24
    """
    if groups < 1:
        raise SettingsError(f"groups = {groups}: must be at least 1")

    def group_norm(name: str, old: _NormBase) -> nn.Module:
        channels = old.num_features
        is_vector = isinstance(old, nn.BatchNorm1d)
        number = 1 if is_vector else _divisor(channels, groups)
        kind = _GroupNormAct if _acts(old) else nn.GroupNorm
        new = kind(number, channels, old.eps, affine=False)
        new.affine = old.affine
        new.weight, new.bias = old.weight, old.bias
        return new

    return _converted(model, _BatchNorm, group_norm)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """The model whose BatchNorm layers keep their running statistics as they are.

    In training mode as well they normalise by the running mean and variance, as
    BatchNorm does in evaluation mode; weight and bias train. In place. InstanceNorm
    with running statistics is treated alike. Raises SettingsError for a layer that has
    no shape yet, no statistics, or a forward of its own.

    >>> model = freeze_batch_norm(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> sorted(name for name, _ in model.named_buffers())
    ['1.running_mean', '1.running_var']
    """

    def frozen(name: str, old: _NormBase) -> nn.Module:
        if old.running_mean is None or old.running_var is None:
            if isinstance(old, _InstanceNorm):
                return old
            raise SettingsError(
                f"{described(name, old)} has no running statistics to freeze "
                "(track_running_stats=False): use to_group_norm"
            )
        return (_FrozenBatchNormAct if _acts(old) else FrozenBatchNorm)(old)

    return _converted(model, (_BatchNorm, _InstanceNorm), frozen)


def personal_batch_norm(model: nn.Module) -> nn.Module:
    """The model with BatchNorm whose statistics stay on the client, in place.

    They start as they are in the model. A method must keep them: `method.personal` has
    to hold "norm", as in strategies/fedbn.toml. Raises SettingsError for a layer that
    has no shape yet, a forward of its own, or `momentum=None`.

    >>> model = personal_batch_norm(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    >>> model[1]
    PersonalBatchNorm(2, eps=1e-05, momentum=0.1)
    >>> [name for name, _ in model[1].named_parameters()]
    ['weight', 'bias', 'running_mean', 'running_var']
    """

    def personal(name: str, old: _NormBase) -> nn.Module:
        if old.momentum is None:
            raise SettingsError(
                f"{described(name, old)} averages over all batches alike "
                "(momentum=None): set its momentum, 0.1 for example"
            )
        return (_PersonalBatchNormAct if _acts(old) else PersonalBatchNorm)(old)

    return _converted(model, _BatchNorm, personal)


def _normalised(layer: FrozenBatchNorm | PersonalBatchNorm, x: Tensor) -> Tensor:
    """BatchNorm in evaluation mode: by the layer's running statistics."""
    # By hand, as the gradient of functional.batch_norm does not batch over clients.
    channels = _channels(x)
    mean, var = layer.running_mean.detach(), layer.running_var.detach()
    centred = x.to(_wide(x)) - mean.view(channels)
    return _scaled(layer, centred, var, channels).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The type to compute in, as BatchNorm does: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _scaled(
    layer: FrozenBatchNorm | PersonalBatchNorm,
    centred: Tensor,
    var: Tensor,
    channels: list[int],
) -> Tensor:
    """Weight times what is `centred` over its deviation, and the bias."""
    scale = (var.to(centred.dtype) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    if layer.bias is None:
        return centred * scale.view(channels)
    return torch.addcmul(layer.bias.view(channels), centred, scale.view(channels))


def _channels(x: Tensor) -> list[int]:
    """The shape of one number a channel, beside x [B, C, ...]."""
    return [1, -1] + [1] * (x.ndim - 2)


class FrozenBatchNorm(nn.Module):
    """BatchNorm in evaluation mode for good: its statistics are constants."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, like: _NormBase) -> None:
        super().__init__()
        assert like.running_mean is not None
        assert like.running_var is not None
        self.num_features, self.eps = like.num_features, like.eps
        self.register_parameter("weight", like.weight)
        self.register_parameter("bias", like.bias)
        self.register_buffer("running_mean", like.running_mean.clone())
        self.register_buffer("running_var", like.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class PersonalBatchNorm(StatisticLayer):
    """BatchNorm over the real examples of a batch, with statistics of the client.

    In training mode it computes what BatchNorm computes on a batch without padding,
    [B, C, ...], and moves the running statistics as BatchNorm does; in evaluation mode
    it uses these. Padding comes out as the bias. Where a channel has but one value (one
    example [1, C], where BatchNorm raises an error), there is no variance: the layer
    normalises by the running statistics, and does not move them. Local training alone
    writes them; a forward by itself leaves them.
    """

    statistics: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")
    mixes_examples_with_mask: ClassVar[bool] = True

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: nn.Parameter
    running_var: nn.Parameter

    def __init__(self, like: _NormBase) -> None:
        super().__init__()
        self.num_features, self.eps = like.num_features, like.eps
        self.momentum = like.momentum or 0.0
        self.register_parameter("weight", like.weight)
        self.register_parameter("bias", like.bias)
        mean, var = like.running_mean, like.running_var
        if mean is None or var is None:
            reference = torch.empty(0) if like.weight is None else like.weight.detach()
            mean = reference.new_zeros(like.num_features)
            var = reference.new_ones(like.num_features)
        self.running_mean = nn.Parameter(mean.clone(), requires_grad=False)
        self.running_var = nn.Parameter(var.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _normalised(self, x)
        axes = [0, *range(2, x.ndim)]
        channels = _channels(x)
        rows = self.rows(x)
        is_real = rows.view(-1, *[1] * (x.ndim - 1))
        values = rows.sum() * x[0, 0].numel()  # of a channel
        is_enough = values > 1
        wide = x.to(_wide(x))
        count = values.clamp(min=1).to(wide.dtype)

        old_mean, old_var = self.running_mean.detach(), self.running_var.detach()
        mean = torch.where(is_real, wide, 0).sum(axes) / count
        mean = torch.where(is_enough, mean, old_mean)
        centred = torch.where(is_real, wide - mean.view(channels), 0)
        squares = centred.square().sum(axes)
        var = torch.where(is_enough, squares / count, old_var)
        self._move(mean, squares / (count - 1).clamp(min=1), is_enough)
        return _scaled(self, centred, var, channels).to(x.dtype)

    def _move(self, mean: Tensor, unbiased: Tensor, is_enough: Tensor) -> None:
        """Note the running statistics after this batch."""
        moves = self.moves()
        if moves is None:
            return
        for given, value in (self.running_mean, mean), (self.running_var, unbiased):
            old = moves.latest(given).detach()
            new = (1 - self.momentum) * old + self.momentum * value.detach()
            moves.move(given, torch.where(is_enough, new, old).to(given.dtype))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class _Acting(nn.Module):
    """A norm with dropout and activation behind it, as timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class _GroupNormAct(_Acting, nn.GroupNorm):
    pass


class _FrozenBatchNormAct(_Acting, FrozenBatchNorm):
    pass


class _PersonalBatchNormAct(_Acting, PersonalBatchNorm):
    pass


FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward)
"""Forwards of layers that are known to do nothing else but normalise."""


def _acts(layer: nn.Module) -> bool:
    """Whether dropout and activation are part of the layer, as in timm."""
    return {"drop", "act"} <= layer._modules.keys()


def _divisor(channels: int, groups: int) -> int:
    """The largest divisor of `channels` up to `groups`; two channels a group."""
    number = max(min(groups, channels // 2), 1)
    while channels % number:
        number -= 1
    return number


def _converted(
    model: nn.Module,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...],
    convert: Callable[[str, Any], nn.Module],
) -> nn.Module:
    """The model with its layers of these kinds replaced by what `convert` makes.

    A layer that is used in several places is replaced by one. No layer is replaced
    before all were converted, so that an error leaves the model as it was.
    """
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds):
            new[layer] = _replacement(name, layer, convert)
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            if layer in new:
                parent._modules[child] = new[layer]
    return new.get(model, model)


def _replacement(
    name: str, old: nn.Module, convert: Callable[[str, Any], nn.Module]
) -> nn.Module:
    if has_no_shape(old):
        raise SettingsError(
            f"{described(name, old)} has no shape yet: call the model once on a batch "
            "of examples, then convert it"
        )
    if type(old).forward not in FORWARDS and not _acts(old):
        raise SettingsError(
            f"{described(name, old)} has a forward of its own, which a conversion "
            "would lose: replace it by hand"
        )
    new = convert(name, old)
    if _acts(old):
        new.drop, new.act = old.drop, old.act
    return new.train(old.training)
