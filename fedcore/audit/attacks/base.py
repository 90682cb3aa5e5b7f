"""What an attack is: its settings, its needs, and its result.

No attack ever gets a client's real data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedcore.audit.observe import Observation
from fedcore.rng import seed_of
from fedcore.types import Params

Need = Literal["images", "classes", "scale", "batches"]
NEEDS: dict[Need, str] = {
    "images": "inputs that are images (Task(..., pixels=Pixels()) says so)",
    "classes": "a classification task with cross-entropy",
    "scale": "the local step size and the number of local steps",
    "batches": "the local step size, epochs and batch size",
}
Progress = Callable[[float, float | None], bool]
"""(share that is done, in [0, 1]; the objective, lower is better) -> go on?"""


def unwatched(done: float, objective: float | None) -> bool:
    """The progress of an attack that runs to its end."""
    return True


def part(progress: Progress, number: int, of: int, size: int = 1) -> Progress:
    """The progress of steps `number` to `number + size` of `of`."""
    return lambda done, objective: progress((number + done * size) / of, objective)


class AttackSettings(BaseModel):
    """Base of an attack's settings: frozen, unknown keys refused, defaults the paper's.

    An attack names its settings class: `class SME(Attack[SurrogateSettings])`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InversionSettings(AttackSettings):
    """Settings that attacks by optimisation share."""

    iterations: int = Field(1000, ge=1, description="steps of the optimiser")
    restarts: int = Field(
        1,
        ge=1,
        description="starts from other noise; the one with the lowest objective counts",
    )
    tv: float = Field(
        0.01,
        ge=0,
        description="lambda, weight of total variation, "
        "half the sum of two mean absolute differences",
    )


@dataclass(frozen=True)
class Reconstruction:
    """One attack's result on one client, from its update alone."""

    x: Tensor  # [M N, ...] as the model takes them
    y: Tensor | None  # [M N] the labels it worked with; None where it found none
    objective: float  # at the end: 1 - cosine, or the attack's own, without priors
    iterations: int
    facts: dict[str, Any] = field(default_factory=dict)  # alpha, path_scale, ...
    curve: list[float] = field(default_factory=list)  # the objective along the way
    others: tuple[Tensor, ...] = ()  # images of other restarts, for self-consistency

    def cpu(self) -> Reconstruction:
        return replace(
            self,
            x=self.x.cpu(),
            y=None if self.y is None else self.y.cpu(),
            others=tuple(x.cpu() for x in self.others),
        )


S = TypeVar("S", bound=AttackSettings)


class Attack(Generic[S]):
    """An attack holds settings and nothing that changes."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, settings: S) -> None:
        self.s = settings

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = unwatched,
    ) -> list[Reconstruction]:
        """The clients' inputs, on the device of the observations.

        `labels` are given or recovered, int64 [M N]; None: unknown. Raises ValueError
        where an observation does not allow the attack.
        """
        raise NotImplementedError


def settings_of(attack: type[Attack[Any]]) -> type[AttackSettings]:
    """The settings class in `class SME(Attack[Settings])`."""
    for base in getattr(attack, "__orig_bases__", ()):
        for argument in get_args(base):
            if inspect.isclass(argument) and issubclass(argument, AttackSettings):
                return argument
    name = attack.__name__
    raise TypeError(f"{name} names no settings: write class {name}(Attack[Settings])")


def lacking(needs: frozenset[Need], seen: Observation) -> str | None:
    """The reason why an attack with these needs cannot be run; None where it can."""
    public = seen.public
    has_lr = public.lr is not None
    has_epochs = public.batch_size is not None and public.epochs is not None
    has: dict[Need, bool] = {
        "images": public.pixels is not None,
        "classes": public.classes is not None,
        "scale": has_lr and public.local_steps(seen.num_examples) is not None,
        "batches": has_lr and has_epochs,
    }
    missing = [text for need, text in NEEDS.items() if need in needs and not has[need]]
    return f"needs {' and '.join(missing)}" if missing else None


def gradient_like(seen: Observation) -> Params:
    """w0 - wT: points as a gradient does."""
    return {name: -change for name, change in seen.delta.items()}


def gradient(seen: Observation) -> Params:
    """The mean gradient along the client's path, (w0 - wT) / (eta T).

    Raises ValueError where eta or T is unknown.
    """
    lr, steps = seen.public.lr, seen.public.local_steps(seen.num_examples)
    if lr is None or steps is None:
        raise ValueError(f"needs {NEEDS['scale']}")
    return {name: -change / (lr * steps) for name, change in seen.delta.items()}


def noise(seen: Observation, seed: int, restart: int, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) as a start, from the key of this client, round and restart."""
    key = seed_of(seed, "audit start", seen.round, seen.client, restart)
    draw = torch.Generator().manual_seed(key)
    like = next(iter(seen.w0.values()))
    return torch.randn(shape, generator=draw, dtype=like.dtype).to(seen.device)


def total_variation(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half the sum of the mean absolute differences along each axis, 0-d.

    Over images x [N, C, H, W]; with mask [N] over those where it is 1.
    """
    across = (x[..., 1:] - x[..., :-1]).abs()
    down = (x[..., 1:, :] - x[..., :-1, :]).abs()
    if mask is None:
        return 0.5 * (across.mean() + down.mean())
    real = mask.sum().clamp(min=1)
    each = across.flatten(1).mean(1) + down.flatten(1).mean(1)
    return 0.5 * (each * mask).sum() / real


def box(seen: Observation) -> tuple[Tensor, Tensor]:
    """(least, greatest) input whose pixels are in [0, 1], by channel [C, 1, 1]."""
    pixels = seen.public.pixels
    assert pixels is not None, "the attack needs images"
    black = torch.zeros((seen.public.shape[0], 1, 1), device=seen.device)
    return pixels.inputs(black), pixels.inputs(black + 1)
