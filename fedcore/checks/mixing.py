"""The examples of a batch, each by itself: what another row changes is refused."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fedcore import trees
from fedcore.checks.gradient import in_short
from fedcore.checks.trace import (
    ROWS,
    SAME,
    Call,
    differs,
    eps_of,
    first_that_differs,
    held,
    largest,
    masked_modules,
    middle,
    tensors,
)
from fedcore.checks.trials import Subject, Trial
from fedcore.errors import SettingsError
from fedcore.types import Params, Tree

__all__ = ["ALONE", "refuse_mixing"]

OTHER = 0.02  # of the largest number: one computation on two shapes
ALONE = "compute with each example by itself (axis 0 is the batch)"


def refuse_mixing(subject: Subject, has_drawn: bool) -> list[nn.Module]:
    """Compare the outputs for one example between others, and alone.

    Returns modules that are left out of it. Raises SettingsError for a module, a loss
    or a metric that mixes the examples of a batch.
    """
    masked = masked_modules(subject.model)
    pair = _between(subject, subject.other_x, masked, has_drawn)
    try:
        subject.trial(subject.moved_params, subject.far_x, subject.other_y)
    except Exception:  # numbers that the model cannot take
        left_out = pair.left_out
    else:
        left_out = _between(subject, subject.far_x, masked, has_drawn).left_out
    if not masked and not has_drawn:
        _refuse_size(subject, subject.moved_params, pair.before)
    for name, value in pair.before.values.items():
        if _row_differs(value, pair.after.values[name]):
            raise SettingsError(
                f"{subject.judge_name(name)} mixes the examples of a batch: another "
                "row changes an example's value, and batches are padded with rows that "
                "do not count; give each example a value of its own"
            )
    return left_out


class Pair(NamedTuple):
    """Two trials of one example, between the trial's examples and between others."""

    before: Trial
    after: Trial
    left_out: list[nn.Module]


def _between(
    subject: Subject, other_x: Tree, masked: list[nn.Module], has_drawn: bool
) -> Pair:
    """Compare an example's outputs, between the trial's examples and others."""
    uneven = subject.uneven_modules(other_x) if has_drawn else []
    params, left_out = subject.moved_params, [*masked, *uneven]
    with held(left_out) as hold:
        before = subject.trial(params)
        hold()
        after = subject.trial(params, other_x, subject.other_y)
    for f, g in zip(tensors(before.outputs), tensors(after.outputs), strict=True):
        if _row_differs(f, g):
            with held(left_out) as hold:
                one = subject.trace(params)
                hold()
                two = subject.trace(params, other_x)
            _refuse_mixed(subject, first_that_differs(one, two, middle))
    return Pair(before, after, left_out)


def _refuse_mixed(subject: Subject, call: Call | None) -> None:
    name, module = ("", subject.model) if call is None else (call.name, call.module)
    others = []
    for other, candidate in subject.model.named_modules():
        if other != name and type(candidate) is type(module):
            others.append(f'"{other}"')
    alike = f" (like {', '.join(others[:3])})" if others else ""
    raise SettingsError(
        f"{subject.module_name(name)}{alike} mixes the examples of a batch: another "
        "row changes an example's output, and batches are padded with rows that do not "
        f"count; {_advice(module)}"
    )


def _advice(module: nn.Module) -> str:
    kind = type(module).__name__
    if "BatchNorm" in kind:
        return (
            "convert the model by to_group_norm or personal_batch_norm of "
            "fedcore.models.norms (docs/batch-norm.md)"
        )
    if getattr(module, "batch_first", True) is False:
        return f"{kind} takes axis 1 for the batch: give it batch_first=True"
    return ALONE


def _refuse_size(subject: Subject, params: Params, whole: Trial) -> None:
    """Compare an example's output in a batch of three, and in one of one."""
    x, y = trees.at((subject.x, subject.y), slice(1, 2))
    try:
        alone = subject.trial(params, x, y)
    except Exception as error:
        raise SettingsError(
            f"{subject.model_name} cannot take a batch of one example, which a client "
            f"may have: {in_short(error)}"
        ) from error
    pairs = zip(tensors(whole.outputs), tensors(alone.outputs), strict=True)
    for f, g in pairs:
        if f.ndim == 0 or len(f) != ROWS:
            continue
        if f[1:2].shape == g.shape and not differs(f[1:2], g, OTHER * largest(f)):
            continue
        one, two = subject.trace(params), subject.trace(params, x)
        call = first_that_differs(one, two, middle, OTHER)
        who = subject.module_name(call.name if call else "")
        raise SettingsError(
            f"{who} gives an example that is alone in its batch another output than in "
            f"a batch of {ROWS}: batches differ in size, and are padded; {ALONE}"
        )


def _row_differs(f: Tensor, g: Tensor) -> bool:
    """Whether the middle one of three rows is another one."""
    if f.shape != g.shape or f.ndim == 0 or len(f) != ROWS:
        return f.shape != g.shape
    return differs(f[1], g[1], SAME * eps_of(f) * largest(f))
