"""The parameters that a model starts with: those of a run, or of a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedcore.errors import SettingsError
from fedcore.storage.checkpoint import Checkpoint

__all__ = ["start_from"]


def start_from(model: nn.Module, source: Path) -> None:
    """Give the model the parameters of a run directory, or of a safetensors file.

    Parameters that the source lacks (a personal part) stay as they are. Raises
    SettingsError when there is nothing to read, or when it does not fit the model.
    """
    values = _saved_params(source)
    params = dict(model.named_parameters())
    for name, value in values.items():
        if name in params and params[name].shape == value.shape:
            continue
        fits = "no such parameter"
        if name in params:
            fits = f"of shape {tuple(params[name].shape)}"
        raise SettingsError(
            f'initial = {source}: it holds "{name}" of shape {tuple(value.shape)}, '
            f"the model has {fits}"
        )
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)


def _saved_params(source: Path) -> dict[str, Tensor]:
    """The parameters of a run directory, or of a safetensors file, by name."""
    try:
        if source.is_dir():
            checkpoint = Checkpoint(source / "checkpoint")
            checkpoint.read()
            flat = checkpoint.part("server")
        else:
            flat = load_file(source)
    except (OSError, SafetensorError, SettingsError) as error:
        raise SettingsError(
            f"initial = {source}: {error}; expected a run directory with a "
            "checkpoint, or a .safetensors file"
        ) from error
    prefix = "params/" if source.is_dir() else ""
    values = {}
    for path, value in flat.items():
        if path.startswith(prefix):
            values[path.removeprefix(prefix)] = value
    if not values:
        raise SettingsError(f"initial = {source}: it holds no parameters")
    return values
