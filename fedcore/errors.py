"""Errors that a person can act on.

Messages say what was found, what was expected and what to do.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

from fedcore.escapes import shortened

__all__ = ["FedcoreError", "RunError", "SettingsError", "TooFewReports"]


class FedcoreError(Exception):
    """Base of every error of fedcore.

    The command line prints its message alone and exits with `exit_status`.
    """

    exit_status = 1

    def _render_traceback_(self) -> list[str]:
        """The message, as IPython shows it instead of all frames down to ours.

        `%debug` still has them.
        """
        lines = []
        for frame in traceback.extract_tb(self.__traceback__):
            if not _is_ours(frame.filename):
                lines = [f"line {frame.lineno}: {frame.line}"]
        return [*lines, f"{type(self).__name__}: {self}"]


def _is_ours(file: str) -> bool:
    """Whether a file is part of Python, a library, or fedcore."""
    folders = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
    return file.startswith((*folders, str(Path(__file__).parent), "<frozen"))


class SettingsError(FedcoreError):
    """The settings, or a file they name, cannot be used as given.

    A message quotes what the user typed: of a word without an end the middle is left
    out.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\S{301,}", lambda word: shortened(word[0]), message))


class RunError(FedcoreError):
    """The run started well and could not go on."""


class TooFewReports(RunError):
    """Fewer clients reported than the round needs.

    The loop leaves the server as it was and goes on.
    """
