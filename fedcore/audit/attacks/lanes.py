"""Many reconstructions in one batch of optimisations.

A lane is one client, one start, one path scale. Adam works element by element, so lanes
side by side are lanes one after another; only the way to their gradients differs
(lane_gradients.py). On a CPU the lanes are shared out among forks of this process, one
for each core; on a GPU they stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.audit.attacks.base import Progress, keep_going
from fedcore.audit.attacks.lane_gradients import (
    Gradients,
    Objective,
    Variables,
    count_lanes,
    device_of,
)
from fedcore.engines.base import one_thread
from fedcore.speed import forks
from fedcore.types import Tree

__all__ = ["Descent", "Objective", "Trace", "Variables", "optimise"]

# Times that an optimisation in forks or on a GPU reports its progress, and learns
# whether to go on; elsewhere it does at every step.
REPORTS = 20
CURVE = 50  # points kept of the objective along the way


class Descent(NamedTuple):
    """The course of Adam over the variables."""

    rates: dict[str, float]  # step sizes; variables without one stay as they are
    iterations: int
    project: Callable[[Variables], None]  # clamps in place after every step
    milestones: bool = True  # step sizes fall tenfold at 3/8, 5/8 and 7/8 of the way
    gamma: float | None = None  # the factor of step sizes at each step, instead
    signed: bool = False  # the sign of the gradient of x instead of the gradient

    def rate_factor(self, done: int) -> float:
        """The factor of step sizes after so many iterations."""
        if self.gamma is not None:
            return self.gamma
        n = self.iterations
        marks = (3 * n // 8, 5 * n // 8, 7 * n // 8)
        return 0.1 if self.milestones and done in marks else 1.0


class Trace(NamedTuple):
    """The end of an optimisation, and the way there."""

    variables: Variables  # [lanes, ...]
    match: Tensor  # [lanes] at the last variables
    curve: list[list[float]]  # by lane
    iterations: int  # done


def optimise(
    objective: Callable[[nn.Module], Objective],
    model: nn.Module,
    variables: Variables,
    constants: Tree,
    descent: Descent,
    progress: Progress = keep_going,
    batched: bool | None = None,
) -> Trace:
    """Adam over all lanes.

    `objective(model)` is the objective on that model; `constants` have a leading lane
    axis. `batched` = None: measure which way to the gradients is faster.
    """
    lanes, on_cpu = count_lanes(variables), device_of(variables).type == "cpu"
    threads = torch.get_num_threads() if on_cpu and forks.possible() else 1
    shares = min(threads, lanes)
    pieces: list[tuple[Variables, Tree]] = []
    for numbers in np.array_split(np.arange(lanes), shares):
        rows = slice(numbers[0], numbers[-1] + 1)
        pieces.append(trees.at((variables, constants), rows))
    with one_thread():  # of each fork; and operations this small are slower on several
        names = tuple(descent.rates)
        gradients = Gradients(objective, model, *pieces[0], names, batched)
        every = max(descent.iterations // REPORTS, 1)
        if on_cpu and shares == 1:
            every = 1
        work = [_descend(gradients, *piece, descent, every) for piece in pieces]
        if shares == 1:
            return _here(work[0], progress)
        return _joined(_shared_out(work, list(variables), progress))


Work = Generator[tuple[float, Tensor], bool | None, Trace]
"""An optimisation on its way.

It yields (the share that is done, the match [lanes]), and takes whether to go on.
"""


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
            tensors = [trace.match, *(trace.variables[name] for name in names)]
            return (trace.curve, trace.iterations), tensors
        return done, [match]

    pool, goes_on = forks.Forks(len(work), go), None
    try:
        while True:
            jobs: list[forks.Job] = [((i, goes_on), []) for i in range(len(work))]
            results = list(pool.run(jobs, []))
            done = results[0][0]
            if not isinstance(done, float):
                break
            match = torch.cat([tensors[0] for _, tensors in results])
            goes_on = progress(done, float(match.mean()))
    finally:
        pool.close()
    traces = []
    for (curve, iterations), tensors in results:
        match, *values = trees.map(torch.clone, tensors)
        variables = dict(zip(names, values, strict=True))
        traces.append(Trace(variables, match, curve, iterations))
    return traces


def _joined(traces: list[Trace]) -> Trace:
    """Traces of pieces as one of all lanes."""
    tensors = [(trace.variables, trace.match) for trace in traces]
    variables, match = trees.map(lambda *xs: torch.cat(xs), *tensors)
    curve: list[list[float]] = []
    for trace in traces:
        curve += trace.curve
    return Trace(variables, match, curve, traces[0].iterations)


def _descend(
    gradients: Gradients,
    variables: Variables,
    constants: Tree,
    descent: Descent,
    every: int,
) -> Work:
    """Adam on one piece of the lanes; it yields after `every` iterations."""
    held: Variables = trees.map(torch.clone, variables)
    groups = [{"params": [held[k]], "lr": lr} for k, lr in descent.rates.items()]
    optimiser = torch.optim.Adam(groups)
    curve: list[Tensor] = []
    done = 0
    for i in range(descent.iterations):
        slopes, match = gradients(held, constants)
        for name in descent.rates:
            is_signed = descent.signed and name == "x"
            held[name].grad = slopes[name].sign() if is_signed else slopes[name]
        optimiser.step()
        with torch.no_grad():
            descent.project(held)
        done = i + 1
        for group in optimiser.param_groups:
            group["lr"] *= descent.rate_factor(done)
        if i % max(descent.iterations // CURVE, 1) == 0:
            curve.append(match)
        if done % every == 0 and not (yield done / descent.iterations, match):
            break
    _, match = gradients(held, constants)
    rows = torch.stack([*curve, match], 1).tolist()
    return Trace(trees.map(torch.detach, held), match, rows, done)
