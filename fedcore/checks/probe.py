"""A model, a loss and metrics, tried on a few examples before a run.

They have to be functions of parameters, inputs and PyTorch's generator, of each example
by itself: batches are padded, clients run side by side and on copies, and a run may be
stopped and resumed. Anything else is refused, by the name of its module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad

from fedcore import trees
from fedcore.checks.counters import follows_from
from fedcore.checks.gradient import in_short
from fedcore.checks.hidden import GENERATOR, changed, name_of
from fedcore.checks.mixing import ALONE, refuse_mixing
from fedcore.checks.trace import (
    ROWS,
    copies,
    differs,
    eps_of,
    first,
    first_that_differs,
    is_same,
    largest,
    masked_modules,
    tensors,
)
from fedcore.checks.trials import SEED, Subject, Trial, are_alike, buffers, undisturbed
from fedcore.errors import SettingsError
from fedcore.types import Params, Tree

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["examine"]

OTHER = 0.02  # of the largest number: one computation in two ways
PRECISE = 1e-4  # eps above which two ways of computing a gradient say nothing
ORDER = 8  # roots of eps: sums in another order

DRAW = (
    "draw with torch.rand, torch.randint or torch.bernoulli, without a generator of "
    "their own: PyTorch's is seeded for each client and round"
)
FUNCTION = (
    "a function of its arguments, parameters and PyTorch's generator gives the same "
    "in every call"
)


def examine(task: Task) -> None:
    """Refuse a model, a loss or a metric that is no function of its arguments.

    Raises SettingsError, which names the module and says what to do.
    """
    _refuse_parameters_of_loss(task)
    if len(task.data.order) == 0:
        return
    subject = Subject(task)
    with undisturbed(task):
        with torch.no_grad():
            task.model.train()
            has_drawn = _refuse_state(subject)
            _refuse_other_parameters(subject)
            left_out = refuse_mixing(subject, has_drawn)
            task.model.eval()
            refuse_mixing(subject, _refuse_state(subject))
        task.model.train()
        _refuse_gradients(subject, compares=not left_out)


def _refuse_parameters_of_loss(task: Task) -> None:
    """Refuse a loss with trainable parameters of its own."""
    loss = task.metrics["loss"]
    if not isinstance(loss, nn.Module):
        return
    for name, p in loss.named_parameters():
        if p.requires_grad:
            raise SettingsError(
                f'the loss "{name_of(loss)}" has a trainable parameter, "{name}", '
                "and the model's alone are trained and sent: make it one of the "
                "model's, whose outputs the loss is given"
            )


# State: what a forward pass leaves behind


def _refuse_state(subject: Subject) -> bool:
    """Compare buffers, modes, generators and attributes around a forward pass.

    Returns whether it drew from PyTorch's generator.
    """
    before_buffers, generators = buffers(subject.model), subject.generators()
    flags = {name: module.training for name, module in subject.model.named_modules()}
    start = subject.state()
    subject.seed(SEED)
    seeded = subject.torch_state()
    given = Given.of(subject)
    try:
        one = subject.trial()
    except Exception as error:
        raise SettingsError(
            f"{subject.model_name}, its loss or a metric cannot take a batch of {ROWS} "
            f"examples: {in_short(error)}"
        ) from error
    _refuse_values(subject, one)
    _refuse_writing(subject, given, one)
    _refuse_changed_buffers(subject, before_buffers)
    # Where the model's own have converged, others have not.
    subject.trial(subject.moved_params)
    _refuse_changed_buffers(subject, before_buffers)
    for name, module in subject.model.named_modules():
        if module.training != flags.get(name, module.training):
            raise SettingsError(
                f"{subject.module_name(name)} sets its mode to training = "
                f"{module.training} in a forward pass, which the run does: leave it "
                "as it is there, or override train(mode)"
            )
    drawn = subject.generators()
    for name, state in drawn.items():
        if name != "torch" and state != generators[name]:
            _refuse_draw(subject, name)
    before = subject.state()
    two = subject.trial()
    after = subject.state()
    moved = changed(before, after)
    for place in moved:
        if place in after and after[place].text.startswith(GENERATOR):
            raise SettingsError(
                f"{place} is a generator that every call draws from, so that one seed "
                f"does not give one result: {DRAW}"
            )
    if not (are_alike(one, two) and are_alike(two, subject.trial())):
        _refuse_difference(subject, changed(start, after))
    for place in moved:
        if place in after and follows_from(after[place], subject.trial, are_alike):
            _refuse_difference(subject, [place])
    return bool(drawn["torch"] != seeded)


class Given(NamedTuple):
    """Copies of the tensors that a trial reads."""

    x: list[Tensor]
    y: list[Tensor]
    params: Params

    @classmethod
    def of(cls, subject: Subject) -> Given:
        params = {name: p.clone() for name, p in subject.params.items()}
        return cls(copies(subject.x), copies(subject.y), params)


def _refuse_values(subject: Subject, trial: Trial) -> None:
    """Refuse values that are no real numbers."""
    for name, values in trial.values.items():
        is_integer = not values.is_floating_point() and name == "loss"
        if values.is_complex() or is_integer:
            raise SettingsError(
                f"{subject.judge_name(name)} gives values of {values.dtype}, expected "
                "real numbers: take abs() or .real of what is complex"
            )


def _refuse_writing(subject: Subject, given: Given, trial: Trial) -> None:
    """Refuse to write to parameters, inputs, targets or outputs."""
    for name, p in subject.params.items():
        if not is_same(p, given.params[name]):
            path, _, own_name = name.rpartition(".")
            subject.params[name] = given.params[name]
            raise SettingsError(
                f'{subject.module_name(path)} writes to its parameter "{own_name}" in '
                "a forward pass, which is lost or meets other clients: compute with "
                "what it should be, e.g. F.normalize(self.weight), and use no max_norm"
            )
    if not all(map(is_same, given.x, tensors(subject.x))):
        raise SettingsError(
            f"{subject.model_name} writes to its inputs, which are the data "
            "themselves: work on x.clone(), and give no inplace=True to a first layer"
        )
    outputs = copies(trial.outputs)
    for name in trial.values:
        subject.task.metrics[name](trial.outputs, subject.y)
        written = ""
        if not all(map(is_same, outputs, tensors(trial.outputs))):
            written = "outputs"
        if not all(map(is_same, given.y, tensors(subject.y))):
            written = "targets"
        if written:
            raise SettingsError(
                f"{subject.judge_name(name)} writes to the {written} that it is given, "
                f"which others read after it: work on {written}.clone()"
            )


def _refuse_changed_buffers(subject: Subject, before: dict[str, Tensor]) -> None:
    exempt = {id(module) for module in masked_modules(subject.model)}
    names = []
    for name, buffer in buffers(subject.model).items():
        owner = subject.model.get_submodule(name.rpartition(".")[0])
        is_new = name not in before
        if id(owner) not in exempt and (is_new or not is_same(before[name], buffer)):
            names.append(name)
    if names:
        path, _, own_name = names[0].rpartition(".")
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise SettingsError(
            f'{subject.module_name(path)} changes its buffer "{own_name}"{more} in a '
            "forward pass: clients send parameters alone, so that the change is lost "
            "or reaches other clients; leave the buffer as it is, make it a parameter, "
            "or use a layer without it (GroupNorm for BatchNorm)"
        )


def _refuse_draw(subject: Subject, generator: str) -> None:
    call = first(subject.trace(), lambda call: generator in call.moved)
    who = subject.judge_name("loss") if call is None else subject.module_name(call.name)
    raise SettingsError(
        f"{who} draws from {generator}, so that one seed does not give one result: "
        f"{DRAW}"
    )


def _refuse_difference(subject: Subject, moved: list[str]) -> None:
    """Refuse two trials of one seed that differ, or one that follows what moved."""
    if moved:
        raise SettingsError(
            f"{moved[0]} changes in every call, and results follow from it: "
            f"{FUNCTION}; leave it as it is, or make it an input"
        )
    call = first_that_differs(subject.trace(), subject.trace(), lambda x: x)
    who = subject.judge_name("loss") if call is None else subject.module_name(call.name)
    raise SettingsError(
        f"{who} gives something else in a second call with the same seed: {FUNCTION}; "
        f"read no clock and count no calls, and {DRAW}"
    )


def _refuse_other_parameters(subject: Subject) -> None:
    """Change the parameters that the model was built with, which nobody should read."""
    before = subject.trial()
    with subject.other_parameters():
        after = subject.trial()
    if are_alike(before, after):
        return
    one = subject.trace()
    with subject.other_parameters():
        call = first_that_differs(one, subject.trace(), lambda x: x)
    if call is not None:
        raise SettingsError(
            f"{subject.module_name(call.name)} reads a parameter by another way than "
            "its name, so that it would never see the trained one: use the attribute "
            "itself (self.layer.weight), no list or variable that holds it as well"
        )
    raise SettingsError(
        f"{subject.judge_name('loss')} reads the model's parameters, and would see "
        "those that it was built with: a term that depends on parameters is "
        "Task(..., penalty=...)"
    )


# Gradients


def _refuse_gradients(subject: Subject, compares: bool) -> None:
    """Differentiate; where it `compares`, one example's loss between others, too."""
    weights = torch.zeros(ROWS, device=subject.task.device)
    weights[1] = 1

    def loss(params: Params, x: Tree, y: Tensor) -> Tensor:
        total: Tensor = (subject.trial(params, x, y).values["loss"] * weights).sum()
        return total

    slopes = _slopes(subject, loss)
    before = buffers(subject.model)
    try:
        one = grad(loss)(subject.params, subject.x, subject.y)
    except Exception as error:
        raise SettingsError(
            f"torch.func cannot differentiate {subject.model_name} with its loss: "
            f"{in_short(error)}"
        ) from error
    _refuse_changed_buffers(subject, before)
    is_precise = all(eps_of(slope) < PRECISE for slope in one.values())
    name = _first_other(one, slopes, OTHER) if is_precise else None
    if name is not None:
        raise SettingsError(
            "torch.func finds another gradient than loss.backward() for "
            f"{subject.module_name(name.rpartition('.')[0])}: no .data, no threads and "
            "no torch.no_grad() between parameters and loss"
        )
    if not compares:
        return
    two = grad(loss)(subject.params, subject.other_x, subject.other_y)
    name = _first_other(one, two, 0.0)
    if name is not None:
        raise SettingsError(
            f"{subject.module_name(name.rpartition('.')[0])} gets another gradient of "
            "one example's loss where another row of the batch changes: batches are "
            f"padded with rows that do not count; {ALONE}"
        )


def _first_other(slopes: Params, others: Params, share: float) -> str | None:
    """The first parameter whose slope is another one; None: they are alike.

    By more than this share of the largest of all, of which one that should be zero has
    the rounding; and by more than the rounding of sums in another order.
    """
    size = max(map(largest, [*slopes.values(), *others.values()]))
    for name, slope in slopes.items():
        rounding = ORDER * eps_of(slope) ** 0.5
        if differs(slope, others[name], max(share, rounding) * size):
            return name
    return None


def _slopes(subject: Subject, loss: Callable[[Params, Tree, Tensor], Tensor]) -> Params:
    """The gradient by loss.backward().

    Refuses a loss without one, which torch.func would differentiate to zeros.
    """
    params = trees.map(lambda p: p.clone().requires_grad_(), subject.params)
    with torch.enable_grad():
        value = loss(params, subject.x, subject.y)
    if not value.requires_grad:
        raise SettingsError(
            f"{subject.judge_name('loss')} of the model's outputs has no gradient, so "
            "that nothing can be learned: is it a metric, or are outputs detached?"
        )
    found = torch.autograd.grad(
        value, list(params.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(params, found, strict=True))
