"""Many reconstructions in one batch of optimisations.

A lane is one client, one start, one path scale. Adam works element by element, so lanes
side by side are lanes one after another; they differ in how gradients are taken: under
`torch.func.vmap`, or one by one; both from recordings (`fedcore.speed.recording`).
Which is faster depends on model and machine, so it is measured and remembered, as the
vectorised engine does. Convolutions with other weights in each lane are written as
matrix products for vmap: PyTorch would make them grouped convolutions, which on a CPU
are twenty times slower. On a CPU the lanes are shared out among forks of this process,
one for each core; on a GPU they stay together, and their gradients become CUDA graphs.
"""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional

from fedcore import __version__, trees
from fedcore.audit.attacks.base import Progress, unwatched
from fedcore.engines.base import one_thread
from fedcore.speed import forks
from fedcore.speed.cuda_graphs import EAGER, Graphs
from fedcore.speed.recording import Recorder
from fedcore.storage import cache
from fedcore.types import Tree

AT_ONCE = 32  # lanes in one batch
HEARD = 20  # times that an optimisation in forks or on a GPU tells its progress
TRIALS = EAGER + 4  # of each way, of which the fastest counts: the first ones record
CURVE = 50  # points kept of the objective along the way

Variables = dict[str, Tensor]
"""What is optimised, by name; [lanes, ...], or of one lane inside an objective."""

Objective = Callable[[Variables, Tree], tuple[Tensor, Tensor]]
"""(variables, constants) of one lane -> (the value that is minimised, its match), 0-d.

The match is the part of the value that compares the update."""


class Trace(NamedTuple):
    """The end of an optimisation, and the way there."""

    variables: Variables  # [lanes, ...]
    match: Tensor  # [lanes] at the last variables
    curve: list[list[float]]  # by lane
    iterations: int  # done


class Steps(NamedTuple):
    """The steps of an optimisation, the same for all lanes."""

    rates: dict[str, float]  # Adam's step size by variable
    iterations: int
    project: Callable[[Variables], None]  # clamps in place after every step
    milestones: bool  # step sizes fall tenfold at 3/8, 5/8 and 7/8 of the way
    gamma: float | None  # or by this factor each step
    signed: bool  # the sign of the gradient of x instead of the gradient
    every: int  # iterations from one report of progress to the next


def optimise(
    objective: Callable[[nn.Module], Objective],
    model: nn.Module,
    variables: Variables,
    constants: Tree,
    rates: dict[str, float],
    iterations: int,
    project: Callable[[Variables], None],
    milestones: bool = True,
    gamma: float | None = None,
    signed: bool = False,
    progress: Progress = unwatched,
    batched: bool | None = None,
) -> Trace:
    """Adam over all lanes, with step size `rates[name]`.

    Variables without a rate stay as they are. `objective(model)` is the objective on
    that model; `constants` have a leading lane axis. The other arguments are those of
    `Steps`. `batched` = None: measured.
    """
    lanes, on_cpu = _count(variables), _device(variables).type == "cpu"
    shares = min(torch.get_num_threads() if on_cpu and forks.possible() else 1, lanes)
    every = 1 if on_cpu and shares == 1 else max(iterations // HEARD, 1)
    steps = Steps(rates, iterations, project, milestones, gamma, signed, every)
    pieces = []
    for numbers in np.array_split(np.arange(lanes), shares):
        piece = slice(numbers[0], numbers[-1] + 1)
        pieces.append(trees.at((variables, constants), piece))
    with one_thread():  # of each fork; and operations this small are slower on several
        some, fixed = pieces[0]
        gradients = Gradients(objective, model, some, fixed, tuple(rates), batched)
        work = [_lanes(gradients, v, fixed, steps) for v, fixed in pieces]
        if shares == 1:
            traces = [_here(work[0], progress)]
        else:
            traces = _shared_out(work, list(variables), progress)
    joined = {}
    for name in variables:
        joined[name] = torch.cat([trace.variables[name] for trace in traces])
    match = torch.cat([trace.match for trace in traces])
    curves = [row for trace in traces for row in trace.curve]
    return Trace(joined, match, curves, traces[0].iterations)


Work = Generator[tuple[float, Tensor], bool | None, Trace]
"""An optimisation on its way: yields (share done, [lanes] the match), is sent go on?"""


def _here(work: Work, progress: Progress) -> Trace:
    goes_on = None
    while True:
        try:
            done, match = work.send(goes_on)
        except StopIteration as end:
            trace: Trace = end.value
            return trace
        goes_on = progress(done, float(match.mean()))


def _shared_out(work: list[Work], names: list[str], progress: Progress) -> list[Trace]:
    """Each piece of work in a fork of its own."""

    def go(
        job: tuple[int, bool | None], _: list[Tensor], __: list[Tensor]
    ) -> tuple[Any, list[Tensor]]:
        number, goes_on = job
        try:
            done, match = work[number].send(goes_on)
        except StopIteration as end:
            trace: Trace = end.value
            variables = [trace.variables[name] for name in names]
            return (trace.curve, trace.iterations), [trace.match, *variables]
        return done, [match]

    pool, goes_on = forks.Forks(len(work), go), None
    try:
        while True:
            jobs = [(number, goes_on) for number in range(len(work))]
            answers = list(pool.run([(job, []) for job in jobs], []))
            done = answers[0][0]
            if not isinstance(done, float):
                break
            match = torch.cat([match for _, (match,) in answers])
            goes_on = progress(done, float(match.mean()))
    finally:
        pool.close()
    traces = []
    for (curve, iterations), (match, *values) in answers:
        # Copied: the memory that they lie in goes with the forks.
        own = [value.clone() for value in values]
        variables = dict(zip(names, own, strict=True))
        traces.append(Trace(variables, match.clone(), curve, iterations))
    return traces


def _lanes(
    gradients: Gradients, variables: Variables, constants: Tree, steps: Steps
) -> Work:
    """The optimisation of some of the lanes."""
    held = {name: value.clone() for name, value in variables.items()}
    groups = [{"params": [held[name]], "lr": lr} for name, lr in steps.rates.items()]
    optimiser = torch.optim.Adam(groups)
    iterations = steps.iterations
    marks = [eighths * iterations // 8 for eighths in (3, 5, 7)]
    match = torch.zeros(_count(held))
    curve: list[Tensor] = []
    for i in range(iterations):
        slopes, match = gradients(held, constants)
        for name in steps.rates:
            is_signed = steps.signed and name == "x"
            held[name].grad = slopes[name].sign() if is_signed else slopes[name]
        optimiser.step()
        with torch.no_grad():
            steps.project(held)
        falls = steps.milestones and i + 1 in marks
        for group in optimiser.param_groups:
            group["lr"] *= steps.gamma or (0.1 if falls else 1.0)
        if i % max(iterations // CURVE, 1) == 0:
            curve.append(match)
        if (i + 1) % steps.every == 0 and not (yield (i + 1) / iterations, match):
            break
    _, match = gradients(held, constants)
    rows = torch.stack([*curve, match], 1).tolist()
    ends = {name: value.detach() for name, value in held.items()}
    return Trace(ends, match, rows, i + 1)


class Gradients:
    """(gradient of every lane's objective, its match), batched or one by one."""

    def __init__(
        self,
        objective: Callable[[nn.Module], Objective],
        model: nn.Module,
        variables: Variables,
        constants: Tree,
        names: tuple[str, ...],
        batched: bool | None = None,
    ) -> None:
        self.names = names
        self._recorder = Recorder()
        self._graphs = Graphs() if _device(variables).type == "cuda" else None
        self._alone = grad_and_value(objective(model), has_aux=True)
        self._batch = vmap(grad_and_value(objective(products(model)), has_aux=True))
        if batched is None:
            batched = _count(variables) > 1 and self._batching_pays(
                model, variables, constants
            )
        self.batched = batched

    def __call__(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        way = self._batched if self.batched else self._one_by_one
        return way(variables, constants)

    def _batched(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        pieces = []
        for start in range(0, _count(variables), AT_ONCE):
            piece = trees.at((variables, constants), slice(start, start + AT_ONCE))
            pieces.append(self._recorded("batched", self._batch, *piece))
        gradients, match = trees.map(lambda *xs: torch.cat(xs), *pieces)
        return gradients, match

    def _one_by_one(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        lanes = []
        for i in range(_count(variables)):
            lane = trees.at((variables, constants), i)
            lanes.append(self._recorded("alone", self._alone, *lane))
        gradients, match = trees.stack(lanes)
        return gradients, match

    def _recorded(
        self, kind: str, way: Callable[..., Any], variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        """(gradient, match) of a piece of the lanes, or of one.

        The first of its shape is recorded, the others run from that.
        """

        def step(inputs: tuple[Variables, Tree]) -> tuple[Variables, Tensor]:
            gradient, (_, match) = way(*inputs)
            return gradient, match.detach()

        def recorded(inputs: Tree) -> Tree:
            return self._recorder.run(step, kind, inputs, ())

        inputs = (variables, constants)
        found: tuple[Variables, Tensor] = (
            self._graphs.run(kind, recorded, inputs)
            if self._graphs
            else recorded(inputs)
        )
        return found

    def _batching_pays(
        self, model: nn.Module, variables: Variables, constants: Tree
    ) -> bool:
        """Measured once a (model, shapes, machine), and remembered.

        Two audits with one seed then compute the same bits.
        """
        shapes = []
        for name, x in trees.flatten((variables, constants)).items():
            shapes.append([name, list(x.shape)])
        machine = [
            str(_device(variables)),
            platform.processor(),
            os.cpu_count(),
            torch.get_num_threads(),
            torch.__version__,
            __version__,
        ]
        key = cache.key_of("lanes", [str(model), shapes, machine])
        measured = cache.load(key)
        if measured is not None:
            return bool(measured["batched"])
        try:
            batched = self._time(self._batched, variables, constants)
            one_by_one = self._time(self._one_by_one, variables, constants)
        except Exception:  # a model that vmap cannot take
            return False
        pays = batched < one_by_one
        cache.save(key, batched=np.array(pays))
        # Another process may have measured and saved before this one.
        measured = cache.load(key)
        return pays if measured is None else bool(measured["batched"])

    def _time(
        self,
        way: Callable[[Variables, Tree], object],
        variables: Variables,
        constants: Tree,
    ) -> float:
        times = []
        for _ in range(TRIALS):
            begin = time.perf_counter()
            way(variables, constants)
            if self._graphs is not None:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)


def _device(variables: Variables) -> torch.device:
    return next(iter(variables.values())).device


def _count(variables: Variables) -> int:
    return len(next(iter(variables.values())))


def products(model: nn.Module) -> nn.Module:
    """A copy of the model whose plain convolutions are matrix products.

    It has the same parameters by name.
    """
    changed = copy.deepcopy(model)
    for name, layer in list(changed.named_modules()):
        if (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            if not name:
                return _Product(layer)
            parent, _, child = name.rpartition(".")
            setattr(changed.get_submodule(parent), child, _Product(layer))
    return changed


class _Product(nn.Module):
    """A convolution as one matrix product over unfolded inputs."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        assert not isinstance(layer.padding, str)
        self.kernel, self.stride, self.dilation, self.padding = (
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            layer.padding,
        )

    def forward(self, x: Tensor) -> Tensor:
        n, _, *size = x.shape
        sides = zip(
            size, self.padding, self.dilation, self.kernel, self.stride, strict=True
        )
        height, width = (
            (s + 2 * p - d * (k - 1) - 1) // step + 1 for s, p, d, k, step in sides
        )
        columns = functional.unfold(
            x, self.kernel, self.dilation, self.padding, self.stride
        )  # [N, C k k, H W]
        columns = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        y = self.weight.flatten(1) @ columns
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(-1, n, height, width).transpose(0, 1)
