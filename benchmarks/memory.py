"""Resident memory of a run whose server remembers an update of every client: `python -m benchmarks.memory [ROUNDS]`.

FedStale, 10 000 clients, MLP 784-200-10 (159 010 parameters): 6.4 GB of memory rows, under a cap of 1 GB. Prints what is resident
as more and more clients have taken part; what is above the cap lies in mapped files of the run directory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from fedcore import Experiment
from fedcore.loop import Loop, Quiet

ROOT = Path(__file__).parent


def resident() -> dict[str, float]:
    """MB of this process, by kind: anonymous memory, and pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) / 1e3 for name, value in (line.split(":") for line in lines) if name in ("RssAnon", "RssFile")
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    settings: dict[str, Any] = {
        "method": {"name": "fedstale"},
        "population": 10_000,
        "rounds": rounds,
        "partition.name": "iid",
        "participation.cohort": 500,
        "evaluation.every": rounds,
        "evaluation.clients": 0,
        "checkpoint.state_ram_gb": 1.0,
    }
    with tempfile.TemporaryDirectory() as folder:
        e = Experiment.load(ROOT / "fashion.toml", settings)
        loop = Loop(e, Path(folder), Quiet(), None, False)
        start = resident()
        print(f"{'round':>6}{'clients':>9}{'rows, GB':>10}{'resident, GB':>14}{'files, GB':>11}{'s':>7}")
        for t in range(rounds):
            row = loop.round()
            if t % 10 == 9 or t == rounds - 1:
                seen, now = len(loop.memory.row_of), resident()
                used = sum(now.values()) - sum(start.values())
                size = seen * loop.memory.row_bytes / 1e9
                print(
                    f"{t + 1:>6}{seen:>9,}{size:>10.2f}{used / 1e3:>14.2f}{now['RssFile'] / 1e3:>11.2f}{row['seconds']:>7.2f}",
                    flush=True,
                )
        loop.save()
        print(f"after the checkpoint: {(sum(resident().values()) - sum(start.values())) / 1e3:.2f} GB above the start")
        loop.close()


if __name__ == "__main__":
    main()
