"""Tables in Markdown, as the benchmarks print them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

__all__ = ["mean_and_std", "print_head", "print_row", "print_table"]


def print_row(cells: Iterable[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(head: Sequence[str]) -> None:
    print_row(head)
    print(f"|{'---|' * len(head)}", flush=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The whole table, and an empty line below it."""
    print_head(head)
    for row in rows:
        print_row(row)
    print(flush=True)


def mean_and_std(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard deviation over seeds; that of a single seed is 0.

    >>> mean_and_std([1.0, 2.0])
    '1.5 ± 0.7'
    """
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {std:{form}}"
