"""Modules of the user's own, a task or a method: found, but never before ours."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from fedcore.errors import SettingsError

__all__ = ["find_user_modules", "user_module"]


def find_user_modules() -> None:
    """Let modules in the working directory be found, after everything installed.

    `python -m` puts that directory first, where a `queue.py` of the user's would be
    taken for Python's own.
    """
    here = os.getcwd()
    others = [folder for folder in sys.path if folder not in ("", here)]
    sys.path[:] = [*others, here]


def user_module(setting: str, module_name: str) -> ModuleType:
    """The module that a setting names; `setting` is how messages call it.

    Raises SettingsError when it cannot be imported, and when Python or a library has
    another module of its name, which hides it.
    """
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise SettingsError(
            f"{setting}: cannot import {module_name}: {error}; "
            "run from the folder that holds it, or install it"
        ) from error
    except Exception as error:
        raise SettingsError(
            f"{setting}: {module_name} fails while it is imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    hidden = _hidden_file(module, module_name)
    if hidden is not None:
        where = getattr(module, "__file__", None) or "built into Python"
        raise SettingsError(
            f"{setting}: {hidden} is hidden by another module of the name "
            f"{module_name} ({where}): rename yours"
        )
    return module


def _hidden_file(module: ModuleType, module_name: str) -> Path | None:
    """The user's file of this name, where another module was imported instead."""
    here = Path.cwd()
    path = here.joinpath(*module_name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if not file.is_file():
            continue
        imported = getattr(module, "__file__", None)
        if imported is None or not Path(imported).samefile(file):
            return file.relative_to(here)
    return None
