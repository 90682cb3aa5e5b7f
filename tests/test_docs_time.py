"""The tutorial of time does what it prints."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.config import Experiment

PAGE = Path("docs/time-tutorial.md")
Cli = Callable[..., tuple[int, str, str]]


def blocks(language: str) -> list[str]:
    """The page's blocks of code in one language."""
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, PAGE.read_text(), re.MULTILINE | re.DOTALL)


def files_in(folder: Path) -> None:
    """The files that the page has its reader write."""
    (toml,), (python,) = blocks("toml"), blocks("python")
    (folder / "phones.toml").write_text(toml)
    exec(compile(python, "make_files.py", "exec"), {})


def test_the_page_says_what_a_run_says() -> None:
    """Its outputs were printed by the commands above them."""
    text = PAGE.read_text()
    assert "OUT_" not in text
    assert "_NOTE" not in text


def test_the_presets_of_the_tutorial_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PAGE.resolve()
    monkeypatch.setattr("tests.test_docs_time.PAGE", page)
    monkeypatch.chdir(tmp_path)
    files_in(tmp_path)
    names = sorted(file.stem for file in tmp_path.glob("*.toml"))
    assert names == ["all", "buffered", "deadline", "first", "memory", "phones"]
    for name in names:
        assert tomllib.loads((tmp_path / f"{name}.toml").read_text())
        assert Experiment.load(f"{name}.toml").clock.is_on


@pytest.mark.slow
def test_the_tutorial_of_time_works_as_printed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PAGE.resolve()
    monkeypatch.setattr("tests.test_docs_time.PAGE", page)
    monkeypatch.chdir(tmp_path)
    commands = [block.strip().split()[1:] for block in blocks("sh")]
    files_in(tmp_path)
    for file in tmp_path.glob("*.toml"):
        short = re.sub(r"rounds = \d+", "rounds = 6", file.read_text())
        file.write_text(short)
    lines = []
    for block in blocks("sh"):
        lines += block.strip().splitlines()
    for line in lines:
        status, out, err = cli(*line.split()[1:])
        assert status == 0, f"{line}: {err}"
        assert out
    assert len(commands) >= 6
    again = tmp_path / "runs" / "again" / "arrivals.parquet"
    assert again.exists()
