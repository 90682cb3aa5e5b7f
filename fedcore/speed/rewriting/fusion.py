"""Products that are only scaled and added are added in one pass, in place if they can.

addcmul(y, a @ b, s) becomes baddbmm(y, s a, b), where s is one number a client.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from fedcore.speed import functorch as ops
from fedcore.speed.rewriting.nodes import shape_of, size_of


class Sum(NamedTuple):
    """The operators for a product and what it is added to."""

    new: Any
    in_place: Any


SUMS = {
    ops.BMM: Sum(ops.BADDBMM, ops.BADDBMM_),
    ops.MM: Sum(ops.ADDMM, ops.ADDMM_),
}


def fuse_sums(graph: fx.Graph, writable: set[fx.Node]) -> None:
    """Fuse what can be; `writable` are the inputs that may be overwritten."""
    for node in graph.nodes:
        if node.target is not ops.ADDCMUL or node.kwargs:
            continue
        y = node.args[0]
        in_place = y in writable and shape_of(y) == shape_of(node)
        in_place = in_place and _is_last_use(y, node)
        if _is_fusible(node):
            _fuse(graph, node, in_place)
        elif in_place:
            node.target = ops.ADDCMUL_
    graph.eliminate_dead_code()


def _fuse(graph: fx.Graph, node: Any, in_place: bool) -> None:
    y, product, s = node.args
    a, b = product.args
    with graph.inserting_before(node):
        if size_of(a) <= size_of(b):  # the smaller factor is scaled
            a = graph.call_function(ops.MUL, (a, s))
        else:
            b = graph.call_function(ops.MUL, (b, s))
        operators = SUMS[product.target]
        operator = operators.in_place if in_place else operators.new
        fused = graph.call_function(operator, (y, a, b))
    fused.meta = node.meta
    node.replace_all_uses_with(fused)


def _is_fusible(node: Any) -> bool:
    y, product, s = node.args
    if product.target not in SUMS or len(product.users) != 1:
        return False
    if shape_of(product) != shape_of(node):
        return False
    by_client = (shape_of(product)[0], 1, 1) if product.target is ops.BMM else ()
    dtypes = {x.meta["val"].dtype for x in (y, *product.args, s)}
    return shape_of(s) in (by_client, ()) and len(dtypes) == 1


def _is_last_use(y: Any, node: fx.Node) -> bool:
    """Whether nothing after `node` reads y or a view of it."""
    is_after = False
    aliases = {y}
    for other in y.graph.nodes:
        if other is node:
            is_after = True
            continue
        reads = aliases & set(other.all_input_nodes)
        if reads and is_after:
            return False
        if reads and ops.may_alias(other.target):
            aliases.add(other)
    return True
