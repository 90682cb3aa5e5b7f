"""A local step as a flat list of tensor operations: recorded once a shape, then run without autograd, vmap and the module.

`local_sgd` gives its step to the recorder of the moment, which an engine sets with `recorded`; without one, as in the oracle, a
step runs as it is written. A recording holds what PyTorch computed for the first step of its kind (`make_fx`), batched over clients
where the engine batches, with one rewrite: a matrix product that is only scaled and added to the parameters is added in one pass,

    y + s (a b)  becomes  baddbmm(y, s a, b),  in place from the second step on.

So it computes the same up to rounding.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_pop_interpreter_stack
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fedcore import trees
from fedcore.types import Tree

Step = Callable[[Any], Tree]
"""A pure function of one tree of tensors."""

Dims = tuple[int | None, ...]
aten = torch.ops.aten
log = logging.getLogger("fedcore")


class Recording(NamedTuple):
    code: Callable[..., list[Tensor]]
    out: Tree  # the outputs' places in what `code` returns


class Recorder:
    """Recordings by kind of step and shapes; of one task. Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Recording] = {}
        self._lock = threading.Lock()

    def run(self, step: Step, kind: Hashable, inputs: Tree, own: Tree) -> Tree:
        """`step(inputs)`. The tensors of `own`, which are in inputs, may be overwritten.

        `kind` is all that shapes the step but the tensors' own shapes: what it closes over, and the structure of its inputs.
        """
        leaves = trees.leaves(inputs)
        levels = len(retrieve_all_functorch_interpreters())
        if levels > 1 or any(x.requires_grad or functorch.is_gradtrackingtensor(x) for x in leaves):
            return step(inputs)  # somebody differentiates through local training, or batches it another time
        if levels == 0:
            return self._run(step, kind, inputs, leaves, (None,) * len(leaves), own)
        # Under vmap: what a batching rule of our own would do, without torch.autograd.Function's 0.2 ms a call.
        level = max(functorch.maybe_get_level(x) for x in leaves)
        dims = tuple(functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else None for x in leaves)
        plain = [x if d is None else functorch.get_unwrapped(x).movedim(d, 0) for x, d in zip(leaves, dims, strict=True)]
        with temporarily_pop_interpreter_stack():
            found = self._run(step, kind, inputs, plain, tuple(None if d is None else 0 for d in dims), own)
        return trees.map(lambda x: functorch._add_batch_dim(x, 0, level), found)

    def _run(self, step: Step, kind: Hashable, inputs: Tree, leaves: list[Tensor], dims: Dims, own: Tree) -> Tree:
        owned = {id(x) for x in trees.leaves(own)}
        mine = tuple(id(x) in owned for x in trees.leaves(inputs)) if owned else ()
        key = (kind, mine, dims, tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves))
        recording = self._known.get(key)
        if recording is None:
            with self._lock:  # make_fx keeps some of its state globally
                recording = self._known.get(key) or _record(step, inputs, leaves, dims, mine)
                self._known[key] = recording
        with torch.no_grad():
            found = recording.code(*leaves)
        return trees.map(lambda place: found[place], recording.out)


def _record(step: Step, inputs: Tree, leaves: list[Tensor], dims: Dims, owned: tuple[bool, ...]) -> Recording:
    out: Tree = None

    def flat(*leaves: Tensor) -> list[Tensor]:
        nonlocal out
        pieces, places = iter(leaves), itertools.count()
        found = step(trees.map(lambda _: next(pieces), inputs))
        out = trees.map(lambda _: next(places), found)
        return trees.leaves(found)

    code = vmap(flat, in_dims=dims) if any(d is not None for d in dims) else flat
    try:
        graph = make_fx(code)(*leaves)
    except Exception as e:  # whatever the step does that cannot be written down, e.g. look at a value; it may still run
        log.debug("a local step runs unrecorded: %s: %s", type(e).__name__, e)
        code(*leaves)
        return Recording(code, out)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    _simplify(graph.graph)
    _fuse(graph.graph, {node for node, mine in zip(placeholders, owned, strict=False) if mine})
    graph.recompile()
    return Recording(graph.forward, out)


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
