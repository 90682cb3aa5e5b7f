"""`fedcore states`: what a client keeps on its device, by run, and how to be rid of it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client import store
from fedcore.errors import SettingsError
from fedcore.storage.memory import size_text

DAY = 86400.0  # seconds


def tidy(
    folder: Path, forget: Sequence[str] = (), older_than: float | None = None
) -> dict[str, Any]:
    """{"kept": [{"run", "clients", "round", "bytes", "used"}], "deleted": [the same]}, the last used first.

    Deletes the runs of `forget`, and those that were last used more than `older_than` days ago. Raises SettingsError for a
    directory that is no client's, a run that is not there, and the last used run while the client that works on it is running.
    """
    runs = store.kept(folder) if folder.is_dir() else []
    if not runs and not (folder / "device.json").exists():
        raise SettingsError(
            f"{folder}: no client has its states there; expected the --state directory of fedcore client"
        )
    for name in forget:
        if name not in {run.run for run in runs}:
            known = ", ".join(run.run for run in runs) or "none"
            raise SettingsError(
                f"--forget {name}: {folder} has no states of that run; it has those of: {known}"
            )
    end = None if older_than is None else time.time() - older_than * DAY
    deleted = [
        run for run in runs if run.run in forget or (end is not None and run.used < end)
    ]
    if deleted and deleted[0] is runs[0] and _in_use(folder):
        raise SettingsError(
            f"{folder}: a client is running on run {runs[0].run}: end it before its states are deleted"
        )
    for run in deleted:
        store.forget(folder, run.run)
    return {
        "kept": [run._asdict() for run in runs if run not in deleted],
        "deleted": [run._asdict() for run in deleted],
    }


def _in_use(folder: Path) -> bool:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for title in ("kept", "deleted"):
        for run in found[title]:
            used = datetime.fromtimestamp(run["used"], UTC).strftime(
                "%Y-%m-%d %H:%M UTC"
            )
            lines.append(
                f"{title:<8} run {run['run']}  last used {used} in round {run['round']}  {size_text(run['bytes'])}"
            )
    return "\n".join(lines) or "nothing is kept here"
