"""iDLG - improved deep leakage from gradients (Zhao, Mopuri, Bilen, 2020).

DLG for one example, its label read off first. With cross-entropy,
    G_i = p_i - 1[i = label]   in the output layer's bias,
so that the label is where the gradient is negative. Then dlg.py's objective over x
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedcore.audit.attacks.base import (
    Attack,
    Progress,
    Reconstruction,
    keep_going,
    noise,
    part,
)
from fedcore.audit.attacks.dlg import Settings, match_gradient
from fedcore.audit.attacks.labels import bias_of
from fedcore.audit.observe import Observation

SURE = 100.0  # logit of a label that is known: its softmax is 1 in float32


class IDLG(Attack[Settings]):
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
            if client.total_examples != 1:
                raise ValueError(
                    f"is for one example; client {client.client} has "
                    f"{client.total_examples}"
                )
            x = noise(client, seed, 0, (1, *client.public.shape))
            z = x.new_zeros(1, client.public.outputs)
            z[0, label(client)] = SURE
            watch = part(progress, i, len(seen))
            reconstructions.append(
                match_gradient(client, x, z, self.s, watch, fixed=True)
            )
        return reconstructions


def label(seen: Observation) -> int:
    """The class of the one example.

    It is where the gradient of the output layer's bias, w0 - wT, is least.
    """
    return int(bias_of(seen).argmax())
