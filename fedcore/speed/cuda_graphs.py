"""A client function on many clients as one CUDA graph: its hundreds of small kernels are launched by one call.

Python and PyTorch take longer to launch such a kernel than a GPU to run it. A graph is captured at the third use of its shapes, is
compared then with what the function computes, and from there on only replayed: what it does must follow from its inputs, and client
functions are pure. What cannot be captured, because it waits for the device, say, runs as it is written.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fedcore import trees
from fedcore.types import Tree

MOST = 4  # graphs at once: each holds all memory that its work needs
EAGER = 2  # uses before, in which local steps are recorded and the recordings compared

log = logging.getLogger("fedcore")


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # where it reads
    outputs: Tree  # where it writes


class Graphs:
    """Of one process and one GPU, by function and shapes."""

    def __init__(self) -> None:
        self._uses: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._refused: set[Hashable] = set()  # what cannot be captured

    def run(self, kind: Hashable, work: Callable[[Tree], Tree], inputs: Tree) -> Tree:
        """`work(inputs)`. `kind` is all that it depends on but its inputs."""
        leaves = trees.leaves(inputs)
        key = (
            kind,
            pytree.tree_structure(inputs),
            tuple((x.shape, x.stride(), x.dtype) for x in leaves),
        )
        if (graph := self._graphs.get(key)) is not None:
            return _replay(graph, leaves)
        self._uses[key] += 1
        found = work(inputs)
        if (
            self._uses[key] > EAGER
            and key not in self._refused
            and len(self._graphs) < MOST
        ):
            graph = _captured(work, inputs, found)
            if graph is None:
                self._refused.add(key)
            else:
                self._graphs[key] = graph
        return found

    def clear(self) -> None:
        self._graphs.clear()
        self._refused.clear()
        self._uses.clear()


def _captured(
    work: Callable[[Tree], Tree], inputs: Tree, expected: Tree
) -> _Graph | None:
    try:
        with (
            _nobody_waits()
        ):  # what waits for the device would spoil the capture, and with it the stream
            work(inputs)
        graph = _capture(work, inputs)
        found = _replay(graph, trees.leaves(inputs))
    except Exception as e:
        log.debug("a client function runs without a CUDA graph: %s", e)
        return None
    if all(
        _alike(a, b)
        for a, b in zip(trees.leaves(found), trees.leaves(expected), strict=True)
    ):
        return graph
    log.debug(
        "a client function runs without a CUDA graph: replayed, it computes something else"
    )
    return None


@contextmanager
def _nobody_waits() -> Iterator[None]:
    """Operations inside that wait for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Synchronization debug mode is a prototype"
            )
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _capture(work: Callable[[Tree], Tree], inputs: Tree) -> _Graph:
    own, graph, stream = (
        trees.map(torch.clone, inputs),
        torch.cuda.CUDAGraph(),
        torch.cuda.current_stream(),
    )
    try:
        with torch.cuda.graph(graph):
            outputs = work(own)
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
    return _Graph(graph, trees.leaves(own), outputs)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, by the largest of b."""
    if not b.is_floating_point():
        return torch.equal(a, b)
    largest = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-2, atol=1e-2 * largest, equal_nan=True)


def _replay(g: _Graph, inputs: list[Tensor]) -> Tree:
    for own, x in zip(g.inputs, inputs, strict=True):
        own.copy_(x)
    g.graph.replay()
    return trees.map(_copy, g.outputs)  # the next replay writes there


def _copy(x: Tensor) -> Tensor:
    """What is one row in memory for all clients stays so."""
    return (
        _copy(x[0]).expand(x.shape)
        if x.ndim and len(x) and x.stride(0) == 0
        else x.clone()
    )
