"""Data as users have them, made tensors and row numbers, or refused in one line.

    tensors             as they are; integers that PyTorch cannot index get int64
    arrays, tables      of NumPy and pandas: as `torch.as_tensor` makes tensors of them
    lists               of numbers, whose fractions get float32, or of equal tensors
    dicts and tuples    trees of all these, as inputs of a model

Every value must be a finite number; a line names the array and its first bad row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.types import Tree

__all__ = ["as_array", "as_examples", "as_indices", "as_targets", "as_tensor", "leaves"]

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # few operations take these
BLOCK = 2**22  # values that are looked at at a time, once one of them is bad
DROP = "drop such rows, or fill them"


def as_examples(name: str, examples: Any) -> tuple[Tree, Tensor]:
    """(x, y) of `examples`, with equal numbers of rows and finite values.

    Raises SettingsError for anything else.

    >>> x, y = as_examples("train", ([[0.5], [1.5]], np.array([0, 1], np.int32)))
    >>> x.dtype, y.dtype
    (torch.float32, torch.int64)
    """
    is_pair = isinstance(examples, tuple | list) and len(examples) == 2
    if not is_pair:
        raise SettingsError(
            f"{name} is {_kind(examples)}: expected Examples(x, y), inputs and targets "
            "with a row an example"
        )
    x, y = as_inputs(f"{name}.x", examples[0]), as_targets(f"{name}.y", examples[1])
    lengths = {path: len(leaf) for path, leaf in leaves(f"{name}.x", x).items()}
    for path, length in lengths.items():
        if length != len(y):
            first = min(length, len(y))
            raise SettingsError(
                f"{path} has {length} rows and {name}.y {len(y)}: expected a row an "
                f"example in both; row {first} is in one of them alone"
            )
    return x, y


def leaves(name: str, tree: Tree) -> dict[str, Any]:
    """The tensors of a tree, by the names that a user gives them.

    >>> list(leaves("train.x", {"ids": 1, "pair": (2, 3)}))
    ['train.x["ids"]', 'train.x["pair"][0]', 'train.x["pair"][1]']
    """
    flat: dict[str, Any] = {}
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            flat |= leaves(f'{name}["{key}"]', value)
    elif isinstance(tree, tuple):
        fields = getattr(tree, "_fields", None)
        for i, value in enumerate(tree):
            part = f".{fields[i]}" if fields else f"[{i}]"
            flat |= leaves(name + part, value)
    else:
        flat[name] = tree
    return flat


def as_inputs(name: str, value: Any) -> Tree:
    """A tensor, or a tree of tensors, [n, ...] each."""
    if isinstance(value, Mapping | tuple) and not value:
        raise SettingsError(f"{name} is empty: expected a tensor at least")
    if isinstance(value, Mapping):
        parts = {}
        for key, part in value.items():
            parts[key] = as_inputs(f'{name}["{key}"]', part)
        return parts
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        values = []
        for i, part in enumerate(value):
            own = f".{fields[i]}" if fields else f"[{i}]"
            values.append(as_inputs(name + own, part))
        return type(value)(*values) if fields else tuple(values)
    return as_tensor(name, value, "encode it as numbers first")


def as_targets(name: str, value: Any) -> Tensor:
    """Targets, [n, ...]; whole numbers become int64, as losses of PyTorch ask for."""
    if isinstance(value, Mapping | tuple):
        raise SettingsError(
            f"{name} is {_kind(value)}: expected one tensor with a row an example; "
            "stack several targets as its columns"
        )
    y = as_tensor(
        name, value, "number the classes, np.unique(y, return_inverse=True)[1]"
    )
    return y.long() if y.dtype in INTEGERS else y


def as_tensor(name: str, value: Any, advice: str = "encode it as numbers") -> Tensor:
    """A tensor [n, ...] of finite numbers, without a copy where that can be.

    `advice` is for a user who has text. Raises SettingsError for what is no such thing.
    """
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        value = _stacked(name, value)
    x = value if isinstance(value, Tensor) else _from_array(name, value, advice)
    if x.is_nested or x.layout != torch.strided:
        remedy = "pad its rows to one length" if x.is_nested else "write x.to_dense()"
        raise SettingsError(f"{name} is no dense tensor: {remedy}")
    if x.dtype in UNSIGNED:
        x = x.to(torch.int64)
    if x.dtype not in (*FLOATING, *INTEGERS, torch.bool):
        remedy = ".float()"
        if x.is_complex():
            remedy = "torch.view_as_real(x), which has real and imaginary parts"
        dtype = str(x.dtype).removeprefix("torch.")
        raise SettingsError(
            f"{name} is {dtype}: expected real numbers, whole numbers or bool; "
            f"write {remedy}"
        )
    if x.ndim == 0:
        raise SettingsError(f"{name} is a single number: expected a row an example")
    _refuse_not_finite(name, x)
    if x.requires_grad or type(x) is not Tensor:
        x = x.detach().as_subclass(Tensor)
    return x


def as_indices(name: str, value: Any, meaning: str) -> np.ndarray:
    """Whole numbers, int64 [n], without a copy of such an array.

    Raises SettingsError for anything else; `meaning` says what was expected.

    >>> as_indices("order", [2, 0], "row numbers of train")
    array([2, 0])
    """
    array = as_array(name, value, f"expected {meaning}")
    if array.ndim == 1 and array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1:
        raise SettingsError(
            f"{name} has shape {array.shape}: expected {meaning}, in one dimension"
        )
    if array.dtype.kind == "b":
        raise SettingsError(
            f"{name} is a mask of True and False: expected {meaning}; "
            f"np.flatnonzero({name}) makes row numbers of it"
        )
    if array.dtype.kind == "f":
        rows = np.flatnonzero(array != np.floor(array))
        row = int(rows[0]) if len(rows) else 0
        raise SettingsError(
            f"{name} is {array.dtype}, {name}[{row}] = {array[row]}: expected "
            f"{meaning}, whole numbers; write {name}.astype(np.int64)"
        )
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        row = int(array.argmax())
        raise SettingsError(f"{name}[{row}] = {array[row]}: expected {meaning}")
    return np.ascontiguousarray(array, dtype=np.int64)


def as_array(name: str, value: Any, advice: str) -> np.ndarray:
    """An array of numbers or bool, of a tensor, an array, a table or a list.

    Raises SettingsError for anything else, with the first bad row and `advice`.
    """
    if isinstance(value, Tensor):
        x = value.detach().cpu()
        array: np.ndarray = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
        return array
    if value is None:
        raise SettingsError(f"{name} is None: expected a row an example")
    try:
        array = np.asarray(value)
        if array.dtype == object and array.ndim:  # numbers in a box each
            array = np.array(array.tolist())
    except (ValueError, TypeError, RuntimeError) as error:
        raise _uneven(name, value) or SettingsError(
            f"{name} is {_kind(value)}, which is no array: {error}"
        ) from error
    if array.ndim == 0 and array.dtype.kind not in "biuf":
        raise SettingsError(
            f"{name} is {_kind(value)}: expected a tensor with a row an example"
        )
    if array.dtype.kind not in "biuf" or array.dtype == np.longdouble:
        raise _no_numbers(name, array, advice)
    return array


def _from_array(name: str, value: Any, advice: str) -> Tensor:
    """A tensor of an array, a table or a list, on its memory where that can be."""
    array = as_array(name, value, advice)
    # PyTorch takes the machine's own byte order, and no strides that go backwards.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if min(array.strides, default=0) < 0:
        array = np.ascontiguousarray(array)
    if isinstance(value, list) and array.dtype == np.float64:
        array = array.astype(np.float32)
    with warnings.catch_warnings():
        # Data are never written to.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _stacked(name: str, rows: list[Tensor]) -> Tensor:
    for i, row in enumerate(rows):
        shape = getattr(row, "shape", None)
        if shape != rows[0].shape:
            found = "no tensor" if shape is None else f"of shape {tuple(shape)}"
            raise SettingsError(
                f"{name} is a list whose row {i} is {found}, and row 0 of shape "
                f"{tuple(rows[0].shape)}: expected equal rows; pad them to one length"
            )
    return torch.stack([row.detach() for row in rows])


def _refuse_not_finite(name: str, x: Tensor) -> None:
    """Raises SettingsError where x [n, ...] holds NaN or infinity.

    NaN and infinity survive a sum, which takes one pass and no memory; finite values
    that overflow it are looked at one by one.
    """
    if not x.is_floating_point() or x.numel() == 0:
        return
    x = x.detach()
    total = x.sum(dtype=torch.float32 if x.element_size() < 4 else None)
    if bool(total.isfinite()):
        return
    rows = max(BLOCK // max(x[0].numel(), 1), 1)
    for start in range(0, len(x), rows):
        block = x[start : start + rows].reshape(len(x[start : start + rows]), -1)
        is_good = block.isfinite().all(1)
        if not bool(is_good.all()):
            row = int((~is_good).nonzero()[0])
            found = "NaN" if bool(block[row].isnan().any()) else "infinity"
            raise SettingsError(
                f"{name} holds {found}, first in row {start + row}: expected finite "
                f"numbers; {DROP}"
            )


def _uneven(name: str, value: Any) -> SettingsError | None:
    """The error of rows that have different lengths; None where they have not."""
    shapes: list[tuple[int, ...] | None] = []
    for row in value if isinstance(value, list | tuple) else ():
        try:
            shapes.append(np.shape(row))
        except (ValueError, TypeError):
            shapes.append(None)
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            return SettingsError(
                f"{name} has rows of different lengths, row 0 of shape {shapes[0]} and "
                f"row {i} of {shape}: expected equal rows; pad them to one length, or "
                f"join them with np.concatenate"
            )
    return None


def _no_numbers(name: str, array: np.ndarray, advice: str) -> SettingsError:
    """The error of an array that holds something else, with its first bad row."""
    if array.dtype.kind == "c":
        return SettingsError(
            f"{name} is {array.dtype}: expected real numbers; give their real and "
            "imaginary parts as columns"
        )
    for row in range(len(array)):
        values = np.ravel(np.asarray(array[row], dtype=object))
        for value in values:
            if isinstance(value, str | bytes):
                text = value if isinstance(value, str) else value.decode("latin-1")
                return SettingsError(
                    f'{name} holds text, first in row {row} ("{text[:40]}"): expected '
                    f"numbers; {advice}"
                )
            if isinstance(value, bool | int | float | np.number | np.bool_):
                continue
            shown = value if value is None else type(value).__name__
            return SettingsError(
                f"{name} holds {shown}, first in row {row}: expected numbers; {DROP}"
            )
    if array.dtype == object and len(array):
        uneven = _uneven(name, list(array))
        if uneven is not None:
            return uneven
    return SettingsError(
        f"{name} has the type {array.dtype}: expected numbers; convert it, e.g. "
        ".astype(np.float32)"
    )


def _kind(value: Any) -> str:
    """A value's type, in words of a message."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
