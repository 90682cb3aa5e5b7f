"""A task whose clients keep much and share little, to see where states go."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import squared_error
from fedcore.task import Task


class Wide(nn.Module):
    """One shared parameter, and 16 000 that a client keeps: 64 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(1, 1, bias=False)
        self.own = nn.Parameter(torch.zeros(16_000))
        nn.init.zeros_(self.shared.weight)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.shared(x) + self.own.mean()
        return outputs


def wide(e: Experiment) -> Task:
    """One example a client: 1 -> its id."""
    n = e.population or 1
    rows = Examples(torch.ones(n, 1), torch.arange(float(n))[:, None])
    data = FederatedData(rows, rows, np.arange(n), np.arange(n + 1))
    return Task(Wide(), data, loss=squared_error, metrics={})
