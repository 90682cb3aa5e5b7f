"""Lies of one client in ten, and the bounds and rules that each of them needs.

python -m benchmarks.lies

Ten clients of digits, IID, eight local epochs, one of which sends what no honest client
would; test accuracy in percent after the last round. The table of docs/hostile.md. The
same lies, and others that are found for what they are, come over TLS in
tests/flower/test_hostile_device.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import print_table
from fedcore import Experiment, RunError, trees
from fedcore.rounds.loop import run
from fedcore.types import Tree
from tests.liars import Lie, run_among

LIAR = 9
SETTINGS = [
    "population=10",
    "participation.cohort=10",
    "rounds=16",
    "partition.name=iid",
    "local.epochs=8",
    "evaluation.clients=0",
]
F = "aggregation.byzantine=1"
CAP, CLIP = "aggregation.max_examples=", "aggregation.clip="
DEFENCES: dict[str, list[str]] = {
    "nothing": [],
    "cap 10 000": [f"{CAP}10000"],
    "cap 300": [f"{CAP}300"],
    "clip 6": [f"{CLIP}6"],
    "cap 300, clip 6": [f"{CAP}300", f"{CLIP}6"],
    "trimmed mean": ["aggregation.rule=trimmed_mean", F],
    "median": ["aggregation.rule=median", F],
    "NNM + Multi-Krum": [
        "aggregation.rule=multi_krum",
        "aggregation.before=nnm",
        F,
    ],
}


def times(factor: float, count: float | None = None) -> Lie:
    """The update times a factor, and this number of examples."""

    def lie(up: Tree, num_examples: Tensor) -> tuple[Tree, Tensor]:
        sent = up._replace(delta=trees.scale(up.delta, factor))
        if count is None:
            return sent, num_examples
        return sent, torch.full_like(num_examples, count)

    return lie


LIES: dict[str, Lie] = {
    "10^9 examples, -10 times the update": times(-10.0, 1e9),
    "10^36 times the update": times(1e36),
    "-10 times the update": times(-10.0),
}


def accuracy(make: Callable[[Path], float]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return f"{100 * make(Path(folder) / 'run'):.1f}"
        except RunError:
            return "ends"


def main() -> None:
    honest = Experiment.load("fedavg", SETTINGS)
    shown = accuracy(lambda folder: run(honest, folder).final["test_accuracy"])
    print(f"without a liar: {shown}\n")
    rows = []
    for name, lie in LIES.items():
        row = [name]
        for settings in DEFENCES.values():
            experiment = Experiment.load("fedavg", [*SETTINGS, *settings])

            def make(
                folder: Path, lie: Lie = lie, experiment: Experiment = experiment
            ) -> float:
                result = run_among({LIAR}, lie, experiment, folder)
                return float(result.final["test_accuracy"])

            row.append(accuracy(make))
        rows.append(row)
    print_table(["the lie", *DEFENCES], rows)


if __name__ == "__main__":
    main()
