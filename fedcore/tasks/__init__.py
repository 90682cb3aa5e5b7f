"""The bundled tasks, and the way to a user's own: from an Experiment to a Task."""

from fedcore.tasks.build import TASKS, build_task
from fedcore.tasks.image import images
from fedcore.tasks.initial import start_from
from fedcore.tasks.options import Options
from fedcore.tasks.regression import (
    LeastSquares,
    WeightedLeastSquares,
    least_squares,
    weighted_least_squares,
    weighted_squared_error,
)

__all__ = [
    "TASKS",
    "LeastSquares",
    "Options",
    "WeightedLeastSquares",
    "build_task",
    "images",
    "least_squares",
    "start_from",
    "weighted_least_squares",
    "weighted_squared_error",
]
