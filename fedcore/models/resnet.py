"""ResNet (He et al. 2016) with group normalisation.

Batch statistics of skewed clients do not average (Hsieh et al. 2020).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from fedcore.models.cnn import image

STAGES = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class ResNet(BaseModel):
    """Basic blocks in four stages, with a 3x3 stem for small images.

    Depth 18 and width 64: 11.2 M parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["resnet"] = "resnet"
    depth: Literal[10, 18, 34] = Field(18, description="layers")
    width: int = Field(
        64,
        ge=2,
        multiple_of=2,
        description="channels of the first stage, doubled at each next",
    )
    groups: int = Field(2, ge=1, description="groups of every GroupNorm; divides width")
    adapter: bool = Field(
        False, description="an adapter behind every 3x3 convolution of a block"
    )

    @model_validator(mode="after")
    def _divides(self) -> ResNet:
        if self.width % self.groups:
            raise ValueError(f"groups = {self.groups} must divide width = {self.width}")
        return self

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        channels, _, _ = image(input_shape, "resnet", 8)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, self.width, 3, padding=1, bias=False),
            nn.GroupNorm(self.groups, self.width),
            nn.ReLU(),
        ]
        blocks: list[Block] = []
        inputs = self.width
        for stage, number in enumerate(STAGES[self.depth]):
            outputs = self.width * 2**stage
            for i in range(number):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(inputs, outputs, stride, self.groups))
                inputs = outputs
        model = nn.Sequential(
            *layers,
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, num_outputs),
        )
        if self.adapter:
            # Made last: the rest starts as without them.
            for block in blocks:
                block.add_adapters()
        return model


class Block(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))).

    With a 1x1 convolution on the shortcut where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.GroupNorm(groups, outputs),
            )
        self.adapter1: nn.Module = nn.Identity()
        self.adapter2: nn.Module = nn.Identity()

    def add_adapters(self) -> None:
        """Put an adapter behind either convolution."""
        channels, groups = self.norm1.num_channels, self.norm1.num_groups
        self.adapter1 = Adapter(channels, groups)
        self.adapter2 = Adapter(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.adapter1(self.conv1(x))))
        z = self.norm2(self.adapter2(self.conv2(y)))
        return functional.relu(z + self.shortcut(x))


class Adapter(nn.Module):
    """2 h + conv1x1(norm(h)), which the block's own norm behind it rescales.

    Pillutla et al., ICML 2022, after their code.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=1e-4)

    def forward(self, h: Tensor) -> Tensor:
        changed: Tensor = 2 * h + self.conv(self.norm(h))
        return changed
