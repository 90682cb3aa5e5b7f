"""Dense models: multinomial logistic regression and the multi-layer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import nn


class Logistic(BaseModel):
    """One linear layer, started at zero: the problem is convex."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["logistic"] = "logistic"

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        linear = nn.Linear(math.prod(input_shape), num_outputs)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.Flatten(), linear)


class Mlp(BaseModel):
    """Dense layers with ReLU between them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = Field(
        (200,), min_length=1, description="units of every hidden layer"
    )

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise([math.prod(input_shape), *self.hidden]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.hidden[-1], num_outputs))
