"""The public facts of a model of text: where a token's own numbers are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedcore.inputs import model_outputs
from fedcore.task import Task

__all__ = ["Vocabulary", "are_tokens", "vocabulary_of"]

PROBES = 64  # public rows, over which features are averaged


class Vocabulary(NamedTuple):
    """The tokens of a task of next tokens, and the layers with a row for each.

    Names are those of the model's parameters; None where there is no such layer.
    """

    size: int  # V
    table: str | None  # embedding [V, d] in which inputs are looked up
    weight: str | None  # of the output layer [V, d]
    bias: str | None  # of the output layer [V]
    feature: Tensor | None  # mean input of the output layer on public text, [d]


def are_tokens(x: Any) -> bool:
    """Whether inputs x [n, L] are ids of tokens.

    >>> are_tokens(torch.zeros(2, 3, dtype=torch.int64)), are_tokens(torch.zeros(2, 3))
    (True, False)
    """
    return isinstance(x, Tensor) and x.ndim == 2 and x.dtype == torch.int64


def vocabulary_of(model: nn.Module, task: Task) -> Vocabulary | None:
    """The vocabulary of a task of next tokens; None for any other task.

    `model` is on the CPU, and in evaluation mode.
    """
    x, y = task.data.x, task.data.y
    if not are_tokens(x) or y.shape != x.shape or y.is_floating_point():
        return None
    ids = task.data.test.x[:PROBES].cpu()
    ids = ids if len(ids) else torch.zeros_like(x[:1]).cpu()
    with _Watched(model, ids) as watched, torch.no_grad():
        outputs = model_outputs(model, {}, ids)
    if outputs.ndim != 3:
        return None
    names = {id(p): name for name, p in model.named_parameters()}
    table, output = watched.table, watched.output
    weight = bias = feature = None
    if output is not None and output.out_features == outputs.shape[-1]:
        weight, bias = names.get(id(output.weight)), names.get(id(output.bias))
        if watched.inputs is not None:
            feature = watched.inputs.flatten(0, -2).mean(0)
    return Vocabulary(
        outputs.shape[-1],
        None if table is None else names.get(id(table.weight)),
        weight,
        bias,
        feature,
    )


class _Watched:
    """A forward of a model, of which the first and the last layer are noted."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self.table: nn.Embedding | None = None  # which the ids are looked up in
        self.output: nn.Linear | None = None  # called last
        self.inputs: Tensor | None = None  # of that layer, [n, L, d]

    def __enter__(self) -> _Watched:
        self._hooks = []
        for layer in self._model.modules():
            if isinstance(layer, nn.Embedding):
                self._hooks.append(layer.register_forward_hook(self._looked_up))
            elif isinstance(layer, nn.Linear):
                self._hooks.append(layer.register_forward_hook(self._computed))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _looked_up(self, layer: nn.Embedding, args: tuple[Any, ...], _: Any) -> None:
        is_first = self.table is None and args[0].shape == self._ids.shape
        if is_first and torch.equal(args[0], self._ids):
            self.table = layer

    def _computed(self, layer: nn.Linear, args: tuple[Any, ...], _: Any) -> None:
        self.output, self.inputs = layer, args[0]
