"""Faults of writing in one line: the folder, what is wrong with it, and the room."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcore.errors import RunError
from fedcore.storage.memory import size_text


class Unwritable(RunError, OSError):
    """A file could not be written; its message is for a person.

    An OSError as well, for those that go on without the file.
    """

    def __init__(self, message: str, cause: OSError) -> None:
        super().__init__(message)
        self.message = message
        self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return self.message


def unwritable(file: Path, error: OSError, needed: int | None = None) -> Unwritable:
    """The error for a file that could not be written, or a folder to be made.

    `needed` are the bytes that it was to have, where that is known.

    >>> fault = OSError(errno.EROFS, os.strerror(errno.EROFS))
    >>> print(unwritable(Path("run/config.toml"), fault))
    run is on a read-only file system: config.toml cannot be written to it
    """
    if isinstance(error, Unwritable):
        return error
    folder, name = file.parent, file.name
    code = error.errno
    need = f"{name} needs more"
    if needed is not None:
        need = f"{size_text(needed)} needed for {name}"
    if code == errno.ENOSPC:
        text = f"{folder} is full: {_room(folder)} free, {need}; make room"
    elif code == errno.EDQUOT:
        text = f"{folder}: this user's quota there is used up, {need}; make room"
    elif code == errno.EFBIG:
        text = f"{folder}: a file may not be so large here, {need}; see ulimit -f"
    elif code == errno.EROFS:
        text = f"{folder} is on a read-only file system: {name} cannot be written to it"
    elif code in (errno.EACCES, errno.EPERM):
        text = f"{folder} may not be written to by this user: {name} cannot be written"
    elif code in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        text = f"{folder} is not there: was it deleted, or unmounted?"
    else:
        text = f"{file} cannot be written: {error.strerror or error}"
    return Unwritable(text, error)


def _room(folder: Path) -> str:
    """The room in a folder, or in the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        facts = os.statvfs(folder)
    except OSError:
        return "an unknown room"
    room = size_text(facts.f_bavail * facts.f_frsize)
    if facts.f_files and not facts.f_favail:
        return f"{room}, but no more files,"
    return room


@contextmanager
def writing(file: Path, needed: int | None = None) -> Iterator[None]:
    """Inside, an OSError is raised as Unwritable, about this file."""
    try:
        yield
    except OSError as error:
        raise unwritable(file, error, needed) from error


class Lines:
    """Lines added to the end of a file, each whole or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with writing(file):
            self._sink = file.open("ab", buffering=0)

    def add(self, line: str) -> None:
        """Add a line, without its end of line; raises Unwritable."""
        content = f"{line}\n".encode()
        before = os.fstat(self._sink.fileno()).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._sink.write(rest) :]
        except OSError as error:
            with writing(self.file):
                os.ftruncate(self._sink.fileno(), before)
            raise unwritable(self.file, error, len(content)) from error

    def sync(self) -> None:
        """Make what was added outlast a loss of power."""
        with writing(self.file):
            os.fsync(self._sink.fileno())

    def close(self) -> None:
        self._sink.close()
