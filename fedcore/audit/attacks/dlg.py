"""DLG - deep leakage from gradients (Zhu, Liu, Han, NeurIPS 2019).

G = (w0 - wT) / (eta T)  mean gradient along the client's path; its gradient if T = 1
x, z  dummy inputs and label logits
    minimise   sum over layers of |g - G|^2,
               g = gradient at w0 of the cross-entropy of x with softmax(z)
    by         L-BFGS, step size 1, 300 steps, from N(0, 1)
Labels are found jointly, so that no labels are needed, and those given are not used.
No prior, no box, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad
from torch.nn import functional

from fedcore import trees
from fedcore.audit.attacks.base import (
    Attack,
    AttackSettings,
    Progress,
    Reconstruction,
    gradient,
    keep_going,
    noise,
    part,
)
from fedcore.audit.observe import Observation
from fedcore.engines.base import one_thread
from fedcore.inputs import model_outputs
from fedcore.types import Params

CURVE = 50  # points kept of the objective along the way


class Settings(AttackSettings):
    iterations: int = Field(
        300, ge=1, description="outer steps of L-BFGS, of up to 20 evaluations each"
    )
    lr: float = Field(1.0, gt=0, description="step size of L-BFGS")


class DLG(Attack[Settings]):
    needs = frozenset({"reals", "slope", "classes", "scale"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = keep_going,
    ) -> list[Reconstruction]:
        reconstructions = []
        for i, client in enumerate(seen):
            x = noise(client, seed, 0, (client.total_examples, *client.public.shape))
            z = noise(client, seed, 1, (client.total_examples, client.public.outputs))
            watch = part(progress, i, len(seen))
            reconstructions.append(match_gradient(client, x, z, self.s, watch))
        return reconstructions


def gradient_distance(seen: Observation) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, z) -> sum over layers of |g - G|^2, 0-d."""
    G, model = gradient(seen), seen.public.model
    start = {name: seen.w0[name] for name in G}

    def loss(moving: Params, x: Tensor, z: Tensor) -> Tensor:
        outputs = model_outputs(model, {**seen.w0, **moving}, x)
        return -(z.softmax(1) * functional.log_softmax(outputs, 1)).sum(1).mean()

    def distance(x: Tensor, z: Tensor) -> Tensor:
        difference = trees.sub(grad(loss)(start, x, z), G)
        return trees.dot(difference, difference)

    return distance


@one_thread()
def match_gradient(
    seen: Observation,
    x: Tensor,
    z: Tensor,
    settings: Settings,
    progress: Progress,
    fixed: bool = False,
) -> Reconstruction:
    """One client's inputs from dummies x [N, ...] and label logits z [N, classes].

    The labels stay as they are where `fixed`.
    """
    distance = gradient_distance(seen)
    x, z = x.requires_grad_(), z.requires_grad_(not fixed)
    optimiser = torch.optim.LBFGS([x] if fixed else [x, z], lr=settings.lr)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = distance(x, z)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    # L-BFGS without a line search may leave a good place, so the best one is kept.
    best, best_x, best_z = float("inf"), x.detach().clone(), z.detach().clone()
    curve: list[float] = []
    for i in range(settings.iterations):
        before_x, before_z = x.detach().clone(), z.detach().clone()
        # The value is that before the step.
        value = float(optimiser.step(closure))  # type: ignore[no-untyped-call]
        if value < best:
            best, best_x, best_z = value, before_x, before_z
        curve.append(value)
        goes_on = progress((i + 1) / settings.iterations, value)
        if not goes_on or not torch.isfinite(x).all():
            break
    last = float(closure()) if torch.isfinite(x).all() else float("inf")
    if last < best:
        best, best_x, best_z = last, x.detach(), z.detach()
    points = curve[:: max(len(curve) // CURVE, 1)]
    return Reconstruction(best_x, best_z.argmax(1), best, len(curve), {}, points)
