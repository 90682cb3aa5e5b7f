"""Trees of tensors as Flower records and back, by type annotations; never pickled.

A tree travels as one array of bytes in the safetensors format: Flower sends every array
as objects of their own, each a call in both directions, and a call costs more than the
few kilobytes of most tensors.

The annotation of a client function's `down`, and of the first of its returned pair, is
the schema: a field that is not declared is not sent, and an undeclared, missing or
misshapen one that arrives is refused by name.

A sender may lie in every byte. What is expected is known before, so the length of the
header, then its names, types, shapes and places, are compared with that before a tensor
is made: a message costs what it takes to find that it does not fit.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from flwr.app import Array, ArrayRecord
from safetensors.torch import save
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.escapes import escaped
from fedcore.types import Params, Tree


class WireError(FedcoreError):
    """A message that does not fit its schema; the text follows "client 17 sent"."""


def schemas(fn: Callable[..., Any]) -> tuple[Any, Any]:
    """(type of `down`, type of what comes back) of a client function."""
    hints = get_type_hints(fn)
    return hints["down"], get_args(hints["return"])[0]


FORMAT = "safetensors"
LENGTH = 8  # bytes before the header, which hold its length
ENTRY = 150  # bytes of a header around a name, its numbers of 64 bits included
SPARE = 10_000  # bytes for a few names too many, which are then refused by name
SHOWN = 100  # characters of a name that are quoted
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
"""Types of a header that a message may have."""


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
    if like is None:
        arrived = unpack(record)
        tree = _take(arrived, schema, "")
        if arrived:
            raise _undeclared(arrived.keys(), schema)
        return tree
    expected = trees.flatten(like)
    packed = _packed(record, _longest_header(expected))
    entries = packed.entries
    if missing := expected.keys() - entries.keys():
        raise WireError(f'no "{min(missing)}", which {_name(schema)} declares')
    if extra := entries.keys() - expected.keys():
        raise _undeclared(extra, schema)
    for path, wanted in expected.items():
        _compare(path, entries[path], wanted)
    return trees.unflatten(_tensors(packed), like)


def _undeclared(paths: Set[str], schema: Any) -> WireError:
    path = escaped(min(paths)[:SHOWN])
    return WireError(f'"{path}", which {_name(schema)} does not declare')


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

    Nothing is expected of it, so that its sender has to be trusted: a device trusts
    its server. Raises WireError for a record that `encode` did not make.
    """
    return _tensors(_packed(record, None))


class _Entry(NamedTuple):
    """The line of a header about one tensor."""

    dtype: torch.dtype
    shape: list[int]
    begin: int  # in bytes from the end of the header
    end: int

    def span(self) -> tuple[int, int]:
        """Its place."""
        return self.begin, self.end

    def nbytes(self) -> int:
        """The bytes that its shape and type need."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Packed(NamedTuple):
    """A message whose header was read, and of which no tensor was made."""

    entries: dict[str, _Entry]  # by path, in the order in which they were encoded
    values: memoryview


def _packed(record: ArrayRecord, longest: int | None) -> _Packed:
    """The one array of a record. A header that is too long is not looked at."""
    array = record.get(FORMAT)
    if array is None or len(record) != 1 or array.stype != FORMAT:
        names = ", ".join(sorted(record)[:5])[:SHOWN] or "none"
        raise WireError(f"arrays that are not one of {FORMAT}, found {escaped(names)}")
    content = memoryview(array.data)
    length = int.from_bytes(content[:LENGTH], "little")
    if len(content) < LENGTH or length > len(content) - LENGTH:
        raise WireError("arrays that cannot be read: they end before their header does")
    if longest is not None and length > longest:
        raise WireError(
            f"arrays that cannot be read: a header of {length} bytes, "
            f"expected at most {longest}"
        )
    header = bytes(content[LENGTH : LENGTH + length])
    try:
        return _Packed(_entries(header), content[LENGTH + length :])
    # A client may send anything: no JSON, or some that is nested without end.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        problem = escaped(f"{type(e).__name__}: {e}"[:SHOWN])
        raise WireError(f"arrays that cannot be read: {problem}") from e


def _longest_header(expected: dict[str, Tensor]) -> int:
    """The bytes that a header about these leaves may have."""
    length = SPARE
    for path, x in expected.items():
        # Up to six bytes for a character that JSON escapes, two for half of one.
        length += ENTRY + 12 * len(path) + 20 * x.ndim
    return length


def _entries(header: bytes) -> dict[str, _Entry]:
    lines = []
    for key, line in json.loads(header).items():
        number, _, path = key.partition(trees.SEPARATOR)
        lines.append((int(number), path, line))
    lines.sort(key=lambda line: line[0])
    entries: dict[str, _Entry] = {}
    for _, path, line in lines:
        if path in entries:
            raise ValueError(f'"{path}" twice')
        entries[path] = _entry(line)
    return entries


def _entry(line: Any) -> _Entry:
    shape, (begin, end) = line["shape"], line["data_offsets"]
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{str(number)[:SHOWN]} in place of a whole number")
    return _Entry(TYPES[line["dtype"]], shape, begin, end)


def _compare(path: str, entry: _Entry, wanted: Tensor) -> None:
    """Raises WireError for another shape or type than is expected."""
    if entry.shape != list(wanted.shape):
        shape = str(tuple(entry.shape))[:SHOWN]
        raise WireError(f'"{path}" of shape {shape}, expected {tuple(wanted.shape)}')
    if entry.dtype != wanted.dtype:
        raise WireError(
            f'"{path}" of type {_dtype(entry.dtype)}, expected {_dtype(wanted.dtype)}'
        )


def _tensors(packed: _Packed) -> dict[str, Tensor]:
    """The leaves, which have to lie one behind the other, to the last byte."""
    place = 0
    for entry in sorted(packed.entries.values(), key=_Entry.span):
        if entry.begin != place or entry.end - entry.begin != entry.nbytes():
            raise WireError(
                f"arrays that cannot be read: one of {entry.nbytes()} bytes is said to "
                f"lie from {entry.begin} to {entry.end}, expected from {place} on"
            )
        place = entry.end
    if place != len(packed.values):
        raise WireError(
            f"arrays that cannot be read: {len(packed.values)} bytes of values, "
            f"expected {place}"
        )
    return {path: _tensor(packed, entry) for path, entry in packed.entries.items()}


def _tensor(packed: _Packed, entry: _Entry) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    values = bytearray(packed.values[entry.begin : entry.end])  # to be written to
    return torch.frombuffer(values, dtype=entry.dtype).reshape(entry.shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(schema: Any) -> str:
    return getattr(schema, "__name__", str(schema))
