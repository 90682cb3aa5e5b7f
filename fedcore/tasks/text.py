"""Tasks of text: which texts there are, who has them, and the model that reads them.

    shakespeare   plays, speech by speech; every speaker is a client
    texts         a file or folder of the user's, or a data set of the hub

Clients in order of appearance until `text.base` of all characters are the base's: their
text trains the base model and the vocabulary, and they take no part. What is predicted
is the next token (`fedcore.tasks.tokens`), or a class of each text
(`fedcore.tasks.classes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedcore.data.partition import Own
from fedcore.data.text import shakespeare as plays
from fedcore.data.text.files import Columns, read_texts
from fedcore.data.text.texts import (
    Division,
    Text,
    by_client,
    divided,
    fingerprints,
    joined,
)
from fedcore.data.text.tokens import Tokenizer, load_tokenizer
from fedcore.data.text.vocabulary import kind_of, new_tokenizer
from fedcore.errors import SettingsError
from fedcore.models.base import check_tokenizer, read_facts
from fedcore.models.text import TextModel, TextShape
from fedcore.tasks.options import read_options, refuse_folder, refuse_options

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = [
    "TEXTS",
    "Material",
    "TextsOptions",
    "material_of",
    "text_model",
    "texts_of",
]


class TextsOptions(BaseModel):
    """Options of `texts`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | None = Field(
        None, min_length=1, description="a data set on the hub, in data_folder's place"
    )
    split: str = Field("train", min_length=1, description="the part of `dataset`")
    text: str = Field("text", min_length=1, description="the column of texts")
    client: str = Field("client", min_length=1, description="the column of clients")
    label: str = Field("label", min_length=1, description="the column of classes")


class Material(NamedTuple):
    """The text of a run, divided, and its tokenizer."""

    texts: list[Text]  # of those who are not the base's
    division: Division  # the text of every client
    tokenizer: Tokenizer


def material_of(experiment: Experiment) -> Material:
    """The text of the base, of clients and of those that are too small.

    And the tokenizer: that of the base folder where there is one, else one that is made
    of the base text. Where texts name no clients, each is one by itself. Raises
    SettingsError for settings that the text does not allow.
    """
    settings = experiment.text
    texts = texts_of(experiment)
    share, least = settings.base, settings.least
    if isinstance(experiment.partition, Own):
        _refuse_own_vocabulary(experiment)
        share = 0.0
    if isinstance(experiment.partition, Own) or settings.target == "label":
        least = 0  # those with text are not the clients of the run
    division = divided(by_client(_with_clients(texts)), share, least)
    left = [text for text in _with_clients(texts) if text.client not in division.base]
    if texts[0].client is None:
        left = [text._replace(client=None) for text in left]
    _refuse_tokens_of_others(experiment)
    if experiment.base is None:
        usual = plays.whole_text() if experiment.task == "shakespeare" else ""
        tokenizer = new_tokenizer(settings, joined(division.base), usual)
    else:
        tokenizer = _tokenizer_of_base(experiment, experiment.base)
        _refuse_seen(experiment, experiment.base, division)
    return Material(left, division, tokenizer)


def texts_of(experiment: Experiment) -> list[Text]:
    """The texts of `experiment.task`, in order; with a client and label, all or none.

    On a device that has data of its own, all are its client's.
    """
    texts = TEXTS[experiment.task](experiment)
    if isinstance(experiment.partition, Own):
        return [text._replace(client=OWNER) for text in texts]
    return texts


def _refuse_tokens_of_others(experiment: Experiment) -> None:
    """Raise SettingsError where a pretrained model would read ids that it never saw."""
    folder, tokens = getattr(experiment.model, "path", None), experiment.text.tokens
    if folder is None or tokens not in ("characters", "bytes", "bpe"):
        return
    if (folder / "tokenizer.json").is_file():
        raise SettingsError(
            f'text.tokens = "{tokens}": model.path = {folder} has a tokenizer of its '
            "own, and other ids mean nothing to it; set text.tokens to that folder"
        )


def _refuse_own_vocabulary(experiment: Experiment) -> None:
    """Raise SettingsError on a device that cannot know the run's vocabulary."""
    if experiment.text.base and experiment.base is None:
        raise SettingsError(
            f"text.base = {experiment.text.base}: the vocabulary is that of a base "
            "text, which this device has not; pretrain a base, set base = DIR, and "
            "give the device a copy of the folder"
        )


OWNER = "own"  # the name of the client whose device this is


def _with_clients(texts: list[Text]) -> list[Text]:
    """The texts, each by itself a client where they name none."""
    if texts[0].client is not None:
        return texts
    return [text._replace(client=str(i)) for i, text in enumerate(texts)]


def _speeches(experiment: Experiment) -> list[Text]:
    refuse_options(experiment)
    refuse_folder(experiment, "the plays come with fedcore")
    return plays.speeches()


def _own_texts(experiment: Experiment) -> list[Text]:
    options = read_options(experiment, TextsOptions)
    columns = Columns(options.text, options.client, options.label)
    folder = experiment.data_folder
    if (folder is None) == (options.dataset is None):
        raise SettingsError(
            f'task = "{experiment.task}": expected data_folder = FILE (.jsonl, .csv, '
            ".parquet, or a folder), or options.dataset = NAME of the hub, and not both"
        )
    if folder is not None:
        return read_texts(folder, columns)
    from fedcore.data.text.hub import texts_of_hub

    return texts_of_hub(str(options.dataset), options.split, columns)


TEXTS: dict[str, Callable[[Experiment], list[Text]]] = {
    "shakespeare": _speeches,
    "texts": _own_texts,
}


def _tokenizer_of_base(experiment: Experiment, folder: Path) -> Tokenizer:
    """The tokenizer of a base. Raises SettingsError for a base of other settings."""
    facts = read_facts(folder)
    check_tokenizer(folder, facts)
    tokenizer = load_tokenizer(folder, f"base = {folder}")
    asked = experiment.text.tokens
    if tokenizer.kind != kind_of(asked):
        raise SettingsError(
            f'text.tokens = "{asked}": base = {folder} has {tokenizer.kind}; set '
            "text.tokens to what it was pretrained with"
        )
    _refuse_other_tokens(experiment, folder, facts)
    _refuse_other_model(experiment, folder, facts)
    return tokenizer


def _refuse_other_tokens(
    experiment: Experiment, folder: Path, facts: Mapping[str, Any]
) -> None:
    """Raise SettingsError where subwords are of another kind than the base's.

    The folder of a tokenizer may be another on each machine.
    """
    asked = experiment.text.tokens
    trained = facts.get("settings", {}).get("text", {}).get("tokens", asked)
    if (asked == "bpe") != (trained == "bpe"):
        raise SettingsError(
            f'text.tokens = "{asked}": base = {folder} was pretrained with '
            f'text.tokens = "{trained}"; set that, or pretrain another'
        )


def _refuse_other_model(
    experiment: Experiment, folder: Path, facts: Mapping[str, Any]
) -> None:
    """Raise SettingsError where model settings are not those of the base.

    Some, such as the number of heads, show in no shape. The folder of a model may be
    another on each machine.
    """
    trained = facts.get("settings", {}).get("model", {})
    for key, value in experiment.model.model_dump(mode="json").items():
        if key in trained and trained[key] != value and key != "path":
            raise SettingsError(
                f"model.{key} = {value}: base = {folder} was pretrained with "
                f"model.{key} = {trained[key]}; set that, or pretrain another"
            )


def _refuse_seen(experiment: Experiment, folder: Path, division: Division) -> None:
    """Raise SettingsError where the base has seen a client's text."""
    facts = read_facts(folder)
    seen = set(facts.get("texts", []))
    share = facts.get("settings", {}).get("text", {}).get("base")
    for texts in (division.clients, division.unseen):
        for name, digest in zip(texts, fingerprints(texts), strict=True):
            if digest in seen:
                raise SettingsError(
                    f"text.base = {experiment.text.base}: base = {folder} was "
                    f"pretrained with text.base = {share}, and has seen the text of "
                    f'client "{name}"; set that, or pretrain another'
                )


def text_model(experiment: Experiment, shape: TextShape) -> nn.Module:
    """The model for such inputs. Raises SettingsError for one of images."""
    settings = experiment.model
    if isinstance(settings, TextModel):
        return settings.build_text(shape)
    raise SettingsError(
        f'model.name = "{settings.name}": it takes images, and the task '
        f'"{experiment.task}" has text; use gpt, char-lstm or hf'
    )
