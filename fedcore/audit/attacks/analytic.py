"""Analytic recovery from a first linear layer (Phong et al., IEEE TIFS 2018).

See also Geiping et al. 2020, Proposition 3.1.
z = W a + b  the first layer, fed by the raw input a   G_W, G_b  the update in W and b
    per example   dl/dW_i = d_i a,  dl/db_i = d_i:
                  a = G_W[i] / G_b[i] for every row i with d_i not 0
Exact for one example, after any number of local SGD steps, since each adds a multiple
of a. With more examples a row gives their mean, weighted by d_i; rows that only one of
them made active are still exact, and found because several such rows agree.
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
    keep_going,
)
from fedcore.audit.observe import Observation

TINY = torch.finfo(torch.float64).tiny


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
    needs = frozenset({"reals"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = keep_going,
    ) -> list[Reconstruction]:
        reconstructions = []
        for i, client in enumerate(seen):
            x, rows = inputs(client, self.s)
            facts = {"rows": rows, "inputs": len(x)}
            reconstructions.append(Reconstruction(x, None, 0.0, 1, facts))
            progress((i + 1) / len(seen), None)
        return reconstructions


class FirstLayer(NamedTuple):
    """Names of the parameters of a linear first layer."""

    weight: str
    bias: str


def first_layer(seen: Observation) -> FirstLayer | None:
    """The first layer, if it is linear on the raw input and has a bias."""
    if seen.public.unlike_reals is not None:
        return None
    names = list(seen.w0)[:2]
    size = torch.Size(seen.public.shape).numel()
    shapes = [tuple(seen.w0[name].shape) for name in names]
    if len(names) < 2 or shapes[0][1:] != (size,) or shapes[1] != shapes[0][:1]:
        return None
    return FirstLayer(*names)


def inputs(seen: Observation, settings: Settings) -> tuple[Tensor, int]:
    """(up to N distinct inputs [n, ...], number of rows that were active).

    The inputs that most rows agree on come first. Raises ValueError where the first
    layer was not sent, or no row of it was active.
    """
    layer = first_layer(seen)
    if layer is None:
        name, start = next(iter(seen.w0.items()))
        raise ValueError(
            f'the first layer ("{name}", {tuple(start.shape)}) is not a linear one '
            "with a bias on the raw input"
        )
    weight, bias = layer
    if weight not in seen.delta or bias not in seen.delta:
        raise ValueError(f'the first layer\'s "{weight}" never left the client')
    W, b = seen.delta[weight].double(), seen.delta[bias].double()
    active = b.abs() > settings.least * b.abs().max().clamp(min=TINY)
    if not bool(active.any()):
        raise ValueError("no row of the first layer was active")
    rows = W[active] / b[active, None]  # [rows, size]
    distinct = _distinct(rows, settings.same, seen.total_examples)
    like = next(iter(seen.w0.values()))
    x = rows[distinct].view(-1, *seen.public.shape).to(like.dtype)
    return x, len(rows)


def _distinct(rows: Tensor, same: float, most: int) -> list[int]:
    """Indices of at most so many different rows, those that most others equal first."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=TINY)
    is_same = unit @ unit.T > same
    chosen: list[int] = []
    for row in is_same.sum(1).argsort(descending=True, stable=True).tolist():
        if len(chosen) < most and not bool(is_same[row, chosen].any()):
            chosen.append(row)
    return chosen
