"""Time to accuracy: seven schedules on Fashion-MNIST, with slow and fast clients.

python -m benchmarks.time_to_accuracy
    1 000 clients, log-normal speeds, hours in which they are there: a Markdown table,
    and whether the claims of docs/time.md hold; --figure docs/time.svg draws
python -m benchmarks.time_to_accuracy --tied
    the same, where the slowest clients are those that hold most of classes 8 and 9

Every schedule has the same simulated horizon (--hours), and as many trials of step
sizes, of half that time on a seed of their own. Runs in --out are read, or gone on
with: stop it in any way, and call it again.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment
from fedcore.clock.durations import Durations
from fedcore.clock.lookalikes import lookalike_windows
from fedcore.rng import rng
from fedcore.rounds.loop import run
from fedcore.task import Task
from fedcore.types import Params
from fedcore.views.figures import SERIES, STYLE, svg

PRESET = "benchmarks/time.toml"
TUNED_ON = 100  # a seed that no result is of
LOCAL = (0.03, 0.1)  # step sizes of clients that are tried
RARE = (8, 9)  # classes of the slowest clients, where speed is tied to data
EVERY_S = 900.0  # simulated seconds between evaluations
HOUR = 3600.0


class Schedule(NamedTuple):
    """One way to spend the time."""

    name: str
    settings: dict[str, Any]
    server: tuple[float, ...]  # step sizes of the server that are tried
    tuned_as: str | None = None  # takes the step sizes of another one


def synchronous(asked: int, **schedule: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"schedule": {"name": "synchronous", **schedule}}
    return settings | {"participation": {"name": "uniform", "cohort": asked}}


def buffered(buffer: int, staleness: str, method: str = "fedavg") -> dict[str, Any]:
    schedule = {"name": "buffered", "buffer": buffer, "concurrency": 30}
    settings: dict[str, Any] = {"schedule": {**schedule, "staleness": staleness}}
    if method != "fedavg":
        settings["method"] = {"name": method}
    return settings


USUAL = (1.0, 2.0, 4.0)
SCHEDULES = (
    Schedule("wait for all 30", synchronous(30), USUAL),
    Schedule("deadline 8 min", synchronous(30, deadline_s=480.0), USUAL),
    Schedule("first 30 of 39", synchronous(39, goal=30), USUAL),
    Schedule("FedBuff, K = 10", buffered(10, "sqrt"), USUAL),
    Schedule("FedBuff, K = 10, s = 1", buffered(10, "constant"), (), "FedBuff, K = 10"),
    Schedule("FedAsync, K = 1", buffered(1, "polynomial"), (0.2, 0.6, 1.8)),
    Schedule("CA2FL, K = 10", buffered(10, "constant", "fedvarp"), USUAL),
    Schedule("ACE, K = 1", buffered(1, "constant", "mifa"), (0.03, 0.1, 0.3)),
)
WAIT, FIRST, FEDBUFF = "wait for all 30", "first 30 of 39", "FedBuff, K = 10"


class Steps(NamedTuple):
    """Step sizes of clients and of the server."""

    local: float
    server: float


class Study(NamedTuple):
    """What all schedules have in common."""

    out: Path
    horizon: float  # simulated seconds
    target: float  # accuracy
    seeds: int
    is_tied: bool
    schedules: tuple[Schedule, ...]


class Outcome(NamedTuple):
    """One run, up to the horizon."""

    hours: np.ndarray  # of every evaluation
    accuracy: np.ndarray
    time_to: float  # hours to the target; infinity where it is not reached
    last: float  # mean accuracy of the last three evaluations
    works: int  # pieces of work that were sent
    updates: int
    idle: float
    staleness: float
    slow_share: float  # of arrivals, that of the slowest fifth of clients
    slow_accuracy: float  # on the held-out examples of the slowest fifth
    rare_accuracy: float  # on the test set's classes RARE


# Runs


def experiment_of(
    study: Study, schedule: Schedule, steps: Steps, seed: int
) -> Experiment:
    experiment = Experiment.load(PRESET, {"seed": seed, "evaluation.every_s": EVERY_S})
    clock: dict[str, Any] = {"windows": str(windows_file(study.out))}
    if study.is_tied:
        clock |= {"trace": str(speeds_file(study.out, seed)), "step_s": None}
    method = {"name": "fedavg", "weighting": "participating"}
    method = schedule.settings.get("method", method)
    method |= {"local_lr": steps.local, "server_lr": steps.server}
    settings = {**schedule.settings, "method": method}
    values = experiment.model_dump(mode="json")
    values["clock"] |= clock
    for name, section in settings.items():
        values[name] = section
    return Experiment.parse(without_none(values))


def without_none(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {k: without_none(v) for k, v in values.items() if v is not None}


def windows_file(out: Path) -> Path:
    """Hours in which clients are there: most by night, some by day."""
    file = out / "windows.csv"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        lookalike_windows(file, clients=1000)
    return file


def speeds_file(out: Path, seed: int) -> Path:
    """Log-normal speeds, the slowest for the clients with most of classes RARE."""
    file = out / f"speeds-{seed}.csv"
    if not file.exists():
        counts = task_of(seed).data.label_counts(10)
        share = counts[:, list(RARE)].sum(1) / np.maximum(counts.sum(1), 1)
        order = np.lexsort((rng(seed, "ties").random(1000), share))
        values = np.sort(48 * np.exp(1.2 * rng(seed, "speeds").standard_normal(1000)))
        step_s = np.empty(1000)
        step_s[order] = values
        rows = [(client, step_s[client], 2.0) for client in range(1000)]
        write_csv(file, ("client", "step_s", "latency_s"), rows)
    return file


def write_csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])


@lru_cache(maxsize=1)
def task_of(seed: int) -> Task:
    task: Task = Experiment.load(PRESET, {"seed": seed}).build_task()
    return task


def run_to(experiment: Experiment, folder: Path, horizon: float) -> None:
    """Run until the simulated time has passed the horizon, and go on where it was."""
    done, passed, is_whole = progress(folder)
    while passed < horizon or not is_whole:
        rounds = first_guess(experiment, horizon)
        if done:  # a little more than the pace so far would need
            rounds = max(math.ceil(done * horizon / passed * 1.02), done)
            rounds += passed < horizon
        longer = experiment.model_copy(update={"rounds": rounds})
        if (folder / "checkpoint").exists():
            result = run(longer, resume=folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # it was stopped too early
            result = run(longer, folder)
        last = {"round": len(result.history), "params": result.params}
        torch.save(last, folder / "last.pt")
        done, passed, is_whole = progress(folder)


def progress(folder: Path) -> tuple[int, float, bool]:
    """(rounds, simulated seconds, whether the last parameters are those of the end)."""
    rows, is_whole = rows_of(folder), False
    if not rows:
        return 0, 0.0, False
    if (folder / "last.pt").exists():
        last = torch.load(folder / "last.pt", weights_only=True)
        is_whole = last["round"] == rows[-1]["round"]
    return int(rows[-1]["round"]), float(rows[-1]["time_s"]), is_whole


def first_guess(experiment: Experiment, horizon: float) -> int:
    """Rounds that are done well before the horizon."""
    schedule: Any = experiment.schedule
    mean = 5 * 48 * math.exp(1.2**2 / 2)  # seconds of a piece of work
    if schedule.name == "buffered":
        updates: float = horizon * schedule.concurrency / mean / schedule.buffer
        return math.ceil(0.8 * updates)
    return max(math.ceil(horizon / (10 * mean)), 2)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


# Outcomes


def outcome_of(
    study: Study, schedule: Schedule, steps: Steps, seed: int, kind: str
) -> Outcome:
    """The outcome of a run, which is made, or gone on with, if it has to be."""
    name = "".join(c if c.isalnum() else "-" for c in schedule.name)
    trial = f"{steps.local:g}-{steps.server:g}"
    print(f"{kind}, {schedule.name}, {trial}, seed {seed}", file=sys.stderr)
    folder = study.out / kind / name / f"{trial}-seed-{seed}"
    experiment = experiment_of(study, schedule, steps, seed)
    run_to(experiment, folder, study.horizon)
    rows = [row for row in rows_of(folder) if row["time_s"] <= study.horizon]
    measured = [row for row in rows if "test_accuracy" in row]
    hours = np.array([row["time_s"] / HOUR for row in measured])
    accuracy = np.array([row["test_accuracy"] for row in measured])
    ages = [row["staleness"]["mean"] for row in rows if "staleness" in row]
    task, slow = task_of(seed), slowest_fifth(experiment)
    params = torch.load(folder / "last.pt", weights_only=True)["params"]
    works, share = heard(folder, slow, len(rows))
    held_out = np.concatenate([task.data.rows(client, "test") for client in slow])
    test = task.data.test
    assert test is not None
    is_rare = torch.isin(test.y, torch.tensor(RARE))
    return Outcome(
        hours,
        accuracy,
        time_to(hours, accuracy, study.target),
        float(accuracy[-3:].mean()),
        works,
        len(rows),
        float(np.mean([row["idle"] for row in rows])),
        float(np.mean(ages)) if ages else 0.0,
        share,
        accuracy_of(task, params, task.data.x[held_out], task.data.y[held_out]),
        accuracy_of(task, params, test.x[is_rare], test.y[is_rare]),
    )


def time_to(hours: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """Hours to the first evaluation whose mean with the two before is the target."""
    for end in range(3, len(hours) + 1):
        if accuracy[end - 3 : end].mean() >= target:
            return float(hours[end - 1])
    return math.inf


def slowest_fifth(experiment: Experiment) -> np.ndarray:
    """The fifth of the clients whose work takes longest, by id."""
    clients = np.arange(1000)
    batch_size = experiment.local.batch_size
    durations = Durations(experiment.clock, 1000, experiment.seed, batch_size)
    expected = durations.expected(clients, np.full(1000, 5), 0, 0)
    return np.sort(np.argsort(expected, kind="stable")[-200:])


def heard(folder: Path, slow: np.ndarray, rounds: int) -> tuple[int, float]:
    """(usable answers up to this round, the share of these clients in them)."""
    columns = ["round", "client", "function", "left_out"]
    table = pq.read_table(folder / "clients.parquet", columns=columns)
    is_usable = (table["round"].to_numpy() <= rounds) & (
        np.array(table["left_out"].to_pylist()) == ""
    )
    is_usable &= np.array(table["function"].to_pylist()) == "train"
    clients = table["client"].to_numpy()[is_usable]
    return len(clients), float(np.isin(clients, slow).mean())


def accuracy_of(task: Task, params: Params, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((task.predict(params, x).argmax(1) == y).float().mean())


# Tuning, and results


def tuned(study: Study) -> dict[str, Steps]:
    """The step sizes of every schedule: the fastest to the target on TUNED_ON.

    Where none gets there, the one with the best last evaluations.
    """
    chosen: dict[str, Steps] = {}
    for schedule in study.schedules:
        if schedule.tuned_as is not None:
            chosen[schedule.name] = chosen[schedule.tuned_as]
            continue
        trials = []
        for local in LOCAL:
            for server in schedule.server:
                steps = Steps(local, server)
                done = outcome_of(study, schedule, steps, TUNED_ON, "tune")
                trials.append(((done.time_to, -done.last), steps))
        chosen[schedule.name] = min(trials)[1]
    return chosen


Results = dict[str, list[Outcome]]


def results_of(study: Study, chosen: dict[str, Steps]) -> Results:
    """The outcomes of every schedule, one a seed."""
    kind = "tied" if study.is_tied else "free"
    results: Results = {}
    for schedule in study.schedules:
        steps, outcomes = chosen[schedule.name], []
        for seed in range(study.seeds):
            outcomes.append(outcome_of(study, schedule, steps, seed, kind))
        results[schedule.name] = outcomes
    return results


HEAD = [
    "schedule",
    "step sizes",
    "hours to the target",
    "accuracy at the end",
    "updates",
    "answers",
    "idle",
    "mean tau",
    "slowest fifth: share of answers",
    "its accuracy",
]


def print_results(study: Study, chosen: dict[str, Steps], results: Results) -> None:
    rows = []
    for name, outcomes in results.items():
        row = [name, f"{chosen[name].local:g}, {chosen[name].server:g}"]
        row.append(hours_text(study, [done.time_to for done in outcomes]))
        row.append(mean_and_std([100 * done.last for done in outcomes]))
        row.append(f"{statistics.fmean(done.updates for done in outcomes):.0f}")
        row.append(f"{statistics.fmean(done.works for done in outcomes):.0f}")
        row.append(f"{statistics.fmean(done.idle for done in outcomes):.2f}")
        row.append(f"{statistics.fmean(done.staleness for done in outcomes):.1f}")
        row.append(mean_and_std([done.slow_share for done in outcomes], ".3f"))
        row.append(mean_and_std([100 * done.slow_accuracy for done in outcomes]))
        if study.is_tied:
            row.append(mean_and_std([100 * done.rare_accuracy for done in outcomes]))
        rows.append(row)
    head = [*HEAD, "classes 8 and 9"] if study.is_tied else HEAD
    print_table(head, rows)


def hours_text(study: Study, hours: list[float]) -> str:
    """Mean and deviation; runs that did not get there are counted, not averaged in."""
    there = [value for value in hours if value < math.inf]
    if not there:
        return f"> {study.horizon / HOUR:g}"
    text = mean_and_std(there)
    if len(there) < len(hours):
        text += f" ({len(hours) - len(there)} > {study.horizon / HOUR:g})"
    return text


def claims(results: Results) -> Iterator[str]:
    """What docs/time.md says, and whether it holds here."""

    def hours(name: str) -> float:
        return statistics.fmean(done.time_to for done in results[name])

    for other, least in ((WAIT, 5.0), (FIRST, 1.5)):
        if not {other, FEDBUFF} <= results.keys():
            continue
        ratio = hours(other) / hours(FEDBUFF)
        word = "holds" if ratio >= least else "**does not hold**"
        yield f"FedBuff is {ratio:.1f} times as fast as {other}; {least:g}: {word}"
    for name in results:
        share = statistics.fmean(done.slow_share for done in results[name])
        if name.startswith(("deadline", "first")):
            word = "holds" if share < 0.05 else "**does not hold**"
            yield f"the slowest fifth has {share:.3f} of {name}; below 0.05: {word}"


def draw(study: Study, results: Results, file: Path) -> None:
    """Accuracy by hours, and what the slowest fifth has of the answers."""
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
        grid = np.linspace(0.5, study.horizon / HOUR, 200)
        for number, (name, outcomes) in enumerate(results.items()):
            lines = [np.interp(grid, done.hours, done.accuracy) for done in outcomes]
            color = SERIES[number]
            curves.plot(grid, np.mean(lines, 0), label=name, color=color, lw=1.3)
            share = 100 * statistics.fmean(done.slow_share for done in outcomes)
            bars.barh(-number, share, color=color)
        curves.axhline(study.target, color="0.6", lw=0.8, ls=":")
        curves.set(xlabel="simulated hours", ylabel="test accuracy", ylim=(0.5, 0.9))
        curves.legend(frameon=False, loc="lower right")
        bars.axvline(20, color="0.6", lw=0.8, ls=":")
        bars.set_yticks([-n for n in range(len(results))], list(results))
        bars.set(xlabel="% of answers from the slowest fifth of clients")
        file.write_text(svg(figure, transparent=False, facecolor="white"))


def main() -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tied", action="store_true", help="speed is tied to classes")
    parser.add_argument("--hours", type=float, default=48.0, help="horizon, simulated")
    parser.add_argument("--target", type=float, default=0.8, help="accuracy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/time"))
    parser.add_argument("--figure", type=Path, help="file of the figure (SVG)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=[""],
        help="schedules whose names begin with one of these",
    )
    options = parser.parse_args()
    logging.getLogger("fedcore").setLevel(logging.ERROR)  # clients come late
    horizon = options.hours * HOUR
    asked = tuple(each for each in SCHEDULES if each.name.startswith((*options.only,)))
    study = Study(options.out, horizon, options.target, options.seeds, False, asked)
    # In half of the time, and on speeds that are tied to nothing.
    chosen = tuned(study._replace(horizon=horizon / 2))
    study = study._replace(is_tied=options.tied)
    results = results_of(study, chosen)
    print_results(study, chosen, results)
    for line in claims(results):
        print(f"- {line}")
    if options.figure is not None:
        draw(study, results, options.figure)


if __name__ == "__main__":
    main()
