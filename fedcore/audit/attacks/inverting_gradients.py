"""IG - inverting gradients (Geiping, Bauermeister, Droege, Moeller, NeurIPS 2020).

D = w0 - wT, an update or a gradient
g = gradient of the mean cross-entropy of dummies (x, y) at w0
    minimise   1 - <D, g> / (|D| |g|) + lambda TV(x)   over x in the box,
               with Adam, step size falling tenfold at 3/8, 5/8, 7/8
The loop is SME's with alpha held at 1 (sme.py): exact for one local step, and at the
wrong place after several.
Choice:  defaults are the first release's: Adam 0.1, 4 800 iterations, TV 0.1, which is
         0.2 with the half in this TV. `signed` gives Adam the sign of the gradient, as
         the authors do for deep networks. SME's authors compare with this loop in their
         own settings (lr 1, TV 0.01, 1 000 iterations); the budgets quick, standard and
         thorough do the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from fedcore.audit.attacks.base import (
    Attack,
    InversionSettings,
    Progress,
    Reconstruction,
    keep_going,
)
from fedcore.audit.attacks.sme import SurrogateSettings, match_direction
from fedcore.audit.observe import Observation


class Settings(InversionSettings):
    iterations: int = Field(4800, ge=1, description="steps of the optimiser")
    tv: float = Field(
        0.2,
        ge=0,
        description="lambda, weight of total variation, "
        "half the sum of two mean absolute differences",
    )
    lr: float = Field(0.1, gt=0, description="Adam's step size for the images")
    decay: bool = Field(
        True,
        description="step sizes fall tenfold at 3/8, 5/8 and 7/8 of the iterations",
    )
    signed: bool = Field(
        False, description="Adam gets the sign of the images' gradient"
    )


class IG(Attack[Settings]):
    needs = frozenset({"reals", "slope", "images", "classes"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = keep_going,
    ) -> list[Reconstruction]:
        at_w0 = SurrogateSettings(
            **self.s.model_dump(), alpha=1.0, learn_alpha=False, path_scale=1.0
        )
        return match_direction(seen, labels, at_w0, seed, progress)
