"""The numbers that the server reads of reports, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.reports import Reports, RunningSum, Weight


class Readout(NamedTuple):
    """Of n clients, on the CPU; tensors in the order of `clients`."""

    clients: Tensor  # [n] int64
    num_examples: Tensor  # [n]
    metrics: dict[str, Tensor]  # each [n]
    failed: Mapping[int, str]  # clients left out, with the reason
    has_message: bool  # whether clients sent anything; failures alone count as such
    nbytes: int  # that all of them sent, whether it is of use or not


def read(reports: Iterable[Reports]) -> Iterator[tuple[Reports, Readout]]:
    """Each report with its readout, as it is.

    On a GPU one behind, so that the next chunk is under way before a chunk's numbers
    are waited for.
    """
    for report, readout, _ in _read(reports, is_checked=False):
        yield report, readout


def read_finite(reports: Iterable[Reports]) -> Iterator[tuple[Reports, Readout]]:
    """As `read`, without updates that are not finite, and counts that are none.

    Those clients are named in `failed`.
    """
    for report, readout, finite in _read(reports, is_checked=True):
        faults = _faults(readout, finite)
        yield _filtered(report, readout, faults) if any(faults) else (report, readout)


def added(
    reports: Iterable[Reports], weight: Weight, total: RunningSum
) -> Iterator[Readout]:
    """Readouts of reports whose updates are added to `total`, but for unusable ones."""
    for report, readout in read_finite(reports):
        total.add(report, weight(report.clients, report.num_examples))
        yield readout


def _read(
    reports: Iterable[Reports], is_checked: bool
) -> Iterator[tuple[Reports, Readout, list[bool]]]:
    """(reports, readout, whether each update is finite: [] where it is not checked)."""
    behind: list[tuple[Reports, Callable[[], tuple[Readout, list[bool]]]]] = []
    for report in reports:
        wait = _begin(report, is_checked)
        for earlier, wait_for_earlier in behind:
            yield earlier, *wait_for_earlier()
        behind = []
        if report.num_examples.is_cuda:
            behind = [(report, wait)]
        else:
            yield report, *wait()
    for earlier, wait_for_earlier in behind:
        yield earlier, *wait_for_earlier()


def _begin(
    report: Reports, is_checked: bool
) -> Callable[[], tuple[Readout, list[bool]]]:
    """Begin the copies; the function that is returned waits for them."""
    sums = torch.empty(0)
    if is_checked and len(report.clients):
        sums = trees.row_sums(report.up)
    wait = trees.fetch((sums, report.num_examples, report.metrics))

    def readout() -> tuple[Readout, list[bool]]:
        sums, num_examples, metrics = wait()
        numbers = Readout(
            report.clients,
            num_examples,
            metrics,
            report.failed,
            has_message=len(report.clients) == 0 or bool(trees.leaves(report.up)),
            nbytes=trees.nbytes(report.up) if len(report.clients) else 0,
        )
        return numbers, [math.isfinite(value) for value in sums.tolist()]

    return readout


def _faults(readout: Readout, finite: list[bool]) -> list[str]:
    """Why the report of each client is of no use; "" where it is."""
    faults = []
    counts = readout.num_examples.tolist()
    finite = finite or [True] * len(counts)  # messages without numbers
    for count, is_finite in zip(counts, finite, strict=True):
        fault = ""
        if not is_finite:
            fault = "not finite: the update holds NaN or Inf"
        elif not 0 <= count < math.inf:
            fault = f"bad count: {count:g} examples, expected a number from 0 on"
        faults.append(fault)
    return faults


def _filtered(
    report: Reports, readout: Readout, faults: list[str]
) -> tuple[Reports, Readout]:
    """The reports without a fault; the others are in `failed`."""
    failed = dict(report.failed)
    for client, fault in zip(report.clients.tolist(), faults, strict=True):
        if fault:
            failed[client] = fault
    good = torch.tensor([not fault for fault in faults])
    rows = good.to(report.num_examples.device)
    clients = report.clients[good]
    discount = None if report.discount is None else report.discount[good]
    up, num_examples = trees.at((report.up, report.num_examples), rows)
    return (
        Reports(clients, up, num_examples, failed, discount, report.versions),
        readout._replace(
            clients=clients,
            num_examples=readout.num_examples[good],
            metrics=trees.at(readout.metrics, good),
            failed=failed,
        ),
    )
