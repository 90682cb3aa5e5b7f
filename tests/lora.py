"""Models with adapters, and servers of methods that mean them, for tests."""

from __future__ import annotations

from torch import nn

from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import squared_error
from fedcore.task import Task
from fedcore.tasks import TASKS


def layered_in_float64(e: Experiment) -> Task:
    """Least squares through two linear layers."""
    data = TASKS["least-squares"](e).data
    x, y = data.x.double(), data.y.double()
    test = Examples(data.test.x.double(), data.test.y.double())
    wide = FederatedData(Examples(x, y), test, data.order, data.offsets)
    model = nn.Sequential(nn.Linear(x.shape[1], 4), nn.Linear(4, 1)).double()
    return Task(model, wide, loss=squared_error, metrics={})
