"""A release of PyTorch that lacks a name: one warning, and the same results."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedcore import speed
from fedcore.rounds.loop import run
from fedcore.speed import functorch
from tests.helpers import small

SOURCE = Path(functorch.__file__).read_text()


def imported() -> list[str]:
    """Names of modules of PyTorch."""
    names = []
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch."):
            names += [alias.name for alias in node.names]
    return sorted(names)


def operators() -> list[str]:
    """Names of ATen operators: `aten.NAME.overload`."""
    names = {
        node.attr
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "aten"
    }
    return sorted(names)


class Renamed(MetaPathFinder, Loader):
    """Imports `functorch` as if PyTorch had another name for one that it needs."""

    def __init__(self, name: str) -> None:
        tree = ast.parse(SOURCE)
        for node in ast.walk(tree):
            if isinstance(node, ast.alias) and node.name == name:
                node.asname, node.name = node.asname or name, f"{name}_renamed"
            elif isinstance(node, ast.Attribute) and node.attr == name:
                node.attr = f"{name}_renamed"
        self.code = compile(tree, functorch.__file__, "exec")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname == "fedcore.speed.functorch":
            return spec_from_loader(fullname, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, vars(module))


@pytest.fixture
def rename(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with a name, and `fedcore.speed` is looked up without that name."""

    def rename(name: str) -> None:
        monkeypatch.setattr(sys, "meta_path", [Renamed(name), *sys.meta_path])
        for module in [m for m in sys.modules if m.startswith("fedcore.speed.")]:
            monkeypatch.delitem(sys.modules, module)
            child = module.removeprefix("fedcore.speed.")
            if "." not in child:
                monkeypatch.delattr(speed, child)
        speed._recorder_class.cache_clear()

    yield rename
    speed._recorder_class.cache_clear()


def test_all_that_is_asked_of_pytorch_is_tried() -> None:
    assert {"get_unwrapped", "TorchDispatchMode"} <= set(imported())
    assert {"_unsafe_view", "bmm"} <= set(operators())


@pytest.mark.parametrize("name", [*imported(), *operators()])
def test_without_one_name_a_single_warning_says_that_nothing_is_recorded(
    name: str, rename: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    rename(name)
    assert speed.step_recorder("the loss") is None
    assert speed.step_recorder("the loss") is None
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{name}_renamed" in warning.getMessage()
    assert "\n" not in warning.getMessage()


@pytest.mark.parametrize("name", [*imported(), "_unsafe_view"])
def test_without_one_name_every_engine_trains_as_before(
    name: str,
    rename: Callable[[str], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"engine__chunk": 2, "rounds": 2, "engine__name": "vectorised"}
    before = run(small("fedavg", rounds=2), tmp_path / "before")
    rename(name)
    sequential = run(small("fedavg", rounds=2), tmp_path / "sequential")
    assert not caplog.records
    vectorised = run(small("fedavg", **settings), tmp_path / "vectorised")
    assert len(caplog.records) == 1
    assert sequential.params_sha256 == before.params_sha256
    loss = pytest.approx(before.final["test_loss"], rel=1e-5)
    assert vectorised.final["test_loss"] == loss


def test_neither_the_oracle_nor_a_device_needs_this_room() -> None:
    script = """
import sys
import fedcore.config, fedcore.engines.sequential, fedcore.local, fedcore.method
import fedcore.client.app
print(*[name for name in sys.modules if name.startswith("fedcore.speed")])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
