"""Bundled models by name.

None keeps running statistics; all run under `functional_call`, `grad` and `vmap`.
"""

from typing import Annotated

from pydantic import Field

from fedcore.models.cnn import Cnn, LeNet
from fedcore.models.lowrank import LowRank
from fedcore.models.mlp import Logistic, Mlp
from fedcore.models.resnet import ResNet
from fedcore.models.timm import Timm
from fedcore.models.vit import Vit

ModelSettings = Annotated[
    Logistic | Mlp | Cnn | LeNet | ResNet | Vit | Timm, Field(discriminator="name")
]

__all__ = [
    "Cnn",
    "LeNet",
    "Logistic",
    "LowRank",
    "Mlp",
    "ModelSettings",
    "ResNet",
    "Timm",
    "Vit",
]
