"""Small convolutional models for images."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from fedcore.errors import SettingsError


class Cnn(BaseModel):
    """Two 5x5 convolutions (32, 64 channels, 2x2 pooling), 512 dense units (McMahan et al. 2017): 1 663 370 parameters at 28x28."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["cnn"] = "cnn"

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        channels, height, width = image(input_shape, "cnn", 4)
        return nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 512),
            nn.ReLU(),
            nn.Linear(512, num_outputs),
        )


class LeNet(BaseModel):
    """LeNet-5 with ReLU and max pooling (after LeCun et al. 1998): 61 706 parameters at 28x28."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["lenet"] = "lenet"

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        channels, height, width = image(input_shape, "lenet", 16)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_outputs),
        )


def image(shape: tuple[int, ...], model: str, least: int) -> tuple[int, int, int]:
    """(channels, height, width). Raises SettingsError for inputs that are no images, or too small."""
    if len(shape) != 3 or min(shape[1:]) < least:
        raise SettingsError(
            f'model.name = "{model}": inputs have shape {tuple(shape)}, expected (channels, height, width) of at least '
            f'{least}x{least}; use model.name = "mlp"'
        )
    channels, height, width = shape
    return channels, height, width
