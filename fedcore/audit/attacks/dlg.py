"""DLG - deep leakage from gradients (Zhu, Liu, Han, NeurIPS 2019).

G = (w0 - wT) / (eta T)  the mean gradient along the client's path: its gradient, where
                         T = 1
x, z  dummy inputs and label logits
    minimise   sum over layers of |g - G|^2,
               g = gradient at w0 of the cross-entropy of x with softmax(z)
    by         L-BFGS, step size 1, 300 steps, from N(0, 1)
Labels are found with the inputs: none are needed, and those given are not used. No
prior and no box, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn import functional

from fedcore import trees
from fedcore.audit.attacks.base import (
    Attack,
    AttackSettings,
    Progress,
    Reconstruction,
    gradient,
    noise,
    part,
    unwatched,
)
from fedcore.audit.observe import Observation
from fedcore.engines.base import one_thread
from fedcore.types import Params

CURVE = 50  # points kept of the objective along the way


class Settings(AttackSettings):
    iterations: int = Field(
        300, ge=1, description="outer steps of L-BFGS, of up to 20 evaluations each"
    )
    lr: float = Field(1.0, gt=0, description="step size of L-BFGS")


class Dummies(NamedTuple):
    """Dummy inputs and their labels."""

    x: Tensor  # [N, ...]
    z: Tensor  # [N, classes] label logits


class DLG(Attack[Settings]):
    needs = frozenset({"classes", "scale"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = unwatched,
    ) -> list[Reconstruction]:
        found = []
        for i, observation in enumerate(seen):
            n, public = observation.total_examples, observation.public
            x = noise(observation, seed, 0, (n, *public.shape))
            z = noise(observation, seed, 1, (n, public.outputs))
            share = part(progress, i, len(seen))
            found.append(match_gradient(observation, Dummies(x, z), self.s, share))
        return found


@one_thread()
def match_gradient(
    seen: Observation,
    start: Dummies,
    settings: Settings,
    progress: Progress,
    fixed_labels: bool = False,
) -> Reconstruction:
    """One client's inputs, and their labels unless those are fixed, from this start.

    Raises ValueError where the mean gradient is unknown.
    """
    target, model = gradient(seen), seen.public.model

    def loss(moving: Params, x: Tensor, z: Tensor) -> Tensor:
        outputs = functional_call(model, {**seen.w0, **moving}, (x,))
        return -(z.softmax(1) * functional.log_softmax(outputs, 1)).sum(1).mean()

    x, z = start.x.requires_grad_(), start.z.requires_grad_(not fixed_labels)
    optimiser = torch.optim.LBFGS([x] if fixed_labels else [x, z], lr=settings.lr)

    def closure() -> Tensor:
        optimiser.zero_grad()
        g = grad(loss)({name: seen.w0[name] for name in target}, x, z)
        away = trees.sub(g, target)
        value = trees.dot(away, away)
        value.backward()  # type: ignore[no-untyped-call]
        distance: Tensor = value.detach()
        return distance

    curve: list[float] = []
    best, kept = float("inf"), _copied(x, z)
    for i in range(settings.iterations):
        before = _copied(x, z)
        value = float(optimiser.step(closure))  # type: ignore[no-untyped-call]
        # Without a line search L-BFGS may leave a good place. The value is that of
        # the place before the step.
        if value < best:
            best, kept = value, before
        curve.append(value)
        goes_on = progress((i + 1) / settings.iterations, value)
        if not goes_on or not torch.isfinite(x).all():
            break
    last = float(closure()) if torch.isfinite(x).all() else float("inf")
    if last < best:
        best, kept = last, Dummies(x.detach(), z.detach())
    thinned = curve[:: max(len(curve) // CURVE, 1)]
    return Reconstruction(kept.x, kept.z.argmax(1), best, len(curve), {}, thinned)


def _copied(x: Tensor, z: Tensor) -> Dummies:
    return Dummies(x.detach().clone(), z.detach().clone())
