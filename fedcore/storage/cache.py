"""A cache on disk, between runs, of what is costly to compute and safe to lose.

Partitions, decoded images and chunk sizes are kept there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def cache_dir() -> Path:
    """$FEDCORE_CACHE, or fedcore in $XDG_CACHE_HOME, or ~/.cache/fedcore."""
    if folder := os.environ.get("FEDCORE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedcore"


def key_of(kind: str, depends_on: Any) -> str:
    """A file name for a result, from everything that it depends on (JSON)."""
    text = json.dumps(depends_on, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under this key; None without any, or from a damaged file."""
    try:
        with (
            (cache_dir() / f"{key}.npz").open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            return {name: arrays[name] for name in arrays.files}
    except Exception:  # a damaged file can raise nearly anything in zipfile and numpy
        return None


def save(key: str, **arrays: np.ndarray) -> None:
    """Keep arrays under this key.

    A cache that cannot be written is no error: the result is computed again.
    """
    # RuntimeError: this user has no home.
    with contextlib.suppress(OSError, RuntimeError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=cache_dir(), prefix=f".{key}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            Path(part).replace(cache_dir() / f"{key}.npz")
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
