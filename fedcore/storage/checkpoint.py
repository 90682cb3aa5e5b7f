"""Checkpoints: tensors as safetensors, the rest as JSON, replaced in one step.

`state.json` names every file of the checkpoint with its SHA-256. New files are written beside the old under names of their own;
renaming the new `state.json` over the old is the moment at which the new checkpoint counts; what it does not name then goes.
A process killed at any instant leaves the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load, save
from torch import Tensor

from fedcore.errors import SettingsError

VERSION = 1
STATE = "state.json"


@contextmanager
def replacing(file: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """A new file to write to, which takes the place of `file` at the end.

    Whatever happens to this process, and with `sync` to the machine, the file holds
    what it held before or all that was written.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as sink:
            yield sink
            if sync:
                sink.flush()
                os.fsync(sink.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_atomically(file: Path, content: bytes, sync: bool = True) -> None:
    """Replace the file by `content` in one step, as `replacing` does."""
    with replacing(file, sync) as sink:
        sink.write(content)


class Checkpoint:
    """One directory with the newest checkpoint of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, str]] = {}  # part -> {"file", "sha256"}

    def exists(self) -> bool:
        """Raises SettingsError when there are parts of a checkpoint, and nothing that says which."""
        if (self.folder / STATE).is_file():
            return True
        if any(self.folder.glob("*.safetensors")):
            raise self._damaged(
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
        """Write `parts` (names and flat trees of tensors, one after another) and `facts` (JSON) as checkpoint `number`.

        Parts named in `keep` are taken over from the previous checkpoint as they are.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {part: self._files[part] for part in keep or set()}
        for part, tensors in parts:
            content = save(
                {
                    path or ".": x.detach().cpu().contiguous()
                    for path, x in tensors.items()
                }
            )
            name = f"{part}-{number:06d}.safetensors"
            write_atomically(self.folder / name, content)
            files[part] = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        state = {"version": VERSION, **facts, "files": files}
        write_atomically(
            self.folder / STATE,
            json.dumps({**state, "sha256": _digest(state)}, indent=1).encode(),
        )
        sync_folder(self.folder)
        self._files = files
        current = {entry["file"] for entry in files.values()} | {STATE}
        for file in self.folder.iterdir():
            if file.is_file() and file.name not in current:
                file.unlink(missing_ok=True)

    def read(self) -> dict[str, Any]:
        """The facts of the checkpoint. Raises SettingsError when there is none, or it is damaged."""
        file = self.folder / STATE
        try:
            facts: dict[str, Any] = json.loads(file.read_bytes())
            self._files = {
                part: {"file": str(e["file"]), "sha256": str(e["sha256"])}
                for part, e in facts["files"].items()
            }
        except FileNotFoundError as e:
            raise SettingsError(
                f"{self.folder} holds no checkpoint: expected {STATE} in it; start the run anew without --resume"
            ) from e
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise self._damaged(file, "not the JSON that was written") from e
        if facts.get("version") != VERSION:
            raise SettingsError(
                f"{file} has version {facts.get('version')}, expected {VERSION}: resume it with the fedcore that wrote it"
            )
        if facts.pop("sha256", None) != _digest(facts):
            raise self._damaged(file, "its SHA-256 is not the one that it names")
        return facts

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, after `read`. Raises SettingsError when they are missing or not what was written."""
        if name not in self._files:
            raise self._damaged(self.folder / STATE, f'no part "{name}"')
        file = self.folder / self._files[name]["file"]
        try:
            content = file.read_bytes()
        except OSError as e:
            raise self._damaged(file, e.strerror or str(e)) from e
        if hashlib.sha256(content).hexdigest() != self._files[name]["sha256"]:
            raise self._damaged(file, "its SHA-256 is not the one in state.json")
        return {"" if path == "." else path: x for path, x in load(content).items()}

    def _damaged(self, file: Path, what: str) -> SettingsError:
        return SettingsError(
            f"{file} is damaged ({what}): restore it from a copy, or start the run anew without --resume"
        )


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a directory durable: a file that was renamed into it survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
