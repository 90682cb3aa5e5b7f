"""Every name of PyTorch that its documentation does not promise, in one place.

Where a release of PyTorch lacks one of them, importing this module fails, and with it
recordings: `fedcore.speed.step_recorder` says so once, and steps run as written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import (
    _add_batch_dim as add_batch_dim,
)
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_gradtrackingtensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_pop_interpreter_stack,
)
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "add_batch_dim",
    "get_unwrapped",
    "is_batchedtensor",
    "is_gradtrackingtensor",
    "maybe_get_bdim",
    "maybe_get_level",
    "retrieve_all_functorch_interpreters",
    "temporarily_pop_interpreter_stack",
]

aten = torch.ops.aten

# Shapes
VIEW = aten.view.default
UNSAFE_VIEW = aten._unsafe_view.default
RESHAPE = aten.reshape.default
EXPAND = aten.expand.default
PERMUTE = aten.permute.default
TRANSPOSE = aten.transpose.int
T = aten.t.default
CLONE = aten.clone.default
DETACH = aten.detach.default

# Arithmetic
MUL_SCALAR = aten.mul.Scalar
MUL = aten.mul.Tensor
ADDCMUL = aten.addcmul.default
ADDCMUL_ = aten.addcmul_.default
MM = aten.mm.default
VECTOR_NORM = aten.linalg_vector_norm.default
ADDMM = aten.addmm.default
ADDMM_ = aten.addmm_.default
BMM = aten.bmm.default
BADDBMM = aten.baddbmm.default
BADDBMM_ = aten.baddbmm_.default

# Layers
CONVOLUTION = aten.convolution.default
CONVOLUTION_BACKWARD = aten.convolution_backward.default
IM2COL = aten.im2col.default
COL2IM = aten.col2im.default
AVG_POOL2D = aten.avg_pool2d.default
AVG_POOL2D_BACKWARD = aten.avg_pool2d_backward.default
MAX_POOL2D = aten.max_pool2d_with_indices.default
LOG_SOFTMAX = aten._log_softmax.default
LOG_SOFTMAX_BACKWARD = aten._log_softmax_backward_data.default
convolution = torch.convolution

# Operators that cannot be recorded: they look at values, or draw.
UNRECORDABLE = frozenset(
    {
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.nondeterministic_seeded,
    }
)
_OVERLOAD = type(VIEW)
VIEW._schema.is_mutable  # noqa: B018 - fails here, and not in the middle of a round


def is_recordable(operator: Any) -> bool:
    """Whether the operator's result follows from its arguments and their shapes."""
    return UNRECORDABLE.isdisjoint(operator.tags)


def is_mutable(target: Any) -> bool:
    """Whether calling `target` writes to one of its arguments."""
    return isinstance(target, _OVERLOAD) and bool(target._schema.is_mutable)


def may_alias(target: Any) -> bool:
    """Whether the result of `target` may lie in the memory of an argument."""
    if not isinstance(target, _OVERLOAD) or target is UNSAFE_VIEW:
        return True
    return any(result.alias_info is not None for result in target._schema.returns)
