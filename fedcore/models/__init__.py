"""Bundled models by name.

None keeps running statistics; all run under `functional_call`, `grad` and `vmap`.
"""

from typing import Annotated

from pydantic import Field

from fedcore.models.cnn import Cnn, LeNet
from fedcore.models.gpt import Gpt
from fedcore.models.huggingface import HuggingFace
from fedcore.models.lora import LoraSettings
from fedcore.models.lowrank import LowRank
from fedcore.models.lstm import CharLstm
from fedcore.models.mlp import Logistic, Mlp
from fedcore.models.resnet import ResNet
from fedcore.models.timm import Timm
from fedcore.models.vit import Vit

ModelSettings = Annotated[
    Logistic | Mlp | Cnn | LeNet | ResNet | Vit | Timm | CharLstm | Gpt | HuggingFace,
    Field(discriminator="name"),
]

__all__ = [
    "CharLstm",
    "Cnn",
    "Gpt",
    "HuggingFace",
    "LeNet",
    "Logistic",
    "LoraSettings",
    "LowRank",
    "Mlp",
    "ModelSettings",
    "ResNet",
    "Timm",
    "Vit",
]
