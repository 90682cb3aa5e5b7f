"""What a client does to a message before it leaves, so that it gives less away: clip, Gaussian noise, top-k, quantisation.

Always in this order, on the client, in every engine, and before the channel (`links.uplink`) gets it. Evaluation messages pass
as they are: they are measurements, and no guarantee covers them. Clip as in DP-FedAvg (McMahan et al., ICLR 2018), top-k over the
whole message, unbiased stochastic rounding (QSGD, Alistarh et al., NeurIPS 2017, with the largest entry as scale).

With noise, whatever of a message noise cannot protect (a training loss, a counter, integers) is sent as zero. A 0-d field of a
NamedTuple is such a scalar; a 0-d entry of a dict is a parameter of the model, and is protected like every other. One bit is
refused: it has no level but zero. Messages are not packed: the bytes that a run counts are those of whole tensors.
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


class DefenceSettings(BaseModel):
    """What clients do to their messages; nothing unless something is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip: float | None = Field(
        None,
        gt=0,
        description="C, bound on the L2 norm of a client's message, over all its tensors together",
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="z: each client adds N(0, (z C)^2) to every entry of its own message; needs clip",
    )
    top_k: float = Field(
        1.0,
        gt=0,
        le=1,
        description="rho, share of a message's entries that are sent, the largest, in (0, 1]",
    )
    bits: int | None = Field(
        None,
        ge=2,
        le=32,
        description="b: entries are rounded at random to 2^(b-1) - 1 levels a sign, scaled by the tensor's largest",
    )
    delta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the (epsilon, delta) that is reported; default: min(1e-5, 1 / N^1.1)",
    )

    @model_validator(mode="after")
    def _clipped(self) -> DefenceSettings:
        if self.noise_multiplier and self.clip is None:
            raise ValueError(
                f"noise_multiplier = {self.noise_multiplier} without clip: the noise is z times the norm bound; set clip too"
            )
        return self

    @property
    def active(self) -> bool:
        return self.clip is not None or self.top_k < 1 or self.bits is not None


class Defence:
    """The defences of a run: the same draws in every engine, from the key (seed, client function, round, client)."""

    def __init__(self, settings: DefenceSettings, seed: int) -> None:
        self.s, self.seed = settings, seed

    def silent(self, fn: ClientFunction) -> bool:
        """Whether messages of this client function leave as they are."""
        return not self.s.active or evaluates(fn)

    def protect(self, message: Tree, fn: ClientFunction, t: int, client: int) -> Tree:
        """The message as it leaves the client."""
        if self.silent(fn):
            return message
        draw = torch.Generator().manual_seed(
            seed_of(self.seed, f"defence {fn.__name__}", t, client)
        )
        return protect(message, self.s, draw)


def protect(message: Tree, s: DefenceSettings, draw: torch.Generator) -> Tree:
    """Clip, then noise, then top-k, then quantise; `draw` is a generator of the CPU, so that every device gets the same numbers."""
    leaves, flags = trees.leaves(message), _protected(message)
    xs = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    if s.clip is not None:
        xs = clip(xs, s.clip)
    if s.noise_multiplier:
        assert s.clip is not None
        xs = [add_noise(x, s.noise_multiplier * s.clip, draw) for x in xs]
    if s.top_k < 1:
        xs = top_k(xs, s.top_k)
    if s.bits is not None:
        xs = [quantise(x, s.bits, draw) for x in xs]
    found, rest = iter(xs), iter(flags)
    unprotected = torch.zeros_like if s.noise_multiplier else (lambda x: x)
    return trees.map(lambda x: next(found) if next(rest) else unprotected(x), message)


def _protected(message: Tree, scalar: bool = False) -> list[bool]:
    """For each leaf, whether the defences act on it; `scalar`: what a 0-d tensor here is."""
    if isinstance(message, dict):
        return [flag for value in message.values() for flag in _protected(value)]
    if isinstance(message, tuple | list):
        return [flag for value in message for flag in _protected(value, scalar=True)]
    return [message.is_floating_point() and not (scalar and message.ndim == 0)]


def clip(tree: Tree, bound: float) -> Tree:
    """tree min(1, bound / |tree|), the L2 norm over all leaves. Batches over clients.

    With an entry that is not finite all become NaN: the update is then refused whole, instead of leaving unclipped.
    """
    leaves = trees.leaves(tree)
    if not leaves:
        return tree
    norm = torch.stack([x.double().square().sum() for x in leaves]).sum().sqrt()
    factor = torch.where(norm.isfinite(), (bound / norm).clamp(max=1), torch.nan)
    return trees.map(lambda x: x * factor.to(x.dtype), tree)


def add_noise(x: Tensor, deviation: float, draw: torch.Generator) -> Tensor:
    """x + N(0, deviation^2), independent in every entry."""
    noise = torch.randn(
        x.shape, generator=draw, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return (x + noise.to(x.device) * deviation).to(x.dtype)


def top_k(xs: list[Tensor], share: float) -> list[Tensor]:
    """The ceil(share D) entries of largest magnitude over all tensors; the others are zero."""
    if not xs:
        return xs
    sizes = trees.ravel(xs).abs()
    keep = math.ceil(round(share * len(sizes), 6))  # 0.07 x 100 is 7.000...01
    mask = torch.zeros_like(sizes, dtype=torch.bool)
    mask[sizes.topk(keep, sorted=False).indices] = True
    return [
        torch.where(kept, x, 0)
        for x, kept in zip(xs, trees.unravel(mask, xs), strict=True)
    ]


def quantise(x: Tensor, bits: int, draw: torch.Generator) -> Tensor:
    """x in multiples of max|x| / (2^(bits-1) - 1), each entry rounded up or down at random so that its mean is itself.

    Returns the numbers that the receiver reads. Errors are at most one level.
    """
    if x.numel() == 0:
        return x
    levels = 2 ** (bits - 1) - 1
    scale = x.abs().max().double()
    steps = x.abs().double() * torch.where(scale > 0, levels / scale, 0)
    up = (
        torch.rand(x.shape, generator=draw, dtype=torch.float64).to(x.device)
        < steps - steps.floor()
    )
    rounded: Tensor = x.sign() * (steps.floor() + up) * (scale / levels)
    return rounded.to(x.dtype)
