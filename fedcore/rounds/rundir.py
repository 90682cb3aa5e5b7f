"""The run directory: config.toml, environment.json, metrics.jsonl, clients.parquet, checkpoint/, report.html, lock."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import subprocess
import tomllib
from array import array
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import __version__
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds.readout import Readout
from fedcore.storage.checkpoint import write_atomically

log = logging.getLogger("fedcore")

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)  # of a measure over clients
MAY_CHANGE = (
    "rounds",
    "engine",
    "checkpoint",
)  # settings that a resumed run may have otherwise


def open_run_dir(
    e: Experiment, out: Path | str | None, resume: Path | str | None
) -> Path:
    """The directory to write to. Raises SettingsError when it holds another run, or cannot be resumed with these settings."""
    if resume is not None:
        folder = Path(resume)
        _refuse_changes(e, folder)
        return folder
    folder = (
        Path(out)
        if out is not None
        else fresh(f"{e.method.name}-{e.task.replace(':', '-')}-seed{e.seed}")
    )
    if (folder / "config.toml").exists():
        raise SettingsError(
            f"{folder} already holds a run: resume it with --resume {folder}, or choose another --out"
        )
    if folder.is_dir() and any(
        folder.iterdir()
    ):  # a run writes and deletes in its directory
        raise SettingsError(
            f"--out {folder} is not empty and holds no run: expected a new or empty directory"
        )
    return folder


def make_run_dir(folder: Path, e: Experiment) -> None:
    """Make it and write the settings, when everything else has gone well. Raises SettingsError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder, e)
    except OSError as error:
        raise SettingsError(
            f"--out {folder}: {error.strerror}; expected a directory that can be made and written to"
        ) from error


def lock(folder: Path) -> IO[bytes]:
    """What is held while this process writes to the run: until it is closed, or the process ends in any way.

    A lock of the process and not of the file, so that forks which outlive a killed run for a moment do not hold it. Raises
    SettingsError where another process has it. Where there are no locks, nobody is refused.
    """
    try:
        file = (folder / "lock").open("wb")
    except OSError as e:
        raise SettingsError(f"{folder} cannot be written to: {e.strerror}") from e
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        file.close()
        raise SettingsError(
            f"{folder} is being written by another process: wait until it ends, or stop it"
        ) from e
    except (ImportError, OSError) as e:
        log.debug("%s cannot be locked: %s", folder, e)
    return file


def fresh(name: str) -> Path:
    """A new directory in runs/, named after the time and `name`; made at once, so that no other process takes it."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = Path("runs") / (
            f"{stamp}-{name}" if number == 1 else f"{stamp}-{name}-{number}"
        )
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise SettingsError(
                f"{folder} cannot be made: {e.strerror}; choose a directory with --out"
            ) from e
    raise AssertionError("unreachable")


def stored(folder: Path | str) -> dict[str, Any]:
    """The resolved settings of a run directory. Raises SettingsError when there are none."""
    file = Path(folder) / "config.toml"
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError as e:
        raise SettingsError(
            f"{folder} is no run directory: expected config.toml in it"
        ) from e
    except (OSError, ValueError) as e:
        raise SettingsError(f"{file} is damaged: {e}") from e


def _refuse_changes(e: Experiment, folder: Path) -> None:
    before = _leaves(
        Experiment.parse(stored(folder), source=str(folder / "config.toml")).model_dump(
            mode="json"
        )
    )
    now = _leaves(e.model_dump(mode="json"))
    changed = [
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key.split(".")[0] not in MAY_CHANGE
    ]
    if changed:
        lines = [
            f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(changed)
        ]
        raise SettingsError(
            f"{folder} cannot be resumed with other settings: {'; '.join(lines)}. "
            f"Only {', '.join(MAY_CHANGE)} may change; start a new run"
        )


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            _leaves(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return found


def write_settings(folder: Path, e: Experiment) -> None:
    write_atomically(folder / "config.toml", e.to_toml().encode())
    facts = {
        "fedcore": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(folder / "environment.json", json.dumps(facts, indent=1).encode())


def _commit() -> str | None:
    """The commit of the source tree, where this is one."""
    try:
        source = Path(__file__).parent.parent
        done = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"],
            capture_output=True,
            check=False,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def read_history(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to this round. Raises SettingsError when one is missing."""
    file = folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that a killed process did not finish
    rows = [row for row in rows if row["round"] <= rounds]
    if [row["round"] for row in rows] != list(range(1, rounds + 1)):
        raise SettingsError(
            f"{file} is damaged: expected a line for each of the {rounds} rounds of the checkpoint; start the run anew"
        )
    return rows
