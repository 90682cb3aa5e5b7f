"""A base: the folder of a pretrained model, and its fingerprint."""

from __future__ import annotations

from pathlib import Path

from torch import nn

__all__ = ["load_base"]


def load_base(model: nn.Module, folder: Path) -> None:
    """Give the model the weights that `fedcore pretrain` wrote to `folder`."""
    raise NotImplementedError
