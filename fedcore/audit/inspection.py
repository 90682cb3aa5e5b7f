"""Signs of a model that was made to leak, in the parameters that a client is sent.

A server that attacks actively changes the model, so that an update holds single inputs.
Such attacks are looked for here, and are not built.

Imprint layers   Fowl et al., ICLR 2022 (Robbing the Fed): the rows of a linear layer
                 are one direction, and their biases are graded
Large weights    Boenisch et al., EuroS&P 2023 (trap weights); Wen et al., ICML 2022
                 (fishing): parameters out of the range of initialisers
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.audit.attacks.analytic import first_layer
from fedcore.audit.observe import Observation
from fedcore.types import Params

ALIKE = 0.999  # cosine from which two rows are one direction
ROWS = 8  # of a layer, at least, for its rows to be compared; and numbers in a row
RANGE = 10  # times as large as when it was initialised is suspicious
SMALL = 0.1  # root mean square that training may give to a bias that began as nothing


def inspect_model(seen: Observation) -> list[str]:
    """Suspicions about the parameters that this client was sent, one line each.

    A first layer on the raw input is named, too: it gives inputs away as it is.
    """
    lines = []
    layer = first_layer(seen)
    if layer is not None:
        lines.append(
            f'the first layer ("{layer.weight}") is linear on the raw input: '
            "an input that alone makes a row active is given away"
        )
    initial = dict(seen.public.model.named_parameters())
    for name, w in seen.w0.items():
        alike = _imprinting_rows(seen.w0, name)
        if alike:
            lines.append(
                f'{alike} of {len(w)} rows of "{name}" are one direction with graded '
                "biases: a layer that imprints single inputs"
            )
        at_start = _size(initial[name].detach() if name in initial else w)
        usual = max(at_start, SMALL) if w.ndim < 2 else at_start
        size = _size(w)
        if size > RANGE * usual > 0:
            lines.append(
                f'"{name}" is {size / usual:.0f} times as large as it is initialised: '
                "enough to choose whose gradient is left"
            )
    return lines


def _imprinting_rows(w: Params, name: str) -> int:
    """Rows of a weight that are one direction while their biases differ.

    0 where that is less than half of the rows, or `name` is no weight of a layer with
    a bias.
    """
    weight, bias = w[name], w.get(name.removesuffix("weight") + "bias")
    if bias is None or name.endswith("bias") or weight.ndim != 2:
        return 0
    if min(weight.shape) < ROWS or bias.shape != weight.shape[:1]:
        return 0
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    rows = (unit @ unit.T > ALIKE).double()
    group = rows[int(rows.sum(1).argmax())] > 0
    alike = int(group.sum())
    is_graded = len(torch.unique(bias[group])) > alike / 2
    return alike if is_graded and alike >= max(ROWS, len(weight) / 2) else 0


def _size(x: Tensor) -> float:
    """Root mean square; 0 where there are no values."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0
