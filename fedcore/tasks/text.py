"""Tasks of text: next tokens, and classes of whole texts.

    shakespeare   plays, speech by speech; every speaker is a client
    texts         a file or folder of the user's, or a data set of the hub

For next tokens, clients in order of appearance until `text.base` of all characters are
the base's: their text trains the base model and the vocabulary, and they take no part.
Those after them with at least `text.least` characters are the clients, whose last
windows are held out; the test set is all that is held out together. Smaller ones are
"unseen".

For classes, the texts of clients that are not the base's are spread by `partition`. The
last fifth of each class, in order, is the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import Own
from fedcore.data.text import shakespeare as plays
from fedcore.data.text.texts import Division, Text, by_client, divided, joined
from fedcore.data.text.tokens import Tokenizer
from fedcore.data.text.vocabulary import encoded, new_tokenizer
from fedcore.data.text.windows import Windows, windows_of_all
from fedcore.errors import SettingsError
from fedcore.models.text import TextModel, TextShape
from fedcore.task import Task
from fedcore.tasks.options import refuse_folder, refuse_options

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["shakespeare", "text_task"]

DEFAULT_POPULATION = 100


def shakespeare(experiment: Experiment) -> Task:
    """Shakespeare's speakers: the next token of their speeches, or who speaks.

    Raises SettingsError for settings that the text does not allow.
    """
    refuse_options(experiment)
    refuse_folder(experiment, "the plays come with fedcore")
    return next_tokens(experiment, plays.speeches())


def next_tokens(experiment: Experiment, texts: Sequence[Text]) -> Task:
    """The task of the next token, for clients that the texts name."""
    division = division_of(experiment, texts)
    tokenizer = new_tokenizer(experiment.text, joined(division.base), plays.whole_text())
    length = experiment.text.length
    ids = encoded(tokenizer, list(division.clients.values()))
    cut, offsets = windows_of_all(ids, length, tokenizer.pad)
    data = _held_in_order(experiment, _examples(cut), offsets)
    shape = TextShape(tokenizer.size, length, tokenizer.pad)
    return Task(text_model(experiment, shape), data, loss=nll, metrics={"token_accuracy": token_accuracy})


def nll(out, y):
    ok = (y >= 0).to(out.dtype)
    logp = out.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(logp * ok).sum(1) / ok.sum(1).clamp(min=1)


def token_accuracy(out, y):
    ok = y >= 0
    return ((out.argmax(-1) == y) & ok).sum(1).to(out.dtype) / ok.sum(1).clamp(min=1)


def division_of(experiment: Experiment, texts: Sequence[Text]) -> Division:
    """The texts of the base, of clients and of those that are too small."""
    settings = experiment.text
    return divided(by_client(texts), settings.base, settings.least)


def text_model(experiment: Experiment, shape: TextShape) -> nn.Module:
    """The model for such inputs. Raises SettingsError for one of images."""
    settings = experiment.model
    if isinstance(settings, TextModel):
        return settings.build_text(shape)
    raise SettingsError(
        f'model.name = "{settings.name}": it takes images, and the task '
        f'"{experiment.task}" has text; use gpt, char-lstm or hf'
    )


def _examples(cut: Windows) -> Examples:
    return Examples(torch.from_numpy(cut.x), torch.from_numpy(cut.y))


def _held_in_order(
    experiment: Experiment, examples: Examples, offsets: np.ndarray
) -> FederatedData:
    """Clients' data, whose last rows are held out; those are the test set together."""
    order = np.arange(offsets[-1])
    holdout, seed = experiment.holdout, experiment.seed
    data = FederatedData(examples, None, order, offsets, holdout, seed)
    held = [data.rows(client, "test") for client in range(data.population)]
    rows = torch.from_numpy(np.concatenate(held))
    test = Examples(examples.x[rows], examples.y[rows])
    return FederatedData(examples, test, order, offsets, holdout, seed)
