"""The hash of what a model does not train: two machines must hold the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fedcore.statistics import statistic_names

__all__ = ["frozen_sha256"]


def frozen_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's frozen parameters and persistent buffers, in hex.

    By sorted name: name, type, shape and bytes of each. "" for a model without a frozen
    parameter.

    >>> frozen_sha256(nn.Linear(2, 2))
    ''
    >>> len(frozen_sha256(nn.Linear(2, 2).requires_grad_(False)))
    64
    """
    statistics = statistic_names(model)
    frozen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name not in statistics:
            frozen[name] = parameter
    if not frozen:
        return ""
    digest = hashlib.sha256()
    frozen |= _persistent_buffers(model)
    for name in sorted(frozen):
        tensor = frozen[name].detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {kind} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            own_name = name.rpartition(".")[2]
            if own_name not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found
