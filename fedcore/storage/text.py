"""Text files of the user's, as editors and shells on every system write them."""

from __future__ import annotations

import codecs
import tomllib
from pathlib import Path
from typing import Any

from fedcore.errors import SettingsError

__all__ = ["parse_toml", "read_text"]

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(file: Path, name: str, expected: str) -> str:
    r"""The text of a file, with or without a byte-order mark, its lines ended by \n.

    It is UTF-8, or UTF-16 with a mark, as Windows' PowerShell writes it. Messages call
    the file `name`, and say that `expected` should be there. Raises SettingsError for a
    directory, a file that cannot be read, and one that holds no text.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{name} cannot be read: {error.strerror}; expected {expected}"
        ) from error
    try:
        text = content.decode("utf-16" if content[:2] in UTF_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{name} is no text ({error.reason} at byte {error.start}): "
            f"expected {expected}, saved as UTF-8"
        ) from error
    if "\0" in text:
        raise SettingsError(
            f"{name} is no text (a zero byte at character {text.index(chr(0))}): "
            f"expected {expected}"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_toml(text: str) -> dict[str, Any]:
    """The values that a TOML document holds. Raises ValueError where it is none.

    >>> parse_toml("rounds = 3")
    {'rounds': 3}
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
