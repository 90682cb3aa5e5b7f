"""`fedcore states`: the states on a client's device, by run, and how to delete them."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcore.errors import SettingsError
from fedcore.storage.memory import size_text

from . import store

DAY = 86400.0  # seconds


def tidy(
    folder: Path, forget: Sequence[str] = (), older_than: float | None = None
) -> dict[str, Any]:
    """Delete the runs of `forget`, and those last used over `older_than` days ago.

    {"kept": [{"run", "clients", "round", "bytes", "used"}], "deleted": [the same]},
    the last used first. Raises SettingsError for a directory that is no client's, a run
    that is not there, and the last used run while its client is running.
    """
    runs = store.kept(folder) if folder.is_dir() else []
    if not runs and not (folder / "device.json").exists():
        raise SettingsError(
            f"{folder}: no client has its states there; "
            "expected the --state directory of fedcore client"
        )
    names = [run.run for run in runs]
    for name in forget:
        if name not in names:
            raise SettingsError(
                f"--forget {name}: {folder} has no states of that run; "
                f"it has those of: {', '.join(names) or 'none'}"
            )
    oldest = 0.0 if older_than is None else time.time() - older_than * DAY
    kept: list[store.Kept] = []
    deleted: list[store.Kept] = []
    for run in runs:
        is_unwanted = run.run in forget or run.used < oldest
        (deleted if is_unwanted else kept).append(run)
    if deleted and deleted[0] is runs[0] and _is_in_use(folder):
        raise SettingsError(
            f"{folder}: a client is running on run {runs[0].run}: "
            "end it before its states are deleted"
        )
    for run in deleted:
        store.forget(folder, run.run)
    return {
        "kept": [run._asdict() for run in kept],
        "deleted": [run._asdict() for run in deleted],
    }


def _is_in_use(folder: Path) -> bool:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def text(states: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for title in ("kept", "deleted"):
        for run in states[title]:
            used = datetime.fromtimestamp(run["used"], UTC)
            lines.append(
                f"{title:<8} run {run['run']}  last used {used:%Y-%m-%d %H:%M} UTC "
                f"in round {run['round']}  {size_text(run['bytes'])}"
            )
    return "\n".join(lines) or "nothing is kept here"
