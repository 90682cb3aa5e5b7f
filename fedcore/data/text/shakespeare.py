"""Shakespeare's plays, speech by speech: an excerpt of 1.1 million characters.

The text is in the public domain, and is part of the package. A speech has a line with
the speaker's name and a colon, then its text; an empty line ends it. Speakers are told
apart by their names alone: "All" and "ALL" are two, and a name that is in several
plays (GLOUCESTER) is one, since the file does not say where a play begins.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import lzma
from functools import cache
from importlib import resources

from fedcore.data.text.texts import Text
from fedcore.errors import SettingsError

__all__ = ["largest_roles", "speeches", "whole_text"]

FILE = "shakespeare.json"  # the text, compressed; apps of Flower take such files
SHORTEST = 40  # characters of a speech whose speaker can be told


@cache
def whole_text() -> str:
    """The whole file, 1 115 394 characters.

    Raises SettingsError when the package's own copy is damaged.
    """
    try:
        content = resources.files(__package__).joinpath(FILE).read_text("ascii")
        stored = json.loads(content)
        text = lzma.decompress(base64.b85decode("".join(stored["lines"])))
        if hashlib.sha256(text).hexdigest() != stored["sha256"]:
            raise ValueError("its sha256 is another")
    except (OSError, ValueError, KeyError, lzma.LZMAError, binascii.Error) as error:
        raise SettingsError(
            f"fedcore/data/text/{FILE}: {error}; expected the text of the plays that "
            "fedcore carries, install it again"
        ) from error
    return text.decode("ascii")


def speeches() -> list[Text]:
    """Every speech that has text, in order.

    >>> speeches()[0]
    Text(content='Before we proceed any further, hear me speak.', \
client='First Citizen', label=None)
    """
    spoken = []
    for block in whole_text().split("\n\n"):
        head, _, content = block.strip("\n").partition("\n")
        if content.strip() and head.endswith(":"):
            spoken.append(Text(content, head.removesuffix(":")))
    return spoken


def largest_roles(texts: list[Text], number: int) -> list[Text]:
    """The longer speeches of the roles with most characters, labelled by the role.

    Raises SettingsError when there are fewer roles.
    """
    sizes: dict[str, int] = {}
    for text in texts:
        assert text.client is not None, "every speech has a speaker"
        sizes[text.client] = sizes.get(text.client, 0) + len(text.content) + 1
    if number > len(sizes):
        raise SettingsError(
            f"text.classes = {number}: there are {len(sizes)} roles; lower it"
        )
    # Of two roles of one size, the one that speaks first.
    largest = sorted(sizes, key=lambda role: -sizes[role])[:number]
    labelled = []
    for text in texts:
        if text.client in largest and len(text.content) >= SHORTEST:
            labelled.append(text._replace(label=text.client))
    return labelled
