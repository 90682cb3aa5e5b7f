"""Texts from the hub of Hugging Face, where there is a network."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedcore.data.sources import unreachable
from fedcore.data.text.files import Columns, Row, complete, text_of
from fedcore.data.text.texts import Text
from fedcore.errors import SettingsError
from fedcore.storage import cache

__all__ = ["texts_of_hub"]

OTHERWISE = (
    "give data_folder a file with the texts (.jsonl, .csv or .parquet), or run once "
    "with a network, which downloads them"
)


def texts_of_hub(name: str, split: str, columns: Columns) -> list[Text]:
    """All texts of a data set on the hub; downloaded once, and kept in the cache.

    Raises SettingsError where it cannot be had.
    """
    key = cache.key_of("texts", [name, split, columns])
    cached = cache.load(key)
    if cached is not None:
        stored = json.loads(cached["json"].tobytes())
        return [Text(*fields) for fields in stored]
    reason = unreachable()
    if reason is not None:
        raise SettingsError(
            f"options.dataset = {name}: it is not here, and {reason}: {OTHERWISE}"
        )
    texts = complete(_downloaded(name, split, columns), f"options.dataset = {name}")
    content = json.dumps(texts).encode()
    cache.save(key, json=np.frombuffer(content, np.uint8))
    return texts


def _downloaded(name: str, split: str, columns: Columns) -> list[Text]:
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, split=split)
        names = rows.column_names
    except Exception as error:
        # Whatever the hub's client raises, the user needs to know the other ways.
        raise SettingsError(
            f"options.dataset = {name}: it could not be had from the hub "
            f"({type(error).__name__}): {OTHERWISE}"
        ) from error
    if columns.text not in names:
        raise SettingsError(
            f"options.dataset = {name}: found columns {', '.join(names)}, expected "
            f'one "{columns.text}"; name it with options.text'
        )
    texts = []
    for number, row in enumerate(rows):
        place = f"options.dataset = {name}, row {number}"
        texts.append(text_of(Row(place, row), columns))
    return texts
