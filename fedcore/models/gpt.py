"""A small GPT: learned positions, pre-norm blocks, explicit attention.

Radford et al., 2019, without dropout and without a cache of keys.

    z_0    = token[ids] + position[0 .. L - 1]
    z      = z + proj(attention(qkv(norm1(z))))
    z      = z + fc2(gelu(fc1(norm2(z))))        in every block
    logits = head(norm(z))                       [B, L, vocabulary]

A position sees those before it and itself, so that padding at the end changes nothing
before it. Of classes of whole texts, the mean of norm(z) over the tokens is read out.
Choice:  weights start normal with deviation 0.02, those that are added to z with that
         over sqrt(2 layers), biases at 0; the head has no bias.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from fedcore.errors import SettingsError
from fedcore.models.text import TextShape, mean_of_tokens

__all__ = ["Gpt"]

DEVIATION = 0.02  # of a weight at the start


class Gpt(BaseModel):
    """A decoder-only transformer for text.

    >>> model = Gpt(width=96, layers=3).build_text(TextShape(65, length=64, pad=64))
    >>> sum(parameter.numel() for parameter in model.parameters())
    354336
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["gpt"] = "gpt"
    width: int = Field(
        96, ge=1, description="d, units of a token's vector; a multiple of heads"
    )
    layers: int = Field(3, ge=1, le=1000, description="blocks")
    heads: int = Field(4, ge=1, description="attention heads; they divide width")
    tied: bool = Field(
        False, description="whether the output layer's weight is the embedding's"
    )

    def build_text(self, shape: TextShape) -> nn.Module:
        if self.width % self.heads:
            raise SettingsError(
                f"model.heads = {self.heads}: expected a divisor of "
                f"model.width = {self.width}"
            )
        if self.tied and shape.num_classes is not None:
            raise SettingsError(
                "model.tied = true: the output layer of classes has no token's "
                "weight; leave it out"
            )
        return Transformer(self, shape)


class Transformer(nn.Module):
    """Token ids [B, L] to logits; L is the context at most."""

    def __init__(self, settings: Gpt, shape: TextShape) -> None:
        super().__init__()
        width = settings.width
        self.pad = shape.pad
        self.token = nn.Embedding(shape.vocabulary, width)
        self.position = nn.Embedding(shape.length, width)
        blocks = [Block(width, settings.heads) for _ in range(settings.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.apply(_draw)
        for block in blocks:
            for layer in (block.proj, block.fc2):
                deviation = DEVIATION / math.sqrt(2 * settings.layers)
                nn.init.normal_(layer.weight, std=deviation)
        # Made last: the rest starts the same, whatever is read out.
        if shape.num_classes is None:
            self.head = nn.Linear(width, shape.vocabulary, bias=False)
            self.head.apply(_draw)
            if settings.tied:
                self.head.weight = self.token.weight
        else:
            self.classifier = nn.Linear(width, shape.num_classes)
            self.classifier.apply(_draw)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        z = self.token(ids) + self.position(positions)
        for block in self.blocks:
            z = block(z)
        z = self.norm(z)
        if hasattr(self, "head"):
            logits: Tensor = self.head(z)
        else:
            logits = self.classifier(mean_of_tokens(z, ids, self.pad))
        return logits


class Block(nn.Module):
    """z + attention(norm(z)), then z + mlp(norm(z)), for z [B, L, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.proj(self.attention(self.norm1(z)))
        hidden = functional.gelu(self.fc1(self.norm2(z)))
        z = z + self.fc2(hidden)
        return z

    def attention(self, z: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d / heads)) v over positions up to each, [B, L, d]."""
        length = z.shape[1]
        qkv = self.qkv(z).unflatten(-1, (3, self.heads, -1))  # [B, L, 3, H, d / H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, L, d / H] each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        is_later = torch.ones(length, length, dtype=torch.bool, device=z.device).triu(1)
        weights = scores.masked_fill(is_later, -math.inf).softmax(-1)
        mixed: Tensor = (weights @ v).transpose(1, 2).flatten(2)
        return mixed


def _draw(module: nn.Module) -> None:
    """Draw the weights of a layer; biases become zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=DEVIATION)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
