"""A model's inputs, which are a tensor or a tree of tensors, and its outputs.

    a tensor                    model(x)
    a dict                      model(**x), as models of Hugging Face are called;
                                model(x) where forward does not take these names
    a tuple or a NamedTuple     model(*x); model(x) where forward does not take so many

Every tensor has one row an example, [B, ...]. Outputs that carry `logits`, as an
attribute or under that name, stand for them: loss and metrics get the logits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.types import Params, Tree

__all__ = ["model_outputs", "num_rows", "pad_sequences", "shapes"]


def model_outputs(model: nn.Module, params: Params, x: Tree) -> Any:
    """Outputs of the model with these parameters for inputs `x`; its logits, if any.

    >>> model_outputs(nn.Linear(2, 3), {}, torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    >>> pair = torch.ones(5, 2), torch.ones(5, 4)
    >>> model_outputs(nn.Bilinear(2, 4, 1), {}, pair).shape
    torch.Size([5, 1])
    """
    args, kwargs = arguments(model, x)
    return logits_of(functional_call(model, params, args, kwargs))


def arguments(model: nn.Module, x: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments that `x` is for the model."""
    if isinstance(x, Tensor):
        return (x,), {}
    forward = getattr(model.forward, "__func__", model.forward)
    is_bound = forward is not model.forward
    if isinstance(x, dict):
        spreads = _takes(forward, is_bound, 0, tuple(x))
        return ((), x) if spreads else ((x,), {})
    spreads = _takes(forward, is_bound, len(x), ())
    return (tuple(x), {}) if spreads else ((x,), {})


@functools.lru_cache(maxsize=256)
def _takes(
    forward: Callable[..., Any], is_bound: bool, count: int, names: tuple[str, ...]
) -> bool:
    """Whether `forward` takes so many arguments and these names.

    Yes, too, where it does not take one argument either: its error names them.
    """
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return True
    own = int(is_bound)
    if _binds(signature, own + count, names):
        return True
    return not _binds(signature, own + 1, ())


def _binds(signature: inspect.Signature, count: int, names: tuple[str, ...]) -> bool:
    """Whether a call with so many positional arguments, and these names, is valid."""
    try:
        signature.bind(*(None,) * count, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def logits_of(outputs: Any) -> Any:
    """The logits of a ModelOutput, a NamedTuple or a dict that has them; else as is."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


def num_rows(x: Tree) -> int:
    """The number of examples."""
    return len(trees.leaves(x)[0])


def shapes(x: Tree) -> str:
    """The shape of one example, in words of a message.

    >>> shapes({"ids": torch.zeros(3, 7), "mask": torch.zeros(3, 7)})
    'ids (7,), mask (7,)'
    """
    if isinstance(x, Tensor):
        return str(tuple(x.shape[1:]))
    flat = trees.flatten(x).items()
    return ", ".join(f"{path} {tuple(leaf.shape[1:])}" for path, leaf in flat)


def pad_sequences(
    sequences: Sequence[Any],
    name: str = "x",
    mask: str = "mask",
    value: float = 0,
    length: int | None = None,
) -> dict[str, Tensor]:
    """Sequences of different lengths as inputs of one length, with a mask.

    `sequences` are n tensors, arrays or lists [T_i, ...]. Under `name` comes
    [n, T, ...], filled up at the end with `value`; under `mask` int64 [n, T], 1 where
    there is a sequence, as tokenizers give it. T is the longest T_i, or `length`, which
    training and test set must have alike.

    A model takes both by name, and counts with the mask: `mask == 0` is the
    `src_key_padding_mask` of `nn.TransformerEncoder`, and a mean over T is
    `(h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)`. For models of Hugging
    Face: `pad_sequences(ids, "input_ids", "attention_mask")`. Raises SettingsError for
    sequences that do not fit each other, or `length`.

    >>> pad_sequences([[5, 6, 7], [8]], "tokens")
    {'tokens': tensor([[5, 6, 7],
            [8, 0, 0]]), 'mask': tensor([[1, 1, 1],
            [1, 0, 0]])}
    """
    if name == mask:
        raise SettingsError(
            f'pad_sequences: name and mask are both "{name}": give one another name'
        )
    tensors = _alike(sequences)
    lengths = [len(x) for x in tensors]
    longest = max(lengths) if length is None else length
    if max(lengths) > longest:
        worst = lengths.index(max(lengths))
        raise SettingsError(
            f"pad_sequences: sequence {worst} has {max(lengths)} steps, length = "
            f"{length}: cut it, or raise length"
        )
    padded = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), value)
    for row, x in zip(padded, tensors, strict=True):
        row[: len(x)] = x
    steps = torch.arange(longest, device=padded.device)
    ends = torch.tensor(lengths, device=padded.device)
    return {name: padded, mask: (steps < ends[:, None]).long()}


def _alike(sequences: Sequence[Any]) -> list[Tensor]:
    """The sequences as tensors [T_i, ...] that differ in T_i alone.

    Raises SettingsError where they do not, or where there is none.
    """
    tensors = []
    for i, sequence in enumerate(sequences):
        try:
            x = torch.as_tensor(sequence)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingsError(
                f"pad_sequences: sequence {i} is no tensor [T, ...]: {error}"
            ) from error
        if x.ndim == 0:
            raise SettingsError(
                f"pad_sequences: sequence {i} is a single number: expected [T, ...]"
            )
        tensors.append(x)
    if not tensors:
        raise SettingsError("pad_sequences got no sequence: expected one at least")
    start = next((i for i, x in enumerate(tensors) if len(x)), 0)
    first = tensors[start]
    for i, x in enumerate(tensors):
        if len(x) == 0 and x.ndim == 1:  # of an empty list nothing else is known
            tensors[i] = first[:0]
        elif x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
            raise SettingsError(
                f"pad_sequences: sequence {i} is {x.dtype} {_axes(x)}, sequence "
                f"{start} {first.dtype} {_axes(first)}: expected the same but for T"
            )
    return tensors


def _axes(x: Tensor) -> str:
    return f"[{', '.join(['T', *map(str, x.shape[1:])])}]"
