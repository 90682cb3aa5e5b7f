"""The runs of a stress test: each cell an ordinary run, in a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError
from fedcore.rng import rng
from fedcore.rounds.history import History
from fedcore.rounds.loop import Interrupted, Observer
from fedcore.rounds.rundir import stored
from fedcore.storage.checkpoint import write_atomically
from fedcore.stress.odds import odds_text, too_many
from fedcore.stress.plan import CLEAN, Cell, Plan, cells_of
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
    odds: list[str]


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
    population = task.population
    for fraction in plan.fractions:
        if int(fraction * population) == 0:
            raise SettingsError(
                f"--fraction {fraction:g}: of {population} clients that is nobody; "
                f"give at least {1 / population:g}"
            )
    cells = cells_of(experiment, plan)
    return Prepared(
        experiment,
        preset,
        plan,
        cells,
        judge_of(experiment, task),
        population,
        _odds(plan, cells, population),
    )


def judge_of(experiment: Experiment, task: Task) -> Judge:
    """The measure that judges the runs: what clients get where models are personal."""
    measure, is_higher_better = next(iter(task.measures.items()))
    is_of_clients = experiment.build_method().personalises()
    if is_of_clients or len(task.data.test.y) == 0:
        return Judge(measure, is_higher_better, f"client_{measure}")
    return Judge(measure, is_higher_better, f"test_{measure}")


def _odds(plan: Plan, cells: list[Cell], population: int) -> list[str]:
    """Warnings of cohorts with more malicious clients than a rule is told of."""
    lines: dict[str, None] = {}
    for fraction in plan.fractions:
        malicious = int(fraction * population)
        for cell in cells:
            asked = _asked(cell.experiment, population)
            if cell.fraction != fraction or asked is None:
                continue
            settings = cell.experiment.aggregation
            if settings.byzantine is None and settings.fraction is None:
                continue
            f = settings.f(asked)
            if too_many(population, malicious, asked, f) > 0.001:
                lines[odds_text(population, malicious, asked, f)] = None
    return list(lines)


def _asked(experiment: Experiment, population: int) -> int | None:
    """The clients that a round asks; None where their number is drawn."""
    settings = experiment.participation
    if settings.name != "uniform":
        return None
    cohort = getattr(settings, "cohort", None)
    fraction = getattr(settings, "fraction", None)
    if cohort is None:
        cohort = population if fraction is None else int(fraction * population)
    return max(int(cohort), 1)


def malicious_clients(population: int, fraction: float, seed: int) -> frozenset[int]:
    """The ids that an adversary with this share of the population draws."""
    drawn = rng(seed, "adversary").permutation(population)
    return frozenset(drawn[: int(fraction * population)].tolist())


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
    for line in prepared.odds:
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
    except RunError as error:
        ruined = str(error)
        history = History.read(folder / "metrics.jsonl")
        write_atomically(folder / RUINED, ruined.encode())
    malicious = malicious_clients(
        prepared.population, job.cell.fraction, experiment.seed
    )
    treatment = treatment_of(folder, malicious)
    return SeedRun(experiment.seed, folder, history, ruined, treatment)


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
        prepared.odds,
        is_interrupted,
    )


def is_image(x: Tensor | object) -> bool:
    """Whether inputs are images, [n, channels, height, width]."""
    return isinstance(x, Tensor) and x.ndim == 4


def has_classes(task: Task) -> bool:
    """Whether targets are classes."""
    return task.data.num_classes() is not None
