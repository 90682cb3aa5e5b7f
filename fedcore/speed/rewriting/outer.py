"""Outer products of which norms and weighted sums are wanted, and nothing else.

The gradient of one example for a linear layer is an outer product a b^T. DP-SGD
(`fedcore.dpsgd`) takes its norm, and adds it to others with a weight:

    |a b^T| = |a| |b|        sum_j w_j a_j b_j^T = (w a)^T b, one matrix product

so that gradients of single examples need not be in memory at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from fedcore.speed import functorch as ops
from fedcore.speed.rewriting.nodes import VIEWS, shape_of

RESHAPING = VIEWS | {ops.RESHAPE}


def multiply_outer_products(graph: fx.Graph) -> None:
    """Replace outer products all of whose users are norms and weighted sums."""
    for node in list(graph.nodes):
        if node.target is not ops.BMM or shape_of(node.args[0])[-1] != 1:
            continue
        ends = list(_ends(node))
        has_norm = any(_is_norm(*end) for end in ends)
        if has_norm and all(_is_norm(*end) or _is_sum(*end) for end in ends):
            for user, source in ends:
                with graph.inserting_before(user):
                    if _is_norm(user, source):
                        result = _norm(graph, node)
                    else:
                        result = _sum(graph, node, user)
                    shape = list(shape_of(user))
                    shaped = graph.call_function(ops.RESHAPE, (result, shape))
                user.replace_all_uses_with(shaped, propagate_meta=True)
    graph.eliminate_dead_code()


def _ends(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Users of the node, or of its numbers in another shape, with what they use."""
    for user in node.users:
        if user.target in RESHAPING:
            yield from _ends(user)
        else:
            yield user, node


def _is_norm(user: fx.Node, source: fx.Node) -> bool:
    """Whether it is the norm of every outer product by itself."""
    if user.target is not ops.VECTOR_NORM or user.kwargs:
        return False
    axis = len(shape_of(source)) - 1
    return list(user.args[1:]) == [2, [axis]] and _has_rows(source)


def _is_sum(user: fx.Node, source: fx.Node) -> bool:
    """Whether it is a sum over outer products, each with a weight of its own."""
    if user.target not in (ops.MM, ops.BMM) or user.args[1] is not source:
        return False
    return shape_of(user.args[0])[-2:-1] == (1,) and _has_rows(source)


def _has_rows(source: Any) -> bool:
    """Whether each row of the last axis is one outer product."""
    node = source
    while node.target in RESHAPING:
        node = node.args[0]
    products, rows, columns = shape_of(node)
    shape = shape_of(source)
    return shape[-1] == rows * columns and math.prod(shape[:-1]) == products


def _norm(graph: fx.Graph, product: fx.Node) -> fx.Node:
    """|a| |b|, [products]."""
    norms = []
    for factor in product.args:
        norm = graph.call_function(ops.VECTOR_NORM, (factor, 2, [1, 2]))
        norms.append(norm)
    return graph.call_function(ops.MUL, tuple(norms))


def _sum(graph: fx.Graph, product: fx.Node, user: fx.Node) -> fx.Node:
    """(w a)^T b, [groups, rows, columns]."""
    weights = shape_of(user.args[0])  # [groups,] 1, products of a group
    groups, count = math.prod(weights[:-2]), weights[-1]
    _, rows, columns = shape_of(product)

    def shaped(node: Any, *shape: int) -> fx.Node:
        return graph.call_function(ops.RESHAPE, (node, list(shape)))

    left = shaped(product.args[0], groups, count, rows)
    right = shaped(product.args[1], groups, count, columns)
    weight = shaped(user.args[0], groups, count, 1)
    weighted = graph.call_function(ops.MUL, (left, weight))
    turned = graph.call_function(ops.TRANSPOSE, (weighted, 1, 2))
    return graph.call_function(ops.BMM, (turned, right))
