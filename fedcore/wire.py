"""Trees of tensors as Flower records and back, driven by type annotations. Nothing is pickled.

The annotation of a client function's `down`, and of the first of its returned pair, is the schema: a field that is not declared is
not sent, and an undeclared, missing or misshapen one that arrives is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.types import Tree

BARE = "."  # the path of a tree that is one tensor: Flower's keys are not empty


class WireError(FedcoreError):
    """A message does not hold what its schema declares."""


def schemas(fn: Callable[..., Any]) -> tuple[Any, Any]:
    """(type of `down`, type of what comes back) of a client function."""
    hints = get_type_hints(fn)
    return hints["down"], get_args(hints["return"])[0]


def encode(tree: Tree) -> ArrayRecord:
    """One array a leaf, under its path."""
    return ArrayRecord({path or BARE: Array(x.detach().cpu().numpy()) for path, x in trees.flatten(tree).items()})


def flat(record: ArrayRecord) -> dict[str, Tensor]:
    """Tensors by path, copied out of the record."""
    return {"" if path == BARE else path: torch.from_numpy(array.numpy().copy()) for path, array in record.items()}


def decode(record: ArrayRecord, schema: Any, like: Tree = None) -> Tree:
    """The tree that `schema` declares; `like` gives the shapes and types that are expected.

    Raises WireError naming the first field that is missing, not declared, or of another shape or type.
    """
    rest = flat(record)
    expected = None if like is None else trees.flatten(like)
    for path, x in rest.items():
        wanted = None if expected is None else expected.get(path)
        if wanted is not None and (x.shape != wanted.shape or x.dtype != wanted.dtype):
            raise WireError(
                f'"{path}" of shape {tuple(x.shape)} and type {x.dtype}, expected {tuple(wanted.shape)} and {wanted.dtype}'
            )
    if expected is not None and (missing := expected.keys() - rest.keys()):
        raise WireError(f'no "{min(missing)}", which {_name(schema)} declares')
    if expected is not None and (extra := rest.keys() - expected.keys()):
        raise WireError(f'"{min(extra)}", which {_name(schema)} does not declare')
    tree = _take(rest, schema, "")
    if rest:
        raise WireError(f'"{min(rest)}", which {_name(schema)} does not declare')
    return tree


def _take(rest: dict[str, Tensor], schema: Any, path: str) -> Tree:
    """Remove from `rest` what `schema` declares at `path`, and build it."""
    if schema is Tensor:
        try:
            return rest.pop(path)
        except KeyError:
            raise WireError(f'no "{path}", which is declared') from None
    prefix = path + trees.SEPARATOR if path else ""
    if get_origin(schema) is dict:
        names = [key for key in rest if key.startswith(prefix)]
        return {name[len(prefix) :]: rest.pop(name) for name in names}
    if inspect.isclass(schema) and issubclass(schema, tuple) and hasattr(schema, "_fields"):
        hints = get_type_hints(schema)
        return schema(**{field: _take(rest, hints[field], prefix + field) for field in schema._fields})
    raise TypeError(f"{schema} cannot be sent: annotate with Tensor, Params (dict[str, Tensor]) or a NamedTuple of these")


def _name(schema: Any) -> str:
    return getattr(schema, "__name__", str(schema))
