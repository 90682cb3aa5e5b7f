"""Clients that a fork has done, as plain facts and a flat list of tensors, and back.

A fork knows the structures of a client function's trees: only their leaves are sent.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Done, failure
from fedcore.reports import Reports
from fedcore.types import Tree


class Forms(NamedTuple):
    """The structures of a client function's trees.

    A fork knows them, and only their leaves are sent.
    """

    down: pytree.TreeSpec
    state: pytree.TreeSpec
    up: pytree.TreeSpec
    new: pytree.TreeSpec


class Job(NamedTuple):
    """A chunk for a fork; its tensors are the weights, if any, and the states."""

    function: str
    chunk: list[int]
    t: int
    size: int
    has_weights: bool


class Outcome(NamedTuple):
    """Clients of a chunk as a fork answers them, without their tensors."""

    clients: list[int]
    failed: dict[int, str]
    has_total: bool


def packed(
    clients: list[Done], forms: Forms
) -> tuple[list[Outcome] | None, list[Tensor]]:
    """Outcomes, and their leaves; None where a structure is not the known one."""
    outcomes, tensors = [], list[Tensor]()
    for reports, new, total in clients:
        failed, has_total = dict(reports.failed), total is not None
        outcomes.append(Outcome(reports.clients.tolist(), failed, has_total))
        if failed:
            continue
        structures = pytree.tree_structure(reports.up), pytree.tree_structure(new)
        if structures != (forms.up, forms.new):
            return None, []
        tensors += [reports.num_examples, *trees.leaves(reports.up)]
        tensors += trees.leaves(new)
        tensors += trees.leaves(total) if has_total else []
    return outcomes, tensors


def unpacked(
    outcomes: list[Outcome], tensors: list[Tensor], forms: Forms
) -> list[Done]:
    """The inverse of `packed`."""
    rest, clients = iter(tensors), []

    def next_tree(form: pytree.TreeSpec) -> Tree:
        return pytree.tree_unflatten(islice(rest, form.num_leaves), form)

    for ids, failed, has_total in outcomes:
        if failed:
            clients.append(Done(failure([], "")._replace(failed=failed), {}))
            continue
        num_examples = next(rest)
        up, new = next_tree(forms.up), next_tree(forms.new)
        total = next_tree(forms.up) if has_total else None
        clients.append(Done(Reports(torch.tensor(ids), up, num_examples), new, total))
    return clients
