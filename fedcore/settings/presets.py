"""Presets: where they lie, and what they hold."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import fedcore
from fedcore.errors import SettingsError
from fedcore.escapes import shortened
from fedcore.storage.text import parse_toml, read_text

__all__ = ["is_preset", "missing", "read_preset"]


def read_preset(preset: str | Path) -> dict[str, Any]:
    """The values of a TOML file. Raises SettingsError when it is missing or no TOML.

    The file is looked for as given and among those that come with fedcore. A bare name
    is that of a bundled preset, or else of one in ./strategies/.
    """
    name = str(preset)
    file = _preset_file(name)
    if file is None:
        raise SettingsError(f"{shortened(name)}: {missing(name)}")
    text = read_text(file, shortened(name), "a TOML file of settings")
    try:
        return parse_toml(text)
    except ValueError as error:
        raise SettingsError(f"{name} is not valid TOML: {error}") from None


def is_preset(preset: str) -> bool:
    """Whether there is a preset of this path or name."""
    return _preset_file(preset) is not None


def missing(preset: str) -> str:
    """What to do about a preset that is not there."""
    key, equals, value = preset.partition("=")
    if equals and key.replace(".", "").isidentifier():
        return (
            "expected a PRESET first, and settings after --set, "
            f"e.g. fedavg --set {key}={value}"
        )
    if preset.startswith("~"):
        return "there is no such preset; write the path without ~"
    if Path(preset).suffix == ".py":
        return (
            "a preset is a TOML file; a task of your own in it is "
            '--set task="module:function"'
        )
    if os.path.isdir(preset):
        return (
            "it is a directory; expected a TOML file, e.g. strategies/fedavg.toml "
            "(a run directory goes on with --resume)"
        )
    paths = {path: path for path in _bundled_presets()}
    names = {Path(path).stem: path for path in paths}
    wanted, near = paths, difflib.get_close_matches(preset, paths, 1)
    if not near:
        wanted = names
        near = difflib.get_close_matches(Path(preset).stem.lower(), names, 1)
    if not near:
        return (
            "there is no such preset; expected a TOML file, e.g. "
            "strategies/fedavg.toml, or one of those that fedcore methods lists"
        )
    nearest = wanted[near[0]]
    found = nearest if preset.endswith(".toml") else Path(nearest).stem
    return f"there is no such preset; did you mean {found}?"


def _preset_file(preset: str) -> Path | None:
    """The file of a preset: of a path the user's first, of a name the bundled one."""
    by_name = f"strategies/{preset}.toml"
    is_path = preset.endswith(".toml") or Path(preset).name != preset
    if is_path:
        places = [Path(preset), *_bundled(preset)]
    else:
        places = [*_bundled(by_name), Path(by_name), Path(preset)]
    for file in places:
        if os.path.isfile(file):  # False, not an error, for a name that is too long
            return file
    return None


def _bundled(path: str) -> list[Path]:
    """Places of a file that comes with fedcore.

    One in what is installed, two in the source tree.
    """
    return [Path(folder) / path for folder in fedcore.__path__]


def _bundled_presets() -> list[str]:
    """The paths of the methods' presets, as a user types them."""
    paths = []
    for folder in _bundled("strategies"):
        paths += [f"strategies/{file.name}" for file in folder.glob("*.toml")]
    return sorted(paths)
