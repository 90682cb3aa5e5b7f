"""Trees of tensors as Flower records and back, by type annotations; never pickled.

A tree travels as one array of bytes in the safetensors format: Flower sends every array
as objects of their own, each a call in both directions, and a call costs more than the
few kilobytes of most tensors.

The annotation of a client function's `down`, and of the first of its returned pair, is
the schema: a field that is not declared is not sent, and an undeclared, missing or
misshapen one that arrives is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from typing import Any, get_args, get_origin, get_type_hints

from flwr.app import Array, ArrayRecord
from safetensors.torch import load, save
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.types import Params, Tree


class WireError(FedcoreError):
    """A message that does not fit its schema; the text follows "client 17 sent"."""


def schemas(fn: Callable[..., Any]) -> tuple[Any, Any]:
    """(type of `down`, type of what comes back) of a client function."""
    hints = get_type_hints(fn)
    return hints["down"], get_args(hints["return"])[0]


FORMAT = "safetensors"


def encode(tree: Tree) -> ArrayRecord:
    """One array, which holds every leaf under its path.

    >>> import torch
    >>> record = encode({"weight": torch.zeros(2, 3)})
    >>> decode(record, dict[str, Tensor])["weight"].shape
    torch.Size([2, 3])
    """
    flat: dict[str, Tensor] = {}
    for n, (path, x) in enumerate(trees.flatten(tree).items()):
        # Numbered, for the format has an order of its own. Cloned: leaves may share
        # memory.
        key = f"{n}{trees.SEPARATOR}{path}"
        flat[key] = x.detach().cpu().contiguous().clone()
    content = save(flat)
    return ArrayRecord({FORMAT: Array("uint8", (len(content),), FORMAT, content)})


def decode(record: ArrayRecord, schema: Any, like: Tree = None) -> Tree:
    """The tree that `schema` declares, on the CPU.

    `like` has the names in its dicts, the shapes and the types that are expected.
    Raises WireError naming the first field that is missing, not declared, unreadable,
    or of another shape or type; TypeError for a schema of anything but Tensor,
    dict[str, Tensor] and NamedTuples of these.
    """
    arrived = unpack(record)
    if like is None:
        tree = _take(arrived, schema, "")
        if arrived:
            raise _undeclared(arrived.keys(), schema)
        return tree
    expected = trees.flatten(like)
    if missing := expected.keys() - arrived.keys():
        raise WireError(f'no "{min(missing)}", which {_name(schema)} declares')
    if extra := arrived.keys() - expected.keys():
        raise _undeclared(extra, schema)
    for path, wanted in expected.items():
        x = arrived[path]
        if x.shape != wanted.shape:
            raise WireError(
                f'"{path}" of shape {tuple(x.shape)}, expected {tuple(wanted.shape)}'
            )
        if x.dtype != wanted.dtype:
            raise WireError(f'"{path}" of type {_dtype(x)}, expected {_dtype(wanted)}')
    return trees.unflatten(arrived, like)


def _undeclared(paths: Set[str], schema: Any) -> WireError:
    return WireError(f'"{min(paths)}", which {_name(schema)} does not declare')


def _take(arrived: dict[str, Tensor], schema: Any, path: str) -> Tree:
    """Remove from `arrived` the leaves that `schema` declares at `path`, as a tree."""
    if schema is Tensor:
        if path not in arrived:
            raise WireError(f'no "{path}", which is declared')
        return arrived.pop(path)
    prefix = path + trees.SEPARATOR if path else ""
    if get_origin(schema) is dict and get_args(schema) == get_args(Params):
        keys = [key for key in arrived if key.startswith(prefix)]
        return {key.removeprefix(prefix): arrived.pop(key) for key in keys}
    if not _is_named_tuple(schema):
        raise TypeError(
            f"{schema} cannot be sent: annotate with Tensor, "
            "Params (dict[str, Tensor]) or a NamedTuple of these"
        )
    hints = get_type_hints(schema)
    fields = {}
    for field in schema._fields:
        fields[field] = _take(arrived, hints[field], prefix + field)
    return schema(**fields)


def _is_named_tuple(schema: Any) -> bool:
    is_tuple = inspect.isclass(schema) and issubclass(schema, tuple)
    return is_tuple and hasattr(schema, "_fields")


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """The leaves of any message by path, in the order in which they were encoded.

    Raises WireError for a record that `encode` did not make.
    """
    array = record.get(FORMAT)
    if array is None or len(record) != 1 or array.stype != FORMAT:
        names = ", ".join(sorted(record)[:5]) or "none"
        raise WireError(f"arrays that are not one of {FORMAT}, found {names}")
    leaves: list[tuple[int, str, Tensor]] = []
    try:
        for key, x in load(array.data).items():
            number, _, path = key.partition(trees.SEPARATOR)
            leaves.append((int(number), path, x))
    except Exception as error:  # a client may send anything
        raise WireError(f"arrays that cannot be read: {error}") from error
    leaves.sort(key=lambda leaf: leaf[0])
    return {path: x for _, path, x in leaves}


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _name(schema: Any) -> str:
    return getattr(schema, "__name__", str(schema))
