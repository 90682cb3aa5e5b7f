"""A local step as a flat list of tensor operations: recorded once a shape, then run without autograd, vmap and the module.

`local_sgd` gives its step to the recorder of the moment, which an engine sets with `recorded`; without one, as in the oracle, a
step runs as it is written. A recording holds the operations by which PyTorch computed the first step of its kind, batched over
clients where the engine batches, and rewritten for speed: above all, a matrix product that is only scaled and added to the
parameters is added in one pass,

    y + s (a b)  becomes  baddbmm(y, s a, b),  in place from the second step on.

So it computes the same up to rounding. A step that looks at values, or draws, is not recorded and runs as it is written; where it
looks behind PyTorch's back (`tolist`), the second use of its recording, which is compared with the step, finds it out.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_pop_interpreter_stack,
)
from torch.func import vmap
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from fedcore import trees
from fedcore.speed.rewriting import rewrite
from fedcore.types import Tree

Step = Callable[[Any], Tree]
"""A pure function of one tree of tensors."""

Dims = tuple[int | None, ...]
log = logging.getLogger("fedcore")


@dataclass
class Recording:
    code: Callable[..., list[Tensor]] | None  # None: the step cannot be recorded
    out: Tree  # the outputs' places in what `code` returns
    uses: int = 0


class Recorder:
    """Recordings by kind of step and shapes; of one task, used by one thread."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Recording] = {}

    def run(self, step: Step, kind: Hashable, inputs: Tree, own: Tree) -> Tree:
        """`step(inputs)`. The tensors of `own`, which are in inputs, may be overwritten.

        `kind` is all that shapes the step but the tensors' own shapes: what it closes over, and the structure of its inputs.
        """
        leaves = trees.leaves(inputs)
        levels = len(retrieve_all_functorch_interpreters())
        if levels > 1 or any(
            x.requires_grad or functorch.is_gradtrackingtensor(x) for x in leaves
        ):
            return step(
                inputs
            )  # somebody differentiates through local training, or batches it another time
        if levels == 0:
            return self._run(step, kind, inputs, leaves, (None,) * len(leaves), own)
        # Under vmap: what a batching rule of our own would do, without torch.autograd.Function's 0.2 ms a call.
        level = max(functorch.maybe_get_level(x) for x in leaves)
        dims = tuple(
            functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else None
            for x in leaves
        )
        plain = [
            x if d is None else functorch.get_unwrapped(x).movedim(d, 0)
            for x, d in zip(leaves, dims, strict=True)
        ]
        with temporarily_pop_interpreter_stack():
            found = self._run(
                step,
                kind,
                inputs,
                plain,
                tuple(None if d is None else 0 for d in dims),
                own,
            )
        return trees.map(lambda x: functorch._add_batch_dim(x, 0, level), found)

    def _run(
        self,
        step: Step,
        kind: Hashable,
        inputs: Tree,
        leaves: list[Tensor],
        dims: Dims,
        own: Tree,
    ) -> Tree:
        owned = {id(x) for x in trees.leaves(own)}
        mine = tuple(id(x) in owned for x in trees.leaves(inputs)) if owned else ()
        key = (
            kind,
            mine,
            dims,
            tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves),
        )
        recording = self._known.get(key)
        if recording is None:
            recording = self._known[key] = _record(step, inputs, leaves, dims, mine)
        with torch.no_grad():
            if recording.code is None:
                found = _flat(step, inputs, dims)[0](*leaves)
            elif recording.uses == 1:
                found = _compared(recording, _flat(step, inputs, dims)[0], leaves)
            else:
                found = recording.code(*leaves)
        recording.uses += 1
        return trees.map(lambda place: found[place], recording.out)


def _compared(
    recording: Recording, written: Callable[..., list[Tensor]], leaves: list[Tensor]
) -> list[Tensor]:
    """What the recording computes; or what the step does, for good, where that is something else."""
    assert recording.code is not None
    expected = written(*leaves)
    found = recording.code(*leaves)  # last, for it may overwrite what it is given
    if all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    ):
        return found
    log.debug("a step looks at values: it runs unrecorded")
    recording.code = None
    return expected


class Unrecordable(Exception):
    """A step that looks at values, or draws."""


def _flat(
    step: Step, inputs: Tree, dims: Dims
) -> tuple[Callable[..., list[Tensor]], list[Tree]]:
    """The step on flat inputs, batched over those that have dims; and, once it ran, the places of its outputs."""
    out: list[Tree] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        pieces, places = iter(leaves), itertools.count()
        found = step(trees.map(lambda _: next(pieces), inputs))
        out[:] = [trees.map(lambda _: next(places), found)]
        return trees.leaves(found)

    return (vmap(flat, in_dims=dims) if any(d is not None for d in dims) else flat), out


def _record(
    step: Step, inputs: Tree, leaves: list[Tensor], dims: Dims, owned: tuple[bool, ...]
) -> Recording:
    written, out = _flat(step, inputs, dims)
    tape = _Tape(leaves)
    try:
        with tape:
            found = written(*leaves)
        graph = tape.finish(found)
        rewrite(
            graph,
            next(
                (len(x) for x, d in zip(leaves, dims, strict=True) if d is not None), 1
            ),
            owned,
        )
        return Recording(fx.GraphModule(tape.constants, graph).forward, out[0])
    except Unrecordable as e:
        log.debug("a step runs unrecorded: it needs %s", e)
        written(*leaves)
        return Recording(None, out[0])
    finally:
        tape.forget()


_UNRECORDABLE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation that PyTorch runs, below autograd and vmap, as a graph."""

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = fx.Graph(), nn.Module()
        self._nodes: dict[int, fx.Node] = {}  # by tensor; `meta` keeps them alive
        for i, x in enumerate(leaves):
            self._enter(x, self.graph.placeholder(f"x{i}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if _UNRECORDABLE & set(func.tags):
            raise Unrecordable(str(func))
        found = func(*args, **(kwargs or {}))
        node = self.graph.call_function(
            func,
            map_aggregate(args, self._node),
            map_aggregate(kwargs or {}, self._node),
        )
        if isinstance(found, Tensor):
            self._enter(found, node)
        else:
            for i, x in enumerate(found if isinstance(found, tuple | list) else ()):
                if isinstance(x, Tensor):
                    self._enter(
                        x, self.graph.call_function(operator.getitem, (node, i))
                    )
        return found

    def _enter(self, x: Tensor, node: fx.Node) -> None:
        node.meta["val"], self._nodes[id(x)] = x, node

    def _node(self, x: Any) -> Any:
        """What stands for an argument; a tensor that was there before is a constant, held as it is."""
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._nodes:
            name = f"c{len(self.constants._buffers)}"
            self.constants.register_buffer(name, x.detach())
            self._enter(x, self.graph.get_attr(name))
        return self._nodes[id(x)]

    def finish(self, found: list[Tensor]) -> fx.Graph:
        self.graph.output([self._node(x) for x in found])
        return self.graph

    def forget(self) -> None:
        """The values of the first step, which would stay for as long as nobody looks for cycles."""
        self._nodes.clear()
        for node in self.graph.nodes:
            node.meta.clear()


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
    return (
        step(inputs)
        if recorder is None or kind is None
        else recorder.run(step, kind, inputs, own)
    )
