"""Defences: a client clips, adds noise to, makes sparse and quantises a message.

Always in this order, on the client, in every engine, and before the channel
(`links.uplink`) gets the message. Evaluation messages pass as they are: they are
measurements, and no guarantee covers them. Clip as in DP-FedAvg (McMahan et al.,
ICLR 2018), top-k over the whole message, unbiased stochastic rounding (QSGD, Alistarh
et al., NeurIPS 2017, with the largest entry as scale).

With noise, whatever of a message noise cannot protect (a training loss, a counter,
integers) is sent as zero. A 0-d field of a NamedTuple is such a scalar; a 0-d entry of
a dict is a parameter of the model, and is protected like every other. One bit is
refused: it has no level but zero. Messages are not packed: the bytes that a run counts
are those of whole tensors.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedcore import trees
from fedcore.method import evaluates
from fedcore.rng import seed_of
from fedcore.types import ClientFunction, Tree


class DistributedSettings(BaseModel):
    """Noise that clients draw themselves and that adds up in a secure sum."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip: float = Field(
        1.0,
        gt=0,
        description="C, bound on the L2 norm of a client's message, over all its "
        "tensors together",
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="z: the noise of the clients that are counted on, together, has "
        "deviation z C in every entry; 0 = none",
    )
    colluding: int = Field(
        0,
        ge=0,
        description="a, clients that may tell the server their own noise; the others "
        "of the threshold have to add enough",
    )

    @model_validator(mode="after")
    def _with_noise(self) -> DistributedSettings:
        usual = DistributedSettings.model_fields
        for name in ("clip", "colluding"):
            value = getattr(self, name)
            if self.noise_multiplier == 0 and value != usual[name].default:
                raise ValueError(
                    f"distributed.{name} = {value} without distributed."
                    "noise_multiplier does nothing: set that too; for a bound "
                    "without noise set defence.clip"
                )
        return self

    @property
    def is_active(self) -> bool:
        """Whether clients add noise."""
        return self.noise_multiplier > 0


class DefenceSettings(BaseModel):
    """What clients do to their messages; nothing unless something is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip: float | None = Field(
        None,
        gt=0,
        description="C, bound on the L2 norm of a client's message, over all its "
        "tensors together",
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="z: each client adds N(0, (z C)^2) to every entry of its own "
        "message; needs clip",
    )
    top_k: float = Field(
        1.0,
        gt=0,
        le=1,
        description="rho, share of a message's entries that are sent, the largest, "
        "in (0, 1]",
    )
    bits: int | None = Field(
        None,
        ge=2,
        le=32,
        description="b: entries are rounded at random to 2^(b-1) - 1 levels a sign, "
        "scaled by the tensor's largest",
    )
    delta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the (epsilon, delta) that is reported; "
        "default: min(1e-5, 1 / N^1.1)",
    )

    distributed: DistributedSettings = DistributedSettings()

    @model_validator(mode="after")
    def _one_kind_of_noise(self) -> DefenceSettings:
        if self.distributed.is_active and self.is_active:
            raise ValueError(
                "distributed.noise_multiplier = "
                f"{self.distributed.noise_multiplier} clips and adds noise: leave out "
                "clip, noise_multiplier, top_k and bits beside it"
            )
        return self

    @model_validator(mode="after")
    def _clipped(self) -> DefenceSettings:
        if self.noise_multiplier and self.clip is None:
            raise ValueError(
                f"noise_multiplier = {self.noise_multiplier} without clip: "
                "the noise is z times the norm bound; set clip too"
            )
        return self

    @property
    def is_active(self) -> bool:
        """Whether anything is done to messages."""
        return self.clip is not None or self.top_k < 1 or self.bits is not None


class Defence:
    """The defences of a run: the same draws in every engine.

    Their key is (seed, client function, round, client).
    """

    def __init__(self, settings: DefenceSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def is_silent(self, fn: ClientFunction) -> bool:
        """Whether messages of a client function leave as they are."""
        return not self.settings.is_active or evaluates(fn)

    def protect(self, message: Tree, fn: ClientFunction, t: int, client: int) -> Tree:
        """The message as it leaves the client."""
        if self.is_silent(fn):
            return message
        key = seed_of(self.seed, f"defence {fn.__name__}", t, client)
        return protect(message, self.settings, torch.Generator().manual_seed(key))


def protect(message: Tree, settings: DefenceSettings, draw: torch.Generator) -> Tree:
    """The message clipped, then noised, then made sparse, then quantised.

    `draw` is a generator of the CPU, so that every device gets the same numbers.
    """
    flags = _flags(message)
    protected = []
    for x, flag in zip(trees.leaves(message), flags, strict=True):
        if flag:
            protected.append(x)
    protected = _protect(protected, settings, draw)
    next_protected, next_flag = iter(protected), iter(flags)

    def sent(x: Tensor) -> Tensor:
        if next(next_flag):
            return next(next_protected)
        return torch.zeros_like(x) if settings.noise_multiplier else x

    return trees.map(sent, message)


def _protect(
    xs: list[Tensor], settings: DefenceSettings, draw: torch.Generator
) -> list[Tensor]:
    if settings.clip is not None:
        xs = clip(xs, settings.clip)
    if settings.noise_multiplier:
        assert settings.clip is not None
        deviation = settings.noise_multiplier * settings.clip
        xs = [add_noise(x, deviation, draw) for x in xs]
    if settings.top_k < 1:
        xs = top_k(xs, settings.top_k)
    if settings.bits is not None:
        xs = [quantise(x, settings.bits, draw) for x in xs]
    return xs


def _flags(message: Tree, scalar: bool = False) -> list[bool]:
    """For each leaf, whether the defences act on it; not on 0-d ones with `scalar`."""
    flags: list[bool] = []
    if isinstance(message, dict):
        for value in message.values():
            flags += _flags(value)
    elif isinstance(message, tuple | list):
        for value in message:
            flags += _flags(value, scalar=True)
    else:
        is_scalar = scalar and message.ndim == 0
        flags.append(message.is_floating_point() and not is_scalar)
    return flags


def clip(tree: Tree, bound: float | Tensor) -> Tree:
    """tree min(1, bound / |tree|), the L2 norm over all leaves. Batches over clients.

    With an entry that is not finite all become NaN: the update is then refused whole,
    instead of leaving unclipped.

    >>> clip({"w": torch.tensor([3.0, 4.0])}, bound=1.0)
    {'w': tensor([0.6000, 0.8000])}
    """
    leaves = trees.leaves(tree)
    if not leaves:
        return tree
    norm = torch.stack([x.double().square().sum() for x in leaves]).sum().sqrt()
    factor = torch.where(norm.isfinite(), (bound / norm).clamp(max=1), torch.nan)
    return trees.map(lambda x: x * factor.to(x.dtype), tree)


def add_noise(x: Tensor, deviation: float, draw: torch.Generator) -> Tensor:
    """x + N(0, deviation^2), independent in every entry."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    noise = torch.randn(x.shape, generator=draw, dtype=dtype)
    return (x + noise.to(x.device) * deviation).to(x.dtype)


def top_k(xs: list[Tensor], share: float) -> list[Tensor]:
    """The ceil(share D) entries of largest magnitude over all tensors, the others zero.

    >>> top_k([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.5])], share=0.5)
    [tensor([ 0., -3.]), tensor([2., 0.])]
    """
    if not xs:
        return xs
    sizes = trees.ravel(xs).abs()
    keep = math.ceil(round(share * len(sizes), 6))  # 0.07 x 100 is 7.000...01
    mask = torch.zeros_like(sizes, dtype=torch.bool)
    mask[sizes.topk(keep, sorted=False).indices] = True
    masks = trees.unravel(mask, xs)
    return [torch.where(kept, x, 0) for x, kept in zip(xs, masks, strict=True)]


def quantise(x: Tensor, bits: int, draw: torch.Generator) -> Tensor:
    """x in multiples of max|x| / (2^(bits-1) - 1), as the receiver reads it.

    Each entry is rounded up or down at random, so that its mean is itself; errors are
    at most one level.
    """
    if x.numel() == 0:
        return x
    levels = 2 ** (bits - 1) - 1
    scale = x.abs().max().double()
    steps = x.abs().double() * torch.where(scale > 0, levels / scale, 0)
    draws = torch.rand(x.shape, generator=draw, dtype=torch.float64).to(x.device)
    up = draws < steps - steps.floor()
    rounded: Tensor = x.sign() * (steps.floor() + up) * (scale / levels)
    return rounded.to(x.dtype)
