"""`fedcore server`: starts Flower's SuperLink and the run, and again what is killed.

    fedcore server ── SuperLink (Fleet API for clients; two APIs on loopback)
                   └─ ServerApp (the round loop, in the run directory)

Whatever is killed, this process included: started again with the same --out, the run
goes on from its checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fedcore import trees
from fedcore.clock.settings import Buffered
from fedcore.config import Experiment
from fedcore.deploy import certs
from fedcore.engines.base import Engine, Work
from fedcore.engines.sequential import Sequential
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.history import History
from fedcore.rounds.loop import Interrupted
from fedcore.rounds.rundir import (
    clear_start,
    fresh,
    has_round,
    make_run_dir,
    open_run_dir,
    refuse_other_base,
    write_settings,
)
from fedcore.rounds.saving import read_header
from fedcore.rounds.setup import Parts, prepare
from fedcore.storage.checkpoint import Checkpoint, write_atomically
from fedcore.storage.faults import writing
from fedcore.storage.memory import require, size_text
from fedcore.storage.rows import ROWS, StateStore

from .app import CERTS_DIR, OUTCOME, RUN_DIR, SERIES, WATCH
from .bundle import bundle_of
from .link import LOG, SuperLink, host_and_port, wait_for_port

log = logging.getLogger("fedcore")

FACTS = "server.json"  # for `fedcore status`: where the SuperLink's APIs are
CRASHES = 5  # in a row, without a round between them, after which the run ends
ROOM = 1_000_000  # bytes that a start of the ServerApp writes
LOOK = 0.1  # seconds between looks at the processes
ERRORS: dict[int, type[Exception]] = {2: SettingsError, 130: Interrupted}


def serve(
    experiment: Experiment, listen: str, folder: Path | None, out: Path | None
) -> dict[str, Any]:
    """Run an experiment to its end with clients that connect to `listen` (HOST:PORT).

    The result is that of `fedcore run --json`. `folder` holds the server's certificate
    and the clients' keys, None for no TLS and no authentication. `out` is the run
    directory: a new one, or one that this run began in. Raises SettingsError, RunError
    and Interrupted.
    """
    if folder is not None and (faults := certs.check_server(folder)):
        raise SettingsError("\n".join(faults))
    host_and_port(listen)
    if out is not None:
        _refuse_run_dir(experiment, out)
    population, base = _refuse_settings(experiment, out)
    if out is None:
        task = experiment.task.replace(":", "-")
        out = fresh(f"{experiment.method.name}-{task}-seed{experiment.seed}")
    make_run_dir(out)
    with _alone(out):
        wait_for_port(listen)
        _begin(experiment, out, base)
        return Server(experiment, listen, folder, out, population).run()


def _refuse_run_dir(experiment: Experiment, out: Path) -> None:
    """Raises SettingsError for a directory of another run, or of something else."""
    if has_round(out):
        open_run_dir(experiment, None, out)
    else:
        open_run_dir(experiment, out, None)


def _refuse_settings(experiment: Experiment, out: Path | None) -> tuple[int, str]:
    """The number of clients, and the SHA-256 of the frozen parameters.

    Raises SettingsError for what the round loop refuses.

    Its parts are made as it makes them, so that a fault is found before anything
    listens, and are thrown away.
    """
    if experiment.adversary.is_active:
        raise SettingsError(
            f'adversary.attack = "{experiment.adversary.attack}": a simulation has '
            "malicious clients, and devices are real: they would be told to lie. "
            "Leave [adversary] out, or try the attack with fedcore run"
        )
    folder = out or Path()  # nothing is written to it
    if out is not None and has_round(out):
        header = read_header(Checkpoint(out / "checkpoint"), out, experiment.rounds)
        History.read(out / "metrics.jsonl", 0 if header is None else header["round"])

    def engine(work: Work) -> Engine:
        return Sequential(work, StateStore((), 0, Path))

    parts = prepare(experiment, folder, engine, log.debug)
    size = trees.nbytes(parts.params)
    is_whole = not parts.method.personalises()  # else a part of it stays on clients
    if is_whole and size > experiment.engine.message_limit_mb * 1e6:
        raise SettingsError(
            f"engine.message_limit_mb = {experiment.engine.message_limit_mb:g}, but "
            f"the model that every client gets has {size_text(size)}: use a smaller "
            "model, or raise the limit, also in the memory of the server (a copy a "
            "client) and of the clients"
        )
    if isinstance(experiment.schedule, Buffered):
        _refuse_memory(experiment, experiment.schedule, parts)
    base = parts.task.base_sha256
    if out is not None and has_round(out):
        refuse_other_base(out, base)
    return parts.task.population, base


def _refuse_memory(experiment: Experiment, schedule: Buffered, parts: Parts) -> None:
    """Raises SettingsError where all work in flight would not fit in memory.

    Each client has a message in the SuperLink, and an answer here; what they start
    from is kept, in files beyond checkpoint.state_ram_gb.
    """
    ring = parts.timing.stores()["ring"]
    clients = min(schedule.concurrency, parts.task.population)
    blocks = -(-(clients + 1) // ROWS)
    models = min(
        blocks * ROWS * ring.row_bytes, experiment.checkpoint.state_ram_gb * 1e9
    )
    need = 2 * clients * ring.row_bytes + int(models)
    what = (
        f"schedule.concurrency = {schedule.concurrency}: messages, answers and models"
    )
    require(need, torch.device("cpu"), what)


def _begin(experiment: Experiment, out: Path, base: str) -> None:
    """Write the settings, and the name by which clients know the run.

    A run that came to no round, and had other settings, is forgotten.
    """
    config, series = out / "config.toml", out / SERIES
    text = experiment.to_toml().encode()
    if not has_round(out) and not (config.exists() and config.read_bytes() == text):
        clear_start(out)
        series.unlink(missing_ok=True)
    write_settings(out, experiment, base)
    if not series.exists():
        name = {"series": secrets.token_hex(8)}
        write_atomically(series, json.dumps(name).encode())


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One server at a time in a run directory; one that began nothing leaves none."""
    file = out / "server.lock"
    with writing(file):
        lock = file.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"{out}: another server runs in it; "
                "end that one, or choose another --out"
            ) from None
        try:
            yield
        finally:
            if not (out / "config.toml").exists():
                file.unlink(missing_ok=True)
                with suppress(OSError):
                    out.rmdir()


class Server:
    """The processes of one run, watched."""

    def __init__(
        self,
        experiment: Experiment,
        listen: str,
        folder: Path | None,
        out: Path,
        population: int,
    ) -> None:
        self.experiment, self.listen = experiment, listen
        self.folder, self.out, self.population = folder, out, population
        self.link: SuperLink | None = None
        self.app: subprocess.Popen[bytes] | None = None
        self.run_id = 0
        self._crashes, self._crashed_after = 0, -1  # in a row; rounds done at the last
        self._stop = threading.Event()

    def run(self) -> dict[str, Any]:
        """Watch until the run has ended; its result."""
        (self.out / OUTCOME).unlink(missing_ok=True)
        before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, self._on_signal)
        try:
            return self._watch()
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()

    def _watch(self) -> dict[str, Any]:
        while True:
            if self.link is None or not self.link.is_running():
                self._kill_app()
                self.link = self._start_link()
            if self.app is None:
                self.app = self._start_app(self.link)
            time.sleep(LOOK)
            self.link.mind_keys()
            if self._stop.is_set():
                self._stop_app()
                raise Interrupted(
                    f"interrupted; go on with the same command and --out {self.out}"
                )
            if not self.link.is_running():
                self._note_crash("the SuperLink", self.link.process.returncode)
                continue
            result = self._result(self.link)
            if result is not None:
                return result

    def _result(self, link: SuperLink) -> dict[str, Any] | None:
        """The result, once there is one; a ServerApp that was killed is forgotten.

        Raises the error with which the run ended.
        """
        status = None if self.app is None else self.app.poll()
        if status is None:
            return None
        file = self.out / OUTCOME
        if not file.exists():
            self._try_room()
            self._note_crash("the ServerApp", status)
            self.app = None
            link.stop_run(self.run_id)
            return None
        outcome = json.loads(file.read_bytes())
        if outcome["exit_status"] != 0:
            raise ERRORS.get(outcome["exit_status"], RunError)(outcome["error"])
        result: dict[str, Any] = outcome["result"]
        return result

    def _try_room(self) -> None:
        """Raises Unwritable where the run directory takes nothing more.

        A ServerApp that found it so could not write its outcome.
        """
        trial = self.out / "room"
        write_atomically(trial, bytes(ROOM))
        trial.unlink()

    def _note_crash(self, name: str, status: int) -> None:
        rounds = _rounds_done(self.out)
        is_stuck = rounds == self._crashed_after
        self._crashes = self._crashes + 1 if is_stuck else 1
        self._crashed_after = rounds
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if self._crashes >= CRASHES:
            raise RunError(
                f"{name} ended {how}, for the {CRASHES}th time without a round "
                f"between: see {self.out / LOG}"
            )
        log.warning("%s ended %s after round %d; starting it again", name, how, rounds)

    def _start_link(self) -> SuperLink:
        limit = self.experiment.engine.message_limit_mb * 1e6
        environment = self._environment()
        link = SuperLink(
            self.listen, self.folder, self.out, limit, self.population, environment
        )
        write_atomically(self.out / FACTS, json.dumps(link.facts()).encode())
        who = "anybody, without TLS"
        if link.keys is not None:
            who = f"{len(link.registered)} clients with keys in {link.keys}"
        log.warning(
            "listening on %s for %s; run directory %s", self.listen, who, self.out
        )
        return link

    def _start_app(self, link: SuperLink) -> subprocess.Popen[bytes] | None:
        """Submit the run, and start its ServerApp as Flower's SuperExec does."""
        task = link.submit(bundle_of(self.experiment))
        if task is None:
            return None
        self.run_id = task.run_id
        command = [sys.executable, "-m", "fedcore.server.superlink", "serverapp"]
        command += ["--runtime-api-address", link.address, "--token", task.token]
        command += ["--parent-pid", str(os.getpid())]
        if self.folder is None:
            command.append("--insecure")
        else:
            command += ["--root-certificates", str(self.folder / "ca.crt")]
        with writing(self.out / LOG), (self.out / LOG).open("ab") as file:
            return subprocess.Popen(command, stdout=file, env=self._environment())

    def _stop_app(self) -> None:
        """Ask it to end after what it is doing, then insist, then kill it.

        Its checkpoint is whole in any case.
        """
        for seconds in (10, 5):
            if self._app_is_busy():
                assert self.app is not None
                self.app.send_signal(signal.SIGTERM)
            end = time.monotonic() + seconds
            while self._app_is_busy() and time.monotonic() < end:
                time.sleep(LOOK)
        self._kill_app()

    def _app_is_busy(self) -> bool:
        """Whether it is still at work.

        With its outcome it has written all; Flower's part of it may take longer.
        """
        if self.app is None or self.app.poll() is not None:
            return False
        return not (self.out / OUTCOME).exists()

    def _kill_app(self) -> None:
        if self.app is not None and self.app.poll() is None:
            self.app.kill()
            self.app.wait()
        self.app = None

    def _environment(self) -> dict[str, str]:
        keys = "" if self.folder is None else str(self.folder.resolve())
        return {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING"),
            "FLWR_HOME": str((self.out / "flower").resolve()),
            RUN_DIR: str(self.out.resolve()),
            CERTS_DIR: keys,
        }

    def _end(self) -> None:
        self._kill_app()
        if self.link is not None:
            self.link.kill()
        for name in (FACTS, WATCH):
            with suppress(OSError):
                (self.out / name).unlink()


def _rounds_done(out: Path) -> int:
    """The lines of metrics.jsonl."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
