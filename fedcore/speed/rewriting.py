"""A recording rewritten for speed: less to do, functions of ours where they take less time, sums in one pass.

`meta["val"]` of every node is the tensor that it was when the step was recorded. Each rule keeps what is computed, up to rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fedcore.speed.kernels import (
    averages,
    averages_backward,
    convolutions,
    convolutions_backward,
    folded,
    log_softmax,
    log_softmax_backward,
    patches,
    products,
    products_backward,
    spread,
    unfolded,
)

aten = torch.ops.aten


def rewrite(graph: fx.Graph, clients: int, owned: tuple[bool, ...]) -> None:
    """For speed; `owned` says which inputs may be overwritten."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    _simplify(graph)
    _share(graph)
    for node in graph.nodes:
        node.target = _quick(node) or node.target
    _unfold_each(graph)
    if clients > 1:
        _convolve_each(graph, clients)
    _pool_by_channels(graph)
    _fuse(
        graph, {node for node, mine in zip(placeholders, owned, strict=False) if mine}
    )


def _simplify(graph: fx.Graph) -> None:
    """Leaves out what changes nothing: views to the same shape, transpositions that undo each other, products with 1."""
    for node in graph.nodes:
        if (
            node.op != "call_function"
            or not node.args
            or not isinstance(node.args[0], fx.Node)
        ):
            continue
        source = node.args[0]
        if node.target in _SHAPING and _shape(node) == _shape(source):
            node.replace_all_uses_with(source)
        elif (
            node.target in _TRANSPOSING
            and source.target is node.target
            and source.args[1:] == node.args[1:]
        ):
            node.replace_all_uses_with(source.args[0])
        elif (
            node.target in _VIEWING and source.target is aten.clone.default
        ):  # a copy that may not be needed any more
            if source.kwargs.get("memory_format") is torch.contiguous_format:
                node.target = aten.reshape.default
                node.update_arg(0, source.args[0])
        elif _does_nothing(node):
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def _share(graph: fx.Graph) -> None:
    """What is computed twice is computed once, unless something is written in place."""
    if any(
        getattr(node.target, "_schema", None) is not None
        and node.target._schema.is_mutable
        for node in graph.nodes
    ):
        return
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or any(
            user.op == "output" for user in node.users
        ):
            continue  # the caller may write to what it gets
        first = known.setdefault(
            (node.target, repr(node.args), repr(node.kwargs)), node
        )
        if first is not node:
            node.replace_all_uses_with(first)
    graph.eliminate_dead_code()


def _does_nothing(node: fx.Node) -> bool:
    if node.target in {aten.mul.Scalar, aten.permute.default}:
        return bool(
            node.args[1]
            == (1 if node.target is aten.mul.Scalar else sorted(node.args[1]))
        )  # type: ignore[arg-type]
    return node.target is aten.detach.default


def _unfold_each(graph: fx.Graph) -> None:
    """Images unfolded for one matrix product a client, in one copy instead of two; and the way back."""
    for node in graph.nodes:
        with graph.inserting_before(node):
            if (found := _turned(node)) and found[0].target is patches:
                columns, (n, b, k, p) = found
                if (_shape(columns), _shape(node)) != ((n * b, k, p), (n, k, b * p)):
                    continue
                x, *settings = columns.args
                each = graph.call_function(
                    aten.view.default, (x, [n, b, *_shape(x)[1:]])
                )
                new = graph.call_function(unfolded, (each, *settings))
            elif node.target is spread and (found := _turned(node.args[0])):
                y, (n, k, b, p) = found
                if (_shape(y), _shape(node.args[0])) != ((n, k, b * p), (n * b, k, p)):
                    continue
                each = graph.call_function(folded, (y, b, *node.args[1:]))
                new = graph.call_function(aten.view.default, (each, list(_shape(node))))
            else:
                continue
        node.replace_all_uses_with(new, propagate_meta=True)
    graph.eliminate_dead_code()


def _turned(node: Any) -> tuple[Any, tuple[int, ...]] | None:
    """(x, shape), where node = x.view(shape).transpose(1, 2).reshape(...), of four axes."""
    if node.target is aten.reshape.default:
        turned = node.args[0]
        if turned.target is aten.transpose.int and turned.args[1:] == (1, 2):
            view = turned.args[0]
            if view.target in _VIEWING and len(_shape(view)) == 4:
                return view.args[0], _shape(view)
    return None


def _convolve_each(graph: fx.Graph, clients: int) -> None:
    """Convolutions with weights of their own for each client, which vmap makes one of as many groups, in a faster form.

    On a CPU, PyTorch's kernels for groups take about twice as long as a call for each client; on a GPU (an H200), two to four
    times as long as a matrix product of few inputs, and as long as one of many.
    """
    for node in list(graph.nodes):
        if node.target is aten.convolution.default:
            x, w, bias, stride, padding, dilation, transposed, _, groups = node.args
            if (
                bias is None
                and not transposed
                and groups == clients
                and (forms := _forms(w))
            ):
                with graph.inserting_before(node):
                    inputs = [
                        _by_client(graph, x, clients),
                        _weights(graph, w, clients),
                    ]
                    each = graph.call_function(
                        forms[0], (*inputs, stride, padding, dilation)
                    )
                    _instead(graph, node, each, clients)
        elif node.target is aten.convolution_backward.default:
            g, x, w, bias, stride, padding, dilation, transposed, _, groups, wanted = (
                node.args
            )
            if (
                bias is None
                and not transposed
                and groups == clients
                and (forms := _forms(w))
            ):
                with graph.inserting_before(node):
                    inputs = [
                        _by_client(graph, g, clients),
                        _by_client(graph, x, clients),
                        _weights(graph, w, clients),
                    ]
                    each = graph.call_function(
                        forms[1], (*inputs, stride, padding, dilation, wanted)
                    )
                for user in list(node.users):
                    with graph.inserting_before(user):
                        found = graph.call_function(
                            operator.getitem, (each, user.args[1])
                        )
                        if user.args[1] == 0:
                            _instead(graph, user, found, clients)
                        else:
                            user.replace_all_uses_with(
                                graph.call_function(
                                    aten.view.default, (found, list(_shape(user)))
                                )
                            )
    graph.eliminate_dead_code()


def _forms(w: fx.Node) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """(forward, backward) for weights w; None to leave them as they are."""
    if w.meta["val"].device.type == "cpu":
        return convolutions, convolutions_backward
    return (
        (products, products_backward)
        if math.prod(_shape(w)[1:]) <= FEW_INPUTS and len(_shape(w)) == 4
        else None
    )


FEW_INPUTS = 256  # of a convolution: channels x elements of the kernel
_SWAP = [
    1,
    0,
    2,
    3,
    4,
]  # to and fro between clients first, as vmap has it, and examples first, as groups want it


def _by_client(graph: fx.Graph, x: fx.Node, clients: int) -> fx.Node:
    """[B, clients * C, H, W] as [clients, B, C, H, W]: what it was made of, if it was."""
    source: Any = x
    while source.target in _VIEWING | {aten.reshape.default, aten.clone.default}:
        source = source.args[0]
    if source.target is aten.permute.default and source.args[1] == _SWAP:
        source = source.args[0]
        assert isinstance(source, fx.Node)
        return source
    b, channels, *size = _shape(x)
    return graph.call_function(
        aten.permute.default,
        (
            graph.call_function(
                aten.view.default, (x, [b, clients, channels // clients, *size])
            ),
            _SWAP,
        ),
    )


def _weights(graph: fx.Graph, w: fx.Node, clients: int) -> fx.Node:
    channels, *rest = _shape(w)
    return graph.call_function(
        aten.view.default, (w, [clients, channels // clients, *rest])
    )


def _instead(graph: fx.Graph, node: fx.Node, each: fx.Node, clients: int) -> None:
    """`each` [clients, B, C, H, W] takes the place of `node` [B, clients * C, H, W]."""
    swapped = graph.call_function(aten.permute.default, (each, _SWAP))
    old = graph.call_function(aten.reshape.default, (swapped, list(_shape(node))))
    for view in list(node.users):
        for user in list(view.users):
            if (
                user.target is aten.permute.default
                and user.args[1] == _SWAP
                and _shape(user)[0] == clients
            ):
                each.meta = dict(user.meta)
                user.replace_all_uses_with(each)
    node.replace_all_uses_with(old, propagate_meta=True)


def _quick(node: Any) -> Callable[..., Any] | None:
    """A function of ours that does the same in less time, for arguments like these."""
    values = [x.meta.get("val") for x in (node, *node.all_input_nodes)]
    if any(
        not isinstance(x, Tensor)
        or not x.is_contiguous()
        or x.dtype not in (torch.float32, torch.float64)
        for x in values
    ):
        return None  # among others, what is laid out by channels, which views after it rely on
    match node.target:
        case aten.im2col.default if len(_shape(node.args[0])) == 4:
            return patches
        case aten.col2im.default if len(_shape(node.args[0])) == 3:
            return spread
    if any(
        x.device.type != "cpu" for x in values
    ):  # a GPU has good kernels for the rest
        return None
    match node.target:
        case aten.avg_pool2d.default if _tiles(*node.args):
            return averages
        case aten.avg_pool2d_backward.default if _tiles(*node.args[1:]):
            return averages_backward
        case aten._log_softmax.default if _few_classes(*node.args):
            return log_softmax
        case aten._log_softmax_backward_data.default if _few_classes(*node.args[1:3]):
            return log_softmax_backward
    return None


FEW = 16  # classes, for which PyTorch's softmax fills no vector registers


def _few_classes(x: Any, dim: int, _: Any = None) -> bool:
    return (
        len(_shape(x)) > 0 and _shape(x)[-1] <= FEW and dim in (-1, len(_shape(x)) - 1)
    )


def _tiles(
    x: Any,
    kernel: list[int],
    stride: list[int] | None = None,
    padding: tuple[int, ...] = (),
    ceil: bool = False,
    padding_counts: bool = True,
    divisor: int | None = None,
) -> bool:
    """Whether pooling with these arguments is over tiles that fill the images: then `ceil` and `padding_counts` change nothing."""
    if len(_shape(x)) != 4 or len(kernel) != 2:
        return False
    whole = not any(size % k for size, k in zip(_shape(x)[2:], kernel, strict=True))
    return (
        whole
        and (stride or kernel) == kernel
        and min(kernel) > 1
        and not any(padding)
        and divisor is None
    )


def _pool_by_channels(graph: fx.Graph) -> None:
    """Max-pooling on a CPU goes over channels where these lie side by side, which is several times faster, to and fro included."""
    pools = [
        node
        for node in graph.nodes
        if node.target is aten.max_pool2d_with_indices.default
    ]
    for pool in pools:
        x = pool.args[0]
        value = x.meta["val"]
        if value.device.type != "cpu" or value.ndim != 4 or not value.is_contiguous():
            continue
        with graph.inserting_before(pool):
            pool.update_arg(
                0,
                graph.call_function(
                    aten.clone.default, (x,), {"memory_format": torch.channels_last}
                ),
            )
        for found in [user for user in pool.users if user.args[1] == 0]:
            with graph.inserting_after(found):
                back = graph.call_function(
                    aten.clone.default,
                    (found,),
                    {"memory_format": torch.contiguous_format},
                )
            back.meta = dict(found.meta)
            found.replace_all_uses_with(
                back, delete_user_cb=lambda user, back=back: user is not back
            )


_VIEWING = {aten.view.default, aten._unsafe_view.default}
_SHAPING = _VIEWING | {aten.expand.default}
_TRANSPOSING = {aten.transpose.int, aten.t.default}
_SUMS: dict[Any, Any] = {  # of a product and what it is added to: (new, in place)
    aten.bmm.default: (aten.baddbmm.default, aten.baddbmm_.default),
    aten.mm.default: (aten.addmm.default, aten.addmm_.default),
}


def _fuse(graph: fx.Graph, owned: set[fx.Node]) -> None:
    """addcmul(y, product(a, b), s) to baddbmm(y, a s, b), where s is one number a client; in place where `y` is ours to write."""
    for node in graph.nodes:
        if node.target is not aten.addcmul.default or node.kwargs:
            continue
        y, product, s = node.args
        in_place = y in owned and _shape(y) == _shape(node) and _last_use(y, node)
        if not _fusible(node):
            if in_place:
                node.target = aten.addcmul_.default
            continue
        a, b = product.args
        with graph.inserting_before(node):
            if _size(a) <= _size(b):
                a = graph.call_function(aten.mul.Tensor, (a, s))
            else:
                b = graph.call_function(aten.mul.Tensor, (b, s))
            fused = graph.call_function(_SUMS[product.target][in_place], (y, a, b))
        fused.meta = node.meta
        node.replace_all_uses_with(fused)
    graph.eliminate_dead_code()


def _fusible(node: Any) -> bool:
    y, product, s = node.args
    if (
        product.target not in _SUMS
        or len(product.users) != 1
        or _shape(product) != _shape(node)
    ):
        return False
    each = (_shape(product)[0], 1, 1) if product.target is aten.bmm.default else ()
    return (
        _shape(s) in (each, ())
        and len({x.meta["val"].dtype for x in (y, *product.args, s)}) == 1
    )


def _last_use(y: Any, node: fx.Node) -> bool:
    """Whether nothing after `node` reads y or a view of it."""
    after = False
    aliases = {y}
    for other in y.graph.nodes:
        if other is node:
            after = True
            continue
        reads = aliases & set(other.all_input_nodes)
        if reads and after:
            return False
        if reads and _may_alias(other):
            aliases.add(other)
    return True


def _may_alias(node: fx.Node) -> bool:
    """Whether its result may lie in the memory of what it is given."""
    schema = getattr(node.target, "_schema", None)
    return (
        node.target is aten._unsafe_view.default
        or schema is None
        or any(r.alias_info is not None for r in schema.returns)
    )


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else (-1,)


def _size(node: Any) -> int:
    return math.prod(_shape(node))
