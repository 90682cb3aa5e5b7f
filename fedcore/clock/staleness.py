"""A stand-in, until its part is handed in: replace this file."""

from __future__ import annotations
from torch import Tensor
from fedcore.clock.settings import Buffered


def discount(settings: Buffered, tau: Tensor) -> Tensor:
    return (1 + tau.double()) ** (0 if settings.staleness == "constant" else -0.5)
