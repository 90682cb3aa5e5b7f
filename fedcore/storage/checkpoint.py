"""Checkpoints: tensors as safetensors, the rest as JSON, replaced in one step.

`state.json` names every file of the checkpoint with its SHA-256. New files are written
beside the old under names of their own. Renaming the new `state.json` over the old is
the moment at which the new checkpoint counts; files that it does not name then go. A
process killed at any instant leaves the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load, save
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.storage.faults import Unwritable, unwritable, writing

VERSION = 1
STATE = "state.json"
WHOLE = "."  # the path of a tree that is one tensor; safetensors takes no empty name


@contextmanager
def replacing(
    file: Path, sync: bool = True, needed: int | None = None, mode: int = 0o666
) -> Iterator[IO[bytes]]:
    """A new file to write to, which takes the place of `file` at the end.

    Whatever happens to this process, and with `sync` to the machine, the file holds
    what it held before or all that was written. Raises Unwritable, which says that
    `needed` bytes were to be written. `mode` is that of a new file, less the umask.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        with open(part, "wb", opener=partial(os.open, mode=mode)) as sink:
            yield sink
            if sync:
                sink.flush()
                os.fsync(sink.fileno())
        part.replace(file)
    except BaseException as error:
        with suppress(OSError):  # as where the folder has gone
            part.unlink()
        if isinstance(error, OSError):  # now, for the room is that without the part
            raise unwritable(file, error, needed) from error
        raise


def write_atomically(
    file: Path, content: bytes, sync: bool = True, mode: int = 0o666
) -> None:
    """Replace the file by `content` in one step, as `replacing` does."""
    with replacing(file, sync, len(content), mode) as sink:
        sink.write(content)


class Checkpoint:
    """One directory with the newest checkpoint of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By part: its "file" and "sha256".
        self._files: dict[str, dict[str, str]] = {}

    def exists(self) -> bool:
        """Whether there is a checkpoint.

        Raises SettingsError when there are parts of one, and no file that names them.
        """
        if (self.folder / STATE).is_file():
            return True
        if any(self.folder.glob("*.safetensors")):
            raise _damaged(
                self.folder / STATE, "missing, beside the parts of a checkpoint"
            )
        return False

    def save(
        self,
        number: int,
        facts: dict[str, Any],
        parts: Iterable[tuple[str, dict[str, Tensor]]],
        keep: set[str] | None = None,
    ) -> None:
        """Write `facts` (JSON) and `parts` as checkpoint `number`.

        A part is a name and a flat tree of tensors; they are written one after another.
        Parts named in `keep` are taken over from the previous checkpoint as they are.
        """
        # Its parent is not made: a run whose directory was deleted has nothing to save.
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        files = {part: self._files[part] for part in keep or set()}
        try:
            for part, tensors in parts:
                files[part] = self._write(f"{part}-{number:06d}.safetensors", tensors)
            state = {"version": VERSION, **facts, "files": files}
            text = json.dumps({**state, "sha256": _digest(state)}, indent=1)
            write_atomically(self.folder / STATE, text.encode())
        except Unwritable:
            self._delete(_names(files) - _names(self._files))
            raise
        with writing(self.folder / STATE):
            sync_folder(self.folder)
            self._files = files
            self._delete_others()

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write the file of one part; its entry in `files` is returned."""
        plain = {}
        for path, x in tensors.items():
            plain[path or WHOLE] = x.detach().cpu().contiguous()
        content = save(plain)
        write_atomically(self.folder / name, content)
        return {"file": name, "sha256": hashlib.sha256(content).hexdigest()}

    def _delete(self, names: set[str]) -> None:
        """Delete the parts of a checkpoint that did not come to its end."""
        with suppress(OSError):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def _delete_others(self) -> None:
        """Delete the files that the newest checkpoint does not name."""
        current = _names(self._files) | {STATE}
        for file in self.folder.iterdir():
            if file.is_file() and file.name not in current:
                file.unlink(missing_ok=True)

    def read(self) -> dict[str, Any]:
        """The facts of the checkpoint.

        Raises SettingsError when there is no checkpoint, or it is damaged.
        """
        file = self.folder / STATE
        try:
            facts: dict[str, Any] = json.loads(file.read_bytes())
            files: dict[str, dict[str, str]] = {}
            for part, entry in facts["files"].items():
                files[part] = {
                    "file": str(entry["file"]),
                    "sha256": str(entry["sha256"]),
                }
        except FileNotFoundError as error:
            raise SettingsError(
                f"{self.folder} holds no checkpoint: expected {STATE} in it; "
                "start the run anew without --resume"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, "not the JSON that was written") from error
        if facts.get("version") != VERSION:
            raise SettingsError(
                f"{file} has version {facts.get('version')}, expected {VERSION}: "
                "resume it with the fedcore that wrote it"
            )
        if facts.pop("sha256", None) != _digest(facts):
            raise _damaged(file, "its SHA-256 is not the one that it names")
        self._files = files
        return facts

    def has(self, name: str) -> bool:
        """Whether there is such a part, after `read`."""
        return name in self._files

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, after `read`.

        Raises SettingsError when they are missing or not those that were written.
        """
        if name not in self._files:
            raise _damaged(self.folder / STATE, f'no part "{name}"')
        file = self.folder / self._files[name]["file"]
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _damaged(file, error.strerror or str(error)) from error
        if hashlib.sha256(content).hexdigest() != self._files[name]["sha256"]:
            raise _damaged(file, f"its SHA-256 is not the one in {STATE}")
        tensors = load(content)
        if WHOLE in tensors:
            tensors[""] = tensors.pop(WHOLE)
        return tensors


def _names(files: dict[str, dict[str, str]]) -> set[str]:
    return {entry["file"] for entry in files.values()}


def sync_folder(folder: Path) -> None:
    """Make the names in a directory durable.

    A file that was renamed into it survives a loss of power.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(file: Path, problem: str) -> SettingsError:
    return SettingsError(
        f"{file} is damaged ({problem}): "
        "restore it from a copy, or start the run anew without --resume"
    )
