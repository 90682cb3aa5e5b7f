"""Arithmetic on trees of tensors, and means over the client axis of reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fedcore.errors import TooFewReports
from fedcore.types import Answers, Reports, Tree, Weight

SEPARATOR = "/"
T = TypeVar("T")


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn` on corresponding leaves. A third of the time of `pytree.tree_map`, which every client pays several times."""
    if isinstance(tree, dict):
        return {
            key: map(fn, value, *[r[key] for r in rest]) for key, value in tree.items()
        }
    if isinstance(tree, tuple | list):
        values = [map(fn, *xs) for xs in zip(tree, *rest, strict=True)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return fn(tree, *rest)


def leaves(tree: Tree) -> list[Tensor]:
    if isinstance(tree, dict | tuple | list):
        return [
            leaf
            for inner in (tree.values() if isinstance(tree, dict) else tree)
            for leaf in leaves(inner)
        ]
    return [tree]


def add(a: Tree, b: Tree) -> Tree:
    return map(torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    return map(torch.sub, a, b)


def sub_(a: Tree, b: Tree) -> Tree:
    """a - b in place: `a` must be the caller's own, as what `local_sgd` returns is. Returns it."""
    return map(torch.Tensor.sub_, a, b)


def scale(tree: Tree, factor: float | Tensor) -> Tree:
    return map(lambda x: x * factor, tree)


def axpy(factor: float | Tensor, a: Tree, b: Tree) -> Tree:
    """factor * a + b, in one pass over memory."""
    if isinstance(factor, Tensor):
        return map(lambda x, y: torch.addcmul(y, x, factor), a, b)
    return map(lambda x, y: torch.add(y, x, alpha=factor), a, b)


def zeros_like(tree: T, dtype: torch.dtype | None = None) -> T:
    zeros: T = map(lambda x: torch.zeros_like(x, dtype=dtype), tree)
    return zeros


def double(tree: Tree) -> Tree:
    """In float64."""
    return map(torch.Tensor.double, tree)


def like(tree: Tree, other: Tree) -> Tree:
    """The values of `tree` in the types of `other`."""
    return map(lambda x, y: x.to(y.dtype), tree, other)


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """Leaves of `a` where the 0-d `condition` holds, else of `b`; without a branch, so that it batches."""
    return map(lambda x, y: torch.where(condition, x, y), a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product over all leaves. 0-d."""
    return torch.stack(
        [(x * y).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]
    ).sum()


def stack(trees: list[Tree]) -> Tree:
    """Equal trees to one with a new leading axis."""
    return map(lambda *xs: torch.stack(xs), *trees)


def at(tree: Tree, index: int | slice | Tensor) -> Tree:
    """Rows of the leading axis."""
    return map(lambda x: x[index], tree)


def to(tree: Tree, device: torch.device) -> Tree:
    """On this device; from the CPU to a GPU through pinned memory, for else the copy would wait for all work of the GPU."""
    if device.type == "cuda":
        return map(
            lambda x: (x if x.is_cuda else _pinned(x)).to(device, non_blocking=True),
            tree,
        )
    return map(lambda x: x.to(device), tree)


def _pinned(x: Tensor) -> Tensor:
    return (
        x.contiguous() if 0 in x.stride() else x
    ).pin_memory()  # what is one row for all has no memory of its own to write to


def fetch(tree: T) -> Callable[[], T]:
    """To the CPU: the copies begin now, after what the GPU has to do up to here, and what is returned waits for them alone."""
    if not any(x.is_cuda for x in leaves(tree)):
        return lambda: tree
    found: T = map(lambda x: x.to("cpu", non_blocking=True), tree)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> T:
        copied.synchronize()
        return found

    return wait


def nbytes(tree: Tree) -> int:
    return sum(x.numel() * x.element_size() for x in leaves(tree))


def finite(tree: Tree) -> Tensor:
    """Whether every floating-point value is finite; 0-d bool.

    One sum a leaf instead of one test a value: NaN and Inf survive a sum, and finite values that overflow it are lost anyway.
    """
    sums = [x.sum(dtype=_wide(x)) for x in leaves(tree) if x.is_floating_point()]
    return torch.isfinite(torch.stack(sums).sum()) if sums else torch.tensor(True)


def _wide(x: Tensor) -> torch.dtype | None:
    """The type to sum in: half precision overflows where its values do not."""
    return torch.float32 if x.element_size() < 4 else None


def row_sums(tree: Tree) -> Tensor:
    """For each row of the leading axis a number that is finite where the row is, as in `finite`, [n]; [0] without such leaves."""
    values = [x for x in leaves(tree) if x.is_floating_point()]
    rows = [x[:1] if _same(x) else x for x in values]
    sums = [x.reshape(x.shape[0], -1).sum(1, dtype=_wide(x)) for x in rows]
    return (
        functools.reduce(torch.add, sums).expand(len(values[0]))
        if sums
        else torch.empty(0)
    )


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Leaves by path: `{"params/0.weight": ..., "c/0.weight": ...}`; a bare tensor has the path ""."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    return {
        SEPARATOR.join(str(_name(key)) for key in path): leaf for path, leaf in paths
    }


def unflatten(flat: dict[str, Tensor], like: Tree) -> Tree:
    """The inverse of `flatten`, in the shape of `like`. Raises KeyError on a missing path."""
    return pytree.tree_unflatten(
        [flat[path] for path in flatten(like)], pytree.tree_structure(like)
    )


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise TypeError(
        f"a tree of tensors is made of NamedTuples, dicts, lists and tuples, not of {key!r}"
    )


def ravel(tree: Tree) -> Tensor:
    """All leaves in one vector, [d]."""
    return torch.cat([x.reshape(-1) for x in leaves(tree)])


def unravel(vector: Tensor, like: T) -> T:
    """The inverse of `ravel`, as views of `vector`, in the shapes of `like`."""
    pieces = iter(torch.split(vector, [x.numel() for x in leaves(like)]))
    found: T = map(lambda x: next(pieces).view(x.shape), like)
    return found


def weighted_sum(tree: Tree, weights: Tensor) -> Tree:
    """sum_i weights[i] * row i, over the leading axis."""
    weights = _beside(weights, tree)
    if len(weights) == 1:  # one client at a time: no product with a matrix of one row
        return map(lambda x: x[0] * weights[0].to(x), tree)
    return map(
        lambda x: (
            x[0] * weights.to(x).sum()
            if _same(x)
            else torch.tensordot(weights.to(x), x, 1)
        ),
        tree,
    )


def _beside(weights: Tensor, tree: Tree) -> Tensor:
    """On the device of the tree."""
    found: Tensor = to(weights, next(iter(leaves(tree)), weights).device)
    return found


def _same(rows: Tensor) -> bool:
    """Whether all rows are one row in memory, as vmap returns what no client changed."""
    return rows.stride(0) == 0


def add_weighted_(total: Tree, tree: Tree, weights: Tensor) -> Tree:
    """total + sum_i weights[i] * row i, in place: `total` must be the caller's own. Returns it."""
    if len(weights) == 1:
        w = _beside(weights, tree)[0]
        return map(lambda t, x: t.addcmul_(x[0], w.to(t)), total, tree)
    return map(lambda t, x: t.add_(x), total, weighted_sum(tree, weights))


def by_examples(r: Reports) -> Tensor:
    """Weights of a mean: the number of examples, [n]."""
    return r.num_examples


def equally(r: Reports) -> Tensor:
    """Weights of a mean in which every client counts the same, [n]."""
    return torch.ones_like(r.num_examples)


def weighted_mean(reports: Iterable[Reports], weight: Weight = by_examples) -> Tree:
    """The mean of `up` over all reports, by number of examples, or by `weight(reports)` -> [n].

    Holds one model, whatever the cohort. Raises TooFewReports when nobody reported, or all weights are zero.
    """
    if isinstance(reports, Answers) and weight in (
        by_examples,
        equally,
    ):  # what other processes know, too
        reports.summed(weight)
    total: Tree = None
    sum_of_weights: Tensor | float = 0.0
    for r in reports:
        if len(r.clients) == 0:
            continue
        w = weight(r)
        if r.total is not None:
            total = (
                map(torch.clone, r.total)
                if total is None
                else map(torch.Tensor.add_, total, r.total)
            )
        else:
            total = (
                weighted_sum(r.up, w)
                if total is None
                else add_weighted_(total, r.up, w)
            )
        sum_of_weights = sum_of_weights + w.sum()
    if total is None or not bool(torch.as_tensor(sum_of_weights) > 0):
        raise TooFewReports("nobody reported with an example to its name")
    return scale(total, 1 / sum_of_weights)


def uniform_mean(reports: Iterable[Reports]) -> Tree:
    """The mean of `up` over all reports, every client counting the same."""
    return weighted_mean(reports, equally)
