"""Shared by all tests: an environment of their own, small experiments, no telemetry."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

# Here and not in a fixture: modules of tests copy the environment when they are
# imported, and processes that tests start inherit it.
CACHE = tempfile.mkdtemp(prefix="fedcore-tests-")
os.environ["FEDCORE_CACHE"] = CACHE
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"

if TYPE_CHECKING:
    from fedcore.rounds.loop import Result
    from tests.helpers import Reference

# A busy machine is no failure, so Hypothesis may not look at the clock.
hypothesis.settings.register_profile(
    "fedcore",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fedcore")


def _stay_in_memory(descriptor: int) -> None:
    """Stands in for os.fsync, which only matters to machines that lose power."""


os.fsync = _stay_in_memory  # in this process; those that tests start keep theirs


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def same_models() -> None:
    """Models that a test builds start from the same parameters, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Runs of `small`, each done once: to be compared with, not to be resumed."""
    from fedcore.rounds.loop import run
    from tests.helpers import small

    results: dict[str, Result] = {}

    def result_of(method: str, **settings: object) -> Result:
        e = small(method, **settings)
        key = e.to_toml()
        if key not in results:
            results[key] = run(e, tmp_path_factory.mktemp("reference") / "run")
        return results[key]

    return result_of


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process: (exit status, stdout, stderr)."""
    from fedcore.cli import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedcore", *map(str, arguments)])
        # The command puts the working directory last, where tests have it first.
        monkeypatch.setattr(sys, "path", sys.path[:])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as e:
            status = int(e.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
