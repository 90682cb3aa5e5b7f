"""Whether results follow from a number that changes from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fedcore.checks.hidden import Value

__all__ = ["follows_from"]

Result = TypeVar("Result")

SHIFTS = (1, 10, 1_000, 1_000_000)  # by which a number is moved
MOST = 40  # numbers that it is tried with, at most
COMPARED = (
    "__mod__",
    "__floordiv__",
    "__truediv__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__eq__",
    "__ne__",
)


def follows_from(
    value: Value, run: Callable[[], Result], are_alike: Callable[[Result, Result], bool]
) -> bool:
    """Whether `run()` gives something else where the value is another one.

    The value is tried near the numbers, too, that it is divided by or compared with: a
    counter may have a consequence in each hundredth call alone.

    >>> calls = {"n": 5}
    >>> def put(n):
    ...     calls["n"] = n
    >>> counter = Value("5", 5, put)
    >>> follows_from(counter, lambda: calls["n"] % 100 == 0, lambda a, b: a == b)
    True
    >>> follows_from(counter, lambda: str(calls["n"])[:0], lambda a, b: a == b)
    False
    """
    if value.set is None:
        return False
    try:
        value.set(value.content)
        first = run()
        for other in _others(value, run):
            for _ in range(2):  # what it sets off may show in the next call
                value.set(other)
                if not are_alike(first, run()):
                    return True
                if not are_alike(first, run()):
                    return True
    finally:
        value.set(value.content)
    return False


def _others(value: Value, run: Callable[[], Any]) -> list[Any]:
    """Other values to try."""
    content = value.content
    if isinstance(content, Tensor):
        return [content + 1, content + 1000]
    if isinstance(content, bool):
        return [not content]
    if not isinstance(content, int | float):
        return []
    others = [content + shift for shift in SHIFTS]
    if isinstance(content, int):
        for number in _compared_with(value, run)[:MOST]:
            whole = int(number)
            for n in (whole - 2, whole - 1, whole, whole + 1):
                others.append(n)
    return others


def _compared_with(value: Value, run: Callable[[], Any]) -> list[float]:
    """The numbers by which a counter is divided, or with which it is compared."""
    numbers: dict[float, None] = {}

    class Counter(int):
        """Keeps its class where it counts, and notes what it meets."""

        def __add__(self, other: int) -> Counter:
            return Counter(int(self) + int(other))

        __radd__ = __iadd__ = __add__

        def __sub__(self, other: int) -> Counter:
            return Counter(int(self) - int(other))

        __hash__ = int.__hash__

    def noting(name: str) -> Callable[[Counter, Any], Any]:
        def operation(self: Counter, other: Any) -> Any:
            if isinstance(other, int | float):
                numbers[other] = None
            return getattr(int, name)(self, other)

        return operation

    for name in COMPARED:
        setattr(Counter, name, noting(name))
    assert value.set is not None
    value.set(Counter(value.content))
    try:
        run()
    except Exception:  # code that wants a plain number
        return []
    return list(numbers)
