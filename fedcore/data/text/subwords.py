"""Subwords: a byte-pair encoding that is trained here, or a tokenizer from a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from fedcore.errors import SettingsError
from fedcore.storage import cache

__all__ = ["Subwords", "from_folder", "trained"]

PAD = "<pad>"
REASON = 300  # characters at most of what a package says, which may be many lines
PIECE = 10_000  # characters in one piece of text that a tokenizer is trained on
# Files of a folder that may say which token is padding.
SPECIAL = ("special_tokens_map.json", "tokenizer_config.json")
MISSING = (
    "it needs the package tokenizers, which is not installed: "
    'pip install \'fedcore[hf]\', or use text.tokens = "characters" or "bytes"'
)


class Subwords:
    """A tokenizer of the package tokenizers.

    Where it has no token for padding, padding has the first id after its own.
    """

    kind = "subwords"

    def __init__(self, content: str, pad: int | None) -> None:
        """`content` is the JSON of the package. Raises ValueError for another."""
        _require()
        self._content = content
        self._tokenizer = _parsed(content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Ids may have holes: a table needs room for the largest.
        self._tokens: int = max(self._tokenizer.get_vocab().values()) + 1
        self._has_pad = pad is not None
        self.pad = self._tokens if pad is None else pad
        self.characters = self._counted()

    @property
    def size(self) -> int:
        return self._tokens if self._has_pad else self._tokens + 1

    def encode(self, text: str) -> np.ndarray:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int64)

    def encode_alone(self, text: str, length: int) -> np.ndarray:
        self._tokenizer.enable_truncation(length)
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        finally:
            self._tokenizer.no_truncation()
        return np.array(ids[:length], dtype=np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; kept in the cache."""
        digest = hashlib.sha256(self._content.encode())
        for text in texts:
            digest.update(text.encode("utf-8", errors="surrogatepass"))
            digest.update(b"\xff")  # is in no UTF-8: ends a text
        key = cache.key_of("tokens", [digest.hexdigest(), version("tokenizers")])
        arrays = cache.load(key)
        if arrays is None:
            encoded = [self.encode(text) for text in texts]
            lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
            flat = np.concatenate([np.empty(0, np.int64), *encoded])
            arrays = {"ids": flat, "lengths": lengths}
            cache.save(key, **arrays)
        return np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        kept = [int(i) for i in ids if i != self.pad]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        pad = self.pad if self._has_pad else None
        stored = {"kind": self.kind, "pad": pad}
        return json.dumps({**stored, "tokenizer": json.loads(self._content)})

    def _counted(self) -> np.ndarray:
        """Characters that each token stands for, int64 [size]."""
        settings = json.loads(self._content)
        is_of_bytes = "ByteLevel" in json.dumps(
            [settings.get("pre_tokenizer"), settings.get("decoder")]
        )
        special = set()
        for token in settings.get("added_tokens") or []:
            if token.get("special"):
                special.add(token["id"])
        counts = np.zeros(self.size, dtype=np.int64)
        for token, number in self._tokenizer.get_vocab().items():
            if number in special:
                continue
            counts[number] = _characters_of(token, is_of_bytes)
        return counts


def _parsed(content: str) -> Any:
    """A tokenizer of the package. Raises ValueError for what is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"it is no tokenizer: {error}") from error


def _characters_of(token: str, is_of_bytes: bool) -> int:
    """Characters of text that a token stands for.

    >>> _characters_of("##ing", False), _characters_of("Ġthe", True)
    (3, 4)
    """
    if is_of_bytes:
        return sum(character not in _GOES_ON for character in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int((int(token[3:5], 16) & 0b1100_0000) != 0b1000_0000)
    return len(token.removeprefix("##"))


def _signs_of_bytes() -> list[str]:
    """The character that stands for each byte in a vocabulary of bytes, [256].

    As GPT-2 has it: printable bytes stand for themselves, the others for characters
    from 256 on.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    signs, others = [], 0
    for byte in range(256):
        if byte in kept:
            signs.append(chr(byte))
        else:
            signs.append(chr(256 + others))
            others += 1
    return signs


# Signs of the bytes that go on with a character and begin none.
_GOES_ON = frozenset(_signs_of_bytes()[0x80:0xC0])


def trained(text: str, size: int) -> Subwords:
    """A byte-pair encoding with `size` entries, trained on a text; kept in the cache.

    Every byte has an entry, so that no text has unknown parts: 256 of them and padding
    leave the rest for pairs. The same for the same text, twice and everywhere. Raises
    SettingsError where the package tokenizers is not installed, and for a text that has
    too few pairs.
    """
    _require()
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
    key = cache.key_of("bpe", [digest, size, PIECE, version("tokenizers")])
    arrays = cache.load(key)
    if arrays is None:
        content = _train(text, size)
        arrays = {"json": np.frombuffer(content.encode(), np.uint8)}
        cache.save(key, **arrays)
    tokenizer = Subwords(arrays["json"].tobytes().decode(), pad=0)
    if tokenizer.size < size:
        raise SettingsError(
            f"text.vocabulary = {size}: the base text, of {len(text)} characters, "
            f"gives {tokenizer.size} entries; lower it, or raise text.base"
        )
    return tokenizer


def _train(text: str, size: int) -> str:
    """The JSON of a trained tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with _one_thread():
        tokenizer.train_from_iterator(_pieces(text), trainer)
    content: str = tokenizer.to_str()
    return content


def _pieces(text: str) -> Iterable[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, the package starts no threads, of which a later fork would warn."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def from_folder(folder: Path) -> Subwords:
    """The tokenizer of a folder of Hugging Face, as `text.tokens` names it.

    Raises SettingsError for a folder that holds none.
    """
    if not folder.is_dir():
        raise SettingsError(
            f'text.tokens = "{folder}": expected characters, bytes, bpe, or a folder '
            "with a tokenizer of Hugging Face; there is no such folder"
        )
    _require()
    file = folder / "tokenizer.json"
    try:
        content = file.read_text("utf-8") if file.is_file() else _converted(folder)
        pad = _token_of_padding(folder, content)
        return Subwords(content, pad)
    except (OSError, ValueError) as error:
        reason = shorten(str(error), REASON)
        raise SettingsError(
            f'text.tokens = "{folder}": {reason}; expected a folder with tokenizer.json'
        ) from error


def _converted(folder: Path) -> str:
    """The JSON of a tokenizer that is stored in an older way.

    Raises ValueError where transformers is not installed, or makes none of it.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "it has no tokenizer.json, and what else it holds is read by the package "
            "transformers, which is not installed: pip install 'fedcore[hf]'"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        content: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # damaged files bring about whatever it raises
        raise ValueError(f"it holds no tokenizer ({error})") from error
    return content


def _token_of_padding(folder: Path, content: str) -> int | None:
    """The id of the folder's token for padding; None where it has none."""
    tokenizer = _parsed(content)
    for name in SPECIAL:
        file = folder / name
        if not file.is_file():
            continue
        stored = json.loads(file.read_text("utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"{name}: found a {type(stored).__name__}")
        token = stored.get("pad_token")
        if isinstance(token, dict):
            token = token.get("content")
        number = None if token is None else tokenizer.token_to_id(token)
        if number is not None:
            return int(number)
    padding = json.loads(content).get("padding")
    return int(padding["pad_id"]) if padding else None


def _require() -> None:
    if importlib.util.find_spec("tokenizers") is None:
        raise SettingsError(f"text.tokens: {MISSING}")
