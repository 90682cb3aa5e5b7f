"""The runs of a stress test: each cell an ordinary run, in a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError
from fedcore.messages.adversary.adversary import Adversary
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.rounds import hostile
from fedcore.rounds.history import History
from fedcore.rounds.loop import Interrupted, Observer
from fedcore.rounds.refusals import participation_process
from fedcore.rounds.rundir import stored
from fedcore.rounds.setup import work_of
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import Unwritable
from fedcore.stress.odds import odds_line
from fedcore.stress.plan import (
    CLEAN,
    Cell,
    Plan,
    Rule,
    cells_of,
    default_attacks,
    default_rules,
)
from fedcore.stress.results import CellResult, Judge, SeedRun, Stress
from fedcore.stress.treatment import treatment_of
from fedcore.task import Task
from fedcore.views.compare import finish, slug

__all__ = ["Prepared", "Watcher", "examine", "malicious_clients", "prepare"]

RUINED = "ruined.txt"  # in a run directory: why the run ended before its last round


class Watcher(Protocol):
    """Is told how the stress test goes on, and watches each of its runs."""

    def planned(self, cells: int, runs: int, rounds: int, folder: Path) -> None: ...
    def cell(self, number: int, runs: int, name: str, is_clean: bool) -> None: ...
    def training(self) -> Observer: ...
    def note(self, message: str) -> None: ...


class Prepared(NamedTuple):
    """All that is known of a stress test before its first run."""

    experiment: Experiment
    preset: str
    plan: Plan
    cells: list[Cell]
    judge: Judge
    population: int
    notes: list[str]


class Job(NamedTuple):
    """One run that is to be done."""

    cell: Cell
    experiment: Experiment  # on its seed
    folder: Path


def prepare(experiment: Experiment, preset: str, plan: Plan, task: Task) -> Prepared:
    """The cells of the plan, all of them possible.

    `task` is that of the experiment. Raises SettingsError for cells that cannot be,
    before anything is written.
    """
    cells = cells_of(experiment, plan)
    notes: dict[str, None] = {}
    for cell in cells:
        try:
            line = _refuse(cell, task)
        except SettingsError as error:
            name = f"{cell.rule} against {cell.column}"
            raise SettingsError(f"{name}: {error}") from error
        if line:
            notes[line] = None
    judge = judge_of(experiment, task)
    return Prepared(experiment, preset, plan, cells, judge, task.population, [*notes])


def default_plan(
    experiment: Experiment, plan: Plan, task: Task
) -> tuple[Plan, list[str]]:
    """The plan with the usual rules and attacks where it names none, and notes.

    Those that these settings or data do not allow are left out, with a note. Raises
    SettingsError where nothing is left.
    """
    mean = (Rule("none", "mean"),)
    kept_rules, kept_attacks = list(plan.rules), list(plan.attacks)
    notes = []
    refused: SettingsError | None = None
    for rule in () if plan.rules else default_rules(experiment):
        try:
            prepare(experiment, "", replace(plan, rules=(rule,), attacks=()), task)
            kept_rules.append(rule)
        except SettingsError as error:
            refused = refused or error
            notes.append(f"left out: {error}")
    for attack in () if plan.attacks else default_attacks():
        try:
            prepare(experiment, "", replace(plan, rules=mean, attacks=(attack,)), task)
            kept_attacks.append(attack)
        except SettingsError as error:
            refused = refused or error
            notes.append(f"left out: {error}")
    if refused is not None and not (kept_rules and kept_attacks):
        raise refused
    plan = replace(plan, rules=tuple(kept_rules), attacks=tuple(kept_attacks))
    return plan, notes


def _refuse(cell: Cell, task: Task) -> str:
    """The odds of too many malicious clients in a round, in words; "" for none.

    Raises SettingsError for settings that the run would refuse.
    """
    experiment = cell.experiment
    method = experiment.build_method()
    process = participation_process(experiment, task)
    work = work_of(experiment, task, method)
    work.adversary.refuse(method, experiment.method.name)
    hostile.refuse(experiment, work, process, lambda note: None)
    population, asked = task.population, process.largest
    return odds_line(experiment.aggregation, population, asked, cell.fraction)


def judge_of(experiment: Experiment, task: Task) -> Judge:
    """The measure that judges the runs: what clients get where models are personal."""
    measure, is_higher_better = next(iter(task.measures.items()))
    is_of_clients = experiment.build_method().personalises()
    if is_of_clients or len(task.data.test.y) == 0:
        return Judge(measure, is_higher_better, f"client_{measure}")
    return Judge(measure, is_higher_better, f"test_{measure}")


def malicious_clients(population: int, fraction: float, seed: int) -> frozenset[int]:
    """The ids that an adversary with this share of the population draws."""
    settings = AdversarySettings(attack="absent", fraction=fraction)
    return Adversary(settings, population, seed).clients


def jobs_of(prepared: Prepared, folder: Path) -> list[Job]:
    """Every run, seed by seed, those with equal settings once."""
    jobs: dict[Path, Job] = {}
    first = prepared.experiment.seed
    for seed in range(first, first + prepared.plan.seeds):
        for cell in prepared.cells:
            experiment = cell.experiment.model_copy(update={"seed": seed})
            place = folder / f"{slug(cell.label)}-seed{seed}"
            jobs.setdefault(place, Job(cell, experiment, place))
    return list(jobs.values())


def examine(prepared: Prepared, folder: Path, watcher: Watcher) -> Stress:
    """Run what is not done yet, and gather the results of all cells.

    Each run is in a directory below `folder`; one that is there is read, or gone on
    with. An interrupt ends the test with what is done. Raises SettingsError where
    `folder` holds runs with other settings, and RunError where nothing could be run.
    """
    jobs = jobs_of(prepared, folder)
    rounds = sum(_rounds_to_do(job) for job in jobs)
    watcher.planned(len(prepared.cells), len(jobs), rounds, folder)
    for line in prepared.notes:
        watcher.note(line)
    done: dict[Path, SeedRun] = {}
    is_interrupted = False
    for number, job in enumerate(jobs):
        name = f"{job.cell.rule}, {job.cell.column}, seed {job.experiment.seed}"
        watcher.cell(number, len(jobs), name, job.cell.column == CLEAN)
        try:
            done[job.folder] = run_job(job, watcher.training, prepared)
        except (Interrupted, KeyboardInterrupt):
            is_interrupted = True
            break
        except SettingsError as error:
            raise SettingsError(f"{name}: {error}") from error
    _refuse_ruin_of_all(done, is_interrupted)
    return _gathered(prepared, folder, done, is_interrupted)


def _rounds_to_do(job: Job) -> int:
    metrics = job.folder / "metrics.jsonl"
    if (job.folder / RUINED).exists():
        return 0
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    return max(job.experiment.rounds - done, 0)


def run_job(
    job: Job, make_observer: Callable[[], Observer], prepared: Prepared
) -> SeedRun:
    """The run of a job, done to its end; a run that an attack ended is a result too."""
    experiment, folder, ruined = job.experiment, job.folder, None
    try:
        if _is_ruined(job):
            raise RunError((folder / RUINED).read_text())
        history = finish(experiment, folder, make_observer())
    except (Interrupted, Unwritable):
        raise
    except RunError as error:
        history = _history(folder)
        if not history.fruitless:
            raise  # of this machine, or of the task
        ruined = str(error)
        write_atomically(folder / RUINED, ruined.encode())
    malicious = malicious_clients(
        prepared.population, job.cell.fraction, experiment.seed
    )
    treatment = treatment_of(folder, malicious)
    return SeedRun(experiment.seed, folder, history, ruined, treatment)


def _history(folder: Path) -> History:
    """The rounds of a run that failed; none where it failed before the first."""
    metrics = folder / "metrics.jsonl"
    return History.read(metrics) if metrics.exists() else History()


def _is_ruined(job: Job) -> bool:
    """Whether this very run has already come to its early end."""
    if not (job.folder / RUINED).exists():
        return False
    source = str(job.folder / "config.toml")
    return Experiment.parse(stored(job.folder), source=source) == job.experiment


def _refuse_ruin_of_all(done: dict[Path, SeedRun], is_interrupted: bool) -> None:
    """Raises RunError where no run came to its end: then attacks are not the cause."""
    runs = list(done.values())
    if runs and not is_interrupted and all(run.ruined for run in runs):
        raise RunError(f"every run failed; the first: {runs[0].ruined}")


def _gathered(
    prepared: Prepared, folder: Path, done: dict[Path, SeedRun], is_interrupted: bool
) -> Stress:
    """The results, by cell; cells with equal settings share their runs."""
    cells: dict[tuple[float, str, str], CellResult] = {}
    first = prepared.experiment.seed
    for cell in prepared.cells:
        result = CellResult(cell, prepared.judge)
        for seed in range(first, first + prepared.plan.seeds):
            run = done.get(folder / f"{slug(cell.label)}-seed{seed}")
            if run is not None:
                result.runs.append(run)
        cells[cell.fraction, cell.rule, cell.column] = result
    return Stress(
        prepared.experiment,
        prepared.preset,
        prepared.plan,
        folder,
        prepared.judge,
        cells,
        prepared.notes,
        is_interrupted,
    )
