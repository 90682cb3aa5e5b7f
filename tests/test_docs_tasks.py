"""Every example of docs/your-own-task.md is a task that trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedcore import Experiment, run
from tests.test_docs import blocks

EXAMPLES = blocks(Path("docs/your-own-task.md"), "python")


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_trains_as_printed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = f"task_{number}_of_the_page"
    (tmp_path / f"{module}.py").write_text(EXAMPLES[number])
    settings = {
        "method": {"name": "fedavg", "local_lr": 1.0},
        "task": f"{module}:make_task",
        "population": 20,
        "partition": {"name": "iid"},
        "rounds": 8,
        "evaluation": {"every": 1},
        "holdout": 0.2,
        "engine": {"name": "vectorised", "chunk": 5},
    }
    result = run(Experiment.parse(settings), out=tmp_path / "run")
    sys.modules.pop(module)
    assert result.history[-1]["test_loss"] < result.history[0]["test_loss"]
    assert result.dropped == {}
