"""The Flower ServerApp: the round loop, with Flower nodes as its clients.

Under `flwr run` it is a run like any other. Under `fedcore server` the environment
names the run directory, which holds the settings: the run goes on from its checkpoint,
and its outcome is written there.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcore.clock.queue import Item
from fedcore.clock.settings import Buffered, goal_of
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.errors import FedcoreError, RunError, SettingsError
from fedcore.rounds import loop
from fedcore.rounds.rundir import open_run_dir, stored
from fedcore.storage.checkpoint import STATE, Checkpoint, write_atomically
from fedcore.storage.faults import Unwritable
from fedcore.views.run_report import write_or_note
from fedcore.views.terminal import Terminal, show_result

from .grid import GridEngine
from .sums import Securing

RUN_DIR = "FEDCORE_RUN_DIR"  # set by `fedcore server`
CERTS_DIR = "FEDCORE_CERTS_DIR"  # by `fedcore server` too, where it has TLS
OUTCOME = "outcome.json"  # the end of the run: {"exit_status", "error", "result"}
SERIES = "series.json"  # the name by which clients know the run, from start to end
ROUND_TIMEOUT = 3600.0  # seconds, where the schedule has no deadline
WATCH = "waiting.json"  # the clients whose answers the round waits for

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment; a mistake in the settings is one line of the log."""
    if folder := os.environ.get(RUN_DIR):
        _deploy(grid, Path(folder))
        return
    try:
        _simulate(grid, context)
    except FedcoreError as error:
        print(f"fedcore: {error}", file=sys.stderr, flush=True)
        # Flower counts a run as failed by an exception alone, which must be no
        # SystemExit, and logs its traceback below our line.
        raise RunError(str(error)) from None


def _simulate(grid: Grid, context: Context) -> None:
    overrides = [*str(context.run_config["set"]).split(), 'engine.name="grid"']
    experiment = Experiment.load(str(context.run_config["preset"]), overrides)
    folder = open_run_dir(experiment, None, None)
    state = folder / "state" / "clients"  # the loop clears the first away

    def engine(work: Work) -> GridEngine:
        securing = Securing(experiment.secure)
        return _engine(grid, work, experiment, state=state, securing=securing)

    with Terminal() as terminal:
        result = loop.run(experiment, folder, observer=terminal, engine=engine)
    report = write_or_note(result.run_dir)
    # In full, for the working directory is the SuperLink's.
    show_result(result, report and report.resolve())


def _deploy(grid: Grid, folder: Path) -> None:
    """Go on with the run of this directory, and write its outcome.

    A process that is killed writes none.
    """
    outcome: dict[str, Any] = {
        "exit_status": 1,
        "error": "the server's program failed; its traceback is above",
        "result": None,
    }
    try:
        with _alone(folder), Terminal() as terminal:
            source = str(folder / "config.toml")
            experiment = Experiment.parse(stored(folder), source=source)
            series = json.loads((folder / SERIES).read_text())["series"]
            keys = os.environ.get(CERTS_DIR)
            securing = Securing(
                experiment.secure,
                None if not keys else Path(keys),
                folder / "checkpoint",
            )

            def engine(work: Work) -> GridEngine:
                return _engine(
                    grid,
                    work,
                    experiment,
                    series=series,
                    safe=Safe(folder),
                    watch=folder / WATCH,
                    securing=securing,
                )

            result = loop.run(
                experiment, resume=folder, observer=terminal, engine=engine
            )
        write_or_note(result.run_dir)
        outcome = {"exit_status": 0, "error": None, "result": result.to_dict()}
    except FedcoreError as error:  # `fedcore server` says it, and ends with the status
        outcome |= {"exit_status": error.exit_status, "error": str(error)}
    finally:
        # Where that cannot be written, `fedcore server` finds it out itself.
        with suppress(Unwritable):
            write_atomically(folder / OUTCOME, json.dumps(outcome).encode())


def _engine(
    grid: Grid, work: Work, experiment: Experiment, **places: Any
) -> GridEngine:
    settings, schedule = experiment.engine, experiment.schedule
    timeout = getattr(schedule, "deadline_s", None) or ROUND_TIMEOUT
    if isinstance(schedule, Buffered):  # an evaluation waits behind a client's work
        timeout = schedule.max_age_s
    return GridEngine(
        grid,
        work,
        timeout,
        min_clients=settings.min_clients,
        report_goal=goal_of(schedule),
        min_reports=experiment.min_reports,
        rejoin=settings.rejoin_timeout,
        limit=settings.message_limit_mb * 1e6,
        **places,
    )


class Safe:
    """The first version that clients may be asked for again, after a restart.

    That of the oldest work in flight at the last checkpoint, else its round: devices
    may forget the states before it.
    """

    def __init__(self, folder: Path) -> None:
        self._checkpoint = Checkpoint(folder / "checkpoint")
        self._file = folder / "checkpoint" / STATE
        self._seen = (0, 0)  # when it was written, and that version

    def __call__(self) -> int:
        try:
            written = self._file.stat().st_mtime_ns
        except FileNotFoundError:
            return 0
        if written != self._seen[0]:
            self._seen = written, self._read()
        return self._seen[1]

    def _read(self) -> int:
        number = int(self._checkpoint.read()["round"])
        if not self._checkpoint.has("timing"):
            return number
        kept = self._checkpoint.part("timing")
        if "queue" not in kept:
            return number
        versions = [Item(*row).version for row in kept["queue"].tolist()]
        return min([number, *versions])


@contextmanager
def _alone(folder: Path, patience: float = 30.0) -> Iterator[None]:
    """One process at a time in a run directory.

    A process whose server was killed may need a moment to end.
    """
    with (folder / "run.lock").open("w") as lock:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise SettingsError(
                        f"{folder} is in use by another process: end that one first"
                    ) from None
                time.sleep(0.1)
        yield
