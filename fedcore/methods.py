"""Methods by name: the files of `strategies/`, and a user's own classes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any, get_args

from fedcore.errors import SettingsError
from fedcore.escapes import shortened
from fedcore.method import Method, MethodSettings
from fedcore.users import user_module

PACKAGE = "fedcore.strategies"

RENAMED: dict[str, dict[str, str | float]] = {
    "fedavgm": {"optimizer": "momentum", "server_lr": 1.0, "beta1": 0.9},
    "fedadagrad": {"optimizer": "adagrad", "server_lr": 0.1, "beta1": 0.0},
    "fedadam": {"optimizer": "adam", "server_lr": 0.01},
    "fedyogi": {"optimizer": "yogi", "server_lr": 0.01},
}
"""Methods that became one, `fedopt`, with the settings that each of them is."""


def load(name: str) -> type[Method[Any]]:
    """The method of `strategies/<name>.py`, or the class at "package.module:Class".

    Raises SettingsError when there is none.
    """
    module_name, class_name = _place_of(name)
    module = user_module(f'method.name = "{shortened(name)}"', module_name)
    candidates = []
    for attribute, value in vars(module).items():
        home = getattr(value, "__module__", None)
        is_wanted = attribute == class_name if class_name else home == module_name
        if is_wanted and inspect.isclass(value) and issubclass(value, Method):
            candidates.append(value)
    if len(candidates) != 1:
        raise SettingsError(
            f'method.name = "{shortened(name)}": expected one subclass of Method in '
            f"{module_name}, found {len(candidates)}"
        )
    return candidates[0]


def _place_of(name: str) -> tuple[str, str]:
    """(module, class) of a method; the class is "" where the module has but one."""
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        if not class_name or not module_name or module_name.startswith("."):
            raise SettingsError(
                f'method.name = "{shortened(name)}": expected "package.module:Class"'
            )
        return module_name, class_name
    if name in RENAMED:
        lines = ['method.name = "fedopt"']
        for key, value in RENAMED[name].items():
            shown = f'"{value}"' if isinstance(value, str) else value
            lines.append(f"method.{key} = {shown}")
        raise SettingsError(
            f'method.name = "{name}": this is now fedopt with a server optimizer; '
            f"write {', '.join(lines)} (its defaults; momentum is beta1), or start "
            f"from the preset strategies/{name}.toml"
        )
    module_name = f"{PACKAGE}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module_name) is None:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(names())}"
        raise SettingsError(
            f'method.name = "{shortened(name)}": there is no such method; {hint}'
        )
    return module_name, ""


def names() -> list[str]:
    """Every method in `strategies/`."""
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def settings_of(method: type[Method[Any]]) -> type[MethodSettings]:
    """The settings class in `class FedAvg(Method[Settings])`."""
    for base in getattr(method, "__orig_bases__", ()):
        for argument in get_args(base):
            if inspect.isclass(argument) and issubclass(argument, MethodSettings):
                return argument
    raise TypeError(
        f"{method.__name__} names no settings: write "
        f"class {method.__name__}(Method[Settings])"
    )
