"""Rows under attack: near numbers, and a rule that selects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_near(found: Tensor, expected: Any, digits: int = 9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    gap = float((found.double() - expected).abs().max())
    assert gap < 0.6 * 10.0**-digits, f"{found.tolist()}, expected {expected.tolist()}"


def multi_krum(rows: Tensor, f: int) -> Tensor:
    """Multi-Krum as ByzFL has it: scores over n - f - 1 neighbours, mean of n - f."""
    n = len(rows)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    scores = distances.square().sort(1).values[:, 1 : n - f].sum(1)
    return rows[scores.argsort(stable=True)[: n - f]].mean(0)
