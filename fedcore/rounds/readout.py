"""What the server reads of reports, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.types import Reports


class Readout(NamedTuple):
    """Of n clients, on the CPU; tensors in the order of the reports' `clients`."""

    finite: list[bool]  # whether a client's update is; empty where all are
    num_examples: Tensor  # [n]
    metrics: dict[str, Tensor]  # each [n]


def read(reports: Iterable[Reports]) -> Iterator[tuple[Reports, Readout]]:
    """Each with its readout. On a GPU one behind, so that nobody waits for a chunk's numbers before the next one is under way."""
    behind: list[tuple[Reports, Callable[[], Readout]]] = []
    for r in reports:
        readout = _begin(r)
        yield from ((before, wait()) for before, wait in behind)
        behind = [(r, readout)]
        if not r.num_examples.is_cuda:
            yield r, readout()
            behind = []
    yield from ((before, wait()) for before, wait in behind)


def _begin(r: Reports) -> Callable[[], Readout]:
    """The copies begin; to call what is returned waits for them."""
    sums = (
        trees.row_sums(r.up) if len(r.clients) and r.total is None else torch.empty(0)
    )
    wait = trees.fetch((sums, r.num_examples, r.metrics))

    def readout() -> Readout:
        sums, num_examples, metrics = wait()
        return Readout(
            [math.isfinite(value) for value in sums.tolist()], num_examples, metrics
        )

    return readout
