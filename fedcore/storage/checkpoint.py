"""Checkpoints: tensors as safetensors, the rest as JSON, replaced in one step.

`state.json` names every file of the newest checkpoint with its SHA-256. New files are
written beside the old under names of their own. Renaming the new `state.json` over the
old is the moment at which the new checkpoint counts. A process killed at any instant
leaves the old checkpoint or the new one, whole.

Earlier checkpoints stay as `state-000012.json`: the last ones, and the best. Parts that
did not change in between are the same files; those that no checkpoint names go.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

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


Files = dict[str, dict[str, str]]  # by part: its "file" and "sha256"


class Kept(NamedTuple):
    """A checkpoint in the directory."""

    number: int
    score: float | None  # lower is better; None where the model was not judged
    files: Files


class Checkpoint:
    """One directory with the newest checkpoints of a run, and the best.

    The number of a checkpoint is the "round" of its facts.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        """`keep` are the last checkpoints that stay beside the best, at least one."""
        self.folder = folder
        self._keep = keep
        self._newest: Kept | None = None
        self._earlier: list[Kept] = []

    @property
    def _files(self) -> Files:
        return self._newest.files if self._newest is not None else {}

    @property
    def best(self) -> float | None:
        """The lowest score of a checkpoint that stays; None where none was judged."""
        scores = [one.score for one in self._all() if one.score is not None]
        return min(scores, default=None)

    def _all(self) -> list[Kept]:
        """The checkpoints that stay, by number."""
        newest = [] if self._newest is None else [self._newest]
        return [*self._earlier, *newest]

    def exists(self) -> bool:
        """Whether there is a checkpoint.

        Raises SettingsError when there are parts of one, and no file that names them.
        """
        if (self.folder / STATE).is_file():
            return True
        if any(self.folder.glob("*.safetensors")):
            problem = "missing, beside the parts of a checkpoint"
            raise self._damaged(self.folder / STATE, problem)
        return False

    def save(
        self,
        number: int,
        facts: dict[str, Any],
        parts: Iterable[tuple[str, dict[str, Tensor]]],
        unchanged: set[str] | None = None,
        score: float | None = None,
    ) -> None:
        """Write `facts` (JSON) and `parts` as checkpoint `number`.

        A part is a name and a flat tree of tensors; they are written one after another.
        Those named in `unchanged` are taken over from the previous checkpoint as they
        are. The lowest `score` is that of the best checkpoint.
        """
        # Its parent is not made: a run whose directory was deleted has nothing to save.
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        files = {part: self._files[part] for part in unchanged or set()}
        try:
            for part, tensors in parts:
                file = self.folder / f"{part}-{number:06d}.safetensors"
                files[part] = _write(file, tensors)
            state = {"version": VERSION, "round": number, **facts}
            state |= {"score": score, "files": files}
            text = json.dumps({**state, "sha256": _digest(state)}, indent=1)
            newest = Kept(number, score, files)
            earlier = self._kept_beside(newest)
            if self._newest is not None and self._newest in earlier:
                self._set_aside(self._newest.number)
            write_atomically(self.folder / STATE, text.encode())
        except Unwritable:
            self._delete(_names(files) - self._all_names())
            raise
        with writing(self.folder / STATE):
            sync_folder(self.folder)
            self._newest, self._earlier = newest, earlier
            self._delete_others()

    def make_room(self) -> bool:
        """Delete the earlier checkpoints; whether there were any."""
        if not self._earlier:
            return False
        self._earlier = []
        with writing(self.folder / STATE):
            self._delete_others()
        return True

    def _kept_beside(self, newest: Kept) -> list[Kept]:
        """The earlier checkpoints that stay when this one is written, by number."""
        # One that is written again takes the place of what it was.
        earlier = [one for one in self._all() if one.number < newest.number]
        judged = [one for one in [*earlier, newest] if one.score is not None]
        first = max(0, len(earlier) - (self._keep - 1))
        stay = {one.number for one in earlier[first:]}
        if judged:
            stay.add(min(judged, key=_rank).number)
        return [one for one in earlier if one.number in stay]

    def _set_aside(self, number: int) -> None:
        """Give the newest state a second name, that of an earlier one."""
        newest, aside = self.folder / STATE, self.folder / _state_name(number)
        part = aside.with_name(f".{aside.name}.part")
        try:
            with suppress(FileNotFoundError):
                part.unlink()
            os.link(newest, part)
            part.replace(aside)
        except OSError:  # a file system without links
            with writing(aside):
                content = newest.read_bytes()
            write_atomically(aside, content)

    def _delete(self, names: set[str]) -> None:
        """Delete the parts of a checkpoint that did not come to its end."""
        with suppress(OSError):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def _delete_others(self) -> None:
        """Delete the files that no checkpoint which stays names."""
        current = self._all_names() | {STATE}
        current |= {_state_name(one.number) for one in self._earlier}
        for file in self.folder.iterdir():
            if file.is_file() and file.name not in current:
                file.unlink(missing_ok=True)

    def _all_names(self) -> set[str]:
        """The files of the parts of all checkpoints that stay."""
        return set().union(*(_names(one.files) for one in self._all()))

    def read(self, number: int | None = None) -> dict[str, Any]:
        """The facts of checkpoint `number`, or of the newest one.

        Raises SettingsError when there is no such checkpoint, or it is damaged.
        """
        file = self.folder / STATE
        if number is not None:
            file = self._file_of(number)
        facts, self._newest = self._parse(file)
        self._earlier = []
        for earlier in self._numbers():
            if earlier < self._newest.number:
                with suppress(SettingsError):
                    kept = self._parse(self.folder / _state_name(earlier))[1]
                    self._earlier.append(kept)
        return facts

    def go_back(self) -> None:
        """Make the checkpoint that was read the newest; those after it go."""
        assert self._newest is not None, "read comes first"
        aside = self.folder / _state_name(self._newest.number)
        if aside.exists():
            with writing(aside):
                content = aside.read_bytes()
            write_atomically(self.folder / STATE, content)
        with writing(self.folder / STATE):
            sync_folder(self.folder)
            self._delete_others()

    def rounds(self) -> list[int]:
        """The numbers of the checkpoints that are there and whole, ascending."""
        numbers = set()
        for file in [self.folder / STATE, *self.folder.glob("state-*.json")]:
            with suppress(SettingsError):
                numbers.add(self._parse(file)[1].number)
        return sorted(numbers)

    def _numbers(self) -> list[int]:
        """The numbers of the states that were set aside, ascending."""
        names = [file.name for file in self.folder.glob("state-*.json")]
        found = [re.fullmatch(r"state-(\d+)\.json", name) for name in names]
        return sorted(int(match[1]) for match in found if match is not None)

    def _file_of(self, number: int) -> Path:
        """The state of checkpoint `number`. Raises SettingsError without one."""
        aside = self.folder / _state_name(number)
        if aside.is_file():
            return aside
        rounds = self.rounds()
        if rounds and number == rounds[-1]:
            return self.folder / STATE
        found = ", ".join(map(str, rounds)) or "none"
        raise SettingsError(
            f"--round {number}: {self.folder} holds no checkpoint of that round; those "
            f"that it holds are of rounds: {found}"
        )

    def _parse(self, file: Path) -> tuple[dict[str, Any], Kept]:
        """The facts in one state file, and the checkpoint that it names."""
        try:
            facts: dict[str, Any] = json.loads(file.read_bytes())
            files: Files = {}
            for part, entry in facts["files"].items():
                files[part] = {
                    "file": str(entry["file"]),
                    "sha256": str(entry["sha256"]),
                }
            # Those of an older fedcore were not judged, or never set aside.
            kept = Kept(facts.get("round", 0), facts.get("score"), files)
        except FileNotFoundError as error:
            raise SettingsError(
                f"{self.folder} holds no checkpoint: expected {STATE} in it; "
                "start the run anew without --resume"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(file, "not the JSON that was written") from error
        if facts.get("version") != VERSION:
            raise SettingsError(
                f"{file} has version {facts.get('version')}, expected {VERSION}: "
                "resume it with the fedcore that wrote it"
            )
        if facts.pop("sha256", None) != _digest(facts):
            raise self._damaged(file, "its SHA-256 is not the one that it names")
        return facts, kept

    def has(self, name: str) -> bool:
        """Whether there is such a part, after `read`."""
        return name in self._files

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, after `read`.

        Raises SettingsError when they are missing or not those that were written.
        """
        if name not in self._files:
            raise self._damaged(self.folder / STATE, f'no part "{name}"')
        file = self.folder / self._files[name]["file"]
        try:
            content = file.read_bytes()
        except OSError as error:
            raise self._damaged(file, error.strerror or str(error)) from error
        if hashlib.sha256(content).hexdigest() != self._files[name]["sha256"]:
            raise self._damaged(file, f"its SHA-256 is not the one in {STATE}")
        tensors = load(content)
        if WHOLE in tensors:
            tensors[""] = tensors.pop(WHOLE)
        return tensors

    def _damaged(self, file: Path, problem: str) -> SettingsError:
        """The error for a file of a checkpoint, with what can be done."""
        others = self._numbers()
        back = ""
        if others:
            back = f"go back to an earlier one, such as --round {others[-1]}, "
        return SettingsError(
            f"{file} is damaged ({problem}): "
            f"restore it from a copy, {back}or start the run anew without --resume"
        )


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


def _write(file: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write the file of one part; its entry in `files` is returned."""
    plain = {}
    for path, x in tensors.items():
        plain[path or WHOLE] = x.detach().cpu().contiguous()
    content = save(plain)
    write_atomically(file, content)
    return {"file": file.name, "sha256": hashlib.sha256(content).hexdigest()}


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _state_name(number: int) -> str:
    return f"state-{number:06d}.json"


def _rank(kept: Kept) -> tuple[float, int]:
    """The order from the best on; of equals the first."""
    assert kept.score is not None
    return kept.score, kept.number
