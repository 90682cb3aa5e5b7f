"""The history of a run: the rows of metrics.jsonl, one a round, and their sums."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.errors import SettingsError
from fedcore.metrics import is_higher_better
from fedcore.storage.checkpoint import write_atomically

__all__ = ["History", "Row", "is_fruitless"]

Row = dict[str, Any]
NUMBERS = ("round", "cohort", "reports", "bytes_down", "bytes_up", "seconds")


@dataclass(frozen=True)
class History:
    """The rows of a run's rounds, in their order; row 0 is round 1.

    >>> first = {"round": 1, "reports": 4, "seconds": 2.0, "dropped": {"dropout": 1}}
    >>> second = {"round": 2, "reports": 5, "seconds": 0.5, "dropped": {}}
    >>> history = History([first, second])
    >>> history.total("reports"), history.dropped(), history.clients_per_second
    (9, Counter({'dropout': 1}), 10.0)
    """

    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, rounds: int | None = None) -> History:
        """Read metrics.jsonl; of a run in which `rounds` rounds count, these alone.

        A last line that a killed process did not finish is left out. Raises
        SettingsError, with the line and what was expected there, when the file is
        missing or damaged, or has fewer than `rounds` lines.
        """
        if rounds == 0:
            return cls()
        try:
            lines = file.read_bytes().splitlines()
        except FileNotFoundError as error:
            message = f"{file.parent} has no metrics.jsonl: its run has not begun"
            raise SettingsError(message) from error
        except OSError as error:
            raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
        rows: list[Row] = []
        for number, line in enumerate(lines[:rounds], 1):
            is_last = number == len(lines)
            row = _parse(file, number, line, is_last)
            if row is not None:
                rows.append(row)
        if rounds is not None and len(rows) < rounds:
            raise SettingsError(
                f"{file} is damaged: expected a line for each of the {rounds} rounds "
                f"of the checkpoint, found {len(rows)}; start the run anew"
            )
        return cls(rows)

    def write(self, file: Path) -> None:
        """Replace the file by these rows, in one step."""
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(file, lines.encode())

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def total(self, key: str) -> float:
        """The sum over rounds; a round without the number counts as zero.

        Sums of counts are ints.
        """
        return sum(row.get(key) or 0 for row in self.rows)

    def dropped(self) -> Counter[str]:
        """Requests to clients that brought no usable update, by reason."""
        total: Counter[str] = Counter()
        for row in self.rows:
            total.update(row["dropped"])
        return total

    def sent(self) -> np.ndarray:
        """Bytes sent up to each round, down and up together. [rounds + 1]

        Before the first, none.
        """
        sent = [row["bytes_down"] + row["bytes_up"] for row in self.rows]
        return np.cumsum([0, *sent])

    @property
    def times(self) -> np.ndarray | None:
        """Seconds on the run's clock at the end of each round. [rounds + 1]

        Before the first, none. The clock is a simulated one, or that of devices; None
        for a run without one.
        """
        times = [row.get("time_s") for row in self.rows]
        if None in times or not times:
            return None
        return np.array([0.0, *times])

    @property
    def baseline(self) -> Row:
        """The evaluation before the first round, as of round 0.

        Empty for a run that began with a model that nobody had trained.
        """
        before = self.rows[0].get("baseline") if self.rows else None
        return {"round": 0, **before} if before else {}

    @property
    def evaluations(self) -> list[Row]:
        """The rows of rounds, after the baseline where there is one."""
        before = self.baseline
        return [before, *self.rows] if before else self.rows

    def points(self, key: str) -> list[tuple[int, Any]]:
        """(round, value) of every round that has a value, 0 for the baseline."""
        rows = self.evaluations
        return [(row["round"], row[key]) for row in rows if row.get(key) is not None]

    def last_row(self, key: str) -> Row:
        """The last row that has a value of `key`; empty where none has."""
        for row in reversed(self.rows):
            if row.get(key) is not None:
                return row
        return {}

    def last(self, key: str) -> Any:
        """The last value of `key`; None where there is none."""
        return self.last_row(key).get(key)

    @property
    def evaluated(self) -> Row:
        """The row of the last evaluation; empty before the first.

        Its `test_loss` is None where the loss was not finite, and missing where the
        task has no test set.
        """
        for row in reversed(self.rows):
            if "test_loss" in row or "evaluation_s" in row:
                return row
        return {}

    @property
    def extra_tests(self) -> list[str]:
        """Names of the test sets beside the test set."""
        return list(self.last("extra_tests") or ())

    @property
    def score(self) -> float | None:
        """The test loss after the last round; None where it was not evaluated."""
        value: float | None = self.rows[-1].get("test_loss") if self.rows else None
        return value

    @property
    def measures(self) -> dict[str, bool]:
        """Whether higher is better, by measure; that which judges the run first.

        Runs of an older fedcore do not say it: they are judged by the accuracy, where
        there is one.
        """
        stored = self.last("measures")
        if isinstance(stored, dict) and stored:
            return {name: which == "higher" for name, which in stored.items()}
        names = {"loss"}
        for row in self.rows:
            for key, value in row.items():
                kind, _, name = key.partition("_")
                if kind in ("test", "client") and value is not None:
                    names.add(name)
        ordered = sorted(names, key=lambda name: (name != "accuracy", name != "loss"))
        return {name: is_higher_better(name) for name in ordered}

    @property
    def measure(self) -> str:
        """The measure that judges the run: the first metric of its task, or "loss"."""
        return next(iter(self.measures))

    @property
    def clients_per_second(self) -> float:
        """Clients trained a second: usable updates over the seconds of the rounds.

        Evaluation and checkpoints are not counted. The first round, which also warms up
        and measures, counts only where it is the only one. This is the speed wherever
        one is shown: progress, table, JSON, pages.
        """
        later = History(self.rows[1:] or self.rows)
        return float(later.total("reports") / max(later.total("seconds"), 1e-9))

    @property
    def fruitless(self) -> int:
        """Number of rounds in a row, up to the last, that are fruitless."""
        return len(list(takewhile(is_fruitless, reversed(self.rows))))


def is_fruitless(row: Row) -> bool:
    """Whether clients were asked in this round and none brought a usable update.

    A client that drops out by the settings is no failure.
    """
    dropped = row["dropped"]
    if dropped.get("server not finite"):
        return True
    failed = row["cohort"] - dropped.get("dropout", 0)
    return bool(row["reports"] == 0 and failed > 0)


def _parse(file: Path, number: int, line: bytes, is_last: bool) -> Row | None:
    """The row of round `number`; None for a last line that was not finished."""
    damaged = f"{file}, line {number} is damaged: expected"
    try:
        row = json.loads(line)
    except ValueError as error:
        if is_last:
            return None
        raise SettingsError(f"{damaged} a JSON object") from error
    row = row if isinstance(row, dict) else {}
    expected = ""
    for key in NUMBERS:
        if not isinstance(row.get(key), int | float):
            expected = f'a number "{key}"'
            break
    else:
        if row["round"] != number or not isinstance(row.get("dropped"), dict):
            expected = f'round {number}, and "dropped" by reason'
    if expected:
        raise SettingsError(f"{damaged} {expected}; is it a run's metrics.jsonl?")
    return {key: _renamed(key, value) for key, value in row.items()}


def _renamed(key: str, value: Any) -> Any:
    """A spread over clients of an older fedcore, whose lowest tenth was called so.

    Where lower is better that was the best tenth, and the worst one is not known.
    """
    if not isinstance(value, dict) or "lowest_tenth" not in value:
        return value
    lowest = value.pop("lowest_tenth")
    if is_higher_better(key.partition("_")[2]):
        value["worst_tenth"] = lowest
    return value
