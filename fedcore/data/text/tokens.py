"""Tokens of text: characters, bytes, or the subwords of a trained tokenizer.

    characters   those of a given text, sorted; then one id for all others, then padding
    bytes        of UTF-8, 0 to 255, then padding
    subwords     of a byte-pair encoding, or of a tokenizer of Hugging Face:
                 `fedcore.data.text.subwords`

A vocabulary is made of the base text alone: from the clients' it would give away what
they write. Padding has an id of its own, which is no token.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedcore.errors import SettingsError

__all__ = ["FILE", "Bytes", "Characters", "Tokenizer", "load_tokenizer", "printable"]

FILE = "tokenizer.json"  # in a base folder
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for an unknown character in a text


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    pad: int  # the id of padding
    characters: np.ndarray  # int64 [size], characters that a token stands for

    @property
    def size(self) -> int:
        """Ids, padding among them."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int64 [n]."""
        ...

    def encode_alone(self, text: str, length: int) -> np.ndarray:
        """At most `length` ids of a text that is an example by itself.

        With the tokens that a tokenizer puts before and after such a text.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, without padding."""
        ...

    def to_json(self) -> str:
        """The whole tokenizer, as `load_tokenizer` reads it."""
        ...


class Characters:
    """Single characters; those that are not in the vocabulary share one id.

    >>> tokenizer = Characters("cab")
    >>> tokenizer.encode("abz").tolist(), tokenizer.size, tokenizer.pad
    ([0, 1, 3], 5, 4)
    """

    kind = "characters"

    def __init__(self, text: str) -> None:
        """The vocabulary is every character in `text`."""
        self.vocabulary = "".join(sorted(set(text)))
        self._codes = _code_points(self.vocabulary)
        self.unknown = len(self.vocabulary)
        self.pad = self.unknown + 1
        self.characters = np.ones(self.size, dtype=np.int64)
        self.characters[self.pad] = 0

    @property
    def size(self) -> int:
        return len(self.vocabulary) + 2

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        places = np.searchsorted(self._codes, codes)
        nearest = self._codes[np.minimum(places, max(self.unknown - 1, 0))]
        ids: np.ndarray = np.where(nearest == codes, places, self.unknown)
        return ids.astype(np.int64)

    def encode_alone(self, text: str, length: int) -> np.ndarray:
        return self.encode(text[:length])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        table = [*self.vocabulary, UNKNOWN, ""]
        return "".join(table[int(i)] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self.vocabulary})


class Bytes:
    """The bytes of UTF-8.

    >>> Bytes().encode("é").tolist()
    [195, 169]
    """

    kind = "bytes"
    pad = 256

    def __init__(self) -> None:
        # A character's first byte stands for it, those that go on with it for none.
        ids = np.arange(self.size)
        goes_on = (ids & 0b1100_0000) == 0b1000_0000
        self.characters = np.where(goes_on | (ids == self.pad), 0, 1).astype(np.int64)

    @property
    def size(self) -> int:
        return 257

    def encode(self, text: str) -> np.ndarray:
        content = text.encode("utf-8", errors="surrogatepass")
        return np.frombuffer(content, np.uint8).astype(np.int64)

    def encode_alone(self, text: str, length: int) -> np.ndarray:
        return self.encode(text[:length])[:length]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        kept = [int(i) for i in ids if i != self.pad]
        return bytes(kept).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})


def printable() -> str:
    """Characters of a vocabulary where there is no base text: printable ASCII.

    >>> len(printable())
    97
    """
    return string.digits + string.ascii_letters + string.punctuation + " \n\t"


def load_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a base folder, which `name` is called in messages.

    Raises SettingsError for a folder without one, and for a file that is none.
    """
    file = folder / FILE
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return from_stored(stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SettingsError(
            f"{name}: {FILE} cannot be read ({reason}); expected a folder that "
            "`fedcore pretrain` wrote"
        ) from error


def from_stored(stored: Any) -> Tokenizer:
    """The tokenizer that `to_json` wrote. Raises ValueError, KeyError for another."""
    if not isinstance(stored, dict):
        raise ValueError(f"found a {type(stored).__name__}")
    if stored["kind"] == Characters.kind:
        return Characters(stored["characters"])
    if stored["kind"] == Bytes.kind:
        return Bytes()
    from fedcore.data.text.subwords import Subwords

    if stored["kind"] == Subwords.kind:
        return Subwords(json.dumps(stored["tokenizer"]), stored["pad"])
    raise ValueError(f'its kind is "{stored["kind"]}"')


def _code_points(text: str) -> np.ndarray:
    """The numbers of the characters, uint32 [n]."""
    content = text.encode("utf-32-le", errors="surrogatepass")
    return np.frombuffer(content, dtype="<u4")
