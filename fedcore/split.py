"""Shared and personal parameters: a total, disjoint split by a predicate on parameter names."""

from __future__ import annotations

from collections.abc import Callable

from fedcore.types import Params


def split(params: Params, personal: Callable[[str], bool]) -> tuple[Params, Params]:
    """(shared, personal): every name is in exactly one of the two; order is kept."""
    shared = {name: value for name, value in params.items() if not personal(name)}
    return shared, {name: value for name, value in params.items() if name not in shared}


def merge(shared: Params, personal: Params, order: Params | None = None) -> Params:
    """The inverse of `split`. Raises ValueError when a name is in both; `order` gives the order of names."""
    both = shared.keys() & personal.keys()
    if both:
        raise ValueError(f"parameters {sorted(both)[:3]} are both shared and personal; a split must be disjoint")
    merged = {**shared, **personal}
    return merged if order is None else {name: merged[name] for name in order}
