"""The task of a class of each text, such as its speaker.

The last fifth of each class, in order, is the test set; the others are spread over
clients by `partition`, as images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import Own, carve
from fedcore.data.text.shakespeare import largest_roles
from fedcore.data.text.texts import Text
from fedcore.data.text.windows import rows_of_texts
from fedcore.errors import SettingsError
from fedcore.models.text import TextShape
from fedcore.task import Task
from fedcore.tasks.text import material_of, text_model

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["classes_of_texts"]

ROLES = 10  # of Shakespeare's that are told apart, without text.classes
TESTED = 5  # one of so many texts of a class is for testing
DEFAULT_POPULATION = 100


def classes_of_texts(experiment: Experiment) -> Task:
    """The task of a class of each text that `experiment.task` names."""
    material = material_of(experiment)
    texts = material.texts
    if experiment.task == "shakespeare":
        texts = largest_roles(texts, experiment.text.classes or ROLES)
    labels, num_classes = _numbered(experiment, texts)
    tokenizer, length = material.tokenizer, experiment.text.length
    ids = [tokenizer.encode_alone(text.content, length) for text in texts]
    x = torch.from_numpy(rows_of_texts(ids, length, tokenizer.pad))
    whole = Examples(x, torch.from_numpy(labels))
    data, proxy = _spread(experiment, whole, texts)
    shape = TextShape(tokenizer.size, length, tokenizer.pad, num_classes)
    return Task(text_model(experiment, shape), data, proxy=proxy)


def _numbered(experiment: Experiment, texts: list[Text]) -> tuple[np.ndarray, int]:
    """(the class of each text, int64 [n]; the number of classes).

    Whole numbers are the classes; names are numbered in alphabetical order.
    """
    labels = [text.label for text in texts]
    if labels[0] is None:
        raise SettingsError(
            f'text.target = "label": the texts of {experiment.task} have no column '
            'label; give one, or set text.target = "next"'
        )
    wanted = experiment.text.classes
    numbers = _whole_numbers(labels)
    if isinstance(experiment.partition, Own) and (numbers is None or wanted is None):
        raise SettingsError(
            'text.target = "label": on a device with data of its own, labels must be '
            "whole numbers, the same everywhere, and text.classes must be set"
        )
    if numbers is None:
        names = sorted(set(map(str, labels)))
        numbers = np.searchsorted(names, list(map(str, labels))).astype(np.int64)
    found = int(numbers.max()) + 1
    if numbers.min() < 0 or (wanted is not None and found > wanted):
        raise SettingsError(
            f"text.classes = {wanted}: found labels from {numbers.min()} to "
            f"{numbers.max()}, expected 0 to {(wanted or found) - 1}"
        )
    return numbers, max(wanted or found, 2)


def _whole_numbers(labels: Sequence[str | int | None]) -> np.ndarray | None:
    """The labels as numbers, int64 [n]; None where one of them is a name."""
    numbers = []
    for label in labels:
        if isinstance(label, str) and not label.isdecimal():
            return None
        numbers.append(int(str(label)))
    return np.array(numbers, dtype=np.int64)


def _last_of_each(labels: np.ndarray) -> np.ndarray:
    """Whether a row is among the last fifth of its class, in order, [n].

    >>> _last_of_each(np.array([0, 1, 0, 0, 0, 0, 1])).tolist()
    [False, False, False, False, False, True, False]
    """
    is_last = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        is_last[rows[len(rows) - len(rows) // TESTED :]] = True
    return is_last


def _spread(
    experiment: Experiment, whole: Examples, texts: list[Text]
) -> tuple[FederatedData, Examples | None]:
    """(texts spread over clients, and those for testing; those of the server)."""
    labels = whole.y.numpy()
    is_test = _last_of_each(labels)
    rows, tested = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train, test = _rows(whole, rows), _rows(whole, tested)
    proxy_rows, pool = carve(labels[rows], experiment.proxy, experiment.seed)
    population = experiment.population
    if population is None and experiment.partition.name != "natural":
        population = DEFAULT_POPULATION
    groups = None
    if texts[0].client is not None:
        groups = np.array([text.client for text in texts])[rows][pool]
    part = experiment.partition.split(
        labels[rows][pool], groups, population, experiment.seed
    )
    data = FederatedData(
        train, test, pool[part.order], part.offsets, experiment.holdout, experiment.seed
    )
    proxy = _rows(train, proxy_rows) if experiment.proxy else None
    return data, proxy


def _rows(examples: Examples, rows: np.ndarray) -> Examples:
    return Examples(examples.x[rows], examples.y[rows])
