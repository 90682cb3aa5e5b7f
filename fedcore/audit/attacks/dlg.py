"""DLG - deep leakage from gradients (Zhu, Liu, Han, NeurIPS 2019).

G = (w0 - wT) / (eta T)  the mean gradient along the client's path: its gradient, where T = 1   x, z  dummy inputs and label logits
    minimise   sum over layers of |g - G|^2,  g = gradient at w0 of the cross-entropy of x with softmax(z)
    by         L-BFGS, step size 1, 300 steps, from N(0, 1)
Labels are found jointly, so that no labels are needed, and those given are not used. No prior, no box, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    silent,
)
from fedcore.audit.observe import Observation
from fedcore.engines.base import one_thread
from fedcore.types import Params


class Settings(AttackSettings):
    iterations: int = Field(
        300, ge=1, description="outer steps of L-BFGS, of up to 20 evaluations each"
    )
    lr: float = Field(1.0, gt=0, description="step size of L-BFGS")


class DLG(Attack[Settings]):
    needs = frozenset({"classes", "scale"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        found = []
        for i, o in enumerate(seen):
            start = (
                noise(o, seed, 0, (o.total, *o.public.shape)),
                noise(o, seed, 1, (o.total, o.public.outputs)),
            )
            found.append(
                match_gradient(o, *start, self.s, part(progress, i, len(seen)))
            )
        return found


@one_thread()
def match_gradient(
    o: Observation,
    x: Tensor,
    z: Tensor,
    s: Settings,
    progress: Progress,
    fixed: bool = False,
) -> Reconstruction:
    """One client's inputs from dummies x [N, ...] and label logits z [N, classes]; the labels stay as they are where `fixed`."""
    G, known = gradient(o), o.public

    def loss(moving: Params, x: Tensor, z: Tensor) -> Tensor:
        outputs = functional_call(known.model, {**o.w0, **moving}, (x,))
        return -(z.softmax(1) * functional.log_softmax(outputs, 1)).sum(1).mean()

    x, z = x.requires_grad_(), z.requires_grad_(not fixed)
    optimiser = torch.optim.LBFGS([x] if fixed else [x, z], lr=s.lr)

    def closure() -> Tensor:
        optimiser.zero_grad()
        away = trees.sub(grad(loss)({name: o.w0[name] for name in G}, x, z), G)
        value = trees.dot(away, away)
        value.backward()  # type: ignore[no-untyped-call]
        found: Tensor = value.detach()
        return found

    curve, best, kept = [], float("inf"), (x.detach().clone(), z.detach().clone())
    for i in range(s.iterations):
        before = x.detach().clone(), z.detach().clone()
        value = float(optimiser.step(closure))  # type: ignore[no-untyped-call]
        if (
            value < best
        ):  # L-BFGS without a line search may leave a good place; the value is that before the step
            best, kept = value, before
        curve.append(value)
        if not progress((i + 1) / s.iterations, value) or not torch.isfinite(x).all():
            break
    last = float(closure()) if torch.isfinite(x).all() else float("inf")
    if last < best:
        best, kept = last, (x.detach(), z.detach())
    return Reconstruction(
        kept[0],
        kept[1].argmax(1),
        best,
        len(curve),
        {},
        curve[:: max(len(curve) // 50, 1)],
    )
