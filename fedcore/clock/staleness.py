"""s(tau), the weight of an update by its age."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.clock.settings import Buffered

__all__ = ["discount"]


def discount(settings: Buffered, tau: Tensor) -> Tensor:
    """s(tau) of each of n updates that are tau >= 0 versions old: float64 [n].

    constant    1
    sqrt        (1 + tau)^-1/2                         (FedBuff)
    polynomial  (1 + tau)^-a                           (FedAsync)
    hinge       1 if tau <= b, else 1 / (a (tau - b) + 1)   (FedAsync)

    >>> discount(Buffered(), torch.tensor([0, 3])).tolist()
    [1.0, 0.5]
    """
    age = tau.double()
    if settings.staleness == "constant":
        return torch.ones_like(age)
    if settings.staleness == "hinge":
        late = (age - settings.b).clamp_min(0)
        return 1 / (settings.a * late + 1)
    exponent = 0.5 if settings.staleness == "sqrt" else settings.a
    return (1 + age) ** -exponent
