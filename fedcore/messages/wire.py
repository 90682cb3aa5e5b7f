"""Trees of tensors as Flower records and back, driven by type annotations. Nothing is pickled.

A tree travels as one array of bytes in the safetensors format: Flower sends every array as objects of their own, each a call in
both directions, and a call costs more than the few kilobytes of most tensors.

The annotation of a client function's `down`, and of the first of its returned pair, is the schema: a field that is not declared is
not sent, and an undeclared, missing or misshapen one that arrives is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from flwr.app import Array, ArrayRecord
from safetensors.torch import load, save
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


FORMAT = "safetensors"


def encode(tree: Tree) -> ArrayRecord:
    """One array, which holds every leaf under its path."""
    # Numbered, for the format has an order of its own. Cloned: leaves may share memory.
    flat = {
        f"{n}{trees.SEPARATOR}{path}": x
        for n, (path, x) in enumerate(trees.flatten(tree).items())
    }
    content = save(
        {key: x.detach().cpu().contiguous().clone() for key, x in flat.items()}
    )
    return ArrayRecord({FORMAT: Array("uint8", (len(content),), FORMAT, content)})


def decode(record: ArrayRecord, schema: Any, like: Tree = None) -> Tree:
    """The tree that `schema` declares, on the CPU; `like` gives the names in its dicts, the shapes and the types that are expected.

    Raises WireError naming the first field that is missing, not declared, unreadable, or of another shape or type; TypeError for
    a schema of anything but Tensor, dict[str, Tensor] and NamedTuples of these.
    """
    found = unpack(record)
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
            raise WireError(
                f'"{path}" of shape {tuple(x.shape)}, expected {tuple(wanted.shape)}'
            )
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
        return {
            key.removeprefix(prefix): found.pop(key)
            for key in list(found)
            if key.startswith(prefix)
        }
    if (
        inspect.isclass(schema)
        and issubclass(schema, tuple)
        and hasattr(schema, "_fields")
    ):
        hints = get_type_hints(schema)
        return schema(
            **{
                field: _take(found, hints[field], prefix + field)
                for field in schema._fields
            }
        )
    raise TypeError(
        f"{schema} cannot be sent: annotate with Tensor, Params (dict[str, Tensor]) or a NamedTuple of these"
    )


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """The leaves by path, whatever they are. Raises WireError for what `encode` did not make."""
    array = record.get(FORMAT)
    if array is None or len(record) != 1 or array.stype != FORMAT:
        raise WireError(
            f"arrays that are not one of {FORMAT}, found {', '.join(sorted(record)[:5]) or 'none'}"
        )
    try:
        numbered = {
            key.partition(trees.SEPARATOR): x for key, x in load(array.data).items()
        }
        return {
            path: x
            for (_, _, path), x in sorted(
                numbered.items(), key=lambda item: int(item[0][0])
            )
        }
    except Exception as e:  # what arrives may be anything
        raise WireError(f"arrays that cannot be read: {e}") from e


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _name(schema: Any) -> str:
    return getattr(schema, "__name__", str(schema))
