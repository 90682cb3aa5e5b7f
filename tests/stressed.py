"""Small stress tests, and results that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcore import Experiment
from fedcore.rounds.history import History
from fedcore.stress.plan import (
    ABSENT,
    CLEAN,
    Plan,
    cells_of,
    parse_attack,
    parse_rule,
)
from fedcore.stress.results import CellResult, Judge, SeedRun, Stress

JUDGE = Judge("accuracy", True, "test_accuracy")
TINY: dict[str, Any] = {
    "population": 10,
    "rounds": 2,
    "evaluation.every": 1,
    "participation.name": "uniform",
    "participation.fraction": 1.0,
    "engine.chunk": 10,
    "local.steps": 1,
    "local.batch_size": 4,
    "model.name": "mlp",
    "model.hidden": [4],
}


def tiny(**more: Any) -> Experiment:
    overrides = dict(TINY)
    for key, value in more.items():
        overrides[key.replace("__", ".")] = value
    return Experiment.parse({"method": "fedavg"}, overrides)


def plan(
    rules: str = "mean,trimmed_mean",
    attacks: str = "sign_flip,backdoor",
    fractions: tuple[float, ...] = (0.2,),
    seeds: int = 1,
) -> Plan:
    return Plan(
        tuple(map(parse_rule, rules.split(","))),
        tuple(map(parse_attack, attacks.split(","))),
        fractions,
        seeds,
    )


VALUES = {  # final accuracy by rule and column, by seed; None: ruined
    "mean": {
        CLEAN: [0.9, 0.94],
        ABSENT: [0.8, 0.84],
        "sign_flip": [0.5, None],
        "backdoor": [0.88, 0.9],
    },
    "trimmed_mean": {
        CLEAN: [0.85, 0.87],
        ABSENT: [0.8, 0.84],
        "sign_flip": [0.7, 0.8],
        "backdoor": [0.7, 0.7],
    },
}


def row(t: int, accuracy: float, **more: Any) -> dict[str, Any]:
    counts = {"cohort": 10, "reports": 10, "bytes_down": 1, "bytes_up": 1}
    return {
        "round": t,
        **counts,
        "seconds": 0.1,
        "dropped": {},
        "test_accuracy": accuracy,
        "test_loss": 1.0,
        "client_accuracy": {"mean": accuracy, "worst_tenth": accuracy / 2},
        **more,
    }


def made(
    values: dict[str, dict[str, list[float | None]]] = VALUES, seeds: int = 2
) -> Stress:
    """A stress test with these results; round 1 is better than the last by 0.05."""
    wanted = plan(seeds=seeds)
    experiment = tiny()
    cells = {}
    for cell in cells_of(experiment, wanted):
        result = CellResult(cell, JUDGE)
        for seed, value in enumerate(values[cell.rule][cell.column][:seeds]):
            final = 0.1 if value is None else value
            more = {"backdoor_success": 0.9 if cell.rule == "mean" else 0.05}
            rows = [row(1, final + 0.05), row(2, final)]
            if cell.column == "backdoor":
                rows[-1] |= more
            why = "no client sent a usable update" if value is None else None
            run = SeedRun(seed, Path(f"{cell.label}-{seed}"), History(rows), why)
            result.runs.append(run)
        cells[cell.fraction, cell.rule, cell.column] = result
    return Stress(experiment, "fedavg", wanted, Path("out"), JUDGE, cells)
