"""The calls of a model's modules in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "ROWS",
    "SAME",
    "Call",
    "Trace",
    "copies",
    "differs",
    "eps_of",
    "first",
    "first_that_differs",
    "held",
    "is_same",
    "largest",
    "masked_modules",
    "middle",
    "tensors",
]

ROWS = 3  # examples of a trial; the middle one is compared
SAME = 64  # eps of the largest number: one computation on one shape, twice


class Call(NamedTuple):
    """One call of a module; inner modules come first."""

    name: str  # in the model; "" is the model itself
    module: nn.Module
    inputs: list[Tensor]  # copies, from before the call
    outputs: list[Tensor]  # copies
    moved: frozenset[str]  # states that differ after the call
    states: dict[str, Any]  # after the call


class Trace:
    """Inside, every call of a module of `model` is noted in the list."""

    def __init__(self, model: nn.Module, states: Callable[[], dict[str, Any]]) -> None:
        """`states()` are looked at before and after each call."""
        self._model, self._states = model, states
        self._calls: list[Call] = []
        self._open: list[tuple[list[Tensor], dict[str, Any]]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> list[Call]:
        for name, module in self._model.named_modules():
            self._hook(name, module)
        return self._calls

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._open.append((copies((args, kwargs)), self._states()))

        def note(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
            inputs, states = self._open.pop()
            now = self._states()
            moved = frozenset(key for key in states if states[key] != now[key])
            after = copies(outputs)
            self._calls.append(Call(name, module, inputs, after, moved, now))

        self._handles += [
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            module.register_forward_hook(note, with_kwargs=True),
        ]


def first(calls: list[Call], is_it: Callable[[Call], bool]) -> Call | None:
    """The first such call; the innermost, where one is inside another."""
    return next((call for call in calls if is_it(call)), None)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and mappings; nothing of other objects."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    found: list[Tensor] = []
    for branch in tree if isinstance(tree, list | tuple) else ():
        found += tensors(branch)
    return found


def copies(tree: Any) -> list[Tensor]:
    """Copies of all tensors of a tree."""
    return [x.detach().clone() for x in tensors(tree)]


def masked_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that mix the examples of a batch, and read its mask."""
    masked = []
    for module in model.modules():
        if getattr(module, "mixes_examples_with_mask", False):
            masked.append(module)
    return masked


@contextmanager
def held(modules: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Inside, after `hold()`, modules give the middle row what they gave it before.

    They leave PyTorch's generator as they did, too.
    """
    kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {m: [] for m in modules}
    is_held = False

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != ROWS:
            return output
        if not is_held:
            kept[module].append((output[1].clone(), torch.get_rng_state()))
            return output
        output = output.clone()
        output[1], state = kept[module].pop(0)
        torch.set_rng_state(state)
        return output

    def hold() -> None:
        nonlocal is_held
        is_held = True

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield hold
    finally:
        for handle in handles:
            handle.remove()


# Comparisons


def differs(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether a number of `a` is farther than `limit` from that of `b`.

    NaN is like NaN.

    >>> differs(torch.tensor([1.0, torch.nan]), torch.tensor([1.1, torch.nan]), 0.2)
    False
    """
    if a.dtype == torch.bool or b.dtype == torch.bool:
        return not torch.equal(a, b)
    same = (a == b) | ((a != a) & (b != b))
    gap = (a - b).abs().double().where(~same, 0.0)
    return bool((~(gap <= limit)).any())


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and type, and the same numbers."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not differs(a, b, 0.0)


def eps_of(x: Tensor) -> float:
    """The rounding of a number near one; 0 for whole numbers."""
    is_number = x.is_floating_point() or x.is_complex()
    return float(torch.finfo(x.dtype).eps) if is_number else 0.0


def largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 where there is none."""
    if x.numel() == 0 or x.dtype == torch.bool:
        return 0.0
    return float(x.detach().abs().double().nan_to_num(0, 0, 0).max())


def first_that_differs(
    one: list[Call],
    two: list[Call],
    part: Callable[[Tensor], Tensor],
    share: float = 0.0,
) -> Call | None:
    """The first call that gives something else for the same inputs, in these parts.

    By more than `share` of the largest number; 0: by more than rounding.
    """

    def are_same(old: list[Tensor], new: list[Tensor]) -> bool:
        for f, g in zip(map(part, old), map(part, new), strict=False):
            limit = (share or SAME * eps_of(f)) * largest(f)
            if f.shape != g.shape or differs(f, g, limit):
                return False
        return True

    for old, new in zip(one, two, strict=False):
        if old.name != new.name:
            return None
        if are_same(old.inputs, new.inputs) and not are_same(old.outputs, new.outputs):
            return old
    return None


def middle(x: Tensor) -> Tensor:
    """The row of the compared example, whichever axis is the batch's; or nothing."""
    if x.ndim and len(x) == 1:
        return x[0]
    if x.ndim and len(x) == ROWS:
        return x[1]
    if x.ndim and len(x) % ROWS == 0:
        return x.reshape(ROWS, -1, *x.shape[1:])[1]
    if x.ndim > 1 and x.shape[1] == ROWS:
        return x[:, 1]
    return x.flatten()[:0]
