"""Values that no setting may have, whatever its own range says.

They overflow single precision, or cannot be written down in config.toml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedcore.errors import SettingsError
from fedcore.settings.faults import Origin, told

__all__ = ["plain", "refuse_extremes"]

SMALLEST, LARGEST = 1.2e-38, 3.4e38  # of float32, in which models compute
MOST = 10**9  # of whole numbers: clients, rounds, units, bytes, ...
MOST_SEED = 2**63 - 1  # of seeds and of whole numbers in options: what TOML holds
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes


def plain(values: Any) -> Any:
    """Nested dicts and lists, as TOML has them, of those values alone that were given.

    A section that was copied with `model_copy` has not been checked; its dict will be.

    >>> from fedcore.config import CheckpointSettings
    >>> plain({"checkpoint": CheckpointSettings(seconds=1)})
    {'checkpoint': {'seconds': 1.0}}
    >>> plain({"options": {"sizes": (1, 2)}})
    {'options': {'sizes': [1, 2]}}
    """
    if isinstance(values, BaseModel):
        fields = values.model_fields_set | ({"name"} & type(values).model_fields.keys())
        values = {name: getattr(values, name) for name in sorted(fields)}
    if isinstance(values, tuple | list):
        return [plain(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    return {key: plain(value) for key, value in values.items()}


def refuse_extremes(settings: BaseModel, origin: Origin) -> None:
    """Raise SettingsError for values that cannot be computed with or written down."""
    faults = []
    for key, value in _leaves(dict(settings), ""):
        message = _fault(key, value)
        if message is not None:
            faults.append(told(key, value, message, origin))
    if faults:
        raise SettingsError("\n".join(dict.fromkeys(faults)))


def _leaves(values: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no section or list; keys of dicts, too."""
    if isinstance(values, BaseModel):
        values = dict(values)
    if isinstance(values, Mapping):
        for name, value in values.items():
            inner = f"{key}.{name}" if key else str(name)
            if key:
                yield (key, name) if not isinstance(name, str) else (inner, name)
            yield from _leaves(value, inner)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, key)
    else:
        yield key, values


def _fault(key: str, value: Any) -> str | None:
    is_option = key.startswith("options.") or key == "options"
    if value is None or isinstance(value, bool):
        return (
            "expected a value, TOML has no null"
            if is_option and value is None
            else None
        )
    if isinstance(value, int):
        most = MOST_SEED if is_option or key == "seed" else MOST
        return None if abs(value) <= most else f"must be at most {most}"
    if isinstance(value, float):
        return _fault_of_float(value, is_option)
    if isinstance(value, str | Path):
        return _fault_of_text(str(value), isinstance(value, Path))
    if isinstance(value, date | time):
        return None
    return (
        f"{type(value).__name__} cannot be written to config.toml; expected text, "
        "a number, true, false, or a list or dict of those"
    )


def _fault_of_float(value: float, is_option: bool) -> str | None:
    if math.isnan(value):
        return "must be a number"
    if is_option or value == 0 or SMALLEST <= abs(value) <= LARGEST:
        return None
    return f"must be 0, or of a size from {SMALLEST:g} to {LARGEST:g}"


def _fault_of_text(text: str, is_path: bool) -> str | None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "must be text that can be written as UTF-8"
    if "\0" in text:
        return "must hold no zero byte"
    names = text.split("/")
    longest = max(len(name.encode()) for name in names)
    if is_path and (size > LONGEST_PATH or longest > LONGEST_NAME):
        return f"too long for a path, which has {LONGEST_NAME} bytes in a name at most"
    return None
