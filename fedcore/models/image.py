"""Settings of a model for images and other inputs of one shape."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

__all__ = ["ImageModel"]


@runtime_checkable
class ImageModel(Protocol):
    """Settings that a model is built from by the shape of an input."""

    name: str

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """The model, with weights drawn from PyTorch's generator."""
        ...
