"""The results of a stress test: every cell over its seeds, and what follows from it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedcore.config import Experiment
from fedcore.rounds.history import History
from fedcore.storage.json import without_nan
from fedcore.stress.plan import ABSENT, CLEAN, Cell, Plan
from fedcore.stress.treatment import Treatment
from fedcore.views.comparison import Curve, Run, curve

__all__ = ["CellResult", "Judge", "SeedRun", "Stress", "Worst"]


class Judge(NamedTuple):
    """The measure that judges every run."""

    measure: str
    is_higher_better: bool
    key: str  # of the rows of a history: of the test set, or of clients

    def value(self, row: dict[str, Any]) -> float | None:
        """The measure in a row; None where it is not there, or not finite."""
        value = row.get(self.key)
        if isinstance(value, dict):
            value = value.get("mean")
        return None if value is None else float(value)

    def best(self, values: list[float]) -> float:
        return max(values) if self.is_higher_better else min(values)

    def worst(self, values: list[float]) -> float:
        return min(values) if self.is_higher_better else max(values)

    def loss(self, before: float, after: float) -> float:
        """The loss from `before` to `after`; negative where it is better."""
        return before - after if self.is_higher_better else after - before


class Step(NamedTuple):
    """A round, and the mean of the measure there."""

    round: int
    mean: float


@dataclass(frozen=True)
class SeedRun:
    """The run of a cell on one seed."""

    seed: int
    folder: Path
    history: History
    ruined: str | None = None  # why it ended before its last round
    treatment: Treatment | None = None

    def final(self, judge: Judge) -> float | None:
        """The measure after the last round; None where the run came to nothing."""
        if self.ruined is not None:
            return None
        return judge.value(self.history.evaluated)


@dataclass(frozen=True)
class CellResult:
    """One rule against one attack, over seeds."""

    cell: Cell
    judge: Judge
    runs: list[SeedRun] = field(default_factory=list)

    @property
    def values(self) -> list[float | None]:
        """The measure after the last round, by seed."""
        return [run.final(self.judge) for run in self.runs]

    @property
    def is_ruined(self) -> bool:
        """Whether some seed has no model in the end that could be measured."""
        return None in self.values

    @property
    def rounds_skipped(self) -> int:
        """Rounds with too few messages for the rule, of all seeds."""
        skipped = 0
        for run in self.runs:
            skipped += sum(bool(row.get("skipped")) for row in run.history)
        return skipped

    @property
    def is_stuck(self) -> bool:
        """Whether no round of some seed had enough messages for the rule."""
        for run in self.runs:
            if len(run.history) and all(row.get("skipped") for row in run.history):
                return True
        return False

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None where there is none, or a seed was ruined."""
        values = self.values
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds; None for one."""
        known = [value for value in self.values if value is not None]
        return statistics.stdev(known) if len(known) > 1 else None

    @property
    def curve(self) -> Curve:
        """The measure by round, over the seeds."""
        runs = [Run(run.seed, run.folder, run.history) for run in self.runs]
        return curve(runs, self.judge.key)

    @property
    def best_step(self) -> Step | None:
        """The round with the best mean over seeds, and this mean.

        It flatters: nobody knows in a run which round that is.
        """
        by_round = self.curve
        if not len(by_round.rounds):
            return None
        means = by_round.values.mean(0)
        number = means.argmax() if self.judge.is_higher_better else means.argmin()
        return Step(int(by_round.rounds[number]), float(means[number]))

    def last(self, key: str, part: str | None = None) -> float | None:
        """The mean over seeds of another measure after the last round."""
        values = []
        for run in self.runs:
            value = run.history.evaluated.get(key)
            if part is not None:
                value = (value or {}).get(part)
            if value is None or run.ruined is not None:
                return None
            values.append(float(value))
        return statistics.fmean(values) if values else None

    @property
    def backdoor_success(self) -> float | None:
        """Share of stamped examples that become the target; None without a backdoor."""
        return self.last("backdoor_success")


class Worst(NamedTuple):
    """The attack that a rule stands worst."""

    attack: str
    value: float | None  # None: the model was ruined

    def order(self, judge: Judge) -> float:
        """Larger is better, for whichever measure."""
        if self.value is None:
            return -np.inf
        return self.value if judge.is_higher_better else -self.value


@dataclass(frozen=True)
class Stress:
    """All cells of a stress test, as far as they are done."""

    experiment: Experiment
    preset: str
    plan: Plan
    folder: Path
    judge: Judge
    cells: dict[tuple[float, str, str], CellResult]  # by fraction, rule and column
    notes: list[str] = field(default_factory=list)
    is_interrupted: bool = False

    def cell(self, fraction: float, rule: str, column: str) -> CellResult | None:
        """A cell with all its seeds; None where it is not done."""
        found = self.cells.get((fraction, rule, column))
        if found is None or len(found.runs) < self.plan.seeds:
            return None
        return found

    def rules(self) -> list[str]:
        return [rule.name for rule in self.plan.rules]

    def attacks(self) -> list[str]:
        return [attack.name for attack in self.plan.attacks]

    def worst(self, fraction: float, rule: str) -> Worst | None:
        """The worst attack on a rule; None before all of them are done."""
        found: Worst | None = None
        for attack in self.attacks():
            cell = self.cell(fraction, rule, attack)
            if cell is None:
                return None
            here = Worst(attack, cell.mean)
            if found is None or here.order(self.judge) < found.order(self.judge):
                found = here
        return found

    def ranked(self, fraction: float) -> list[tuple[str, Worst]]:
        """The rules with all attacks done, the best worst case first."""
        ranked = []
        for rule in self.rules():
            worst = self.worst(fraction, rule)
            if worst is not None:
                ranked.append((rule, worst))
        ranked.sort(key=lambda pair: pair[1].order(self.judge), reverse=True)
        return ranked

    def damage(self, fraction: float, rule: str, column: str) -> float | None:
        """The loss to the attack, beside malicious clients that stay away.

        Not than a clean run: their data are missing either way.
        """
        absent = self.cell(fraction, rule, ABSENT)
        attacked = self.cell(fraction, rule, column)
        if absent is None or attacked is None or absent.is_stuck:
            return None
        if absent.mean is None or attacked.mean is None:
            return None
        return self.judge.loss(absent.mean, attacked.mean)

    def backdoor(self, fraction: float, rule: str) -> float | None:
        """The success of the most successful backdoor; None without any."""
        found = []
        for attack in self.plan.backdoors:
            cell = self.cell(fraction, rule, attack)
            success = None if cell is None else cell.backdoor_success
            if success is not None:
                found.append(success)
        return max(found, default=None)

    def cost(self, fraction: float, rule: str) -> float | None:
        """The loss of the rule beside the mean, where nobody is malicious."""
        plain = self.cell(fraction, "mean", CLEAN)
        with_rule = self.cell(fraction, rule, CLEAN)
        if plain is None or with_rule is None:
            return None
        if plain.mean is None or with_rule.mean is None:
            return None
        return self.judge.loss(plain.mean, with_rule.mean)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        tables = []
        for fraction in self.plan.fractions:
            rules = {}
            for rule in self.rules():
                rules[rule] = self._of_rule(fraction, rule)
            best = self.ranked(fraction)
            tables.append(
                {
                    "fraction": fraction,
                    "best_rule": best[0][0] if best else None,
                    "rules": rules,
                }
            )
        content = {
            "preset": self.preset,
            "method": self.experiment.method.name,
            "task": self.experiment.task,
            "folder": str(self.folder),
            "measure": self.judge.measure,
            "higher_is_better": self.judge.is_higher_better,
            "rounds": self.experiment.rounds,
            "seeds": self.plan.seeds,
            "interrupted": self.is_interrupted,
            "notes": self.notes,
            "tables": tables,
        }
        ready: dict[str, Any] = without_nan(content)
        return ready

    def _of_rule(self, fraction: float, rule: str) -> dict[str, Any]:
        cells = {}
        for column in self.plan.columns:
            found = self.cells.get((fraction, rule, column))
            if found is not None and found.runs:
                cells[column] = self._of_cell(fraction, rule, found)
        worst = self.worst(fraction, rule)
        return {
            "worst": None if worst is None else worst._asdict(),
            "backdoor_success": self.backdoor(fraction, rule),
            "cost_without_attack": self.cost(fraction, rule),
            "cells": cells,
        }

    def _of_cell(self, fraction: float, rule: str, found: CellResult) -> dict[str, Any]:
        column, settings = found.cell.column, found.cell.settings
        best = found.best_step
        treatments = [run.treatment for run in found.runs if run.treatment is not None]
        return {
            "mean": found.mean,
            "std": found.std,
            "values": found.values,
            "ruined": {run.seed: run.ruined for run in found.runs if run.ruined},
            "best_step": None if best is None else best._asdict(),
            "rounds_skipped": found.rounds_skipped,
            "damage": self.damage(fraction, rule, column),
            "worst_tenth": found.last(f"client_{self.judge.measure}", "worst_tenth"),
            "backdoor_success": found.backdoor_success,
            "settings": settings,
            "seeds": [run.seed for run in found.runs],
            "runs": [str(run.folder) for run in found.runs],
            "treatment": [each.to_dict() for each in treatments],
        }
