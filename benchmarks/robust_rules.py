"""Seconds and memory of the robust rules, beside those of ByzFL.

python -m benchmarks.robust_rules [seconds] [memory] [--rules a,b] [--repeat 5]
python -m benchmarks.robust_rules memory --columns 10000000     40 GB on a disk

seconds  each rule at 100 rows of 1.7 million numbers, and at 1 000 rows of 100 000:
         ours and ByzFL's by turns in one run, so that both have the same machine; the
         ratio is that of the medians. ByzFL is optional:
         pip install --no-deps --target FOLDER byzfl==0.0.11, and PYTHONPATH=FOLDER
memory   1 000 rows of 1 and of 3 million numbers, one at a time into a file beyond
         `memory_gb` = 2: the most that the process had, and what of it rows were
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.tables import print_head, print_row
from fedcore.messages.aggregation.rows import Rows
from fedcore.messages.aggregation.rule import Rule, aggregate
from fedcore.messages.aggregation.settings import AggregationSettings

SHAPES = ((100, 1_700_000), (1000, 100_000))
SHARE = 5  # one row in five is malicious
ENTRY = 0.01  # standard deviation of an entry
MEMORY_GB = 2.0
MEMORY_COLUMNS = (1_000_000, 3_000_000)
MEMORY_RULES = ("median", "multi_krum", "geometric_median", "nnm+trimmed_mean")

Aggregate = Callable[[Tensor], Any]


class Case(NamedTuple):
    """A rule here, and the same one in ByzFL."""

    settings: dict[str, Any]
    theirs: Callable[[Any, int, float], list[Aggregate]] | None  # module, f, norm


CASES = {
    "median": Case({"rule": "median"}, lambda b, f, norm: [b.Median()]),
    "trimmed_mean": Case({"rule": "trimmed_mean"}, lambda b, f, norm: [b.TrMean(f)]),
    "meamed": Case({"rule": "meamed"}, lambda b, f, norm: [b.Meamed(f)]),
    "krum": Case({"rule": "krum"}, lambda b, f, norm: [b.Krum(f)]),
    "multi_krum": Case({"rule": "multi_krum"}, lambda b, f, norm: [b.MultiKrum(f)]),
    "geometric_median, 8 steps": Case(
        {"rule": "geometric_median"},
        lambda b, f, norm: [b.GeometricMedian(nu=1e-3 * norm, T=8)],
    ),
    "centred_clipping, 3 steps": Case(
        {"rule": "centred_clipping"},
        lambda b, f, norm: [b.CenteredClipping(L=3, tau=norm)],
    ),
    "caf": Case({"rule": "caf"}, lambda b, f, norm: [b.CAF(f)]),
    "nnm+multi_krum": Case(
        {"rule": "multi_krum", "before": "nnm"},
        lambda b, f, norm: [b.NNM(f), b.MultiKrum(f)],
    ),
    "nnm+trimmed_mean": Case(
        {"rule": "trimmed_mean", "before": "nnm"},
        lambda b, f, norm: [b.NNM(f), b.TrMean(f)],
    ),
    "bucketing+median": Case(
        {"rule": "median", "before": "bucketing"},
        lambda b, f, norm: [b.Bucketing(2), b.Median()],
    ),
    "dnc": Case({"rule": "dnc"}, None),
    "bulyan": Case({"rule": "bulyan"}, None),
    "fltrust": Case({"rule": "fltrust"}, None),
    "sign": Case({"rule": "sign"}, None),
}
SLOW = ("caf",)  # one turn at 1 000 rows takes minutes


def byzfl_rules() -> Any:
    """ByzFL's rules, or None. Its front door imports much that they do not need."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        return None
    front = types.ModuleType("byzfl")
    front.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = front
    return importlib.import_module("byzfl.aggregators")


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_turns(pair: list[Callable[[], Any]], repeat: int) -> list[float]:
    """Median seconds of each, after one turn that does not count."""
    seconds: list[list[float]] = [[] for _ in pair]
    for turn in range(repeat + 1):
        for number, work in enumerate(pair):
            taken = seconds_of(work)
            if turn or repeat == 1:
                seconds[number].append(taken)
    return [statistics.median(found) for found in seconds]


def measure_seconds(names: list[str], repeat: int) -> None:
    """Print a table for each shape."""
    byzfl = byzfl_rules()
    if byzfl is None:
        print("without ByzFL: pip install --no-deps --target FOLDER byzfl==0.0.11")
    for n, d in SHAPES:
        print(f"\n{n} rows of {d:,} numbers, f = {n // SHARE}\n")
        print_head(["rule", "s", "ByzFL, s", "ratio"])
        matrix = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * ENTRY
        for name in names:
            print_row(_seconds_row(name, matrix, byzfl, repeat))


def _seconds_row(name: str, matrix: Tensor, byzfl: Any, repeat: int) -> list[str]:
    n, d = matrix.shape
    f = n // SHARE
    if name == "bulyan":
        f = (n - 3) // 4
    case = CASES[name]
    settings = AggregationSettings(byzantine=f, **case.settings)
    reference = matrix[0]

    def ours() -> None:
        aggregate(matrix, settings, f, reference=reference)

    if byzfl is None or case.theirs is None:
        (seconds,) = by_turns([ours], repeat)
        return [name, f"{seconds:.2f}", "", ""]
    # NNM of ByzFL copies n - f rows for every row.
    if "nnm" in name and n * (n - f) * d * 4 > 16e9:
        (seconds,) = by_turns([ours], repeat)
        need = n * (n - f) * d * 4 / 1e9
        return [name, f"{seconds:.2f}", f"needs {need:,.0f} GB", ""]
    stages = case.theirs(byzfl, f, ENTRY * d**0.5)

    def theirs() -> None:
        rows = matrix
        for stage in stages:
            rows = stage(rows)

    if name in SLOW:
        repeat = 1
    mine, other = by_turns([ours, theirs], repeat)
    return [name, f"{mine:.2f}", f"{other:.2f}", f"{other / mine:.1f}"]


def measure_memory(columns: list[int], names: list[str]) -> None:
    """Print the peak of a process of its own for each number of columns and rule."""
    print(f"\n1 000 rows, memory_gb = {MEMORY_GB:g}\n")
    print_head(["columns", "rule", "rows, GB", "peak, GB", "s"])
    for d in columns:
        for name in names:
            command = [sys.executable, "-m", "benchmarks.robust_rules", "one"]
            command += ["--columns", str(d), "--rules", name]
            subprocess.run(command, check=True)


def measure_one(d: int, name: str) -> None:
    """Print a line of the table of memory: the peak of this process."""
    n = 1000
    ahead, _, rule = name.rpartition("+")
    f = n // SHARE
    settings = AggregationSettings(rule=rule, before=ahead or "none", byzantine=f)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        memory = int(MEMORY_GB * 1e9)
        rows = Rows(torch.arange(n), d, torch.float32, memory, lambda: Path(folder))
        for client in range(n):
            generator = torch.Generator().manual_seed(client)
            row = torch.randn(1, d, generator=generator) * ENTRY
            rows.put(torch.tensor([client]), [row])
        Rule(settings, 0).aggregate(rows, f, None, (), torch.zeros(0), None)
        rows.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = n * d * 4
    seconds = time.perf_counter() - start
    cells = [f"{d:,}", name, f"{size / 1e9:.1f}", f"{peak / 1e9:.2f}", f"{seconds:.0f}"]
    print_row(cells)


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("parts", nargs="*", metavar="PART", help="seconds, memory")
    parser.add_argument("--rules", help="names of rows of the table, by commas")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--columns", type=int, help="of the rows, for memory")
    arguments = parser.parse_args()
    parts = arguments.parts or ["seconds", "memory"]
    chosen = arguments.rules.split(",") if arguments.rules else None
    if "one" in parts:
        measure_one(arguments.columns, arguments.rules)
        return
    if unknown := set(parts) - {"seconds", "memory"}:
        parser.error(f"no part {', '.join(sorted(unknown))}: seconds, memory")
    if "seconds" in parts:
        names = [name for name in CASES if not chosen or name.split(",")[0] in chosen]
        measure_seconds(names, arguments.repeat)
    if "memory" in parts:
        columns = [arguments.columns] if arguments.columns else list(MEMORY_COLUMNS)
        measure_memory(columns, chosen or list(MEMORY_RULES))


if __name__ == "__main__":
    main()
