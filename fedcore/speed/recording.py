"""A local step as a flat list of tensor operations, recorded once for each shape.

It then runs without autograd, vmap and the module. `local_sgd` gives its steps to the
runner of the moment (`fedcore.local.steps_run_by`): `Recorder` is one.
A recording holds the operations by which PyTorch computed the first step of its kind,
batched over clients where the engine batches, and rewritten for speed: above all, a
matrix product that is only scaled and added to the parameters is added in one pass,

    y + s (a b)  becomes  baddbmm(y, s a, b),  in place from the second step on.

So it computes the same up to rounding, and that is checked: at its uses 1, 2, 11, 101,
... a recording is compared with the step by how far it moves. A step that looks at
values, or draws, runs as it is written.

A loss may change from round to round by something that it is not given, of which a
recording would know nothing. One client's step is therefore kept with its result, and
computed again after 1, 2, 4, 8, ... rounds. Where that gives something else, no step
runs from a recording any more, and a warning names the loss.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.func import vmap

from fedcore import trees
from fedcore.local import Step
from fedcore.speed import functorch
from fedcore.speed.comparison import (
    deviation,
    may_replace,
    movement,
    shake,
    tolerance,
)
from fedcore.speed.rewriting import rewrite
from fedcore.speed.tape import Tape, UnrecordableError
from fedcore.types import Tree

Dims = tuple[int | None, ...]
"""For each input the axis of its clients, 0 or None."""

Flat = Callable[..., list[Tensor]]
"""A step on a flat list of inputs."""

IMPURE = (
    "%s depends on more than its arguments: %s. From here on it runs as it is written, "
    "in one process, which is slower; the rounds before may have used an older value. "
    "A loss may depend on its arguments and on what never changes "
    '(docs/your-own-task.md); with engine.name = "sequential" every step calls it'
)

log = logging.getLogger("fedcore")


@dataclass
class Recording:
    """One kind of step at one set of shapes."""

    code: Flat | None  # None: the step cannot be recorded
    places: Tree  # of the outputs in what `code` returns
    uses: int = 0
    next_check: int = 1  # the use at which it is compared again


class Call(NamedTuple):
    """One step that is to run, free of any surrounding vmap."""

    step: Step
    inputs: Tree
    leaves: list[Tensor]  # of the inputs, clients first
    dims: Dims
    owned: tuple[bool, ...]  # which leaves may be overwritten; () = none

    @property
    def is_batched(self) -> bool:
        return any(dim is not None for dim in self.dims)

    @property
    def num_clients(self) -> int:
        pairs = zip(self.leaves, self.dims, strict=True)
        return next((len(x) for x, dim in pairs if dim is not None), 1)

    def flat(self) -> tuple[Flat, list[Tree]]:
        """The step on flat inputs; and, once it ran, the places of its outputs."""
        places: list[Tree] = []

        def flat(*leaves: Tensor) -> list[Tensor]:
            pieces, numbers = iter(leaves), itertools.count()
            outputs = self.step(trees.map(lambda _: next(pieces), self.inputs))
            places[:] = [trees.map(lambda _: next(numbers), outputs)]
            return trees.leaves(outputs)

        return (vmap(flat, in_dims=self.dims) if self.is_batched else flat), places


class Recorder:
    """Recordings by kind of step and shapes; of one task, used by one thread.

    After a fork the copy goes on by itself. `reason` says why steps are not recorded
    any more, for the parent, which alone warns of it.
    """

    def __init__(self, subject: str) -> None:
        """`subject` names in messages what the steps compute."""
        self.subject = subject
        self.reason: str | None = None
        self._recordings: dict[Hashable, Recording] = {}
        self._checking = True
        self._sample: Sample | None = None
        self._rounds = 0
        self._round = -1
        self._process = os.getpid()

    def run(self, step: Step, kind: Hashable, inputs: Tree, own: Tree) -> Tree:
        """`step(inputs)`, from a recording; `fedcore.local.StepRunner.run`."""
        leaves = trees.leaves(inputs)
        levels = len(functorch.retrieve_all_functorch_interpreters())
        if self.reason is not None or levels > 1 or _is_differentiated(leaves):
            return step(inputs)
        owned_ids = {id(x) for x in trees.leaves(own)}
        owned = tuple(id(x) in owned_ids for x in leaves) if owned_ids else ()
        if levels == 0:
            dims: Dims = (None,) * len(leaves)
            return self._run(kind, Call(step, inputs, leaves, dims, owned))
        # Under vmap: as a batching rule would do it, without the 0.2 ms a call of
        # torch.autograd.Function.
        level = max(functorch.maybe_get_level(x) for x in leaves)
        unwrapped = [_unwrapped(x) for x in leaves]
        plain = [x for x, _ in unwrapped]
        dims = tuple(dim for _, dim in unwrapped)
        with functorch.temporarily_pop_interpreter_stack():
            outputs = self._run(kind, Call(step, inputs, plain, dims, owned))
        return trees.map(lambda x: functorch.add_batch_dim(x, 0, level), outputs)

    def begin_round(self, t: int) -> None:
        """Note that round t begins; after 1, 2, 4, 8, ... rounds check the sample."""
        if t == self._round:
            return
        done = self._rounds
        self._round, self._rounds = t, done + 1
        if self._sample is not None and done & (done - 1) == 0:
            self._check_sample()

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Inside, no recording is compared: where nothing may wait for the device."""
        self._checking = False
        try:
            yield
        finally:
            self._checking = True

    def give_up(self, reason: str) -> None:
        """Run every step as it is written from now on, for `reason`, and warn once."""
        if self.reason is not None:
            return
        self.reason = reason
        self._recordings.clear()
        self._sample = None
        if os.getpid() == self._process:
            log.warning(IMPURE, self.subject, reason)

    def _run(self, kind: Hashable, call: Call) -> Tree:
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in call.leaves)
        key = (kind, call.owned, call.dims, shapes)
        recording = self._recordings.get(key)
        with torch.no_grad():
            if recording is None:
                recording, outputs = self._record(call)
                self._recordings[key] = recording
            elif recording.code is None:
                outputs = call.flat()[0](*call.leaves)
            elif recording.uses >= recording.next_check and self._checking:
                recording.next_check *= 10
                outputs = self._compared(recording, call)
            else:
                outputs = recording.code(*call.leaves)
        recording.uses += 1
        return trees.map(lambda place: outputs[place], recording.places)

    def _record(self, call: Call) -> tuple[Recording, list[Tensor]]:
        """A new recording, and the outputs of its first use."""
        written, places = call.flat()
        tape = Tape(call.leaves)
        try:
            with tape:
                expected = written(*call.leaves)
            tape.finish(expected)
            rewrite(tape.graph, call.num_clients, call.owned)
        except UnrecordableError as error:
            log.debug("a step runs unrecorded: it needs %s", error)
            return self._unrecordable(call)
        finally:
            tape.forget()
        code = fx.GraphModule(tape.constants, tape.graph).forward
        if not self._checking:
            return Recording(code, places[0]), code(*call.leaves)
        outputs = code(*_copies(call))
        if not self._is_alike(outputs, expected, call):
            return Recording(None, places[0]), expected
        if self._sample is None and self._rounds:
            self._sample = Sample.of(call, expected)
        return Recording(code, places[0]), outputs

    def _unrecordable(self, call: Call) -> tuple[Recording, list[Tensor]]:
        written, places = call.flat()
        outputs = written(*call.leaves)
        return Recording(None, places[0]), outputs

    def _compared(self, recording: Recording, call: Call) -> list[Tensor]:
        """The recording's outputs; the step's, for good, where these are others."""
        assert recording.code is not None
        expected = call.flat()[0](*call.leaves)
        outputs = recording.code(*_copies(call))
        if self._is_alike(outputs, expected, call):
            return outputs
        recording.code = None
        return expected

    def _is_alike(
        self, outputs: list[Tensor], expected: list[Tensor], call: Call
    ) -> bool:
        """Whether a recording computes what the step does, up to rounding."""
        limit = tolerance(expected)
        if deviation(outputs, expected, call.leaves, call.is_batched) <= limit:
            return True
        self._ask_step(call, expected)
        if self.reason is not None:
            return False
        # Near an optimum a movement may be nothing but rounding. How large that is
        # shows where the inputs are changed by as little as can be.
        leaves = shake(call.leaves, expected, call.is_batched)
        shaken = call.flat()[0](*leaves)
        share = deviation(outputs, expected, call.leaves, call.is_batched, shaken)
        if share > limit:
            log.debug("a step runs unrecorded: its recording computes something else")
        return share <= limit

    def _ask_step(self, call: Call, expected: list[Tensor]) -> None:
        """Give up where the step itself does not compute what it did."""
        if self._sample is not None:
            self._check_sample()
            return
        again = call.flat()[0](*call.leaves)
        share = deviation(again, expected, call.leaves, call.is_batched)
        if share > tolerance(expected):
            self.give_up(_described("two steps in a row", share))

    def _check_sample(self) -> None:
        assert self._sample is not None
        share = self._sample.deviation()
        if share > self._sample.tolerance:
            self.give_up(
                _described("a step and the same step of an earlier round", share)
            )


class Sample:
    """One client's step with its result, to be computed again later."""

    def __init__(
        self, step: Step, inputs: Tree, leaves: list[Tensor], outputs: list[Tensor]
    ) -> None:
        self._call = Call(step, inputs, leaves, (None,) * len(leaves), ())
        self._outputs = outputs
        # The same operations on the same numbers: far less than two ways may differ by.
        self.tolerance = max(
            torch.finfo(x.dtype).eps ** 0.5 for x in outputs if x.is_floating_point()
        )

    @classmethod
    def of(cls, call: Call, outputs: list[Tensor]) -> Sample | None:
        """The step of the client whose parameters moved most; None if none moved."""
        moved = torch.zeros(call.num_clients, dtype=torch.float64)
        for output in outputs:
            if any(may_replace(output, x, call.is_batched) for x in call.leaves):
                largest = movement(output, call.leaves, call.is_batched)
                moved += largest.flatten().double().cpu()
        if not bool(moved.max() > 0):
            return None
        client = int(moved.argmax())
        pairs = zip(call.leaves, call.dims, strict=True)
        leaves = [(x if dim is None else x[client]).clone() for x, dim in pairs]
        sample = Call(call.step, call.inputs, leaves, (None,) * len(leaves), ())
        shapes = iter(leaves)
        inputs = trees.map(lambda _: next(shapes), call.inputs)
        return cls(call.step, inputs, leaves, sample.flat()[0](*leaves))

    def deviation(self) -> float:
        """The difference of the step from what it was, as a share of its movement."""
        with torch.no_grad():
            outputs = self._call.flat()[0](*self._call.leaves)
        return deviation(outputs, self._outputs, self._call.leaves, by_client=False)


def _copies(call: Call) -> list[Tensor]:
    """The inputs; those that a recording may overwrite as copies."""
    if not call.owned:
        return call.leaves
    pairs = zip(call.leaves, call.owned, strict=True)
    return [x.clone() if owned else x for x, owned in pairs]


def _described(steps: str, share: float) -> str:
    return f"on the same batch, {steps} differ by {100 * share:.2g} % of their movement"


def _is_differentiated(leaves: list[Tensor]) -> bool:
    """Whether a caller differentiates through local training."""
    return any(x.requires_grad or functorch.is_gradtrackingtensor(x) for x in leaves)


def _unwrapped(x: Tensor) -> tuple[Tensor, int | None]:
    """The tensor under vmap's wrapper, clients first, and their axis."""
    if not functorch.is_batchedtensor(x):
        return x, None
    return functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0), 0
