"""Files of tensors with facts beside them, in the safetensors format."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors by name, the metadata) of a file.

    Raises OSError, and what safetensors raises for a file that is damaged.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as content:
        names = content.keys()
        for name in names:
            tensors[name] = content.get_tensor(name)
        return tensors, content.metadata() or {}
