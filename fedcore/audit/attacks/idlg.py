"""iDLG - improved deep leakage from gradients (Zhao, Mopuri, Bilen, 2020).

DLG for one example, its label read off first. With cross-entropy,
G_i = p_i - 1[i = label] in the output layer's bias: the label is where the gradient is
negative. Then dlg.py's objective over x alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedcore.audit.attacks.base import (
    Attack,
    Progress,
    Reconstruction,
    noise,
    part,
    unwatched,
)
from fedcore.audit.attacks.dlg import Dummies, Settings, match_gradient
from fedcore.audit.attacks.labels import bias_of
from fedcore.audit.observe import Observation

SURE = 100.0  # logit of a label that is known: its softmax is 1 in float32


class IDLG(Attack[Settings]):
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
            if n != 1:
                raise ValueError(
                    f"is for one example; client {observation.client} has {n}"
                )
            x = noise(observation, seed, 0, (1, *public.shape))
            z = x.new_zeros(1, public.outputs)
            z[0, label(observation)] = SURE
            share = part(progress, i, len(seen))
            start = Dummies(x, z)
            found.append(match_gradient(observation, start, self.s, share, True))
        return found


def label(seen: Observation) -> int:
    """The class of the one example: where the output bias's gradient is least."""
    return int(bias_of(seen).argmax())
