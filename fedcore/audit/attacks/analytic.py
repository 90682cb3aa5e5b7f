"""Analytic recovery from a first linear layer (Phong et al., IEEE TIFS 2018; Geiping et al. 2020, Proposition 3.1).

z = W a + b, the first layer, fed by the raw input a   G_W, G_b  the update in W and b
    per example   dl/dW_i = d_i a,  dl/db_i = d_i:   a = G_W[i] / G_b[i] for every row i with d_i not 0
Exact for one example, after any number of local SGD steps, since each adds a multiple of a. With more examples a row gives their
mean, weighted by d_i; rows that only one of them made active are still exact, and found because several such rows agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from fedcore.audit.attacks.base import (
    Attack,
    AttackSettings,
    Progress,
    Reconstruction,
    silent,
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


class Analytic(Attack[Settings]):
    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        found = []
        for i, o in enumerate(seen):
            x, rows = inputs(o, self.s)
            found.append(
                Reconstruction(x, None, 0.0, 1, {"rows": rows, "inputs": len(x)})
            )
            progress((i + 1) / len(seen), None)
        return found


def first_layer(o: Observation) -> tuple[str, str]:
    """Names of weight and bias. Raises ValueError for a first layer that is not linear, with a bias, on the raw input."""
    names = list(o.w0)[:2]
    size = torch.Size(o.public.shape).numel()
    shapes = [tuple(o.w0[name].shape) for name in names]
    if len(names) < 2 or shapes[0][1:] != (size,) or shapes[1] != shapes[0][:1]:
        raise ValueError(
            f'the first layer ("{names[0]}", {shapes[0]}) is not a linear one with a bias on the raw input'
        )
    return names[0], names[1]


def inputs(o: Observation, s: Settings) -> tuple[Tensor, int]:
    """(up to N distinct inputs [n, ...], those that most rows agree on first; rows that were active). Raises ValueError."""
    names = first_layer(o)
    if any(name not in o.delta for name in names):
        raise ValueError(f'the first layer\'s "{names[0]}" never left the client')
    W, b = (o.delta[name].double() for name in names)
    active = b.abs() > s.least * b.abs().max().clamp(
        min=torch.finfo(torch.float64).tiny
    )
    if not bool(active.any()):
        raise ValueError("no row of the first layer was active")
    rows = W[active] / b[active, None]  # [rows, size]
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    alike = unit @ unit.T > s.same
    found: list[int] = []
    for row in alike.sum(1).argsort(descending=True, stable=True).tolist():
        if len(found) < o.total and not any(alike[row, other] for other in found):
            found.append(row)
    like = next(iter(o.w0.values()))
    return rows[found].view(-1, *o.public.shape).to(like.dtype), len(rows)
