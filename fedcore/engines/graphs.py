"""A client function on many clients as one CUDA graph: its hundreds of small kernels are launched by one call.

Python and PyTorch take longer to launch such a kernel than a GPU to run it. A graph is captured at the third use of its shapes, is
compared then with what the function computes, and from there on only replayed: what it does must follow from its inputs, and client
functions are pure. What cannot be captured, because it waits for the device, say, runs as it is written.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
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
        self._graphs: dict[Hashable, _Graph | None] = {}  # None: cannot be captured

    def run(self, kind: Hashable, work: Callable[[Tree], Tree], inputs: Tree) -> Tree:
        """`work(inputs)`. `kind` is all that it depends on but the values and shapes of its inputs."""
        leaves = trees.leaves(inputs)
        key = (kind, tuple((x.shape, x.stride(), x.dtype) for x in leaves))
        if (graph := self._graphs.get(key)) is not None:
            return _replay(graph, leaves)
        self._uses[key] += 1
        found = work(inputs)
        if self._uses[key] > EAGER and key not in self._graphs and len(self._graphs) < MOST:
            self._graphs[key] = self._captured(work, inputs, found)
        return found

    def clear(self) -> None:
        self._graphs.clear()
        self._uses.clear()

    def _captured(self, work: Callable[[Tree], Tree], inputs: Tree, expected: Tree) -> _Graph | None:
        try:
            graph = _capture(work, inputs)
            found = _replay(graph, trees.leaves(inputs))
        except Exception as e:
            log.debug("a client function runs without a CUDA graph: %s", e)
            return None
        pairs = zip(trees.leaves(found), trees.leaves(expected), strict=True)
        if all(torch.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True) for a, b in pairs):
            return graph
        log.debug("a client function runs without a CUDA graph: replayed, it computes something else")
        return None


def _capture(work: Callable[[Tree], Tree], inputs: Tree) -> _Graph:
    own, graph = trees.map(torch.clone, inputs), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work(own)
    return _Graph(graph, trees.leaves(own), outputs)


def _replay(g: _Graph, inputs: list[Tensor]) -> Tree:
    for own, x in zip(g.inputs, inputs, strict=True):
        own.copy_(x)
    g.graph.replay()
    return trees.map(_copy, g.outputs)  # the next replay writes there


def _copy(x: Tensor) -> Tensor:
    """What is one row in memory for all clients stays so."""
    return _copy(x[0]).expand(x.shape) if x.ndim and len(x) and x.stride(0) == 0 else x.clone()
