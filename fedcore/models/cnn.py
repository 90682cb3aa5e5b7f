"""Small convolutional models for images."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import nn

from fedcore.errors import SettingsError


class Cnn(BaseModel):
    """Two convolutions, each with 2x2 pooling, and a dense layer.

    By default that of McMahan et al. 2017: 1 663 370 parameters at 28x28.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["cnn"] = "cnn"
    channels: tuple[PositiveInt, PositiveInt] = Field(
        (32, 64), description="outputs of the two convolutions"
    )
    kernel: Literal[3, 5] = Field(5, description="side of both convolutions, in pixels")
    hidden: int = Field(512, ge=1, description="units of the dense layer")
    pool: Literal["max", "avg"] = Field(
        "max", description="avg is smooth, as attacks on gradients assume"
    )

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        channels, height, width = image(input_shape, "cnn", 4)
        first, second = self.channels
        pool = nn.MaxPool2d if self.pool == "max" else nn.AvgPool2d
        return nn.Sequential(
            nn.Conv2d(channels, first, self.kernel, padding=self.kernel // 2),
            nn.ReLU(),
            pool(2),
            nn.Conv2d(first, second, self.kernel, padding=self.kernel // 2),
            nn.ReLU(),
            pool(2),
            nn.Flatten(),
            nn.Linear(second * (height // 4) * (width // 4), self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, num_outputs),
        )


class LeNet(BaseModel):
    """LeNet-5 with ReLU and max pooling, after LeCun et al. 1998.

    61 706 parameters at 28x28.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["lenet"] = "lenet"

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        channels, height, width = image(input_shape, "lenet", 16)
        pixels = ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * pixels, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_outputs),
        )


def image(shape: tuple[int, ...], model: str, least: int) -> tuple[int, int, int]:
    """(channels, height, width) of inputs of this shape, for the model of this name.

    Raises SettingsError for inputs that are no images, or of less than `least` pixels a
    side.
    """
    if len(shape) != 3 or min(shape[1:]) < least:
        raise SettingsError(
            f'model.name = "{model}": inputs have shape {tuple(shape)}, expected '
            f"(channels, height, width) of at least {least}x{least}; "
            'use model.name = "mlp"'
        )
    channels, height, width = shape
    return channels, height, width
