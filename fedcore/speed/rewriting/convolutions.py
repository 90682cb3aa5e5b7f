"""Convolutions with weights of their own for each client, in a faster form.

vmap makes them one convolution of as many groups. On a CPU, PyTorch's kernels for
groups take about twice as long as a call for each client; on a GPU (an H200), two to
four times as long as a matrix product of few inputs, and as long as one of many.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from fedcore.speed import functorch as ops
from fedcore.speed.kernels.convolution import (
    convolutions,
    convolutions_backward,
    products,
    products_backward,
)
from fedcore.speed.rewriting.nodes import VIEWS, shape_of

FEW_INPUTS = 256  # of a convolution: channels x elements of the kernel

# vmap has clients first, [n, B, C, H, W], and groups want examples first.
SWAP = [1, 0, 2, 3, 4]

COPIES = VIEWS | {ops.RESHAPE, ops.CLONE}


class Form(NamedTuple):
    """One way of computing the convolutions of many clients."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def convolve_by_client(graph: fx.Graph, clients: int) -> None:
    """Replace convolutions of one group a client, and their gradients."""
    for node in list(graph.nodes):
        if node.target is ops.CONVOLUTION:
            _replace_forward(graph, node, clients)
        elif node.target is ops.CONVOLUTION_BACKWARD:
            _replace_backward(graph, node, clients)
    graph.eliminate_dead_code()


def _replace_forward(graph: fx.Graph, node: Any, clients: int) -> None:
    x, w, bias, stride, padding, dilation, transposed, _, groups = node.args
    form = _form_of(w)
    if form is None or bias is not None or transposed or groups != clients:
        return
    with graph.inserting_before(node):
        inputs = (_by_client(graph, x, clients), _weights(graph, w, clients))
        settings = (stride, padding, dilation)
        by_client = graph.call_function(form.forward, (*inputs, *settings))
        _take_place(graph, node, by_client, clients)


def _replace_backward(graph: fx.Graph, node: Any, clients: int) -> None:
    g, x, w, bias, stride, padding, dilation, transposed, _, groups, wanted = node.args
    form = _form_of(w)
    if form is None or bias is not None or transposed or groups != clients:
        return
    with graph.inserting_before(node):
        images = (_by_client(graph, g, clients), _by_client(graph, x, clients))
        inputs = (*images, _weights(graph, w, clients))
        settings = (stride, padding, dilation, wanted)
        gradients = graph.call_function(form.backward, (*inputs, *settings))
    for user in list(node.users):
        which = user.args[1]
        with graph.inserting_before(user):
            gradient = graph.call_function(operator.getitem, (gradients, which))
            if which == 0:
                _take_place(graph, user, gradient, clients)
            else:
                shape = list(shape_of(user))
                user.replace_all_uses_with(
                    graph.call_function(ops.VIEW, (gradient, shape))
                )


def _form_of(w: fx.Node) -> Form | None:
    """The faster form for weights w; None where the convolution is best as it is."""
    if w.meta["val"].device.type == "cpu":
        return Form(convolutions, convolutions_backward)
    if len(shape_of(w)) == 4 and math.prod(shape_of(w)[1:]) <= FEW_INPUTS:
        return Form(products, products_backward)
    return None


def _by_client(graph: fx.Graph, x: fx.Node, clients: int) -> fx.Node:
    """[B, n C, H, W] as [n, B, C, H, W]: the node that it was made of, if any."""
    source: Any = x
    while source.target in COPIES:
        source = source.args[0]
    if source.target is ops.PERMUTE and source.args[1] == SWAP:
        original: fx.Node = source.args[0]
        return original
    images, channels, *size = shape_of(x)
    shape = [images, clients, channels // clients, *size]
    split = graph.call_function(ops.VIEW, (x, shape))
    return graph.call_function(ops.PERMUTE, (split, SWAP))


def _weights(graph: fx.Graph, w: fx.Node, clients: int) -> fx.Node:
    """[n D, C, k, k] as [n, D, C, k, k]."""
    channels, *rest = shape_of(w)
    shape = [clients, channels // clients, *rest]
    return graph.call_function(ops.VIEW, (w, shape))


def _take_place(
    graph: fx.Graph, node: fx.Node, by_client: fx.Node, clients: int
) -> None:
    """Put `by_client` [n, B, C, H, W] in place of `node` [B, n C, H, W]."""
    swapped = graph.call_function(ops.PERMUTE, (by_client, SWAP))
    as_before = graph.call_function(ops.RESHAPE, (swapped, list(shape_of(node))))
    for view in list(node.users):
        for user in list(view.users):
            is_swapped_back = user.target is ops.PERMUTE and user.args[1] == SWAP
            if is_swapped_back and shape_of(user)[0] == clients:
                by_client.meta = dict(user.meta)
                user.replace_all_uses_with(by_client)
    node.replace_all_uses_with(as_before, propagate_meta=True)
