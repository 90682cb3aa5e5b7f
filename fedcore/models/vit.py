"""Vision Transformer (Dosovitskiy et al., ICLR 2021), with adapters and prefixes.

Names of parameters are those of timm's models (patch_embed, cls_token, pos_embed,
blocks.i.attn.qkv, ..., head).
Prefixes on attention (Sun et al., FedPerfix, ICCV 2023, equation 4): Z [tokens, d] is
the input of attention, after the block's first norm.
    additive  K = Z W_k + b_k + s P_k,  V = Z W_v + b_v + s P_v,
              [P_k, P_v] = tanh(Z W_down + b_down) W_up + b_up  (their code)
    linear    the same with [P_k, P_v] = Z A + a: the "vanilla prefix" of their ablation
    concat    p learned tokens of keys and of values a head before K and V:
              [s P_k; K], [s P_v; V], as equation 3 is written
Choice:  the prefixes are created after the model, which so starts with the same weights
         with them and without.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from fedcore.errors import SettingsError
from fedcore.models.cnn import image


class Prefix(BaseModel):
    """A generator of prefixes for keys and values in every block."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    form: Literal["none", "additive", "linear", "concat"] = Field(
        "none", description="the generator of prefixes"
    )
    bottleneck: int = Field(
        256,
        ge=1,
        description="additive: r_b, units of the generator; concat: p, tokens",
    )
    scale: float = Field(1.5, description="s")
    depth: int | None = Field(
        None, ge=1, description="the last so many blocks have one; default: all"
    )
    start: Literal["default", "zero_up"] = Field(
        "default", description="zero_up: P = 0 at the start, the plain model's outputs"
    )


class Vit(BaseModel):
    """Pre-norm Vision Transformer; the defaults are tiny.

    ViT-S/16: patch 16, width 384, depth 12, heads 6, mlp 1536.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["vit"] = "vit"
    patch: int = Field(
        4, ge=1, description="side of a patch in pixels; divides the image's sides"
    )
    width: int = Field(32, ge=1, description="d, of a token; a multiple of heads")
    depth: int = Field(2, ge=1, le=1000, description="L, blocks")
    heads: int = Field(4, ge=1, description="H, heads of attention")
    mlp: int = Field(64, ge=1, description="units of the hidden layer in a block")
    adapter: int = Field(
        0,
        ge=0,
        description="units of the two bottlenecks in a block that start as the "
        "identity; 0 = none",
    )
    prefix: Prefix = Prefix()

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        channels, height, width = image(input_shape, "vit", self.patch)
        if height % self.patch or width % self.patch:
            raise SettingsError(
                f"model.patch = {self.patch}: expected a divisor of the image's sides, "
                f"{height}x{width}"
            )
        if self.width % self.heads:
            raise SettingsError(
                f"model.heads = {self.heads}: expected a divisor of "
                f"model.width = {self.width}"
            )
        patches = (height // self.patch) * (width // self.patch)
        model = VisionTransformer(self, channels, patches, num_outputs)
        return add_prefixes(model, self.prefix)


class VisionTransformer(nn.Module):
    """Class token first; its last state, normalised, is read out linearly."""

    def __init__(
        self, settings: Vit, channels: int, patches: int, num_outputs: int
    ) -> None:
        super().__init__()
        d, side = settings.width, settings.patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, d) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, d, side, side)})
        blocks = [Block(d, settings.heads, settings.mlp) for _ in range(settings.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, num_outputs)
        if settings.adapter:
            # Made last: the rest starts as without them.
            for block in blocks:
                block.add_adapters(settings.adapter)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # [B, patches, d]
        z = torch.cat([self.cls_token.expand(len(z), -1, -1), z], 1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(z))[:, 0])
        return logits


class Block(nn.Module):
    """z + attention(norm(z)), then z + mlp(norm(z)).

    An adapter on either branch before it is added.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(
            nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)}
        )
        self.adapter1: nn.Module = nn.Identity()
        self.adapter2: nn.Module = nn.Identity()

    def add_adapters(self, bottleneck: int) -> None:
        """Put an adapter of so many units on either branch."""
        width = self.attn.qkv.in_features
        self.adapter1 = Adapter(width, bottleneck)
        self.adapter2 = Adapter(width, bottleneck)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.adapter1(self.attn(self.norm1(z)))
        hidden = functional.gelu(self.mlp["fc1"](self.norm2(z)))
        z = z + self.adapter2(self.mlp["fc2"](hidden))
        return z


class Adapter(nn.Module):
    """x + W2 relu(W1 x + b1) + b2 (Houlsby et al., ICML 2019).

    The identity at the start: W2 = 0, b2 = 0.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = _zero(nn.Linear(bottleneck, width))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.up(functional.relu(self.down(x)))
        return changed


class Attention(nn.Module):
    """Multi-head self-attention over a fused qkv layer.

    In timm's layout (3, heads, d / heads).
    """

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = qkv, proj, heads

    def forward(
        self, z: Tensor, attn_mask: None = None, is_causal: bool = False
    ) -> Tensor:
        """Outputs [B, tokens, d] for z of the same shape.

        timm's blocks pass `attn_mask` and `is_causal` as well; for images they are
        always empty.
        """
        assert attn_mask is None, "prefixes are defined for whole images"
        assert not is_causal, "prefixes are defined for whole images"
        q, k, v = self.heads(z)
        weights = ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return mixed

    def heads(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, heads, tokens, d / heads]."""
        qkv = self.qkv(z).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v


class PrefixedAttention(Attention):
    """Attention with a generator of prefixes."""

    def __init__(self, plain: Attention, settings: Prefix) -> None:
        super().__init__(plain.qkv, plain.proj, plain.num_heads)
        d, size = plain.qkv.in_features, settings.bottleneck
        self.scale = settings.scale
        self.prefix: nn.Module
        last: nn.Module  # the layer that makes P
        if settings.form == "concat":
            self.prefix = last = Tokens(plain.num_heads, size, d // plain.num_heads)
        elif settings.form == "linear":
            self.prefix = last = nn.Linear(d, 2 * d)
        else:
            self.prefix = nn.Sequential()
            self.prefix.add_module("down", nn.Linear(d, size))
            self.prefix.add_module("tanh", nn.Tanh())
            last = nn.Linear(size, 2 * d)
            self.prefix.add_module("up", last)
        if settings.start == "zero_up":
            _zero(last)

    def heads(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(z)
        if isinstance(self.prefix, Tokens):
            size = len(z), *self.prefix.keys.shape
            keys = self.scale * self.prefix.keys.expand(size)
            values = self.scale * self.prefix.values.expand(size)
            return q, torch.cat([keys, k], 2), torch.cat([values, v], 2)
        prefixes = self.prefix(z).unflatten(-1, (2, self.num_heads, -1))
        p_k, p_v = prefixes.permute(2, 0, 3, 1, 4)
        return q, k + self.scale * p_k, v + self.scale * p_v


class Tokens(nn.Module):
    """Learned keys and values, [heads, p, d / heads]."""

    def __init__(self, heads: int, number: int, size: int) -> None:
        super().__init__()
        scale = math.sqrt(size)
        self.keys = nn.Parameter(torch.randn(heads, number, size) / scale)
        self.values = nn.Parameter(torch.randn(heads, number, size) / scale)


def add_prefixes(model: nn.Module, settings: Prefix) -> nn.Module:
    """The model with a generator of prefixes in the last `depth` blocks, in place.

    Also for timm's Vision Transformers: `model.blocks` is read. Raises SettingsError
    for blocks whose attention has no `qkv`, `proj` and `num_heads`, or has more.
    """
    if settings.form == "none":
        return model
    blocks: list[nn.Module] = list(getattr(model, "blocks", ()))
    if not blocks or (settings.depth or 0) > len(blocks):
        number = len(blocks) or "no"
        raise SettingsError(
            f"model.prefix.depth = {settings.depth}: the model has {number} blocks"
        )
    for block in blocks[-(settings.depth or len(blocks)) :]:
        plain = _plain_attention(getattr(block, "attn", None))
        block.attn = PrefixedAttention(plain, settings)
    return model


def _plain_attention(attn: Any) -> Attention:
    """The same attention, by its two layers.

    Raises SettingsError where it is another, or does more.
    """
    kind = type(attn).__name__
    if not all(hasattr(attn, part) for part in ("qkv", "proj", "num_heads")):
        raise SettingsError(
            "prefixes need attention with qkv, proj and num_heads; "
            f"the block has {kind}"
        )
    for more in ("q_norm", "k_norm", "norm", "gate"):
        if not isinstance(getattr(attn, more, None), nn.Identity | None):
            raise SettingsError(
                f"prefixes are not defined for attention with {more} ({kind})"
            )
    return Attention(attn.qkv, attn.proj, attn.num_heads)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
