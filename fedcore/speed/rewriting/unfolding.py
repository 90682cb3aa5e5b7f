"""Images unfolded for one matrix product a client, in one copy instead of two."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from fedcore.speed import functorch as ops
from fedcore.speed.kernels.unfolding import (
    folded,
    patches,
    patches_adjoint,
    unfolded,
)
from fedcore.speed.rewriting.nodes import VIEWS, shape_of


class Turn(NamedTuple):
    """A node that is `source.view(shape).transpose(1, 2).reshape(...)`."""

    source: Any
    shape: tuple[int, ...]  # of four axes


def unfold_by_client(graph: fx.Graph) -> None:
    """Put `unfolded` and `folded` in place of patches that are turned afterwards."""
    for node in graph.nodes:
        with graph.inserting_before(node):
            faster = _unfolded(graph, node) or _folded(graph, node)
        if faster is not None:
            node.replace_all_uses_with(faster, propagate_meta=True)
    graph.eliminate_dead_code()


def _unfolded(graph: fx.Graph, node: Any) -> fx.Node | None:
    """Patches [n B, C k k, h w], turned into columns [n, C k k, B h w]."""
    turn = _turn(node)
    if turn is None or turn.source.target is not patches:
        return None
    n, images, rows, places = turn.shape
    before, after = (n * images, rows, places), (n, rows, images * places)
    if (shape_of(turn.source), shape_of(node)) != (before, after):
        return None
    x, *settings = turn.source.args
    size = [n, images, *shape_of(x)[1:]]
    by_client = graph.call_function(ops.VIEW, (x, size))
    return graph.call_function(unfolded, (by_client, *settings))


def _folded(graph: fx.Graph, node: Any) -> fx.Node | None:
    """The adjoint: columns [n, C k k, B h w], turned into patches [n B, C k k, h w]."""
    if node.target is not patches_adjoint:
        return None
    turned = node.args[0]
    turn = _turn(turned)
    if turn is None:
        return None
    n, rows, images, places = turn.shape
    before, after = (n, rows, images * places), (n * images, rows, places)
    if (shape_of(turn.source), shape_of(turned)) != (before, after):
        return None
    arguments = (turn.source, images, *node.args[1:])
    by_client = graph.call_function(folded, arguments)
    return graph.call_function(ops.VIEW, (by_client, list(shape_of(node))))


def _turn(node: Any) -> Turn | None:
    if node.target is not ops.RESHAPE:
        return None
    transposed = node.args[0]
    if transposed.target is not ops.TRANSPOSE or transposed.args[1:] != (1, 2):
        return None
    view = transposed.args[0]
    if view.target not in VIEWS or len(shape_of(view)) != 4:
        return None
    return Turn(view.args[0], shape_of(view))
