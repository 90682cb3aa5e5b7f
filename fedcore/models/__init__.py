"""Bundled models by name. All keep no running statistics, and run under `functional_call`, `grad` and `vmap`."""

from typing import Annotated

from pydantic import Field

from fedcore.models.cnn import Cnn, LeNet
from fedcore.models.mlp import Logistic, Mlp
from fedcore.models.resnet import ResNet

ModelSettings = Annotated[Logistic | Mlp | Cnn | LeNet | ResNet, Field(discriminator="name")]

__all__ = ["Cnn", "LeNet", "Logistic", "Mlp", "ModelSettings", "ResNet"]
