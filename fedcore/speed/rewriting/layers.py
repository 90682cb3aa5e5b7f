"""Faster functions for single layers: unfolding, pooling, log-softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fedcore.speed import functorch as ops
from fedcore.speed.kernels.pooling import averages, averages_backward
from fedcore.speed.kernels.softmax import log_softmax, log_softmax_backward
from fedcore.speed.kernels.unfolding import patches, patches_adjoint
from fedcore.speed.rewriting.nodes import shape_of

FEW_CLASSES = 16  # PyTorch's softmax fills no vector registers with so few


def use_faster_kernels(graph: fx.Graph) -> None:
    """Call functions of `kernels` where these take less time."""
    for node in graph.nodes:
        node.target = _faster(node) or node.target


def pool_by_channels(graph: fx.Graph) -> None:
    """Let max-pooling on a CPU go over channels that lie side by side.

    It is several times faster, the copies there and back included.
    """
    pools = [node for node in graph.nodes if node.target is ops.MAX_POOL2D]
    for pool in pools:
        x = pool.args[0]
        value = x.meta["val"]
        if value.device.type != "cpu" or value.ndim != 4 or not value.is_contiguous():
            continue
        with graph.inserting_before(pool):
            by_channels = _copy(graph, x, torch.channels_last)
        pool.update_arg(0, by_channels)
        for pooled in [user for user in pool.users if user.args[1] == 0]:
            with graph.inserting_after(pooled):
                back = _copy(graph, pooled, torch.contiguous_format)
            back.meta = dict(pooled.meta)
            pooled.replace_all_uses_with(
                back, delete_user_cb=lambda user, back=back: user is not back
            )


def _copy(graph: fx.Graph, x: fx.Node, memory_format: torch.memory_format) -> fx.Node:
    return graph.call_function(ops.CLONE, (x,), {"memory_format": memory_format})


def _faster(node: Any) -> Callable[..., Any] | None:
    """A function that does the same in less time, for arguments like these."""
    values = [x.meta.get("val") for x in (node, *node.all_input_nodes)]
    if not all(_is_plain(x) for x in values):
        return None
    match node.target:
        case ops.IM2COL if len(shape_of(node.args[0])) == 4:
            return patches
        case ops.COL2IM if len(shape_of(node.args[0])) == 3:
            return patches_adjoint
    if any(x.device.type != "cpu" for x in values):
        return None  # a GPU has good kernels for the rest
    match node.target:
        case ops.AVG_POOL2D if _is_tiling(*node.args):
            return averages
        case ops.AVG_POOL2D_BACKWARD if _is_tiling(*node.args[1:]):
            return averages_backward
        case ops.LOG_SOFTMAX if _has_few_classes(*node.args[:2]):
            return log_softmax
        case ops.LOG_SOFTMAX_BACKWARD if _has_few_classes(*node.args[1:3]):
            return log_softmax_backward
    return None


def _is_plain(x: Any) -> bool:
    """Contiguous numbers. Later views rely on any other layout, by channels say."""
    return (
        isinstance(x, Tensor)
        and x.is_contiguous()
        and x.dtype in (torch.float32, torch.float64)
    )


def _has_few_classes(x: Any, dim: int) -> bool:
    shape = shape_of(x)
    return len(shape) > 0 and shape[-1] <= FEW_CLASSES and dim in (-1, len(shape) - 1)


def _is_tiling(
    x: Any,
    kernel: list[int],
    stride: list[int] | None = None,
    padding: tuple[int, ...] = (),
    ceil: bool = False,
    padding_counts: bool = True,
    divisor: int | None = None,
) -> bool:
    """Whether pooling goes over tiles that fill the images.

    Then `ceil` and `padding_counts` change nothing.
    """
    if len(shape_of(x)) != 4 or len(kernel) != 2 or min(kernel) < 2:
        return False
    sides = zip(shape_of(x)[2:], kernel, strict=True)
    is_filled = all(size % k == 0 for size, k in sides)
    is_apart = (stride or kernel) == kernel
    return is_filled and is_apart and not any(padding) and divisor is None
