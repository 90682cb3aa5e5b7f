"""A client function on many clients as one CUDA graph, launched by one call.

Python and PyTorch take longer to launch one of its hundreds of small kernels than a GPU
to run it. A graph is captured at the third use of its shapes, and from there on only
replayed. It is compared with what the function computes when it is captured, and at its
replays 10, 100, ...: client functions are pure, but that is not taken on trust. What
cannot be captured, because it waits for the device, say, runs as it is written.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore import trees
from fedcore.speed.comparison import deviation, tolerance
from fedcore.types import Tree

if TYPE_CHECKING:
    from fedcore.speed.recording import Recorder

MOST_GRAPHS = 4  # at once: each holds all memory that its work needs
EAGER = 2  # uses before, in which local steps are recorded and the recordings compared

Work = Callable[[Tree], Tree]

log = logging.getLogger("fedcore")


@dataclass
class Graph:
    """Work that was captured, and the memory that it goes on."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # it reads here
    outputs: Tree  # it writes here
    replays: int = 0
    next_check: int = 10  # the replay at which it is compared again

    def replay(self, leaves: list[Tensor]) -> Tree:
        for place, x in zip(self.inputs, leaves, strict=True):
            place.copy_(x)
        self.graph.replay()
        return trees.map(_copy, self.outputs)  # the next replay writes there


class Graphs:
    """The CUDA graphs of one process and one GPU, by function and shapes."""

    def __init__(self, recorder: Recorder | None) -> None:
        """`recorder` runs the local steps of the work, where any are recorded."""
        self._recorder = recorder
        self._uses: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, Graph] = {}
        self._refused: set[Hashable] = set()  # what cannot be captured

    def run(self, kind: Hashable, work: Work, inputs: Tree) -> Tree:
        """`work(inputs)`. `kind` is all that it depends on but its inputs."""
        if self._recorder is not None and self._recorder.reason is not None:
            self.clear()
            return work(inputs)
        leaves = trees.leaves(inputs)
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in leaves)
        key = (kind, _structure(inputs), shapes)
        if (graph := self._graphs.get(key)) is not None:
            graph.replays += 1
            if graph.replays >= graph.next_check:
                return self._checked(key, graph, work, inputs)
            return graph.replay(leaves)
        self._uses[key] += 1
        outputs = work(inputs)
        if self._uses[key] > EAGER and key not in self._refused:
            self._capture(key, work, inputs, outputs)
        return outputs

    def clear(self) -> None:
        """Give back the memory of all graphs; they are made again in time."""
        self._graphs.clear()
        self._refused.clear()
        self._uses.clear()

    def _checked(self, key: Hashable, graph: Graph, work: Work, inputs: Tree) -> Tree:
        """A replay; or the work, for good, where that computes something else."""
        graph.next_check *= 10
        expected = work(inputs)
        outputs = graph.replay(trees.leaves(inputs))
        if _is_alike(outputs, expected, inputs):
            return outputs
        self._refuse(key, "a replay computes something else than its client function")
        del self._graphs[key]
        return expected

    def _capture(self, key: Hashable, work: Work, inputs: Tree, expected: Tree) -> None:
        if len(self._graphs) >= MOST_GRAPHS:
            return
        unchecked = self._recorder.unchecked() if self._recorder else nullcontext()
        try:
            with unchecked:
                # Waiting for the device would spoil the capture, and the stream.
                with waiting_refused():
                    work(inputs)
                graph = _captured(work, inputs)
            outputs = graph.replay(trees.leaves(inputs))
        except Exception as error:
            self._refuse(key, str(error))
            return
        if _is_alike(outputs, expected, inputs):
            self._graphs[key] = graph
        else:
            self._refuse(key, "replayed, it computes something else")

    def _refuse(self, key: Hashable, reason: str) -> None:
        self._refused.add(key)
        log.debug("a client function runs without a CUDA graph: %s", reason)


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Operations inside that wait for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            message = "Synchronization debug mode is a prototype"
            warnings.filterwarnings("ignore", message)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _captured(work: Work, inputs: Tree) -> Graph:
    places = trees.map(torch.clone, inputs)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            outputs = work(places)
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
    return Graph(graph, trees.leaves(places), outputs)


def _is_alike(outputs: Tree, expected: Tree, inputs: Tree) -> bool:
    """Whether the same clients went the same way, up to rounding."""
    values, right = trees.leaves(outputs), trees.leaves(expected)
    leaves = trees.leaves(inputs)
    return deviation(values, right, leaves, by_client=True) <= tolerance(right)


def _structure(tree: Tree) -> Hashable:
    """The types and names of a tree, without its tensors."""
    if isinstance(tree, dict):
        return tuple((name, _structure(inner)) for name, inner in tree.items())
    if isinstance(tree, tuple | list):
        return type(tree), tuple(_structure(inner) for inner in tree)
    return None


def _copy(x: Tensor) -> Tensor:
    """A copy; one row in memory that stands for all clients stays one."""
    if x.ndim and len(x) and x.stride(0) == 0:
        return _copy(x[0]).expand(x.shape)
    return x.clone()
