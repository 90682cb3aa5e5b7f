"""Many reconstructions in one batch of optimisations: a lane is one client, one start, one path scale.

Adam works element by element, so lanes side by side are lanes one after another; what differs is how their gradients are taken:
under `torch.func.vmap`, or one by one; both from recordings (`fedcore.speed.recording`). Which is
faster depends on model and machine, so it is measured and remembered, as the vectorised engine does. Convolutions with other
weights in each lane are written as matrix products for vmap: PyTorch would make them grouped convolutions, which on a CPU are
twenty times slower. On a CPU the lanes are shared out among forks of this process, one for each core; on a GPU they stay together,
and their gradients become CUDA graphs.
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
from fedcore.audit.attacks.base import Progress, silent
from fedcore.engines.base import one_thread
from fedcore.speed import forks, step_recorder
from fedcore.speed.cuda_graphs import EAGER, Graphs
from fedcore.speed.kernels.product import product
from fedcore.speed.kernels.unfolding import grid
from fedcore.storage import cache
from fedcore.types import Tree

AT_ONCE = 32  # lanes in one batch
HEARD = 20  # times that an optimisation in forks or on a GPU tells how far it is, and hears whether to go on; else at every step
TRIALS = EAGER + 4  # of each way, of which the fastest counts: the first ones record
CURVE = 50  # points kept of the objective along the way

Variables = dict[str, Tensor]
"""What is optimised, by name; [lanes, ...], or of one lane inside an objective."""

Objective = Callable[[Variables, Tree], tuple[Tensor, Tensor]]
"""(variables, constants) of one lane -> (what is minimised, the part of it that is the match), both 0-d."""


class Trace(NamedTuple):
    """Where the optimisation ended."""

    variables: Variables  # [lanes, ...]
    match: Tensor  # [lanes] at the last variables
    curve: list[list[float]]  # by lane
    iterations: int  # done


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
    progress: Progress = silent,
    batched: bool | None = None,
) -> Trace:
    """Adam over all lanes, with step size `rates[name]`; variables without a rate stay as they are.

    `objective(model)` is the objective on that model; `constants` have a leading lane axis. `project` clamps in place after every
    step. `milestones`: step sizes fall tenfold at 3/8, 5/8 and 7/8 of the way; `gamma`: by this factor each step. `signed`: the
    sign of the gradient of x instead of the gradient. `batched` = None: measure.
    """
    lanes, on_cpu = _count(variables), _device(variables).type == "cpu"
    shares = min(torch.get_num_threads() if on_cpu and forks.possible() else 1, lanes)
    pieces = [
        trees.at((variables, constants), slice(n[0], n[-1] + 1))
        for n in np.array_split(np.arange(lanes), shares)
    ]
    with one_thread():  # of each fork; and operations this small are slower on several
        some, fixed = pieces[0]
        gradients = Gradients(objective, model, some, fixed, tuple(rates), batched)
        every = 1 if on_cpu and shares == 1 else max(iterations // HEARD, 1)
        work = [
            _lanes(
                gradients,
                v,
                c,
                rates,
                iterations,
                project,
                milestones,
                gamma,
                signed,
                every,
            )
            for v, c in pieces
        ]
        traces = (
            _here(work[0], progress)
            if shares == 1
            else _shared_out(work, list(variables), progress)
        )
    joined = {
        name: torch.cat([trace.variables[name] for trace in traces])
        for name in variables
    }
    match = torch.cat([trace.match for trace in traces])
    return Trace(
        joined,
        match,
        [row for trace in traces for row in trace.curve],
        traces[0].iterations,
    )


Work = Generator[tuple[float, Tensor], bool | None, Trace]
"""An optimisation on its way: yields (how much is done, [lanes] the match), and takes whether to go on."""


def _here(work: Work, progress: Progress) -> list[Trace]:
    on = None
    while True:
        try:
            done, match = work.send(on)
        except StopIteration as end:
            return [end.value]
        on = progress(done, float(match.mean()))


def _shared_out(work: list[Work], names: list[str], progress: Progress) -> list[Trace]:
    """Each piece of work in a fork of its own."""

    def go(
        job: tuple[int, bool | None], _: list[Tensor], __: list[Tensor]
    ) -> tuple[Any, list[Tensor]]:
        number, on = job
        try:
            done, match = work[number].send(on)
        except StopIteration as end:
            trace: Trace = end.value
            return (trace.curve, trace.iterations), [
                trace.match,
                *(trace.variables[name] for name in names),
            ]
        return done, [match]

    pool, on = forks.Forks(len(work), go), None
    try:
        while True:
            found = list(
                pool.run([((number, on), []) for number in range(len(work))], [])
            )
            if not isinstance(found[0][0], float):
                break
            on = progress(
                found[0][0], float(torch.cat([match for _, (match,) in found]).mean())
            )
    finally:
        pool.close()
    return [
        Trace(
            {name: x.clone() for name, x in zip(names, values, strict=True)},
            match.clone(),
            *rest,
        )
        for rest, (match, *values) in found
    ]


def _lanes(
    gradients: Gradients,
    variables: Variables,
    constants: Tree,
    rates: dict[str, float],
    iterations: int,
    project: Callable[[Variables], None],
    milestones: bool,
    gamma: float | None,
    signed: bool,
    every: int,
) -> Work:
    held = {name: value.clone() for name, value in variables.items()}
    optimiser = torch.optim.Adam(
        [{"params": [held[name]], "lr": rate} for name, rate in rates.items()]
    )
    marks = [part * iterations // 8 for part in (3, 5, 7)]
    match = torch.zeros(_count(held))
    curve: list[Tensor] = []
    for i in range(iterations):
        found, match = gradients(held, constants)
        for name in rates:
            held[name].grad = (
                found[name].sign() if signed and name == "x" else found[name]
            )
        optimiser.step()
        with torch.no_grad():
            project(held)
        for group in optimiser.param_groups:
            group["lr"] *= gamma or (0.1 if milestones and i + 1 in marks else 1.0)
        if i % max(iterations // CURVE, 1) == 0:
            curve.append(match)
        if (i + 1) % every == 0 and not (yield (i + 1) / iterations, match):
            break
    _, match = gradients(held, constants)
    rows = torch.stack([*curve, match], 1).tolist()
    return Trace(
        {name: value.detach() for name, value in held.items()}, match, rows, i + 1
    )


class Gradients:
    """(gradient of every lane's objective, its match), batched over lanes or one by one."""

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
        self._recorder = step_recorder("the objective of the attack")
        self._graphs = (
            Graphs(self._recorder) if _device(variables).type == "cuda" else None
        )
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
        return (
            self._batched(variables, constants)
            if self.batched
            else self._one_by_one(variables, constants)
        )

    def _batched(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        starts = range(0, _count(variables), AT_ONCE)
        pieces = [
            trees.at((variables, constants), slice(start, start + AT_ONCE))
            for start in starts
        ]
        gradients, match = trees.map(
            lambda *xs: torch.cat(xs),
            *[self._recorded("batched", self._batch, *piece) for piece in pieces],
        )
        return gradients, match

    def _one_by_one(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        lanes = range(_count(variables))
        found = [
            self._recorded(
                "alone", self._alone, trees.at(variables, i), trees.at(constants, i)
            )
            for i in lanes
        ]
        gradients, match = trees.stack(found)
        return gradients, match

    def _recorded(
        self, kind: str, way: Callable[..., Any], variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        """(gradient, match), of a piece of the lanes or of one; the first of its shape is recorded, the others run from that."""

        def step(inputs: tuple[Variables, Tree]) -> tuple[Variables, Tensor]:
            gradient, (_, match) = way(*inputs)
            return gradient, match.detach()

        def recorded(inputs: Tree) -> Tree:
            if self._recorder is None:
                return step(inputs)
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
        """Measured once a (model, shapes, machine), and remembered: two audits with one seed then compute the same bits."""
        shapes = [
            [name, list(x.shape)]
            for name, x in trees.flatten((variables, constants)).items()
        ]
        device = str(_device(variables))
        machine = [
            device,
            platform.processor(),
            os.cpu_count(),
            torch.get_num_threads(),
            torch.__version__,
            __version__,
        ]
        key = cache.key_of("lanes", [str(model), shapes, machine])
        known = cache.load(key)
        if known is None:
            try:
                times = [
                    self._time(way, variables, constants)
                    for way in (self._batched, self._one_by_one)
                ]
            except Exception:  # a model that vmap cannot take
                return False
            cache.save(key, batched=np.array(times[0] < times[1]))
            known = cache.load(key) or {"batched": np.array(times[0] < times[1])}
        return bool(known["batched"])

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
    """A copy of the model whose plain convolutions are matrix products, with the same parameters by name."""
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
        places = grid(
            x.shape[2:], self.kernel, self.dilation, self.padding, self.stride
        )
        columns = functional.unfold(
            x, self.kernel, self.dilation, self.padding, self.stride
        )  # [N, C k k, H W]
        columns = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        y = product(self.weight, columns, places)
        return y if self.bias is None else y + self.bias[:, None, None]
