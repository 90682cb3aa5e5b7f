"""Several presets on the same seeds: the runs, and their table on the terminal."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fedcore.clock.settings import Replay
from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError
from fedcore.escapes import escaped, printable
from fedcore.rounds.history import History
from fedcore.rounds.loop import Interrupted, Observer, Quiet, run
from fedcore.rounds.result import time_of
from fedcore.rounds.rundir import has_round, stored
from fedcore.rounds.slow_clients import Speeds
from fedcore.tasks import TASKS
from fedcore.views.compare_page import explanation, table, write
from fedcore.views.comparison import Comparison, Run
from fedcore.views.text import PERCENT, table_text

__all__ = ["compare", "rounds_to_do", "show"]


def compare(
    experiments: Sequence[tuple[str, Experiment]],
    seeds: int,
    out: Path | str,
    observer: Observer | None = None,
    target: float | None = None,
) -> Comparison:
    """Run every (label, experiment) with seeds s, s + 1, ..., each in a directory.

    The directories are below `out`. A run that is there already is read, or gone on
    with, so that the same command again costs nothing. A run that fails is left out,
    noted and named in `failed`. `target`: the value of the measure that judges the runs
    whose time by their own clock is told; default: one that the best of them reaches.
    Writes compare.json, compare.svg and compare.html.

    Raises SettingsError when `out` holds runs with other settings, RunError when every
    run failed, and Interrupted.
    """
    out = Path(out)
    observer = observer or Quiet()
    if not experiments or seeds < 1:
        raise SettingsError(
            f"{len(experiments)} presets and {seeds} seeds: "
            "expected at least one of each"
        )
    labelled = distinct(experiments)
    _refuse_target(target, labelled)
    runs: dict[str, list[Run]] = {label: [] for label in labelled}
    failed: dict[str, str] = {}
    for label, experiment in labelled.items():
        for seed in range(experiment.seed, experiment.seed + seeds):
            seeded = experiment.model_copy(update={"seed": seed})
            folder = out / f"{slug(label)}-seed{seed}"
            try:
                history = finish(seeded, folder, observer)
                _refuse_percent(target, history)
                runs[label].append(_read(seeded, folder, history))
            except Interrupted as error:
                raise Interrupted(
                    f"interrupted in {folder}; "
                    f"go on with the same command and --out {out}"
                ) from error
            except RunError as error:
                failed[f"{label}, seed {seed}"] = str(error)
                observer.note(f"{label}, seed {seed}, failed and is left out: {error}")
            except SettingsError as error:
                raise SettingsError(f"{label}, seed {seed}: {error}") from error
    if not any(runs.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise RunError(f"every run failed; {reasons}")
    comparison = Comparison(out, seeds, labelled, runs, failed, target)
    write(comparison)
    return comparison


def _read(experiment: Experiment, folder: Path, history: History) -> Run:
    """A finished run, with what its clock tells."""
    # A task of the user's may have another number of clients than its settings.
    speeds, population = None, experiment.population
    if experiment.task in TASKS and population is not None:
        speeds = Speeds.of(experiment, population)
    return Run(experiment.seed, folder, history, time_of(folder, history, speeds))


def _refuse_target(target: float | None, experiments: dict[str, Experiment]) -> None:
    """Raises SettingsError for a target that is none, or whose time nobody knows."""
    if target is None:
        return
    if not math.isfinite(target):
        raise SettingsError(f"--target {target}: expected a number, e.g. 0.9 for 90%")
    for label, experiment in experiments.items():
        if not experiment.clock.is_on and not isinstance(experiment.schedule, Replay):
            raise SettingsError(
                f"--target {target:g}: {label} has no clock, by which it would reach "
                "it; set clock.step_s, the seconds of one local step, e.g. "
                "--set clock.step_s=0.05, or leave --target out"
            )


def _refuse_percent(target: float | None, history: History) -> None:
    """Raises SettingsError for an accuracy that is none."""
    measure = history.measure
    if target is not None and measure in PERCENT and not 0 < target <= 1:
        raise SettingsError(
            f"--target {target:g}: the runs are judged by {measure}, a share: expected "
            "one above 0 and up to 1, e.g. 0.9 for 90%"
        )


def rounds_to_do(
    experiments: Sequence[tuple[str, Experiment]], seeds: int, out: Path
) -> int:
    """Rounds that `compare` has to do; those in `out` are done."""
    rounds = 0
    for label, experiment in distinct(experiments).items():
        for seed in range(experiment.seed, experiment.seed + seeds):
            metrics = out / f"{slug(label)}-seed{seed}" / "metrics.jsonl"
            done = 0
            if os.path.isfile(metrics):
                done = metrics.read_bytes().count(b"\n")
            rounds += max(experiment.rounds - done, 0)
    return rounds


def finish(experiment: Experiment, folder: Path, observer: Observer) -> History:
    """The history of this experiment's run in `folder`, which is run to its end first.

    Raises SettingsError where it holds a longer run, or one with other settings.
    """
    metrics = folder / "metrics.jsonl"
    if not has_round(folder):
        run(experiment, out=folder, observer=observer)
        return History.read(metrics)
    before = Experiment.parse(stored(folder), source=str(folder / "config.toml"))
    if before.rounds > experiment.rounds:
        raise SettingsError(
            f"{folder} holds a run of {before.rounds} rounds, "
            f"and {experiment.rounds} are wanted: choose another --out"
        )
    if before == experiment:
        history = History.read(metrics)
        if len(history) == experiment.rounds:
            return history
    run(experiment, resume=folder, observer=observer)
    return History.read(metrics)


def distinct(experiments: Sequence[tuple[str, Experiment]]) -> dict[str, Experiment]:
    """By label; a label whose directory another one has gets a number.

    >>> list(distinct([("fedavg", None), ("fedavg", None)]))
    ['fedavg', 'fedavg-2']
    """
    labelled: dict[str, Experiment] = {}
    taken: set[str] = set()
    for label, experiment in experiments:
        label = escaped(label)
        name, number = label, 1
        while slug(name) in taken:
            number += 1
            name = f"{label}-{number}"
        taken.add(slug(name))
        labelled[name] = experiment
    return labelled


def slug(label: str) -> str:
    """The label as the name of a directory.

    >>> slug("norm + output")
    'norm-+-output'
    """
    return re.sub(r"[^\w.+=-]+", "-", label).strip(".-") or "run"


def show(comparison: Comparison) -> None:
    """Print the table on stdout."""
    print(printable(table_text(table(comparison))))
    page = comparison.folder / "compare.html"
    print(escaped(f"{explanation(comparison)} Plots: {page}"))
