"""What tests of observations and reports of an audit share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.audit.observe import Observation
from fedcore.rounds import loop
from fedcore.types import Params


def gradient_of(model: nn.Module, w: Params, x: Tensor, y: Tensor) -> Params:
    """Gradient of the mean cross-entropy, by autograd alone."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
    outputs = torch.func.functional_call(model, leaves, (x,))
    loss = functional.cross_entropy(outputs, y)
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, slopes, strict=True))


def flat(tree: Params) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([value.flatten() for value in tree.values()])


def without_output_layer(seen: Observation) -> Observation:
    """The observation of a client that keeps all but its first layer."""
    return replace(seen, delta=dict(list(seen.delta.items())[:2]))


class Silent:
    """An observer of an audit that watches nothing."""

    def cell(self, number: int, cells: int, name: str) -> None:
        pass

    def progress(self, share: float, what: str, objective: float | None) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def training(self) -> loop.Observer:
        return loop.Quiet()
