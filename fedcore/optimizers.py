"""Local steps beyond SGD: AdamW, clipping, step sizes that change, smaller pieces.

Whoever runs a client function says by which steps it trains (`Training.inside`);
`fedcore.local.local_sgd` reads it, so that methods need no line for it. A gradient
passes, in this order: correction, proximal term, clipping, optimizer. Of AdamW

    k <- k + 1;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    y <- y - lr (m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps) + decay y)

as `torch.optim.AdamW` has it. Everything that changes from round to round is a tensor
among the inputs of a step, so that no step is recorded anew. A step of a batch that is
all padding changes neither m, v, k nor y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.dpsgd import Drawn, of_steps
from fedcore.errors import SettingsError
from fedcore.types import Params, Tree

if TYPE_CHECKING:
    from fedcore.local_settings import LocalSettings
    from fedcore.task import Task

__all__ = [
    "PLAIN",
    "AdamW",
    "Examples",
    "Kept",
    "Moments",
    "Recipe",
    "Session",
    "StepSize",
    "Training",
    "adamw",
    "clipped",
    "now",
    "rounded",
    "wide",
]

StepSize = Tensor | float | dict[str, float]
"""One step size, or one a parameter."""

TINY = 1e-6  # beside a norm that is divided by, as in torch.nn.utils.clip_grad_norm_


class AdamW(NamedTuple):
    """The numbers of AdamW."""

    beta1: float
    beta2: float
    eps: float
    decay: float  # times the step size


class Examples(NamedTuple):
    """The numbers of DP-SGD."""

    clip: float  # C, bound on the norm of one example's gradient
    deviation: float  # z C, of the noise in a step's sum


class Recipe(NamedTuple):
    """All that shapes a local step, beside the method's own hooks."""

    adamw: AdamW | None = None  # None: SGD
    clip: float | None = None
    warmup: int = 0
    micro: int = 1
    is_rounded: bool = False  # the forward pass is in bfloat16
    examples: Examples | None = None  # None: gradients are those of batches

    @classmethod
    def of(cls, local: LocalSettings) -> Recipe:
        numbers = AdamW(local.beta1, local.beta2, local.eps, local.weight_decay)
        return cls(
            numbers if local.optimizer == "adamw" else None,
            local.clip,
            local.warmup,
            local.micro,
            local.is_rounded,
            _examples(local),
        )


def _examples(local: LocalSettings) -> Examples | None:
    clip = local.dp.clip
    return None if clip is None else Examples(clip, local.dp.noise * clip)


PLAIN = Recipe()


class Moments(NamedTuple):
    """The state of AdamW, in float32 at least."""

    m: Params
    v: Params
    k: Tensor  # 0-d, steps so far

    @classmethod
    def zero(cls, params: Params) -> Moments:
        dtype = wide(params)
        m, v = trees.zeros_like(params, dtype), trees.zeros_like(params, dtype)
        first = next(iter(params.values()))
        return cls(m, v, torch.zeros((), dtype=dtype, device=first.device))


class Kept(NamedTuple):
    """A client's state between rounds: the method's own, and the optimizer's."""

    own: Tree
    moments: Moments


@dataclass
class Session:
    """One client's work in one round."""

    recipe: Recipe
    task: Task
    share: Tensor | None  # 0-d, of the step size, by the schedule; None: all of it
    moments: Moments | None  # those that the client keeps
    drawn: Drawn | None = None  # by DP-SGD, for all steps of the round
    trainings: int = 0  # so far
    steps: int = 0  # that local training had so far

    def take(self, steps: int, params: Params) -> list[tuple[Tensor, Params]]:
        """(size, noise) of the next steps, as DP-SGD has drawn them for the round.

        Raises SettingsError where there are no more: every draw is used once.
        """
        drawn, start = self.drawn, self.steps
        self.steps += steps
        if drawn is None or self.steps > len(drawn.size):
            raise SettingsError(
                "local.dp: this method takes more steps than it has batches, or on "
                "other examples than those that were drawn for it: leave local.dp "
                "out, or choose another method, e.g. fedavg"
            )
        own: Drawn = trees.at(drawn, slice(start, self.steps))
        return of_steps(own, self.task, params)

    def begin(self, params: Params) -> Moments | None:
        """The moments that local training of these parameters starts with.

        None for SGD. Raises SettingsError where kept ones are of other parameters.
        """
        self.trainings += 1
        if self.recipe.adamw is None:
            return None
        if self.moments is None:
            return Moments.zero(params)
        has_same = self.moments.m.keys() == params.keys()
        if self.trainings > 1 or not has_same:
            raise SettingsError(
                'local.moments = "kept": this method trains more than once a round, '
                'or only some of the parameters; use moments = "fresh"'
            )
        return self.moments

    def end(self, moments: Moments | None) -> None:
        """Keep the moments, where they are kept."""
        if self.moments is not None and moments is not None:
            self.moments = moments


_session: ContextVar[Session | None] = ContextVar("local training", default=None)


def now() -> Session | None:
    """The work whose local training this is; None where steps are plain SGD."""
    return _session.get()


class Training(NamedTuple):
    """How the clients of a run train."""

    local: LocalSettings
    recipe: Recipe
    rounds: int  # of the run, over which the schedule goes

    @classmethod
    def of(cls, local: LocalSettings, rounds: int) -> Training | None:
        """None where steps are plain SGD, as `local_sgd` does them by itself."""
        if local.has_plain_steps:
            return None
        return cls(local, Recipe.of(local), rounds)

    @property
    def keeps_moments(self) -> bool:
        return self.local.keeps_moments

    def first_state(self, own: Tree, params: Params) -> Tree:
        """A client's state before its first round, of which the method's is `own`."""
        return Kept(own, Moments.zero(params)) if self.keeps_moments else own

    def share(self, t: Tensor) -> Tensor | None:
        """The schedule's share of the step size in round t, 0-d; None: all of it."""
        if self.local.schedule == "constant":
            return None
        gone = t.double() / self.rounds
        if self.local.schedule == "linear":
            return (1 - gone).clamp(min=0)
        return 0.5 * (1 + torch.cos(math.pi * gone.clamp(max=1)))

    @contextmanager
    def inside(
        self,
        task: Task,
        t: Tensor | None,
        moments: Moments | None,
        drawn: Drawn | None = None,
    ) -> Iterator[Session]:
        """Inside, local training is of this kind, in round t, or in none (None).

        Without noise in none: what a client trains then stays with it.
        """
        share = None if t is None else self.share(t)
        recipe = self.recipe if t is not None else self.recipe._replace(examples=None)
        session = Session(recipe, task, share, moments, drawn)
        token = _session.set(session)
        try:
            yield session
        finally:
            _session.reset(token)


def clipped(slope: Params, most: float) -> Params:
    """The gradient, shortened to a norm of `most` over all parameters.

    >>> clipped({"w": torch.tensor([3.0, 4.0])}, 1.0)
    {'w': tensor([0.6000, 0.8000])}
    """
    norm = trees.dot(slope, slope).sqrt()
    share = (most / (norm + TINY)).clamp(max=1)
    shortened: Params = trees.scale(slope, share)
    return shortened


def adamw(
    numbers: AdamW,
    y: Params,
    slope: Params,
    moments: Moments,
    lr: StepSize,
    share: Tensor,
    real: Tensor,
) -> tuple[Params, Moments]:
    """(parameters, moments) after a step of size `share` times `lr`.

    `real` is 0-d: 0 leaves everything as it is, and `share` is 0 with it.
    """
    beta1, beta2, eps, decay = numbers
    a, b = real * (1 - beta1), real * (1 - beta2)
    k = moments.k + real
    # Of a first step that is padding, 0 / 0 would not be 0.
    bias1, bias2 = _bias(beta1, k.clamp(min=1)), _bias(beta2, k.clamp(min=1))
    root = bias2.sqrt()
    new_m: Params = {}
    new_v: Params = {}
    moved: Params = {}
    for name, value in y.items():
        g = slope[name].to(a.dtype)
        m = new_m[name] = torch.addcmul(moments.m[name] * (1 - a), g, a)
        v = new_v[name] = torch.addcmul(moments.v[name] * (1 - b), g * b, g)
        size = (lr[name] if isinstance(lr, dict) else lr) * share
        kept = value * (1 - size * decay) if decay else value
        step = m / (v.sqrt() / root + eps)
        moved[name] = torch.addcmul(kept, step, -size / bias1).to(value.dtype)
    return moved, Moments(new_m, new_v, k)


def rounded(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products of matrices are taken in bfloat16; float64 stays as it is."""
    # Without the cache of casts, which would keep tensors of a vmap that has ended.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def _bias(beta: float, k: Tensor) -> Tensor:
    """1 - beta^k, without the rounding of the difference."""
    return -torch.expm1(k * (math.log(beta) if beta else -math.inf))


def wide(params: Params) -> torch.dtype:
    """The type of step sizes, counters and moments, float32 at least.

    float32 would round a float64 model, and bfloat16 counts to 256.
    """
    return torch.promote_types(next(iter(params.values())).dtype, torch.float32)
