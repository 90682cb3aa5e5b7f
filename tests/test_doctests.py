"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules_with_examples() -> list[str]:
    """Modules of fedcore and of strategies whose text holds an example."""
    names = []
    for folder in ("fedcore", "strategies"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text():
                parts = file.relative_to(ROOT).with_suffix("").parts
                names.append(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_of_a_module_work(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("fedcore", "strategies", ""):
            raise
        pytest.skip(f"{missing} is not installed")
    monkeypatch.chdir(tmp_path)  # an example may write files
    results = doctest.testmod(imported)
    assert results.attempted > 0
    assert results.failed == 0, f"see the output above: {results}"
