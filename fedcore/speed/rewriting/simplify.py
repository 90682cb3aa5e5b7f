"""Leave out operations that change nothing, and do the others once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fedcore.speed import functorch as ops
from fedcore.speed.rewriting.nodes import VIEWS, shape_of

RESHAPING = VIEWS | {ops.EXPAND}
TRANSPOSING = frozenset({ops.TRANSPOSE, ops.T})


def drop_idle(graph: fx.Graph) -> None:
    """Leave out views to the same shape, products with 1, and what undoes itself."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            continue
        if node.target in RESHAPING and shape_of(node) == shape_of(source):
            node.replace_all_uses_with(source)
        elif _transposes_back(node, source):
            node.replace_all_uses_with(source.args[0])
        elif _views_a_copy(node, source):
            # It may be a view of the original, so that no copy is needed.
            node.target = ops.RESHAPE
            node.update_arg(0, source.args[0])
        elif _does_nothing(node):
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def share_repeated(graph: fx.Graph) -> None:
    """Compute once what is computed twice, unless something is written in place."""
    if any(ops.is_mutable(node.target) for node in graph.nodes):
        return
    firsts: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        # The caller may write to what it gets: outputs stay apart.
        is_output = any(user.op == "output" for user in node.users)
        if node.op != "call_function" or is_output:
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = firsts.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
    graph.eliminate_dead_code()


def _transposes_back(node: Any, source: Any) -> bool:
    return (
        node.target in TRANSPOSING
        and source.target is node.target
        and source.args[1:] == node.args[1:]
    )


def _views_a_copy(node: Any, source: Any) -> bool:
    return (
        node.target in VIEWS
        and source.target is ops.CLONE
        and source.kwargs.get("memory_format") is torch.contiguous_format
    )


def _does_nothing(node: Any) -> bool:
    if node.target is ops.MUL_SCALAR:
        return bool(node.args[1] == 1)
    if node.target is ops.PERMUTE:
        return bool(node.args[1] == sorted(node.args[1]))
    return node.target is ops.DETACH
