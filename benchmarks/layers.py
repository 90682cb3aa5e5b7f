"""A factored layer's forward and backward pass against the dense layer's, and their parameters: part of `make bench`.

On one core, batch 20; contenders take turns, and what is printed are medians and their ratios. "twice" is what a FedPara layer
costs that forms W anew for the backward pass (activation checkpointing of the composition), for comparison. Arithmetic that the
composition adds: 2 R m n multiplications of a linear layer each way, whatever the batch; so its share falls with the batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

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

CASES: list[tuple[str, nn.Linear | nn.Conv2d, tuple[int, ...]]] = [
    ("linear 256 -> 256", nn.Linear(256, 256), (256,)),
    ("linear 3136 -> 512", nn.Linear(3136, 512), (3136,)),
    (
        "convolution 64 -> 64, 3x3, on 14x14",
        nn.Conv2d(64, 64, 3, padding=1),
        (64, 14, 14),
    ),
    (
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
        found: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return found


def factored(
    dense: nn.Linear | nn.Conv2d, rank: int
) -> FactoredLinear | FactoredConv2d:
    s = LowRank(form="fedpara")
    return (
        FactoredLinear(dense, rank, s)
        if isinstance(dense, nn.Linear)
        else FactoredConv2d(dense, rank, s)
    )


def passes(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def one() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()

    return one


def medians(contenders: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Milliseconds, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 3):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            contenders[name]()
            if turn >= 3:
                seconds[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--turns", type=int, default=100)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(
        f"\n{'forward and backward, batch 20':<38}{'R':>4}{'size':>8}{'dense ms':>10}{'FedPara':>9}{'x dense':>9}{'twice':>8}"
    )
    for name, dense, shape in CASES:
        x = torch.randn(20, *shape)
        for gamma in (0.0, 0.5):
            weight = tuple(dense.weight.shape)
            rank = rank_of(weight, gamma)
            layer = factored(dense, rank)
            found = medians(
                {
                    "dense": passes(dense, x),
                    "once": passes(layer, x),
                    "twice": passes(Twice(layer), x),
                },
                turns,
            )
            share = size_of(weight, rank, "fedpara") / dense.weight.numel()
            once, base = found["once"], found["dense"]
            numbers = f"{rank:>4}{share:>8.1%}{base:>10.2f}{once:>9.2f}{once / base:>9.2f}{found['twice'] / base:>8.2f}"
            print(f"{name + f', gamma {gamma:g}':<38}{numbers}", flush=True)


if __name__ == "__main__":
    main()
