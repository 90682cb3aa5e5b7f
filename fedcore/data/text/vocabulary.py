"""The tokenizer that a run asks for, and the tokens of many texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedcore.data.text.settings import TextSettings
from fedcore.data.text.tokens import Bytes, Characters, Tokenizer, printable
from fedcore.errors import SettingsError

__all__ = ["encoded", "kind_of", "new_tokenizer"]


def new_tokenizer(settings: TextSettings, base: str, usual: str = "") -> Tokenizer:
    """The tokenizer that settings ask for, made of the base text alone.

    Where there is no base text, the characters are those of `usual`, or printable
    ASCII. Raises SettingsError for what cannot be made.
    """
    if settings.tokens == "characters":
        return Characters(base or usual or printable())
    if settings.tokens == "bytes":
        return Bytes()
    from fedcore.data.text import subwords

    if settings.tokens != "bpe":
        return subwords.from_folder(Path(settings.tokens))
    if not base:
        raise SettingsError(
            'text.tokens = "bpe": it is trained on the base text, and there is none; '
            "set text.base, or base to the folder of a model that has a tokenizer"
        )
    return subwords.trained(base, settings.vocabulary)


def kind_of(tokens: str) -> str:
    """The kind of tokenizer that `text.tokens` asks for.

    >>> kind_of("bytes"), kind_of("bpe")
    ('bytes', 'subwords')
    """
    return tokens if tokens in (Characters.kind, Bytes.kind) else "subwords"


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, int64 [n] each."""
    from fedcore.data.text.subwords import Subwords

    if isinstance(tokenizer, Subwords):
        return tokenizer.encode_all(texts)
    return [tokenizer.encode(text) for text in texts]
