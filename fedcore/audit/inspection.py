"""Models made to leak: what a client can see in the parameters that it is sent, before it answers.

A server that attacks actively changes the model, so that an update holds single inputs. The attacks themselves are not built.

Imprint layers   Fowl et al., ICLR 2022 (Robbing the Fed): rows of a linear layer are one direction, their biases are graded
Large weights    Boenisch et al., EuroS&P 2023 (trap weights); Wen et al., ICML 2022 (fishing): out of the range of initialisers
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from fedcore.audit.attacks.analytic import first_layer
from fedcore.audit.observe import Observation
from fedcore.types import Params

ALIKE = 0.999  # cosine from which two rows are one direction
ROWS = 8  # of a layer, at least, for its rows to be compared; and numbers in a row
RANGE = 10  # times as large as when it was initialised is suspicious
SMALL = 0.1  # root mean square of a bias that training may reach from nothing


def inspect_model(seen: Observation) -> list[str]:
    """What is suspicious in the parameters that this client was sent, one line each.

    A first layer on the raw input is named, too: it gives inputs away without any change.
    """
    found = []
    with suppress(ValueError):
        name, _ = first_layer(seen)
        found.append(
            f'the first layer ("{name}") is linear on the raw input: an input that alone makes a row active is given away'
        )
    initial = {name: p.detach() for name, p in seen.public.model.named_parameters()}
    for name, w in seen.w0.items():
        if alike := _imprint(seen.w0, name):
            found.append(
                f'{alike} of {len(w)} rows of "{name}" are one direction with graded biases: a layer that imprints single inputs'
            )
        usual = max(_size(initial.get(name, w)), SMALL if w.ndim < 2 else 0.0)
        if _size(w) > RANGE * usual > 0:
            times = _size(w) / usual
            found.append(
                f'"{name}" is {times:.0f} times as large as it is initialised: enough to choose whose gradient is left'
            )
    return found


def _imprint(w: Params, name: str) -> int:
    """Rows of a weight that are one direction while their biases differ, if that is half of them; else 0."""
    weight, bias = w[name], w.get(name.removesuffix("weight") + "bias")
    if (
        weight.ndim != 2
        or min(weight.shape) < ROWS
        or bias is None
        or bias.shape != weight.shape[:1]
        or name.endswith("bias")
    ):
        return 0
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    rows = (unit @ unit.T > ALIKE).double()
    group = rows[int(rows.sum(1).argmax())] > 0
    alike = int(group.sum())
    graded = len(torch.unique(bias[group])) > alike / 2
    return alike if graded and alike >= max(ROWS, len(weight) / 2) else 0


def _size(x: Tensor) -> float:
    """Root mean square; 0 of nothing."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0
