"""From an experiment to a base folder: the text, the model, the loop, the files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from torch import nn

import fedcore
from fedcore.data.text.texts import fingerprints, joined
from fedcore.data.text.vocabulary import encoded
from fedcore.data.text.windows import Windows, windows_of_all
from fedcore.errors import SettingsError
from fedcore.models.base import refuse_used, save_base
from fedcore.models.text import TextShape
from fedcore.pretraining.training import BATCH, Loss, loss_on, steps_in, train
from fedcore.rng import torch_seed
from fedcore.tasks.text import TEXTS, Material, material_of, text_model

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["STEPS", "Budget", "Observer", "pretrain"]

STEPS = 1700
MEASURED = 100_000  # tokens at most whose loss is taken


class Budget(NamedTuple):
    """The length of a pretraining: steps, or minutes on this machine."""

    steps: int = STEPS
    minutes: float | None = None


class Observer(Protocol):
    """Someone who is told of the progress."""

    def started(self, text: str, steps: int) -> None:
        """Training begins; `text` says with what."""
        ...

    def stepped(self, step: int, loss: float) -> None:
        """So many steps are done; the loss of the last, in nats a token."""
        ...


def pretrain(
    experiment: Experiment, folder: Path, budget: Budget, observer: Observer
) -> dict[str, Any]:
    """Train a base on the base text, and write its folder: what base.json says.

    Raises SettingsError for a task without a base text, and for a folder in use.
    """
    _refuse(experiment)
    refuse_used(folder)
    material = material_of(experiment.model_copy(update={"base": None}))
    ids = encoded(material.tokenizer, [joined(material.division.base)])[0]
    length, seed = experiment.text.length, experiment.seed
    if len(ids) < 2:
        raise SettingsError(
            f"text.base = {experiment.text.base}: the base text has {len(ids)} tokens, "
            "expected two at least; raise it"
        )
    steps = budget.steps
    if budget.minutes is not None:
        model = _drawn(experiment, material)
        steps = steps_in(budget.minutes, model, ids, length, seed)
    model = _drawn(experiment, material)
    size = sum(parameter.numel() for parameter in model.parameters())
    observer.started(
        f"{experiment.model.name}, {size:,} parameters, on {len(ids):,} tokens of "
        f"{len(material.division.base)} clients, {steps:,} steps of {BATCH} x {length}",
        steps,
    )
    judged = _judged(material, ids, length)
    before = _losses(model, judged, material.tokenizer.characters)
    begin = time.monotonic()
    train(model, ids, length, steps, seed, observer.stepped)
    seconds = time.monotonic() - begin
    after = _losses(model, judged, material.tokenizer.characters)
    facts = {
        "fedcore": fedcore.__version__,
        "settings": _settings(experiment),
        "steps": steps,
        "seconds": round(seconds, 1),
        "parameters": size,
        "characters": _characters(material),
        "losses": {"before": before, "after": after},
        "texts": fingerprints(material.division.base),
    }
    return save_base(folder, model, material.tokenizer.to_json(), facts)


def _refuse(experiment: Experiment) -> None:
    """Raise SettingsError for an experiment that has no base text."""
    if experiment.task not in TEXTS:
        raise SettingsError(
            f'task = "{experiment.task}": a base is trained on text; expected a task '
            f"of text, {' or '.join(TEXTS)}"
        )
    if not experiment.text.base:
        raise SettingsError(
            "text.base = 0: no text is the base's, and a base may see none of the "
            "clients'; set text.base to a share of the characters, such as 0.5"
        )


def _drawn(experiment: Experiment, material: Material) -> nn.Module:
    """The model for next tokens, as the seed draws it."""
    tokenizer = material.tokenizer
    shape = TextShape(tokenizer.size, experiment.text.length, tokenizer.pad)
    with torch_seed(experiment.seed, "init"):
        return text_model(experiment, shape)


def _judged(material: Material, base: np.ndarray, length: int) -> dict[str, Windows]:
    """Windows of the base's and of the clients' text, spread evenly over each."""
    division, tokenizer = material.division, material.tokenizer
    texts: dict[str, Sequence[np.ndarray]] = {
        "base": [base],
        "clients": encoded(tokenizer, list(division.clients.values())),
    }
    judged = {}
    for name, ids in texts.items():
        cut, _ = windows_of_all(ids, length, tokenizer.pad)
        number = min(max(MEASURED // length, 1), len(cut.x))
        rows = np.arange(number) * len(cut.x) // max(number, 1)
        judged[name] = Windows(cut.x[rows], cut.y[rows])
    return judged


def _losses(
    model: nn.Module, judged: Mapping[str, Windows], characters: np.ndarray
) -> dict[str, dict[str, float]]:
    """The loss on the base's and on the clients' text."""
    losses = {}
    for name, cut in judged.items():
        loss: Loss = loss_on(model, cut, characters)
        losses[name] = loss._asdict()
    return losses


def _characters(material: Material) -> dict[str, int]:
    """Characters of the base's and of the clients' text."""
    return {
        "base": len(joined(material.division.base)),
        "clients": sum(map(len, material.division.clients.values())),
    }


def _settings(experiment: Experiment) -> dict[str, Any]:
    """The settings that a base follows from."""
    whole = experiment.model_dump(mode="json")
    return {key: whole[key] for key in ("task", "seed", "data_folder", "text", "model")}
