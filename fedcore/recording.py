"""A local step as a flat list of tensor operations: recorded once a shape, then run without autograd, vmap and the module.

`local_sgd` gives its step to the recorder of the moment, which an engine sets with `recorded`; without one, as in the oracle, a
step runs as it is written. A recording holds what PyTorch computed for the first step of its kind (`make_fx`), batched over clients
where the engine batches, with one rewrite: a matrix product that is only scaled and added to the parameters is added in one pass,

    y + s (a b)  becomes  baddbmm(y, s a, b),  in place from the second step on.

So it computes the same up to rounding.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fedcore.types import Tree

Step = Callable[[Any], Tree]
"""A pure function of one tree of tensors."""

Leaves = list[Tensor]
aten = torch.ops.aten
log = logging.getLogger("fedcore")


class Recorder:
    """Recordings by kind of step and shapes; of one task and one mode of its model. Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Callable[..., Leaves], pytree.TreeSpec]] = {}
        self._lock = threading.Lock()

    def run(self, step: Step, kind: Hashable, inputs: Tree, own: Tree) -> Tree:
        """`step(inputs)`; `kind` is all that shapes it but the tensors. Those of `own`, which are in inputs, may be overwritten."""
        leaves, spec = pytree.tree_flatten(inputs)
        if any(x.requires_grad or torch._C._functorch.is_gradtrackingtensor(x) for x in leaves):
            return step(inputs)  # somebody differentiates through local training
        owned = {id(x) for x in pytree.tree_leaves(own)}
        call = _Call(self, step, kind, tuple(id(x) in owned for x in leaves), spec)
        if any(torch._C._functorch.is_batchedtensor(x) for x in leaves):
            found = _Batched.apply(call, *leaves)  # type: ignore[no-untyped-call]
        else:
            found = call.run((None,) * len(leaves), leaves)
        return pytree.tree_unflatten(list(found), call.out)

    def recording(self, call: _Call, dims: tuple[int | None, ...], leaves: Leaves) -> tuple[Callable[..., Leaves], pytree.TreeSpec]:
        key = (call.key, dims, tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves))
        if key not in self._known:
            with self._lock:  # make_fx keeps some of its state globally
                if key not in self._known:
                    self._known[key] = _record(call, dims, leaves)
        return self._known[key]


class _Call:
    """One step with its inputs flat."""

    def __init__(self, recorder: Recorder, step: Step, kind: Hashable, owned: tuple[bool, ...], spec: pytree.TreeSpec) -> None:
        self.recorder, self.step, self.spec, self.owned = recorder, step, spec, owned
        self.key = (kind, spec, owned)
        self.out: Any = None  # how the outputs are put together again

    def run(self, dims: tuple[int | None, ...], leaves: Leaves) -> Leaves:
        code, self.out = self.recorder.recording(self, dims, leaves)
        with torch.no_grad():
            return code(*leaves)


class _Batched(torch.autograd.Function):
    """Not for its gradient: an operation whose batching rule is ours."""

    generate_vmap_rule = False

    @staticmethod
    def forward(call: _Call, *leaves: Tensor) -> Any:
        raise AssertionError("only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *leaves: Tensor) -> Any:
        dims = in_dims[1:]
        moved = [x if d is None else x.movedim(d, 0) for x, d in zip(leaves, dims, strict=True)]
        found = call.run(tuple(None if d is None else 0 for d in dims), moved)
        return tuple(found), (0,) * len(found)


def _record(call: _Call, dims: tuple[int | None, ...], leaves: Leaves) -> tuple[Callable[..., Leaves], pytree.TreeSpec]:
    out: list[pytree.TreeSpec] = []

    def flat(*leaves: Tensor) -> Leaves:
        found, spec = pytree.tree_flatten(call.step(pytree.tree_unflatten(list(leaves), call.spec)))
        out.append(spec)
        return list(found)

    code = vmap(flat, in_dims=dims) if any(d is not None for d in dims) else flat
    try:
        graph = make_fx(code)(*leaves)
    except Exception as e:  # whatever the step does that cannot be written down, e.g. look at a value; it may still run
        log.debug("a local step runs unrecorded: %s: %s", type(e).__name__, e)
        code(*leaves)
        return code, out[-1]
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    _simplify(graph.graph)
    _fuse(graph.graph, {node for node, owned in zip(inputs, call.owned, strict=True) if owned})
    graph.recompile()
    return graph.forward, out[0]


def _simplify(graph: fx.Graph) -> None:
    """Leaves out what changes nothing: views to the same shape, transpositions that undo each other, products with 1."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target in _SHAPING and _shape(node) == _shape(source):
            node.replace_all_uses_with(source)
        elif node.target in _TRANSPOSING and source.target is node.target and source.args[1:] == node.args[1:]:
            node.replace_all_uses_with(source.args[0])
        elif node.target is aten.mul.Scalar and node.args[1] == 1:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


_SHAPING = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
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
    if product.target not in _SUMS or len(product.users) != 1 or _shape(product) != _shape(node):
        return False
    each = (_shape(product)[0], 1, 1) if product.target is aten.bmm.default else ()
    return _shape(s) in (each, ()) and len({x.meta["val"].dtype for x in (y, *product.args, s)}) == 1


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
        if reads and other.target in _SHAPING | _TRANSPOSING:
            aliases.add(other)
    return True


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else (-1,)


def _size(node: Any) -> int:
    return math.prod(_shape(node))


_now: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded(recorder: Recorder | None) -> Iterator[None]:
    """Inside, steps of local training run from `recorder`."""
    token = _now.set(recorder)
    try:
        yield
    finally:
        _now.reset(token)


def run(step: Step, kind: Hashable, inputs: Tree, own: Tree) -> Tree:
    """`step(inputs)`, from the recorder of the moment where there is one and the step has a kind."""
    recorder = _now.get()
    return step(inputs) if recorder is None or kind is None else recorder.run(step, kind, inputs, own)
