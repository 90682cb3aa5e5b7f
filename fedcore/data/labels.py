"""Labels and groups of rows, as users have them, made whole numbers for a partition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedcore.arrays import as_array
from fedcore.errors import SettingsError

__all__ = ["classes_of", "counted", "groups_of"]

IGNORED = -100  # the label that PyTorch's losses ignore


def classes_of(labels: Any) -> np.ndarray:
    """The class of each row, int64 [n]; names are numbered in their order.

    Raises SettingsError for what is no class, with the first row.

    >>> classes_of(["cat", "dog", "cat"])
    array([0, 1, 0])
    """
    if _is_text(labels):
        labels = _names("labels", labels, "classes")
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)
    array = as_array("labels", labels, "leave such rows out")
    if array.ndim != 1:
        raise SettingsError(
            f"labels has shape {array.shape}: expected one class a row; write "
            "y.argmax(1) for one-hot rows, y.reshape(-1) for a single column"
        )
    if len(array) == 0:
        raise SettingsError("labels is empty: there are no rows to spread over clients")
    if array.dtype.kind == "f":
        is_bad = array != np.floor(array)  # NaN is unequal, too
        is_bad |= np.abs(array) > 2**53
        if is_bad.any():
            row = int(is_bad.argmax())
            raise SettingsError(
                f"labels[{row}] = {array[row]}: expected classes, whole numbers or "
                'names; for targets that are no classes use partition.name = "iid"'
            )
    classes = array.astype(np.int64)
    if (classes == IGNORED).any():
        row = int((classes == IGNORED).argmax())
        raise SettingsError(
            f"labels[{row}] = {IGNORED}: a label that PyTorch ignores is no class; "
            "leave such rows out"
        )
    return np.ascontiguousarray(classes)


def counted(labels: Any) -> np.ndarray:
    """Whole numbers, int64 [n], for a partition that looks at nothing but n."""
    if _is_text(labels):
        labels = _names("labels", labels, "classes")
    else:
        labels = as_array("labels", labels, "leave such rows out")
    if np.ndim(labels) == 0 or len(labels) == 0:
        raise SettingsError("labels is empty: there are no rows to spread over clients")
    if labels.dtype.kind in "iub" and labels.ndim == 1:
        return np.ascontiguousarray(labels, dtype=np.int64)
    return np.zeros(len(labels), dtype=np.int64)


def groups_of(groups: Any, rows: int) -> np.ndarray:
    """The natural client of each row, numbers or names [n]."""
    if _is_text(groups):
        array = _names("groups", groups, "clients")
    else:
        array = as_array("groups", groups, "leave such rows out")
    if array.ndim != 1 or len(array) != rows:
        raise SettingsError(
            f"groups has shape {array.shape} and labels {rows} rows: expected the "
            "natural client of each row"
        )
    is_nan = array != array
    if is_nan.any():
        raise SettingsError(
            f"groups[{int(is_nan.argmax())}] is NaN: expected the client that holds "
            "the row; leave such rows out"
        )
    return array


def _is_text(values: Any) -> bool:
    """Whether a list or an array holds a name, so that all must be names."""
    if values is None or isinstance(values, Tensor | Mapping | str | bytes):
        return False
    dtype = getattr(values, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind not in "OUS":
        return False
    try:
        first = next((value for value in values if value is not None), None)
    except TypeError:
        return False
    return isinstance(first, str | bytes)


def _names(name: str, values: Any, kind: str) -> np.ndarray:
    """Names as an array of text [n]. Raises SettingsError for a row without one."""
    for row, value in enumerate(values):
        if not isinstance(value, str | bytes):
            shown = "None" if value is None else repr(value)
            raise SettingsError(
                f"{name}[{row}] is {shown}, beside names of {kind}: expected a name "
                "in every row; leave such rows out"
            )
    return np.asarray(values, dtype=str)
