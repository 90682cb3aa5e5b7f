"""An evaluation that failed: which metric did, and how to go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.errors import RunError

if TYPE_CHECKING:
    from fedcore.task import Task
    from fedcore.types import Params


def evaluation_fault(
    task: Task, params: Params, error: Exception, t: int, folder: Path
) -> RunError:
    """The error of an evaluation of the test set after round t, which names the metric.

    It is found by measuring each alone.
    """
    culprit = "the model"
    for name, metric in task.metrics.items():
        alone = copy.copy(task)
        alone.metrics = {name: metric}
        try:
            alone.test(params)
        except Exception as own:
            if type(own) is type(error) and str(own) == str(error):
                culprit = f'the metric "{name}"'
                break
    what = str(error).strip().partition("\n")[0]
    return RunError(
        f"round {t}: {culprit} failed on the test set: {type(error).__name__}: {what}; "
        f"the rounds before are kept: mend it, and go on with "
        f"fedcore run --resume {folder}"
    )
