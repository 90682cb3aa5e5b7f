"""Modules of the user's own, a task or a method: found, but never before ours."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fedcore.errors import SettingsError

__all__ = ["find_user_modules", "name_of", "user_function", "user_module"]

# Functions that no module holds under their name, such as lambdas, by the name that
# settings have for them in this process.
_NAMELESS: dict[str, Callable[..., Any]] = {}


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


def name_of(function: Callable[..., Any]) -> str:
    """ "module:function", under which `user_function` finds it again.

    In another process, as with `fedcore run --resume`, it finds those of modules, and
    none that a notebook or a script defines, or that has no name of its own.

    >>> name_of(name_of)
    'fedcore.users:name_of'
    """
    module = getattr(function, "__module__", None) or "__main__"
    qualified = getattr(function, "__qualname__", type(function).__qualname__)
    name = f"{module}:{qualified}"
    if getattr(sys.modules.get(module), qualified, None) is function:
        return name
    numbered, number = name, 1
    while _NAMELESS.setdefault(numbered, function) is not function:
        number += 1
        numbered = f"{name}-{number}"
    return numbered


def user_function(setting: str, name: str) -> Callable[..., Any]:
    """The function that a setting names as "module:function".

    Raises SettingsError where there is none.
    """
    if name in _NAMELESS:
        return _NAMELESS[name]
    module_name, _, function_name = name.partition(":")
    if module_name.endswith(".py"):
        meant = module_name.removesuffix(".py").replace("/", ".").lstrip(".")
        raise SettingsError(
            f"{setting}: expected a module, not a file; did you mean "
            f"{meant}:{function_name}?"
        )
    is_lost = module_name == "__main__" or "<" in function_name
    module = user_module(setting, module_name)
    function = getattr(module, function_name, None)
    if callable(function):
        found: Callable[..., Any] = function
        return found
    if is_lost:
        raise SettingsError(
            f"{setting}: a function of a notebook or script, or one without a name, "
            "is not found in another process: go on from there, with run(experiment, "
            "resume=DIR), or put it in a module"
        )
    if function is None:
        raise SettingsError(f"{setting}: {module_name} has no {function_name}")
    raise SettingsError(
        f"{setting}: {function_name} is of type {type(function).__name__}; expected a "
        "function that takes the Experiment"
    )


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
