"""The values that a model or a loss reads besides its arguments.

Attributes, cells of closures, globals, and generators that are not PyTorch's own. They
are compared before and after: a recording holds them as they were, and a process that
got a copy keeps the old ones.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["GENERATOR", "Value", "changed", "hidden_state", "name_of"]

GENERATOR = "a generator's state"
LENGTH_NAME = "length"  # of a list or dict, beside its items
DEPTH = 8  # of attributes of attributes
MOST = 5000  # places that are looked at
LENGTH = 64  # items of a list or a dict that are looked at
SMALL = 4096  # elements of a tensor, at most, that are compared one by one
NUMBERS = (bool, int, float, complex, str, bytes, type(None))
SHARED = (*NUMBERS, Tensor, list, dict, np.random.Generator, random.Random)
PLAIN = nn.Module()
# Of the standard library, whose objects hold what a user puts into them.
HOLDERS = ("types", "collections", "argparse", "enum", "dataclasses", "abc")


class Value(NamedTuple):
    """One value: how it is shown and compared, and how it is set."""

    text: str
    content: Any
    set: Callable[[Any], None] | None


class Place(NamedTuple):
    """One object on the way: whose it is, its name, and how another is put there."""

    subject: str
    name: str
    content: Any
    set: Callable[[Any], None] | None
    depth: int

    @property
    def path(self) -> str:
        """The place in words."""
        return f'{self.subject}\'s "{self.name}"' if self.name else self.subject

    def attribute(self, name: str, content: Any) -> Place:
        setter = functools.partial(setattr, self.content, name)
        return self.below(f".{name}", content, setter)

    def item(self, key: Any, content: Any) -> Place:
        """Entry `key` of a list or dict."""
        is_open = isinstance(self.content, list | dict)
        setter = functools.partial(self.content.__setitem__, key) if is_open else None
        return self.below(f"[{key!r}]", content, setter)

    def below(
        self, name: str, content: Any, setter: Callable[[Any], None] | None
    ) -> Place:
        """A place one step further, by its name with a mark before it."""
        name = f"{self.name}{name}" if self.name else name.removeprefix(".")
        return Place(self.subject, name, content, setter, self.depth + 1)

    def same(self, content: Any, name: str = "") -> Place:
        """Another object at the same depth."""
        full = f"{self.name}.{name}" if self.name and name else name or self.name
        return Place(self.subject, full, content, None, self.depth)


def hidden_state(subjects: Mapping[str, Any]) -> dict[str, Value]:
    """Numbers, texts, tensors and generators that these objects reach, by place.

    Parameters and buffers of modules are left out, and so is the code of libraries.

    >>> def make(weight):
    ...     return lambda outputs, y: weight * outputs
    >>> for place, value in hidden_state({"f": make(0.5)}).items():
    ...     print(place, "=", value.text)
    f's "weight" = 0.5
    """
    values: dict[str, Value] = {}
    seen: set[int] = set()
    waiting = deque(Place(name, "", x, None, 0) for name, x in subjects.items())
    for _ in range(MOST):
        if not waiting:
            break
        place = waiting.popleft()
        text = _text(place.content)
        if text is not None:
            values.setdefault(place.path, Value(text, place.content, place.set))
        elif place.depth < DEPTH and id(place.content) not in seen:
            seen.add(id(place.content))
            if isinstance(place.content, list | tuple | dict | set | deque):
                length = str(len(place.content))
                values[place.same(None, LENGTH_NAME).path] = Value(length, None, None)
            waiting.extend(_reached(place))
    return values


def changed(before: Mapping[str, Value], after: Mapping[str, Value]) -> list[str]:
    """The paths whose values differ, or that are new or gone."""
    paths = []
    for path in [*before, *(path for path in after if path not in before)]:
        old, new = before.get(path), after.get(path)
        if old is None or new is None or old.text != new.text:
            paths.append(path)
    return paths


def name_of(fn: Any) -> str:
    """The module and name of a function, or of a callable object's class.

    >>> name_of(name_of)
    'fedcore.checks.hidden.name_of'
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"


def _text(x: Any) -> str | None:
    """A value in words, alike if and only if it is alike; None: look inside."""
    if isinstance(x, NUMBERS):
        return repr(x) if len(repr(x)) < 80 else _digest(repr(x).encode())
    if isinstance(x, Tensor):
        try:
            return _tensor_text(x)
        except RuntimeError:  # left over from a transformation that has ended
            return f"tensor {id(x)}"
    if isinstance(x, np.ndarray):
        some = x.reshape(-1)[:: 1 + x.size // SMALL]  # of a large one not every number
        return f"array {x.shape} {_digest(repr(some.tolist()).encode())}"
    if isinstance(x, np.generic | torch.dtype | torch.device):
        return repr(x)
    state = _generator_state(x)
    return None if state is None else f"{GENERATOR} {_digest(repr(state).encode())}"


def _generator_state(x: Any) -> Any:
    if isinstance(x, random.SystemRandom):
        return id(x)
    if isinstance(x, random.Random):
        return x.getstate()
    if isinstance(x, np.random.Generator):
        return x.bit_generator.state
    if isinstance(x, np.random.RandomState):
        return x.get_state(legacy=False)
    if isinstance(x, torch.Generator):
        return x.get_state().numpy().tobytes()
    if isinstance(x, types.GeneratorType):
        return None if x.gi_frame is None else (id(x), x.gi_frame.f_lasti)
    return None


def _tensor_text(x: Tensor) -> str:
    shape = f"tensor {tuple(x.shape)} "
    if x.device.type != "cpu" or x.numel() > SMALL or x.layout != torch.strided:
        version = 0 if x.is_inference() else x._version
        return f"{shape}{id(x)} {version}"
    if x.numel() == 1:
        return str(x.detach().reshape(()).item())
    numbers = x.detach().contiguous().flatten()
    return shape + _digest(numbers.view(torch.uint8).numpy().tobytes())


def _digest(x: bytes) -> str:
    return hashlib.blake2b(x, digest_size=8).hexdigest()


def _reached(place: Place) -> Iterator[Place]:
    """The places that are one step further."""
    x = place.content
    if isinstance(x, dict):
        for key, value in list(x.items())[:LENGTH]:
            yield place.item(key, value)
    elif isinstance(x, list | tuple | deque):
        for i, value in enumerate(list(x)[:LENGTH]):
            yield place.item(i, value)
    elif isinstance(x, functools.partial):
        for part in (x.func, x.args, x.keywords):
            yield place.same(part)
    elif isinstance(x, types.MethodType):
        yield place.same(x.__self__)
        yield place.same(x.__func__)
    elif isinstance(x, types.FunctionType):
        if not _is_library(x.__module__):
            yield from _of_function(place, x)
    elif isinstance(x, type):
        if not _is_library(x.__module__):
            yield from _of_class(place)
    elif isinstance(x, nn.Module):
        yield from _of_module(place)
    elif not isinstance(x, types.ModuleType) and _holds_values(type(x)):
        yield from _of_object(place)


def _of_module(place: Place) -> Iterator[Place]:
    module: nn.Module = place.content
    is_own = not _is_library(type(module).__module__)
    for name, value in vars(module).items():
        # What a library's layer remembers for itself is its own business.
        is_setting = isinstance(value, NUMBERS) and not name.startswith("_")
        is_known = name == "training" or hasattr(PLAIN, name)
        if not is_known and (is_own or is_setting):
            yield place.attribute(name, value)
    if not getattr(module, "mixes_examples_with_mask", False):
        for name, buffer in module._buffers.items():
            yield place.attribute(name, buffer)
    for name, child in module.named_children():
        yield place.same(child, name)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            yield place.below(".hook", hook, None)
    yield place.same(type(module))


def _of_object(place: Place) -> Iterator[Place]:
    for name, value in getattr(place.content, "__dict__", {}).items():
        yield place.attribute(name, value)
    for kind in type(place.content).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(place.content, name):
                yield place.attribute(name, getattr(place.content, name))
    yield place.same(type(place.content))


def _of_class(place: Place) -> Iterator[Place]:
    """Attributes that instances share, and what calls of instances read."""
    kind: type = place.content
    for name, value in list(vars(kind).items()):
        if isinstance(value, SHARED) and not name.startswith("__"):
            yield place.attribute(name, value)
    for base in kind.__bases__:
        yield place.same(base)
    waiting, methods = ["forward", "__call__"], set[str]()
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name, None)
        if name not in methods and isinstance(method, types.FunctionType):
            methods.add(name)
            waiting.extend(_names(method.__code__).attributes)
            yield place.same(method)


def _of_function(place: Place, fn: types.FunctionType) -> Iterator[Place]:
    """Cells, defaults, attributes, and globals that the code reads."""
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            content = cell.cell_contents
        except ValueError:  # not yet bound
            continue
        put = functools.partial(setattr, cell, "cell_contents")
        yield place.below(f".{name}", content, put)
    for default in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
        yield place.below(".default", default, None)
    for name, value in vars(fn).items():
        yield place.attribute(name, value)
    names = _names(fn.__code__)
    for name in sorted(names.global_ & fn.__globals__.keys()):
        put = functools.partial(fn.__globals__.__setitem__, name)
        yield from _of_global(place, name, fn.__globals__[name], put, names.attributes)


def _of_global(
    place: Place,
    name: str,
    value: Any,
    put: Callable[[Any], None],
    names: frozenset[str],
) -> Iterator[Place]:
    if not isinstance(value, types.ModuleType):
        yield place.below(f".{name}", value, put)
    elif not _is_library(value.__name__):
        for attribute in sorted(names & vars(value).keys()):
            inner = functools.partial(setattr, value, attribute)
            content = getattr(value, attribute)
            yield place.below(f".{name}.{attribute}", content, inner)


class Names(NamedTuple):
    """Names in a function's code, and in functions inside it."""

    global_: frozenset[str]
    attributes: frozenset[str]


@functools.cache
def _names(code: types.CodeType) -> Names:
    global_, attributes = set[str](), set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            global_.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            global_ |= inner.global_
            attributes |= inner.attributes
    return Names(frozenset(global_), frozenset(attributes))


def _holds_values(kind: type) -> bool:
    """Whether objects of this class are looked into."""
    top = kind.__module__.partition(".")[0]
    is_standard = top in sys.stdlib_module_names and top != "__main__"
    return top in HOLDERS or not is_standard


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether the code of this module is nobody's own."""
    if module is None or module == "__main__":
        return module is None
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
