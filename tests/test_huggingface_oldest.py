"""The oldest versions that the extra `hf` allows, in an environment of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# With the first release of each, the first that goes with it.
ALONG = ["huggingface_hub==1.3.0"]

VERSIONS = "import peft, transformers as t; print(t.__version__, peft.__version__)"


def oldest() -> list[str]:
    """The least version of each package of the extra, as pip takes it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = []
    for line in project["project"]["optional-dependencies"]["hf"]:
        bound = re.match(r"([\w-]+)>=([\d.]+)", line)
        assert bound is not None, f"no least version: {line}"
        wanted.append("==".join(bound.groups()))
    return wanted


@pytest.mark.network
def test_the_oldest_versions_batch_and_record(tmp_path: Path) -> None:
    """A decoder of each kind of layer, and an encoder, with adapters."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "old"], check=True)
    python = tmp_path / "old" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, *oldest(), *ALONG], check=True, timeout=900)
    # What is there already comes behind what has been installed.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = tmp_path / "old" / "lib" / version / "site-packages"
    here = sysconfig.get_paths()["purelib"]
    (folder / "behind.pth").write_text(f"{here}\n", encoding="utf-8")
    found = subprocess.run(
        [python, "-c", VERSIONS],
        check=True,
        capture_output=True,
        text=True,
    )
    for name, version in zip(
        ("transformers", "peft"), found.stdout.split(), strict=True
    ):
        assert any(f"{name}=={version}".startswith(line) for line in oldest())
    kinds = "llama or gpt2 or bert or folder or dropout or named or names or frozen"
    tests = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", "0"]
    tests += ["-m", "not slow", "-k", kinds, "tests/test_huggingface.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        tests,
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-300:]
