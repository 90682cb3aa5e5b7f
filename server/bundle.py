"""The Flower app that clients get: this fedcore's source, and the run's settings."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab

import fedcore
from fedcore import __version__
from fedcore.config import Experiment
from fedcore.data.text import shakespeare

PRESET = "fedcore-run.toml"  # the run's settings in the bundle

PYPROJECT = f"""\
[project]
name = "fedcore"
version = "{__version__}"

[tool.flwr.app]
publisher = "fedcore"
fab-include = ["**/*.py", "**/*.toml"MORE]

[tool.flwr.app.components]
serverapp = "fedcore.server.app:app"
clientapp = "fedcore.client.app:app"

[tool.flwr.app.config]
preset = "{PRESET}"
set = ""
"""


def bundle_of(experiment: Experiment) -> Fab:
    """Flower's bundle of an experiment.

    With the data that fedcore carries where the task needs them: every node gets it.
    """
    data = {shakespeare.FILE} if experiment.task == "shakespeare" else set()
    more = ', "**/*.json"' if data else ""  # Flower refuses a pattern without a file
    root = Path(fedcore.__file__).parent.parent
    files: dict[str, bytes | Path] = {
        "pyproject.toml": PYPROJECT.replace("MORE", more).encode(),
        PRESET: experiment.to_toml().encode(),
    }
    for folder in _folders():
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".toml") or file.name in data:
                files[file.relative_to(root).as_posix()] = file
    content, *_ = build_fab_from_files(files)
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def _folders() -> list[Path]:
    """The folders of fedcore's source: one in what is installed, four in the tree."""
    inner = Path(fedcore.__file__).parent
    names = ("strategies", "server", "client")
    folders = [importlib.import_module(f"fedcore.{name}").__path__[0] for name in names]
    beside = [Path(folder) for folder in folders if inner not in Path(folder).parents]
    return [inner, *beside]
