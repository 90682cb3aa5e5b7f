"""A factored layer's passes against the dense layer's, and their parameters.

Part of `make bench`: forward and backward on one core, batch 20; contenders take turns,
and the medians and their ratios are printed. "twice" is the cost of a FedPara layer
that composes W anew for the backward pass (activation checkpointing), for comparison.
The composition adds 2 R m n multiplications of a linear layer each way, whatever the
batch: its share falls with the batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedcore.models.lowrank import (
    FactoredConv2d,
    FactoredLinear,
    LowRank,
    rank_of,
    size_of,
)

BATCH = 20
WARM_UP = 3  # turns that do not count


class Case(NamedTuple):
    """A layer and the shape of one input."""

    name: str
    dense: nn.Linear | nn.Conv2d
    shape: tuple[int, ...]


CASES = [
    Case("linear 256 -> 256", nn.Linear(256, 256), (256,)),
    Case("linear 3136 -> 512", nn.Linear(3136, 512), (3136,)),
    Case(
        "convolution 64 -> 64, 3x3, on 14x14",
        nn.Conv2d(64, 64, 3, padding=1),
        (64, 14, 14),
    ),
    Case(
        "convolution 256 -> 256, 3x3, on 8x8",
        nn.Conv2d(256, 256, 3, padding=1),
        (256, 8, 8),
    ),
]


class Twice(nn.Module):
    """The layer with its weight composed again in the backward pass."""

    def __init__(self, layer: FactoredLinear | FactoredConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


def factored(
    dense: nn.Linear | nn.Conv2d, rank: int
) -> FactoredLinear | FactoredConv2d:
    settings = LowRank(form="fedpara")
    if isinstance(dense, nn.Linear):
        return FactoredLinear(dense, rank, settings)
    return FactoredConv2d(dense, rank, settings)


def passes(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward pass of the layer."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()

    return run


def medians(contenders: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Milliseconds of each contender, by its name; they take turns, back and forth."""
    names = list(contenders)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + WARM_UP):
        for name in names if turn % 2 else reversed(names):
            begin = time.perf_counter()
            contenders[name]()
            if turn >= WARM_UP:
                milliseconds[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in milliseconds.items()}


def row(case: Case, gamma: float, turns: int) -> str:
    """One line of the table."""
    x = torch.randn(BATCH, *case.shape)
    shape = tuple(case.dense.weight.shape)
    rank = rank_of(shape, gamma)
    layer = factored(case.dense, rank)
    contenders = {
        "dense": passes(case.dense, x),
        "once": passes(layer, x),
        "twice": passes(Twice(layer), x),
    }
    times = medians(contenders, turns)
    share = size_of(shape, rank, "fedpara") / case.dense.weight.numel()
    once, twice = times["once"] / times["dense"], times["twice"] / times["dense"]
    return (
        f"{case.name + f', gamma {gamma:g}':<38}{rank:>4}{share:>8.1%}"
        f"{times['dense']:>10.2f}{times['once']:>9.2f}{once:>9.2f}{twice:>8.2f}"
    )


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--turns", type=int, default=100)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(
        f"\n{f'forward and backward, batch {BATCH}':<38}{'R':>4}{'size':>8}"
        f"{'dense ms':>10}{'FedPara':>9}{'x dense':>9}{'twice':>8}"
    )
    for case in CASES:
        for gamma in (0.0, 0.5):
            print(row(case, gamma, turns), flush=True)


if __name__ == "__main__":
    main()
