"""A step written down as a graph of tensor operations, below autograd and vmap."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from fedcore import trees
from fedcore.speed.functorch import TorchDispatchMode, is_recordable


class UnrecordableError(Exception):
    """A step that looks at values, or draws."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation that PyTorch runs inside `with tape`.

    `meta["val"]` of every node is the tensor that it was, until `forget`.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self._constants = 0
        self._nodes: dict[int, fx.Node] = {}  # by tensor; `meta` keeps them alive
        for i, x in enumerate(inputs):
            self._enter(x, self.graph.placeholder(f"x{i}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_recordable(func):
            raise UnrecordableError(str(func))
        result = func(*args, **kwargs)
        node = self.graph.call_function(
            func, trees.map(self._node, args), trees.map(self._node, kwargs)
        )
        if isinstance(result, Tensor):
            self._enter(result, node)
        elif isinstance(result, tuple | list):
            self._enter_all(result, node)
        return result

    def _enter_all(self, results: Any, node: fx.Node) -> None:
        for i, x in enumerate(results):
            if isinstance(x, Tensor):
                item = self.graph.call_function(operator.getitem, (node, i))
                self._enter(x, item)

    def _enter(self, x: Tensor, node: fx.Node) -> None:
        node.meta["val"] = x
        self._nodes[id(x)] = node

    def _node(self, x: Any) -> Any:
        """The node that stands for an argument.

        A tensor that was there before the step is a constant, held as it is.
        """
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._nodes:
            name = f"c{self._constants}"
            self._constants += 1
            self.constants.register_buffer(name, x.detach())
            self._enter(x, self.graph.get_attr(name))
        return self._nodes[id(x)]

    def finish(self, outputs: list[Tensor]) -> None:
        self.graph.output([self._node(x) for x in outputs])

    def forget(self) -> None:
        """Let go of the first step's values, which would stay until a collection."""
        self._nodes.clear()
        for node in self.graph.nodes:
            node.meta.clear()
