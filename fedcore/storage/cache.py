"""A cache on disk, between runs, of what is costly to compute and safe to lose.

Partitions, decoded images and chunk sizes are kept there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.storage.faults import unwritable

log = logging.getLogger("fedcore")

_noted: set[Path] = set()  # folders of which it was said that they are not written


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

    A cache that cannot be written is no error: the result is computed again. It is
    noted once.
    """
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(RuntimeError):  # this user has no home
        file = cache_dir() / f"{key}.npz"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _replace(file, content.getvalue())
        except OSError as error:
            _note(file.parent, str(unwritable(file, error, content.tell())))


def _replace(file: Path, content: bytes) -> None:
    """Other processes may write the same file at the same time, each whole."""
    descriptor, part = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(descriptor, "wb") as sink:
            sink.write(content)
        Path(part).replace(file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _note(folder: Path, reason: str) -> None:
    if folder in _noted:
        return
    _noted.add(folder)
    log.warning(
        "the cache is not written, and its results are computed again each time: %s; "
        "or set FEDCORE_CACHE to another folder than %s",
        reason,
        folder,
    )
