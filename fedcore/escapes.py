"""Text of others, fit for a terminal, a log and a page.

A client's reason, a file's name or a metric's may hold characters that steer a
terminal, turn the direction of the text after them, or are not seen.
"""

from __future__ import annotations

import logging

__all__ = ["PrintableRecords", "escaped", "printable", "shortened"]


def escaped(text: str) -> str:
    r"""The text in one line, with what is not printable written out.

    >>> print(escaped("red \x1b[31m, turned \u202e, two\nlines"))
    red \x1b[31m, turned \u202e, two\nlines
    """
    if text.isprintable():
        return text
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def printable(text: str) -> str:
    r"""The text with its lines and tabs, the rest that is not printable written out.

    >>> print(printable("two\nlines\r\x1b[2J"))
    two
    lines\r\x1b[2J
    """
    lines = []
    for line in text.split("\n"):
        cells = [escaped(cell) for cell in line.split("\t")]
        lines.append("\t".join(cells))
    return "\n".join(lines)


def shortened(text: str, most: int = 200) -> str:
    """The text, its middle left out where it is longer than `most`.

    >>> shortened("a" * 5000, most=30)
    'aaaaaaaaaa...aaaaaaaaaaaaaaaaa'
    """
    if len(text) <= most:
        return text
    return f"{text[: most - 20]}...{text[-17:]}"


class PrintableRecords(logging.Filter):
    """Makes every record of a logger one line of printable text."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escaped(record.getMessage()), ()
        return True
