"""The run directory: its settings, its history, and who may write to it.

It holds config.toml, environment.json, metrics.jsonl, clients.parquet, checkpoint/,
report.html and lock.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from fedcore import __version__
from fedcore.errors import SettingsError
from fedcore.storage.checkpoint import STATE, write_atomically
from fedcore.storage.faults import Unwritable, unwritable
from fedcore.storage.text import parse_toml, read_text

if TYPE_CHECKING:
    from fedcore.config import Experiment

log = logging.getLogger("fedcore")

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)  # of a measure over clients
LOCKS = {"lock", "run.lock", "server.lock"}  # files that hold nothing
LONGEST = 120  # characters of a run's name
# Settings that a resumed run may have otherwise, and one that goes back to a round.
MAY_CHANGE = ("rounds", "engine", "checkpoint")
MAY_CHANGE_BACK = (*MAY_CHANGE, "aggregation")


def open_run_dir(
    experiment: Experiment,
    out: Path | str | None,
    resume: Path | str | None,
    back_to: int | None = None,
) -> Path:
    """The directory to write to: `resume`, `out`, or a new one in runs/.

    `back_to` is the round that a resumed run goes back to, where it does.

    Raises SettingsError when it holds another run, or one that cannot go on with these
    settings.
    """
    if resume is not None:
        folder = Path(resume)
        may_change = MAY_CHANGE if back_to is None else MAY_CHANGE_BACK
        _refuse_changes(experiment, folder, may_change)
        return folder
    if back_to is not None:
        raise SettingsError(
            f"--round {back_to} without --resume: expected --resume DIR, the run that "
            "is to go back"
        )
    if out is None:
        task = experiment.task.replace(":", "-")
        return fresh(f"{experiment.method.name}-{task}-seed{experiment.seed}")
    if not isinstance(out, str | Path) or out == "":
        raise SettingsError(f"out = {out!r}: expected the path of a directory")
    folder = Path(out)
    _refuse_path(folder)
    _refuse_taken(folder)
    # A run writes and deletes in its directory.
    if folder.is_dir() and not _is_start(folder):
        raise SettingsError(
            f"--out {folder} is not empty and holds no run: "
            "expected a new or empty directory"
        )
    return folder


def has_round(folder: Path) -> bool:
    """Whether a round of a run was done in this directory, as far as can be read."""
    metrics, state = folder / "metrics.jsonl", folder / "checkpoint" / STATE
    try:
        if metrics.exists() and metrics.stat().st_size > 0:
            return True
        if not state.exists():
            return any(state.parent.glob("*.safetensors"))
        return bool(json.loads(state.read_bytes())["round"] != 0)
    except (OSError, ValueError, KeyError, TypeError):
        return True  # something is there that is better not deleted


def _is_start(folder: Path) -> bool:
    """Whether a directory holds nothing, or a run that came to no round."""
    names = {file.name for file in folder.iterdir()}
    return "config.toml" in names or names <= LOCKS


def _refuse_taken(folder: Path) -> None:
    if has_round(folder):
        raise SettingsError(
            f"{folder} already holds a run: resume it with --resume {folder}, "
            "or choose another --out"
        )


FILES = ("metrics.jsonl", "clients.parquet", "arrivals.parquet", "report.html")
FOLDERS = ("checkpoint", "clients", "arrivals", "captures")


def clear_start(folder: Path) -> None:
    """Delete the files of a run that came to no round; other files stay.

    Raises SettingsError where a round was done.
    """
    _refuse_taken(folder)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _refuse_path(folder: Path) -> None:
    """Raise SettingsError for a path that cannot be a directory that is written to."""
    try:
        is_there = folder.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"--out {str(folder)[:80]}: {reason}; expected a directory"
        ) from error
    if is_there and not folder.is_dir():
        raise SettingsError(f"--out {folder} is a file: expected a directory")
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingsError(
            f"--out {folder}: {nearest} may not be written to; choose another --out"
        )


def make_run_dir(folder: Path) -> None:
    """Make it, when everything else has gone well.

    Raises SettingsError when that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(file: Path, error: OSError) -> SettingsError | Unwritable:
    """The error for what cannot be made: of the disk where it is full."""
    fault = unwritable(file, error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return fault
    return SettingsError(f"--out: {fault}; choose another directory")


def lock(folder: Path) -> IO[bytes]:
    """The lock of a run, held until it is closed or this process ends in any way.

    It is a lock of the process and not of the file, so that forks which outlive a
    killed run for a moment do not hold it. Raises SettingsError where another process
    has it. On a system without locks every process gets it.
    """
    try:
        file = (folder / "lock").open("wb")
    except OSError as error:
        raise _refused(folder / "lock", error) from error
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise SettingsError(
            f"{folder} is being written by another process: "
            "wait until it ends, or stop it"
        ) from error
    except (ImportError, OSError) as error:
        log.debug("%s cannot be locked: %s", folder, error)
    return file


def fresh(name: str) -> Path:
    """A new directory in runs/, named after the time and `name`.

    It is made at once, so that no other process takes it.
    """
    name = re.sub(r"[^\w.+=-]+", "-", name)[:LONGEST]
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"-{number}"
        folder = Path("runs") / f"{stamp}-{name}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise _refused(folder, error) from error
    raise AssertionError("unreachable")


def stored(folder: Path | str) -> dict[str, Any]:
    """The resolved settings of a run directory. Raises SettingsError without any."""
    file = Path(folder) / "config.toml"
    if not os.path.isfile(file):
        raise SettingsError(f"{folder} is no run directory: expected config.toml in it")
    try:
        settings = parse_toml(read_text(file, str(file), "the settings of a run"))
    except ValueError as error:
        raise SettingsError(f"{file} is damaged: {error}") from error
    engine = settings.get("engine")
    if isinstance(engine, dict):  # of an earlier fedcore: they were of devices only
        for key in ("round_timeout", "report_goal"):
            engine.pop(key, None)
    return settings


def changed_settings(experiment: Experiment, folder: Path) -> dict[str, list[Any]]:
    """By dotted key: [what the run in `folder` had, what it has now]."""
    source = str(folder / "config.toml")
    settings = type(experiment).parse(stored(folder), source=source)
    before = _leaves(settings.model_dump(mode="json"))
    now = _leaves(experiment.model_dump(mode="json"))
    changed = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            changed[key] = [old, new]
    return changed


def changed_rule(experiment: Experiment, folder: Path) -> dict[str, list[Any]]:
    """The changed settings that move the curve from here on."""
    rule = {}
    for key, values in changed_settings(experiment, folder).items():
        if key.startswith("aggregation."):
            rule[key] = values
    return rule


def _refuse_changes(
    experiment: Experiment, folder: Path, may_change: tuple[str, ...]
) -> None:
    changes, changed = [], changed_settings(experiment, folder)
    schedule = experiment.local.schedule
    if "rounds" in changed and schedule != "constant":
        old, new = changed["rounds"]
        raise SettingsError(
            f"{folder} cannot be resumed: rounds was {old} and is now {new}, and the "
            f'step sizes of local.schedule = "{schedule}" follow from the number of '
            f"rounds; set rounds = {old}, or start a new run"
        )
    for key, (old, new) in changed.items():
        if key.split(".")[0] not in may_change:
            changes.append(f"{key} was {old!r} and is now {new!r}")
    if changes:
        raise SettingsError(
            f"{folder} cannot be resumed with other settings: {'; '.join(changes)}. "
            f"Only {', '.join(may_change)} may change; start a new run"
        )


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts, by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def write_settings(folder: Path, experiment: Experiment, base: str = "") -> None:
    """Write config.toml, and environment.json with what else the run depends on.

    `base` is the SHA-256 of the task's frozen parameters, "" where none is frozen.
    """
    write_atomically(folder / "config.toml", experiment.to_toml().encode())
    has_cuda = torch.cuda.is_available()
    environment = {
        "fedcore": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cuda": torch.cuda.get_device_name() if has_cuda else None,
        "base_sha256": base or None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = json.dumps(environment, indent=1).encode()
    write_atomically(folder / "environment.json", content)


def refuse_other_base(folder: Path, base: str, written: str | None = None) -> None:
    """Raise SettingsError where a run was made on other frozen parameters than `base`.

    `written` is what the run's checkpoint says of them; by default environment.json is
    read. A run of an earlier fedcore says nothing, and is not refused.
    """
    if written is None:
        try:
            environment = json.loads((folder / "environment.json").read_bytes())
        except (OSError, ValueError):
            return
        if not isinstance(environment, dict) or "base_sha256" not in environment:
            return
        written = environment["base_sha256"] or ""
    if written == base:
        return
    raise SettingsError(
        f"{folder} was made on another base ({short_sha256(str(written))}) than the "
        f"one that is here now ({short_sha256(base)}): put that one back where base, "
        "or model.path, says, or start a new run"
    )


def short_sha256(base: str) -> str:
    """The beginning of a SHA-256 of frozen parameters, as messages have it.

    >>> short_sha256("0123456789abcdef")
    'sha256 0123456789ab'
    >>> short_sha256("")
    'nothing frozen'
    """
    return f"sha256 {base[:12]}" if base else "nothing frozen"


def _commit() -> str | None:
    """The commit of the source tree, where this is one."""
    source = str(Path(__file__).parent.parent)
    command = ["git", "-C", source, "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, check=False, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
