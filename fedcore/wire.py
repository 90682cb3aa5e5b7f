"""Trees of tensors as Flower records and back, driven by type annotations. Nothing is pickled.

The annotation of a client function's `down`, and of the first of its returned pair, is the schema: a field that is not declared is
not sent, and an undeclared, missing or misshapen one that arrives is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.types import Params, Tree


class WireError(FedcoreError):
    """A message does not hold what its schema declares; the text goes on from "client 17 sent"."""


def schemas(fn: Callable[..., Any]) -> tuple[Any, Any]:
    """(type of `down`, type of what comes back) of a client function."""
    hints = get_type_hints(fn)
    return hints["down"], get_args(hints["return"])[0]


def encode(tree: Tree) -> ArrayRecord:
    """One array a leaf, under its path."""
    # The separator in front keeps the path of a bare tensor, which is empty, a key like any other.
    return ArrayRecord({trees.SEPARATOR + path: _to_array(x) for path, x in trees.flatten(tree).items()})


def decode(record: ArrayRecord, schema: Any, like: Tree = None) -> Tree:
    """The tree that `schema` declares, on the CPU; `like` gives the names in its dicts, the shapes and the types that are expected.

    Raises WireError naming the first field that is missing, not declared, unreadable, or of another shape or type; TypeError for
    a schema of anything but Tensor, dict[str, Tensor] and NamedTuples of these.
    """
    found = {path.removeprefix(trees.SEPARATOR): _to_tensor(path, array) for path, array in record.items()}
    if like is None:
        tree = _take(found, schema, "")
        if found:
            raise WireError(f'"{min(found)}", which {_name(schema)} does not declare')
        return tree
    expected = trees.flatten(like)
    if missing := expected.keys() - found.keys():
        raise WireError(f'no "{min(missing)}", which {_name(schema)} declares')
    if extra := found.keys() - expected.keys():
        raise WireError(f'"{min(extra)}", which {_name(schema)} does not declare')
    for path, wanted in expected.items():
        x = found[path]
        if x.shape != wanted.shape:
            raise WireError(f'"{path}" of shape {tuple(x.shape)}, expected {tuple(wanted.shape)}')
        if x.dtype != wanted.dtype:
            raise WireError(f'"{path}" of type {_dtype(x)}, expected {_dtype(wanted)}')
    return trees.unflatten(found, like)


def _take(found: dict[str, Tensor], schema: Any, path: str) -> Tree:
    """Remove from `found` what `schema` declares at `path`, and build it."""
    if schema is Tensor:
        if path not in found:
            raise WireError(f'no "{path}", which is declared')
        return found.pop(path)
    prefix = path + trees.SEPARATOR if path else ""
    if get_origin(schema) is dict and get_args(schema) == get_args(Params):
        return {key.removeprefix(prefix): found.pop(key) for key in list(found) if key.startswith(prefix)}
    if inspect.isclass(schema) and issubclass(schema, tuple) and hasattr(schema, "_fields"):
        hints = get_type_hints(schema)
        return schema(**{field: _take(found, hints[field], prefix + field) for field in schema._fields})
    raise TypeError(f"{schema} cannot be sent: annotate with Tensor, Params (dict[str, Tensor]) or a NamedTuple of these")


def _to_array(x: Tensor) -> Array:
    if x.dtype == torch.bfloat16:  # NumPy has none: its bits travel as integers, and Flower's field says what they are
        bits = Array(x.view(torch.int16).numpy(force=True))
        return Array("bfloat16", bits.shape, bits.stype, bits.data)
    return Array(x.numpy(force=True))


def _to_tensor(path: str, array: Array) -> Tensor:
    try:
        x = torch.from_numpy(np.asarray(array.numpy(), order="C"))  # Flower loads with allow_pickle=False
        return x.view(torch.bfloat16) if array.dtype == "bfloat16" else x
    except Exception as e:  # what arrives may be anything
        raise WireError(f'"{path.removeprefix(trees.SEPARATOR)}", which cannot be read: {e}') from e


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _name(schema: Any) -> str:
    return getattr(schema, "__name__", str(schema))
