"""Resident memory of runs as they go, forks included.

python -m benchmarks.memory [RUN ...]      default: all of them

flat     FedAvg, MLP, cohort 100 of 1 000, 500 rounds: the slope over the last 400
scalar   100 000 clients of which each keeps one number between rounds, 2 000 a round,
         until nearly all have taken part
rows     SCAFFOLD, 10 000 clients, each with a state of the MLP's 159 010 parameters:
         6.4 GB of rows under a cap of 2 GB; the rows above the cap lie in mapped files
         of the run directory
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks.engines import EVEN, experiment
from fedcore import Experiment
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import equally
from fedcore.rounds.loop import Loop, Quiet
from fedcore.task import Task
from fedcore.types import Batches, Model, Params


class Settings(MethodSettings):
    pass


class Visits(NamedTuple):
    n: Tensor  # 0-d


class Counting(Method[Settings]):
    """Clients that count how often they were asked, and train nothing."""

    def init_client(self, params: Params) -> Visits:
        return Visits(torch.zeros(()))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Visits, batches: Batches
    ) -> tuple[Visits, Visits]:
        return Visits(state.n + 1), Visits(state.n + 1)

    def round(self, server: Model, r: Round) -> Model:
        r.mean(self.train, r.cohort, server, equally)
        return server


class Case(NamedTuple):
    """A run to watch."""

    settings: dict[str, Any]
    rounds: int
    every: int  # rounds between two lines of the table
    fit: int  # the slope is that of the rounds after this one


CASES = {
    "flat": Case({}, rounds=500, every=50, fit=100),
    "scalar": Case(
        {
            "method.name": "benchmarks.memory:Counting",
            "task": "least-squares",
            "population": 100_000,
            "participation.cohort": 2000,
            "checkpoint.state_ram_gb": 2.0,
        },
        rounds=150,
        every=25,
        fit=50,
    ),
    "rows": Case(
        {
            "method.name": "scaffold",
            "population": 10_000,
            "participation.cohort": 500,
            "checkpoint.state_ram_gb": 2.0,
        },
        rounds=60,
        every=10,
        fit=20,
    ),
}


def resident() -> float:
    """MB of this process and its forks; a page that several share counts once (PSS)."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children())) / 1e6


def slope(used: list[float], first: int) -> float:
    """MB a round after round `first`, of the memory in use after each round, in MB."""
    rounds = np.arange(first + 1, len(used) + 1)
    return float(np.polyfit(rounds, np.array(used[first:]), 1)[0])


def save(loop: Loop) -> None:
    """A checkpoint, as `Loop.run` makes one."""
    with (loop.folder / "metrics.jsonl").open("a") as metrics:
        loop.saving.save(loop.state, metrics)


def watch(settings: Experiment, case: Case) -> None:
    """Run, and print the memory above that at the start, and its slope."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(settings, Path(folder), Quiet(), None, False)
        start = resident()
        used: list[float] = []
        print(f"{'round':>6}{'clients':>9}{'rows, GB':>10}{'resident, GB':>14}{'s':>7}")
        for t in range(1, case.rounds + 1):
            row = loop.round()
            loop.history.add(row)
            used.append(resident() - start)
            if t % case.every == 0 or t == case.rounds:
                store = loop.stores["clients"]
                clients = len(store.row_of)
                size = clients * store.row_bytes / 1e9
                print(
                    f"{t:>6}{clients:>9,}{size:>10.2f}"
                    f"{used[-1] / 1e3:>14.2f}{row['seconds']:>7.2f}",
                    flush=True,
                )
        kilobytes = 1e3 * slope(used, case.fit)
        print(f"slope from round {case.fit} on: {kilobytes:.2f} kB a round")
        save(loop)
        gigabytes = (resident() - start) / 1e3
        print(f"after the checkpoint: {gigabytes:.2f} GB above the start\n")
        loop.close()


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=", ".join(CASES))
    arguments = parser.parse_args()
    if unknown := set(arguments.runs) - set(CASES):
        parser.error(
            f"no such run: {', '.join(sorted(unknown))}; "
            f"expected some of {', '.join(CASES)}"
        )
    for name in arguments.runs or CASES:
        case = CASES[name]
        print(name)
        changes = [f"{key}={value}" for key, value in case.settings.items()]
        watch(experiment(*EVEN, "evaluation.clients=0", *changes), case)


if __name__ == "__main__":
    main()
