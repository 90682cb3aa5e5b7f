"""Vision Transformers of timm, where it is installed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedcore.errors import SettingsError
from fedcore.models.cnn import image
from fedcore.models.vit import Prefix, add_prefixes


class Timm(BaseModel):
    """A Vision Transformer of timm, untrained, for images of their own size."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["timm"] = "timm"
    architecture: str = Field(
        "vit_tiny_patch16_224", description="one of timm.list_models('vit_*')"
    )
    patch: int = Field(
        4, ge=1, description="side of a patch in pixels; divides the image's sides"
    )
    prefix: Prefix = Prefix()

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        try:
            import timm  # type: ignore[import-not-found]
        except ImportError as error:
            raise SettingsError(
                'model.name = "timm": timm is not installed; pip install timm, '
                'or use model.name = "vit"'
            ) from error
        channels, height, width = image(input_shape, "timm", self.patch)
        try:
            model: nn.Module = timm.create_model(
                self.architecture,
                img_size=(height, width),
                patch_size=self.patch,
                in_chans=channels,
                num_classes=num_outputs,
            )
        except Exception as error:  # timm may raise anything
            raise SettingsError(
                f'model.architecture = "{self.architecture}": '
                f"timm cannot make it: {error}"
            ) from error
        for module in model.modules():
            # Its fused kernel has no batching rule.
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
        return add_prefixes(model, self.prefix)
