"""Poisoned data: what a malicious client trains on instead of its own examples.

Label flipping, y -> classes - 1 - y, and the backdoor: a white square in the lower
right corner of part of every batch, whose label becomes the target (Bagdasaryan et al.,
AISTATS 2020). The same in every engine: draws have the key (seed, round, client).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.rng import rng
from fedcore.types import Batches, Params

if TYPE_CHECKING:
    from fedcore.data.sources import Pixels
    from fedcore.task import Task

BATCH = 1000  # test examples in one forward pass


def flipped(y: Tensor, classes: int) -> Tensor:
    """Every label as its opposite, classes - 1 - y.

    >>> flipped(torch.tensor([0, 1, 9]), classes=10)
    tensor([9, 8, 0])
    """
    return classes - 1 - y


def stamped(x: Tensor, pixels: Pixels, trigger: int) -> Tensor:
    """Images [..., C, H, W] with a white square in the lower right corner.

    >>> from fedcore.data.sources import Pixels
    >>> stamped(torch.zeros(1, 2, 3), Pixels((0.5,), (0.25,)), trigger=1)
    tensor([[[0., 0., 0.],
             [0., 0., 2.]]])
    """
    marked = x.clone()
    channels = x.shape[-3]
    white = pixels.inputs(x.new_ones(channels, 1, 1))
    marked[..., -trigger:, -trigger:] = white
    return marked


class Poison:
    """The data-level attack of a run."""

    def __init__(self, settings: AdversarySettings, task: Task, seed: int) -> None:
        """Raises SettingsError where the task has no classes, or no images."""
        self.settings, self.seed = settings, seed
        self.classes = _classes(settings, task)
        self.pixels = task.pixels
        if settings.attack == "backdoor":
            _refuse_no_images(settings, task)
            _refuse_target(settings, self.classes)

    def apply(
        self, batches: Batches, rows: list[int], clients: list[int], t: int
    ) -> Batches:
        """Batches [n, K, B, ...], in which those of `rows`, `clients`, are poisoned."""
        x, y, mask = batches
        if self.settings.attack == "label_flip":
            y = y.clone()
            y[rows] = flipped(y[rows], self.classes)
            return Batches(x, y, mask)
        assert self.pixels is not None
        x, y = x.clone(), y.clone()
        for row, client in zip(rows, clients, strict=True):
            chosen = self._chosen(mask[row].cpu() > 0, client, t).to(y.device)
            marked = stamped(x[row][chosen], self.pixels, self.settings.trigger)
            x[row, chosen] = marked
            y[row, chosen] = self.settings.target
        return Batches(x, y, mask)

    def _chosen(self, is_real: Tensor, client: int, t: int) -> Tensor:
        """The examples of a client's batches that are stamped, bool [K, B].

        A share of each batch, rounded up, drawn over its real examples: padding changes
        no draw.
        """
        draw = rng(self.seed, "backdoor", t, client)
        chosen = torch.zeros_like(is_real)
        for k, real in enumerate(is_real):
            places = real.nonzero().flatten()
            if len(places) == 0:
                continue
            wanted = math.ceil(round(self.settings.share * len(places), 9))
            order = torch.from_numpy(draw.permutation(len(places)))
            chosen[k, places[order[:wanted]]] = True
        return chosen


def _classes(settings: AdversarySettings, task: Task) -> int:
    classes = task.data.num_classes()
    if classes is None:
        raise SettingsError(
            f'adversary.attack = "{settings.attack}" changes labels, but the targets '
            "of the task are no classes (one whole number an example, from 0 on): "
            'choose an attack on messages, e.g. "sign_flip"'
        )
    return classes


def _refuse_no_images(settings: AdversarySettings, task: Task) -> None:
    x = task.data.x
    is_image = isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()
    if not is_image or task.pixels is None:
        shape = tuple(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__
        raise SettingsError(
            'adversary.attack = "backdoor" stamps images [C, H, W], but the inputs of '
            f"the task are {shape}, with pixels = {task.pixels}: make the task with "
            'pixels=Pixels(...) where they are images, or choose "label_flip"'
        )
    side = min(x.shape[2:])
    if settings.trigger > side:
        raise SettingsError(
            f"adversary.trigger = {settings.trigger}: a square of so many pixels does "
            f"not fit into images of {x.shape[2]} x {x.shape[3]}"
        )


def _refuse_target(settings: AdversarySettings, classes: int) -> None:
    if settings.target >= classes:
        raise SettingsError(
            f"adversary.target = {settings.target}: the task has {classes} classes, "
            f"expected 0 to {classes - 1}"
        )


@torch.no_grad()
def backdoor_success(
    task: Task, params: Params, settings: AdversarySettings
) -> float | None:
    """The share of test examples of other classes that become the target if stamped.

    None where there is no such example.
    """
    assert task.pixels is not None
    x, y = task.data.test
    others = (y != settings.target).nonzero().flatten()
    if len(others) == 0:
        return None
    fooled = torch.zeros((), dtype=torch.int64, device=y.device)
    with task.evaluating():
        for places in torch.split(others, BATCH):
            images = stamped(x[places], task.pixels, settings.trigger)
            outputs = task.predict(params, images)
            fooled += (outputs.argmax(1) == settings.target).sum()
    return int(fooled) / len(others)
