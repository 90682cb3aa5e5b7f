"""The base of attacks: their settings, their needs, and their results.

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

from fedcore import trees
from fedcore.audit.observe import Observation
from fedcore.rng import seed_of
from fedcore.types import Params

Need = Literal["reals", "slope", "images", "classes", "scale", "batches"]
NEEDS: dict[Need, str] = {
    "reals": "inputs that are real numbers",
    "slope": "a model whose gradient reaches the inputs",
    "images": "inputs that are images (Task(..., pixels=Pixels()) says so)",
    "classes": "a classification task with cross-entropy",
    "scale": "the local step size and the number of local steps",
    "batches": "the local step size, epochs and batch size",
}
Progress = Callable[[float, float | None], bool]
"""(share of the attack that is done, in [0, 1]; the objective now) -> whether to go on.

A lower objective is a better match.
"""


def keep_going(done: float, objective: float | None) -> bool:
    """Progress without an audience: always go on."""
    return True


def part(progress: Progress, number: int, of: int, size: int = 1) -> Progress:
    """The progress of steps `number` to `number + size` of `of`."""
    return lambda done, objective: progress((number + done * size) / of, objective)


class AttackSettings(BaseModel):
    """Base of an attack's settings: frozen, and unknown keys are refused.

    Defaults are the paper's.
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
    """The result of one attack on one client, from its update alone."""

    x: Tensor  # [M N, ...] as the model takes them
    y: Tensor | None  # [M N] the labels it worked with; None where it found none
    # At the end: 1 - cosine, or what the attack minimises, without its priors.
    objective: float
    iterations: int
    facts: dict[str, Any] = field(default_factory=dict)  # alpha, path_scale, ...
    curve: list[float] = field(default_factory=list)  # the objective along the way
    others: tuple[Tensor, ...] = ()  # of other restarts, for self-consistency

    def cpu(self) -> Reconstruction:
        return replace(
            self,
            x=self.x.cpu(),
            y=None if self.y is None else self.y.cpu(),
            others=tuple(x.cpu() for x in self.others),
        )


S = TypeVar("S", bound=AttackSettings)


class Attack(Generic[S]):
    """Base of attacks, which hold settings and nothing that changes."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, settings: S) -> None:
        self.s = settings

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = keep_going,
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
    """The reason why an attack with these needs cannot be run on this observation.

    None where it can.
    """
    public = seen.public
    steps = public.local_steps(seen.num_examples)
    if "reals" in needs and public.unlike_reals is not None:
        return f"needs {NEEDS['reals']} ({public.unlike_reals})"
    is_met: dict[Need, bool] = {
        "reals": public.unlike_reals is None,
        "slope": public.is_reached,
        "images": public.pixels is not None,
        "classes": public.classes is not None,
        "scale": None not in (public.lr, steps),
        "batches": None not in (public.lr, public.batch_size, public.epochs),
    }
    missing = []
    for need, description in NEEDS.items():
        if need in needs and not is_met[need]:
            missing.append(description)
    return f"needs {' and '.join(missing)}" if missing else None


def gradient_like(seen: Observation) -> Params:
    """w0 - wT: points as a gradient does."""
    update: Params = trees.map(torch.neg, seen.delta)
    return update


def gradient(seen: Observation) -> Params:
    """The mean gradient along the client's path, (w0 - wT) / (eta T).

    Raises ValueError where eta T is unknown.
    """
    lr, steps = seen.public.lr, seen.public.local_steps(seen.num_examples)
    if lr is None or steps is None:
        raise ValueError(f"needs {NEEDS['scale']}")
    length = lr * steps
    mean: Params = trees.map(lambda change: -change / length, seen.delta)
    return mean


def noise(seen: Observation, seed: int, restart: int, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) as a start, from the key of this client, round and restart."""
    draw = torch.Generator().manual_seed(
        seed_of(seed, "audit start", seen.round, seen.client, restart)
    )
    like = next(iter(seen.w0.values()))
    return torch.randn(shape, generator=draw, dtype=like.dtype).to(seen.device)


def neighbour_differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x - left neighbour, x - upper neighbour) of images [N, C, H, W]."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def total_variation(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half the sum of the mean absolute differences along each axis, 0-d.

    Over images [N, C, H, W]; only those with mask [N] 1, where it is given.
    """
    across, down = neighbour_differences(x)
    across, down = across.abs(), down.abs()
    if mask is None:
        return 0.5 * (across.mean() + down.mean())
    by_image = across.flatten(1).mean(1) + down.flatten(1).mean(1)
    return 0.5 * (by_image * mask).sum() / mask.sum().clamp(min=1)


def box(seen: Observation) -> tuple[Tensor, Tensor]:
    """(least, greatest) input with pixels in [0, 1], by channel [C, 1, 1]."""
    pixels = seen.public.pixels
    assert pixels is not None
    black = torch.zeros(seen.public.shape[0], 1, 1, device=seen.device)
    return pixels.inputs(black), pixels.inputs(torch.ones_like(black))
