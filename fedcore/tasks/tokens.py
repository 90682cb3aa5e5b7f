"""The task of the next token.

Each client's text is cut into windows, the last of which are held out; the test set is
all that is held out together. Clients that are neither the base's nor large enough are
a test set of their own, "unseen". Means, weights and measures are over tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import Own
from fedcore.data.text.texts import Text, by_client
from fedcore.data.text.tokens import Tokenizer
from fedcore.data.text.vocabulary import encoded
from fedcore.data.text.windows import windows_of_all
from fedcore.errors import SettingsError
from fedcore.models.text import TextShape
from fedcore.models.writing import Writer
from fedcore.task import Task
from fedcore.tasks.text import Material, material_of, text_model
from fedcore.token_metrics import (
    nats_a_character,
    next_token_loss,
    num_targets,
    perplexity,
    token_accuracy,
)

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["next_tokens"]


def next_tokens(experiment: Experiment) -> Task:
    """The task of the next token, of the texts that `experiment.task` names."""
    material = material_of(experiment)
    tokenizer, length = material.tokenizer, experiment.text.length
    train, offsets = _windows(
        _texts_of_clients(experiment, material), tokenizer, length
    )
    if len(train.y) == 0:
        raise SettingsError(
            f'task = "{experiment.task}": no client has a token that follows another; '
            "give longer texts"
        )
    extra = {}
    if material.division.unseen:
        unseen, _ = _windows(material.division.unseen, tokenizer, length)
        extra["unseen"] = unseen
    model = text_model(experiment, TextShape(tokenizer.size, length, tokenizer.pad))
    return Task(
        model,
        _held_in_order(experiment, train, offsets),
        loss=next_token_loss,
        metrics={
            "perplexity": perplexity,
            "token_accuracy": token_accuracy,
            "nats_a_character": nats_a_character(
                torch.from_numpy(tokenizer.characters)
            ),
        },
        size=num_targets,
        extra_tests=extra,
        sample=Writer(model, tokenizer, length, seed=experiment.seed),
    )


def _texts_of_clients(experiment: Experiment, material: Material) -> dict[str, str]:
    """The text of every client by name, in order; "" of those that are elsewhere."""
    division, partition = material.division, experiment.partition
    if isinstance(partition, Own):
        part = partition.split(np.zeros(1), None, experiment.population, 0)
        whole = dict.fromkeys(map(str, range(len(part.offsets) - 1)), "")
        (whole[str(partition.client)],) = division.clients.values()
        return whole
    if material.texts[0].client is None:
        return _spread(experiment, list(division.clients.values()))
    _refuse_partition(experiment)
    return division.clients


def _refuse_partition(experiment: Experiment) -> None:
    """Raise SettingsError for a partition of texts that say whose they are.

    The default, which is of classes, says nothing.
    """
    partition = experiment.partition
    usual = type(experiment).model_fields["partition"].default
    if partition.name == "natural" or partition == usual:
        return
    raise SettingsError(
        f'partition.name = "{partition.name}": the texts of {experiment.task} name '
        'their clients, and each keeps its own; set partition.name = "natural", or '
        "leave partition out"
    )


def _spread(experiment: Experiment, texts: list[str]) -> dict[str, str]:
    """Texts that name no clients, spread over the population."""
    partition = experiment.partition
    if partition.by_class or partition.name == "natural":
        raise SettingsError(
            f'partition.name = "{partition.name}": the texts name no clients and have '
            'no classes; set partition.name = "iid" or "size_skew" and population, or '
            "give them a column client"
        )
    labels = np.zeros(len(texts), dtype=np.int64)
    part = partition.split(labels, None, experiment.population, experiment.seed)
    spread = []
    for client in range(len(part.offsets) - 1):
        for row in part.order[part.offsets[client] : part.offsets[client + 1]]:
            spread.append(Text(texts[row].removesuffix("\n"), str(client)))
    return by_client(spread)


def _windows(
    texts: dict[str, str], tokenizer: Tokenizer, length: int
) -> tuple[Examples, np.ndarray]:
    """(the windows of all texts; offsets of each text's [texts + 1])."""
    ids = encoded(tokenizer, list(texts.values()))
    cut, offsets = windows_of_all(ids, length, tokenizer.pad)
    return Examples(torch.from_numpy(cut.x), torch.from_numpy(cut.y)), offsets


def _held_in_order(
    experiment: Experiment, train: Examples, offsets: np.ndarray
) -> FederatedData:
    """Clients' data, whose last rows are held out; those are the test set together."""
    order = np.arange(offsets[-1])
    share, seed = experiment.holdout, experiment.seed
    data = FederatedData(train, None, order, offsets, share, seed, ordered=True)
    if data.evaluated_on == "train":
        return data
    held = [data.rows(client, "test") for client in range(data.population)]
    rows = torch.from_numpy(np.concatenate(held))
    test = Examples(train.x[rows], train.y[rows])
    return FederatedData(train, test, order, offsets, share, seed, ordered=True)
