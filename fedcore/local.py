"""A client's work: local SGD with hooks, and the full gradient.

Steps are those of SGD unless the run's `[local]` settings make them others
(`fedcore.optimizers`).
Both are pure, and batch over clients. Whoever runs clients may give local steps to a
runner of its own (`steps_run_by`), which computes the same faster; without one, as in
the sequential engine and on devices, a step runs as it is written.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value

from fedcore import optimizers, trees
from fedcore.dpsgd import clipped_sum
from fedcore.errors import SettingsError
from fedcore.optimizers import (
    PLAIN,
    Moments,
    Recipe,
    Session,
    adamw,
    clipped,
    rounded,
    wide,
)
from fedcore.statistics import statistics_moved
from fedcore.task import Task
from fedcore.types import Batches, Params, Tree

__all__ = [
    "LocalWork",
    "Loss",
    "Step",
    "StepRunner",
    "Weigh",
    "full_gradient",
    "local_sgd",
    "steps_run_by",
    "wide",
]

Loss = Callable[[Params, Tree, Tensor, Tensor], Tensor]
"""(params, x [B, ...], y [B, ...], mask [B]) -> mean loss over real examples, 0-d."""

Weigh = Callable[[Tensor, Tensor], Tensor]
"""(y [B, ...], mask [B]) -> how much each example counts, [B]."""

Step = Callable[[Any], Tree]
"""A pure function of one tree of tensors."""


class StepRunner(Protocol):
    """A faster way of running local steps."""

    def run(self, step: Step, kind: Hashable, inputs: Tree, own: Tree) -> Tree:
        """`step(inputs)`. The tensors of `own`, some of the inputs, may be overwritten.

        `kind` is all that shapes the step but the tensors' own shapes: what it closes
        over, and the structure of its inputs.
        """
        ...


_runner: ContextVar[StepRunner | None] = ContextVar("step runner", default=None)


@contextmanager
def steps_run_by(runner: StepRunner | None) -> Iterator[None]:
    """Inside, `runner` runs the steps of local training; None: as they are written."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


class LocalWork(NamedTuple):
    """The end of local training."""

    params: Params
    steps: Tensor  # 0-d, the steps that had an example
    loss: Tensor  # 0-d, mean training loss over those steps, each before its update


def local_sgd(
    loss: Loss,
    params: Params,
    batches: Batches,
    lr: float | Tensor | dict[str, float],
    correction: Params | None = None,
    prox: float = 0.0,
    center: Params | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    fixed: Params | None = None,
) -> LocalWork:
    """SGD over `batches`, one step each, from y = params and v = 0:

        v <- momentum v + g(y) + correction + prox (y - center) + weight_decay y
        y <- y - lr v

    `lr` is one step size, or one a parameter; `center` is params unless given; `fixed`
    are parameters of the model that stay. A batch that is all padding moves nothing,
    whatever the hooks: ragged clients train side by side. Statistics that are among
    params take no such step, but become what the forward makes of them.

    With `[local]` settings of the run g passes clipping before the momentum, or the
    optimizer in its place, and `lr` follows the schedule; with `[local.dp]` it is the
    noised one of `fedcore.dpsgd`, and no loss comes back.
    """
    session = optimizers.now()
    recipe = PLAIN if session is None else session.recipe
    number = None if isinstance(lr, Tensor) else lr
    hooks = _Hooks(number, prox, momentum, weight_decay, recipe)
    weigh = None if session is None else session.task.weights
    step = functools.partial(_step, loss, weigh, hooks)
    names = tuple(params), tuple(fixed or ()), bool(correction)
    kind = _kind_of(loss, hooks, names)
    runner = _runner.get() if kind is not None else None

    y, v = params, _first_memory(params, hooks, session)
    center = (params if center is None else center) if prox else {}
    rate = lr if isinstance(lr, Tensor) else ()
    share = _scheduled(session, wide(params))
    constants = _Constants(fixed or {}, correction or {}, center, rate, share)
    steps = total = torch.zeros((), dtype=wide(params), device=batches.mask.device)
    own: Params = {}  # of the last step, which the next one may overwrite
    draws = _draws(loss, session, params, len(batches.mask))
    for batch, drawn in zip(trees.unbind(batches), draws, strict=False):
        done = steps if recipe.warmup else ()
        inputs = _Inputs(y, v, constants, *batch, done, drawn)
        if runner is None:
            y, v, real, value = step(inputs)
        else:
            y, v, real, value = runner.run(step, kind, inputs, own)
        own = y
        steps, total = steps + real, total + real * value
    if not len(batches.mask):
        y = trees.map(torch.clone, y)  # the caller's own, as after any step
    if session is not None:
        session.end(v if isinstance(v, Moments) else None)
    return LocalWork(y, steps, total / steps.clamp(min=1))


def _draws(
    loss: Loss, session: Session | None, params: Params, steps: int
) -> Iterable[Tree]:
    """(size, noise) of each step of DP-SGD; () of other steps."""
    if session is None or session.recipe.examples is None:
        return itertools.repeat(())
    if _task_of(loss) is None:
        raise SettingsError(
            "local.dp bounds the gradient of the task's own loss, and this method "
            "trains on another: leave local.dp out, or choose another method"
        )
    return session.take(steps, params)


class _Hooks(NamedTuple):
    """The numbers of a step."""

    lr: float | dict[str, float] | None  # None: a tensor among the inputs
    prox: float
    momentum: float
    weight_decay: float
    recipe: Recipe


def _first_memory(params: Params, hooks: _Hooks, session: Session | None) -> Tree:
    """What the optimizer remembers before the first step."""
    moments = None if session is None else session.begin(params)
    if moments is not None:
        return moments
    return trees.zeros_like(params) if hooks.momentum else {}


def _scheduled(session: Session | None, dtype: torch.dtype) -> Tree:
    """The schedule's share of the step size, 0-d; () where there is no schedule."""
    if session is None or session.share is None:
        return ()
    return session.share.to(dtype)


class _Constants(NamedTuple):
    """The tensors that stay from step to step; empty where they do not count."""

    fixed: Params
    correction: Params
    center: Params
    lr: Tree  # a 0-d tensor, where it is not a number
    share: Tree  # of the step size, 0-d, where it has a schedule


class _Inputs(NamedTuple):
    """All tensors that a step reads."""

    y: Params
    v: Tree  # what the optimizer remembers: momentum, or Moments
    constants: _Constants
    x: Tree
    target: Tensor
    mask: Tensor
    done: Tree  # real steps before this one, 0-d, where the step size rises
    drawn: Tree = ()  # (size, noise) of DP-SGD


class _Outputs(NamedTuple):
    """The result of a step."""

    y: Params
    v: Tree
    real: Tensor  # 0-d, 1 where the batch had an example
    value: Tensor  # 0-d, the loss before the update


def _kind_of(loss: Loss, hooks: _Hooks, names: Hashable) -> Hashable:
    """All that a step depends on but its inputs; None where that is unknown.

    A loss that is not the task's own may hold tensors that change.
    """
    task = _task_of(loss)
    if task is None:
        return None
    lr = tuple(hooks.lr.items()) if isinstance(hooks.lr, dict) else hooks.lr
    return hooks._replace(lr=None), lr, task.model.training, names


def _task_of(loss: Loss) -> Task | None:
    """The task whose own loss this is."""
    task = loss.__self__ if inspect.ismethod(loss) else None
    return task if isinstance(task, Task) else None


def _step(loss: Loss, weigh: Weigh | None, hooks: _Hooks, inputs: _Inputs) -> _Outputs:
    y, constants, recipe = inputs.y, inputs.constants, hooks.recipe
    if recipe.examples is None:
        real = (inputs.mask.sum() > 0).to(wide(y))
        slope, value, statistics = _gradient(loss, weigh, recipe, inputs)
    else:
        size, _ = inputs.drawn  # a step without an example is one as well
        real = (size > 0).to(wide(y))
        slope, value, statistics = _noised(loss, recipe, inputs)
    if constants.correction:
        slope = trees.add(slope, constants.correction)
    if hooks.prox:
        slope = trees.map(
            lambda g, here, center: g + hooks.prox * (here - center),
            slope,
            y,
            constants.center,
        )
    if hooks.weight_decay:
        slope = trees.axpy(hooks.weight_decay, y, slope)
    if recipe.clip is not None:
        slope = clipped(slope, recipe.clip)
    share = _share(recipe, inputs, real)
    v = inputs.v
    if recipe.adamw is not None:
        lr = constants.lr if hooks.lr is None else hooks.lr
        moved, v = adamw(recipe.adamw, y, slope, v, lr, share, real)
        return _Outputs(moved | statistics, v, real, value)
    if hooks.momentum:
        kept = trees.scale(v, 1 - real * (1 - hooks.momentum))
        slope = v = trees.axpy(real, slope, kept)
    moved = _moved(y, slope, hooks, constants, share) | statistics
    return _Outputs(moved, v, real, value)


def _gradient(
    loss: Loss, weigh: Weigh | None, recipe: Recipe, inputs: _Inputs
) -> tuple[Params, Tensor, Params]:
    """(gradient, loss, new values of statistics) at y."""

    def of(x: Tree, target: Tensor, mask: Tensor) -> tuple[Params, Tensor, Params]:
        def at(y: Params) -> tuple[Tensor, Params]:
            params = {**inputs.constants.fixed, **y}
            with statistics_moved() as moves:
                if recipe.is_rounded:
                    with rounded(mask.device):
                        value = loss(params, x, target, mask)
                else:
                    value = loss(params, x, target, mask)
            return value, moves.of(y)

        slope, (value, statistics) = grad_and_value(at, has_aux=True)(inputs.y)
        return slope, value, statistics

    if recipe.micro == 1 or weigh is None:
        return of(inputs.x, inputs.target, inputs.mask)
    # The sum over pieces, each as much as its examples weigh.
    dtype = wide(inputs.y)
    whole = weigh(inputs.target, inputs.mask).sum().to(dtype)
    examples = torch.where(whole > 0, whole, torch.ones_like(whole))
    slope, value = trees.zeros_like(inputs.y), torch.zeros_like(examples)
    width = -(-len(inputs.mask) // recipe.micro)
    for start in range(0, len(inputs.mask), width):
        rows = slice(start, start + width)
        x, target, mask = trees.at((inputs.x, inputs.target, inputs.mask), rows)
        share = weigh(target, mask).sum().to(dtype) / examples
        part, mean, _ = of(x, target, mask)
        slope, value = trees.axpy(share, part, slope), value + share * mean
    return slope, value, {}


def _noised(
    loss: Loss, recipe: Recipe, inputs: _Inputs
) -> tuple[Params, Tensor, Params]:
    """(gradient of DP-SGD, 0 in place of a loss, no statistics) at y.

    The loss of single examples would say of them what the gradient must not.
    """
    assert recipe.examples is not None
    bound, deviation = recipe.examples
    one = torch.ones_like(inputs.mask[:1])

    def of_one(y: Params, x: Tree, target: Tensor) -> Tensor:
        params = {**inputs.constants.fixed, **y}
        if not recipe.is_rounded:
            return loss(params, x, target, one)
        with rounded(one.device):
            return loss(params, x, target, one)

    total = trees.zeros_like(inputs.y)
    width = max(-(-len(inputs.mask) // recipe.micro), 1)
    for start in range(0, len(inputs.mask), width):
        rows = slice(start, start + width)
        x, target, mask = trees.at((inputs.x, inputs.target, inputs.mask), rows)
        part = clipped_sum(of_one, inputs.y, x, target, mask, bound)
        total = trees.add(total, part)
    size, noise = inputs.drawn
    if noise:
        total = trees.axpy(deviation, noise, total)
    # Of a step that is padding, 0 / 0 would not be 0.
    share = torch.where(size > 0, 1 / size.clamp(min=1), 0)
    slope: Params = trees.map(lambda g: g * share.to(g), total)
    return slope, torch.zeros_like(size).to(wide(inputs.y)), {}


def _share(recipe: Recipe, inputs: _Inputs, real: Tensor) -> Tensor:
    """The share of the step size that this step takes, 0-d; 0 where it is padding."""
    share = real
    if isinstance(inputs.constants.share, Tensor):
        share = share * inputs.constants.share
    if recipe.warmup:
        share = share * ((inputs.done + real) / recipe.warmup).clamp(max=1)
    return share


def _moved(
    y: Params, slope: Params, hooks: _Hooks, constants: _Constants, share: Tensor
) -> Params:
    """y - lr slope, as much of it as `share` says."""
    if isinstance(hooks.lr, dict):
        return {
            name: torch.addcmul(value, slope[name], -hooks.lr[name] * share)
            for name, value in y.items()
        }
    lr = constants.lr if hooks.lr is None else hooks.lr
    moved: Params = trees.axpy(-lr * share, slope, y)
    return moved


def full_gradient(
    loss: Loss,
    params: Params,
    batches: Batches,
    weights: Weigh | None = None,
) -> tuple[Params, Tensor]:
    """Gradient and value of the mean loss over all real examples of `batches`.

    `weights` (y, mask) -> [B] says how much each example counts in `loss`; by default
    as it does in a task's own loss, and all the same in others.
    """
    dtype = wide(params)
    if weights is None:
        task = _task_of(loss)
        weights = _mask if task is None else task.weights
    total = torch.zeros_like(batches.mask[:1].sum())
    for _, y, mask in trees.unbind(batches):
        total = total + weights(y, mask).sum()
    examples = torch.where(total > 0, total, 1).to(dtype)
    gradient = trees.zeros_like(params)
    value = torch.zeros((), dtype=dtype, device=batches.mask.device)
    for x, y, mask in trees.unbind(batches):
        share = weights(y, mask).sum() / examples
        slope, mean = grad_and_value(loss)(params, x, y, mask)
        gradient = trees.axpy(share, slope, gradient)
        value = value + share * mean
    return gradient, value


def _mask(y: Tensor, mask: Tensor) -> Tensor:
    return mask
