"""JSON as its standard has it: without NaN and infinity."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["without_nan"]


def without_nan(value: Any) -> Any:
    """The same nest of dicts and lists with None for every number that is not finite.

    Tuples become lists. JSON has no NaN and no infinity, and Python's `json` writes
    them all the same, which other readers refuse.

    >>> without_nan({"loss": float("nan"), "spread": (0.5, float("inf"))})
    {'loss': None, 'spread': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
