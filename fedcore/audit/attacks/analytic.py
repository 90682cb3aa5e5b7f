"""Analytic recovery from a first linear layer (Phong et al., IEEE TIFS 2018).

See also Geiping et al. 2020, Proposition 3.1.

z = W a + b, the first layer, fed by the raw input a   G_W, G_b  the update in W and b
    per example   dl/dW_i = d_i a,  dl/db_i = d_i:   a = G_W[i] / G_b[i] where d_i != 0
Exact for one example, after any number of local SGD steps, since each adds a multiple
of a. With more examples a row gives their mean, weighted by d_i; rows that only one of
them made active are still exact, and are recognised because several of them agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore.audit.attacks.base import (
    Attack,
    AttackSettings,
    Progress,
    Reconstruction,
    unwatched,
)
from fedcore.audit.observe import Observation


class Settings(AttackSettings):
    least: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="rows count whose |G_b| is more than this share of the largest",
    )
    same: float = Field(
        0.999, gt=0, lt=1, description="cosine above which two rows are one input"
    )


class FirstLayer(NamedTuple):
    """Names of the parameters of a first layer."""

    weight: str
    bias: str


class Analytic(Attack[Settings]):
    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = unwatched,
    ) -> list[Reconstruction]:
        found = []
        for i, observation in enumerate(seen):
            x, rows = inputs(observation, self.s)
            facts = {"rows": rows, "inputs": len(x)}
            found.append(Reconstruction(x, None, 0.0, 1, facts))
            progress((i + 1) / len(seen), None)
        return found


def first_layer(seen: Observation) -> FirstLayer | None:
    """The first layer, if it is linear on the raw input and has a bias."""
    names = list(seen.w0)[:2]
    size = torch.Size(seen.public.shape).numel()
    shapes = [seen.w0[name].shape for name in names]
    if len(names) < 2 or shapes[0][1:] != (size,) or shapes[1] != shapes[0][:1]:
        return None
    return FirstLayer(*names)


def inputs(seen: Observation, settings: Settings) -> tuple[Tensor, int]:
    """(up to N distinct inputs [n, ...], the number of active rows).

    Inputs that most rows agree on come first. Raises ValueError where the layer or the
    update allows none.
    """
    layer = first_layer(seen)
    if layer is None:
        name = next(iter(seen.w0))
        raise ValueError(
            f'the first layer ("{name}", {tuple(seen.w0[name].shape)}) is not a '
            "linear one with a bias on the raw input"
        )
    if any(name not in seen.delta for name in layer):
        raise ValueError(f'the first layer\'s "{layer.weight}" never left the client')
    W, b = (seen.delta[name].double() for name in layer)
    tiny = torch.finfo(torch.float64).tiny
    active = b.abs() > settings.least * b.abs().max().clamp(min=tiny)
    if not bool(active.any()):
        raise ValueError("no row of the first layer was active")
    rows = W[active] / b[active, None]  # [rows, size]
    kept = _distinct(rows, settings.same, seen.total_examples)
    like = next(iter(seen.w0.values()))
    return rows[kept].view(-1, *seen.public.shape).to(like.dtype), len(rows)


def _distinct(rows: Tensor, same: float, most: int) -> list[int]:
    """At most so many rows that point apart, those with most like them first."""
    tiny = torch.finfo(torch.float64).tiny
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=tiny)
    alike = unit @ unit.T > same
    kept: list[int] = []
    for row in alike.sum(1).argsort(descending=True, stable=True).tolist():
        if len(kept) < most and not any(alike[row, other] for other in kept):
            kept.append(row)
    return kept
