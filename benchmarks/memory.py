"""Resident memory of runs, forks included, as they go: `python -m benchmarks.memory [flat] [scalar] [rows]`; default: all.

flat     FedAvg, MLP, cohort 100 of 1 000, 500 rounds: the slope over the last 400
scalar   100 000 clients of which each keeps one number between rounds, 2 000 a round, until nearly all have taken part
rows     SCAFFOLD, 10 000 clients, each with a state of the MLP's 159 010 parameters: 6.4 GB of rows under a cap of 2 GB; what is
         above the cap lies in mapped files of the run directory
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


def resident() -> float:
    """MB of this process and its forks; a page that several have counts once (PSS)."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children())) / 1e6


def watch(e: Experiment, rounds: int, every: int, fit: int | None = None) -> None:
    """Run, and print what is resident above the start; the slope from round `fit` on."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(e, Path(folder), Quiet(), None, False)
        start, points = resident(), []
        print(f"{'round':>6}{'clients':>9}{'rows, GB':>10}{'resident, GB':>14}{'s':>7}")
        for t in range(rounds):
            row = loop.round()
            loop.history.append(row)
            used = resident() - start
            points.append((t + 1, used))
            if t % every == every - 1 or t == rounds - 1:
                store = loop.stores["clients"]
                size = len(store.row_of) * store.row_bytes / 1e9
                print(
                    f"{t + 1:>6}{len(store.row_of):>9,}{size:>10.2f}{used / 1e3:>14.2f}{row['seconds']:>7.2f}",
                    flush=True,
                )
        if fit is not None:
            slope = np.polyfit(*np.array([p for p in points if p[0] > fit]).T, 1)[0]
            print(f"slope from round {fit} on: {1e3 * slope:.2f} kB a round")
        loop.save()
        print(
            f"after the checkpoint: {(resident() - start) / 1e3:.2f} GB above the start\n"
        )
        loop.close()


RUNS: dict[str, tuple[dict[str, Any], int, int, int | None]] = {
    "flat": ({}, 500, 50, 100),
    "scalar": (
        {
            "method.name": "benchmarks.memory:Counting",
            "task": "least-squares",
            "population": 100_000,
            "participation.cohort": 2000,
            "checkpoint.state_ram_gb": 2.0,
        },
        150,
        25,
        50,
    ),
    "rows": (
        {
            "method.name": "scaffold",
            "population": 10_000,
            "participation.cohort": 500,
            "checkpoint.state_ram_gb": 2.0,
        },
        60,
        10,
        20,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=", ".join(RUNS))
    a = parser.parse_args()
    if unknown := set(a.runs) - set(RUNS):
        parser.error(
            f"no such run: {', '.join(sorted(unknown))}; expected some of {', '.join(RUNS)}"
        )
    for name in a.runs or RUNS:
        settings, rounds, every, fit = RUNS[name]
        print(name)
        changes = [f"{key}={value}" for key, value in settings.items()]
        watch(experiment(*EVEN, "evaluation.clients=0", *changes), rounds, every, fit)


if __name__ == "__main__":
    main()
