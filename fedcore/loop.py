"""The one round loop: sample, round, evaluate, log, checkpoint; and its continuation after any stop."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore import __version__, engines, trees
from fedcore.checkpoint import Checkpoint, write_atomically
from fedcore.config import Experiment
from fedcore.engines.base import Engine, Work
from fedcore.errors import RunError, SettingsError, TooFewReports
from fedcore.method import Method
from fedcore.participation import Process, answering
from fedcore.rng import rng
from fedcore.rundir import ClientTable, make_run_dir, open_run_dir, read_history, write_settings
from fedcore.state import StateStore
from fedcore.task import Task
from fedcore.tasks import build_task
from fedcore.types import ClientFunction, Model, Params, Reports, Round, Tree

log = logging.getLogger("fedcore")

PATIENCE = 3  # rounds in a row in which every client asked failed, after which the run stops


class Interrupted(RunError):
    """The run was stopped from outside; its checkpoint holds the last whole round."""

    exit_status = 130


class State(NamedTuple):
    """What a run is, between two rounds. Client states are in the engine's store."""

    t: int  # rounds done
    server: Any
    participation: Tree


@dataclass
class Result:
    """What a run came to; `fedcore run --json` prints it."""

    method: str
    engine: str
    seed: int
    rounds: int
    population: int
    cohort: float  # mean clients asked a round
    final: dict[str, Any]
    history: list[dict[str, Any]]
    clients_trained: int
    clients_per_second: float
    first_round_s: float
    bytes_down: int
    bytes_up: int
    dropped: dict[str, int]
    params_sha256: str
    run_dir: str
    params: Params = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the parameters, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "params"}


class Observer(Protocol):
    """Is told of a run as it goes; all of it optional to act on."""

    def started(self, experiment: Experiment, engine: Engine, population: int, first: int) -> None: ...
    def client_done(self, t: int, n: int, cohort: int) -> None: ...
    def round_done(self, row: dict[str, Any]) -> None: ...
    def note(self, message: str) -> None: ...


class Quiet:
    """The observer that does nothing."""

    def started(self, experiment: Experiment, engine: Engine, population: int, first: int) -> None:
        pass

    def client_done(self, t: int, n: int, cohort: int) -> None:
        pass

    def round_done(self, row: dict[str, Any]) -> None:
        pass

    def note(self, message: str) -> None:
        log.warning(message)


def run(
    experiment: Experiment,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    observer: Observer | None = None,
    engine: Callable[[Work], Engine] | None = None,
) -> Result:
    """Run an experiment to its last round, or a stopped one from where it is.

    `out` is the run directory (default: a new one in runs/), `resume` an existing one to go on with. `engine` makes another
    engine than the one that the settings name. Raises SettingsError, RunError, and Interrupted (after a checkpoint) on SIGINT.
    """
    folder = open_run_dir(experiment, out, resume)
    loop = Loop(experiment, folder, observer or Quiet(), engine, resume is not None)
    try:
        return loop.run()
    finally:
        loop.close()


class Loop:
    """One run: the parts, wired; `run` takes it round by round to the end."""

    def __init__(
        self, e: Experiment, folder: Path, observer: Observer, engine: Callable[[Work], Engine] | None, resume: bool
    ) -> None:
        self.e, self.folder, self.observer = e, folder, observer
        self.begin = time.perf_counter()
        self.checkpoint = Checkpoint(folder / "checkpoint")
        facts = self.checkpoint.read() if resume and self.checkpoint.exists() else None
        self.task: Task = build_task(e)
        self.method: Method[Any] = e.build_method()
        self.process: Process = e.participation.process(self.task.population, e.seed, self._label_counts)
        self.process.check(e.rounds)
        known = self.process.rates
        self.rates = None if known is None else torch.from_numpy(known * (1 - e.participation.dropout))
        params = self.task.init_params()
        work = Work(self.task, self.method, e.local, e.seed)
        initial = {"clients": self.method.init_client(params), "memory": self.method.init_memory(params)}
        ram = int(e.checkpoint.state_ram_gb * 1e9) // max(sum(trees.nbytes(row) > 0 for row in initial.values()), 1)
        clients = StateStore(initial["clients"], ram, lambda: self._spill("clients"))
        self.engine = engine(work) if engine else engines.make(e.engine, work, clients)
        self.memory = StateStore(initial["memory"], ram, lambda: self._spill("memory"), self.task.device)
        self.stores = {"memory": self.memory}
        if self.engine.states is not None:
            self.stores["clients"] = self.engine.states
        server = self.method.init_server(trees.to(params, self.task.device), self.task.population)
        self.state = State(0, server, self.process.start())
        self.history: list[dict[str, Any]] = []
        self.clients = ClientTable(folder / "clients.parquet")
        if facts is not None:
            self._restore(facts)
        make_run_dir(folder)
        # What was logged after the checkpoint goes, for those rounds are run again.
        self.history = read_history(folder, self.state.t)
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomically(folder / "metrics.jsonl", lines.encode())
        self._evaluated = self._evaluated_clients()
        self._lost = 0  # rounds in a row that failed entirely
        self._saved = time.perf_counter()
        self._warned: set[str] = set()
        self._stop = threading.Event()

    def close(self) -> None:
        self.engine.close()
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def run(self) -> Result:
        """To the last round. Raises Interrupted on SIGINT or SIGTERM, with a checkpoint of the last whole round."""
        e = self.e
        write_settings(self.folder, e)
        self.observer.started(e, self.engine, self.task.population, self.state.t)
        with (self.folder / "metrics.jsonl").open("a") as metrics, _signals(self._stop):
            while self.state.t < e.rounds:
                try:
                    row = self.round()
                except Interrupted:
                    for store in self.stores.values():
                        store.rollback()
                    self.save()
                    raise
                self.history.append(row)
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                self.observer.round_done(row)
                if time.perf_counter() - self._saved >= e.checkpoint.seconds or self.state.t == e.rounds:
                    self.save()
        return self.result()

    def round(self) -> dict[str, Any]:
        """One round: the row that metrics.jsonl gets. Replaces `self.state`."""
        begin = time.perf_counter()
        t, e = self.state.t, self.e
        cohort, participation = self.process.sample(t, self.state.participation)
        tally = Tally(set(cohort.tolist()))
        answer = answering(cohort, e.participation.dropout, e.seed, t)
        absent = frozenset(cohort.tolist()) - frozenset(answer.tolist())

        def each(fn: ClientFunction, clients: Tensor, down: Tree) -> Iterator[Reports]:
            present = clients[[i not in absent for i in clients.tolist()]] if absent else clients
            return self._each(fn, present, down, t, tally)

        r = Round(t, cohort, self.task.population, self.task, each, self.memory, e.seed, self.rates)
        try:
            server = self.method.round(self.state.server, r)
            if len(cohort) and len(tally.reported) < e.min_reports:
                raise TooFewReports(f"{len(tally.reported)} reports, expected at least {e.min_reports}")
            if not bool(trees.finite(server)):
                tally.broken = True
                raise TooFewReports("the mean of finite updates is not finite")
            self.memory.commit()
        except TooFewReports:
            server = self.state.server
            self.memory.rollback()
            tally.skipped = True
        if self.engine.states is not None:
            self.engine.states.commit()  # a client has done its work, whatever became of the round
        tally.failed |= dict.fromkeys(absent, "dropout")
        self.state = State(t + 1, server, participation)
        self._stop_if_hopeless(tally, bool(len(answer)))
        now = time.perf_counter()
        row: dict[str, Any] = {"round": t + 1, **tally.row(), "seconds": round(now - begin, 4)}
        row |= {f"server_{name}": value for name, value in r.log.items()}
        if t == 0:
            row["first_round_s"] = round(now - self.begin, 3)
        if (t + 1) % e.evaluation.every == 0 or t + 1 == e.rounds:
            row |= self.evaluate()
            row["evaluation_s"] = round(time.perf_counter() - now, 4)
        return {key: _jsonable(value) for key, value in row.items()}

    def _each(self, fn: ClientFunction, clients: Tensor, down: Tree, t: int, tally: Tally) -> Iterator[Reports]:
        """What the engine brings back, less what no method should see: updates that are not finite."""
        if len(clients) == 0:
            return
        tally.asked.update(clients.tolist())
        tally.bytes_down += len(clients) * trees.nbytes(down)
        for r in self.engine.each(fn, clients, down, t):
            if self._stop.is_set():
                raise Interrupted(f"interrupted after round {t} of {self.e.rounds}; go on with: fedcore run --resume {self.folder}")
            good = keep_finite(r)
            tally.add(good)
            self._note(good.failed)
            self.observer.client_done(t, len(tally.reported), len(tally.asked))
            if len(good.clients):
                self.clients.add(t + 1, fn.__name__, good)
                yield good

    def _note(self, failed: Mapping[int, str]) -> None:
        for client, reason in failed.items():
            if reason not in self._warned and len(self._warned) < 20:
                self._warned.add(reason)
                self.observer.note(f"round {self.state.t + 1}: client {client} left out: {reason}")

    def _stop_if_hopeless(self, tally: Tally, asked: bool) -> None:
        hopeless = (asked and not tally.reported) or tally.broken
        self._lost = self._lost + 1 if hopeless else 0
        if self._lost >= PATIENCE or (self._lost and self.state.t == self.e.rounds):
            reasons = ", ".join(f"{reason} ({n})" for reason, n in tally.row()["dropped"].items())
            raise RunError(
                f"round {self.state.t}: no usable update in {self._lost} round(s) in a row; the last: {reasons}. "
                "With updates that are not finite, check the model and lower the learning rate (method.local_lr)"
            )

    # Evaluation

    def _evaluated_clients(self) -> Tensor:
        """A fixed sample, so that the cost does not grow with the population; ascending ids."""
        population, wanted = self.task.population, self.e.evaluation.clients
        if wanted >= population:
            return torch.arange(population)
        drawn = rng(self.e.seed, "evaluation").choice(population, wanted, replace=False, shuffle=False)
        return torch.from_numpy(np.sort(drawn))

    def evaluate(self) -> dict[str, Any]:
        """Global test metrics of the server's model, and the clients' own metrics of the model each would use."""
        server, t = self.state.server, self.state.t - 1
        found: dict[str, Any] = {f"test_{name}": value for name, value in self.task.test(server.params).items()}
        values: dict[str, list[Tensor]] = {}
        for r in self.engine.each(self.method.evaluate, self._evaluated, Model(server.params), t):
            if len(r.clients) == 0:
                continue
            self.clients.add(t + 1, "evaluate", r)
            for name, per_client in r.metrics.items():
                values.setdefault(name, []).append(per_client[r.num_examples > 0].cpu())
        if self.engine.states is not None:
            self.engine.states.rollback()  # evaluation leaves no trace in the clients
        for name, pieces in values.items():
            found[f"client_{name}"] = spread(torch.cat(pieces))
        return found

    def result(self) -> Result:
        rows = self.history
        measured: dict[str, Any] = next((row for row in reversed(rows) if "test_loss" in row), {})
        final: dict[str, Any] = {"test_loss": None, "test_accuracy": None, "client_accuracy": None}
        final |= {key: value for key, value in measured.items() if key.startswith(("test_", "client_"))}
        final["clients_evaluated_on"] = self.task.data.evaluated_on
        dropped: Counter[str] = Counter()
        for row in rows:
            dropped.update(row["dropped"])
        trained = sum(row["reports"] for row in rows)
        return Result(
            method=self.e.method.name,
            engine=self.e.engine.name,
            seed=self.e.seed,
            rounds=self.state.t,
            population=self.task.population,
            cohort=sum(row["cohort"] for row in rows) / max(len(rows), 1),
            final=final,
            history=rows,
            clients_trained=trained,
            clients_per_second=round(_speed(rows), 2),
            first_round_s=rows[0]["first_round_s"],
            bytes_down=sum(row["bytes_down"] for row in rows),
            bytes_up=sum(row["bytes_up"] for row in rows),
            dropped=dict(dropped),
            params_sha256=params_sha256(self.state.server.params),
            run_dir=str(self.folder),
            params=self.state.server.params,
        )

    # Checkpoints

    def save(self) -> None:
        """The whole state of the run, on disk, in one step."""
        facts: dict[str, Any] = {"round": self.state.t, "engine": self.engine.choices, "fedcore": __version__}
        keep: set[str] = set()
        for name, store in self.stores.items():
            if not store.stateless:
                facts[name] = list(store.row_of)
                keep |= {f"{name}-{n}" for n in range(len(store.blocks)) if n not in store.changed}
        self.clients.write(self.state.t)
        self.checkpoint.save(self.state.t, facts, self._parts(), keep)
        for store in self.stores.values():
            store.changed.clear()
        self._saved = time.perf_counter()

    def _parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield "server", trees.flatten(self.state.server)
        yield "participation", trees.flatten(self.state.participation)
        for name, store in self.stores.items():
            yield from ((f"{name}-{n}", block) for n, block in store.save_blocks(store.changed))

    def _restore(self, facts: dict[str, Any]) -> None:
        t = int(facts["round"])
        self.engine.choices.update(facts["engine"])
        server = self._part("server", self.state.server)
        self.state = State(t, trees.to(server, self.task.device), self._part("participation", self.state.participation))
        for name, store in self.stores.items():
            if name in facts:
                store.load(facts[name], partial(self._block, name))
        self.clients.read(t)

    def _block(self, name: str, number: int) -> dict[str, Tensor]:
        return self.checkpoint.part(f"{name}-{number}")

    def _part(self, name: str, like: Tree) -> Tree:
        flat = self.checkpoint.part(name)
        expected = trees.flatten(like)
        if flat.keys() != expected.keys() or any(flat[path].shape != x.shape for path, x in expected.items()):
            raise SettingsError(
                f"{self.folder / 'checkpoint'}: its {name} state does not fit this method and model: is it another fedcore's?"
            )
        return trees.unflatten(flat, like)

    def _spill(self, name: str) -> Path:
        folder = self.folder / "state" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _label_counts(self) -> np.ndarray:
        y = self.task.data.y
        if y.is_floating_point() or y.ndim != 1:
            raise SettingsError("participation.alpha ties rates to classes, but the task's targets are no classes: leave it out")
        return self.task.data.label_counts(int(y.max()) + 1)


@dataclass
class Tally:
    """What one round counted. A client counts once, however often it was asked."""

    asked: set[int]
    reported: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)  # client -> reason
    bytes_down: int = 0
    bytes_up: int = 0
    skipped: bool = False
    broken: bool = False  # the server's state after the round was not finite
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, r: Reports) -> None:
        self.failed.update({client: reason.split(":")[0] for client, reason in r.failed.items()})
        if len(r.clients):
            self.reported.update(r.clients.tolist())
            self.bytes_up += trees.nbytes(r.up)
            for name, values in r.metrics.items():
                total, n = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + float(values.sum()), n + len(values)

    def row(self) -> dict[str, Any]:
        dropped = Counter(self.failed.values()) + Counter({"server not finite": int(self.broken)})
        counts = {"cohort": len(self.asked), "reports": len(self.reported), "dropped": dict(dropped)}
        means = {f"train_{name}": total / n for name, (total, n) in self.sums.items()}
        return {**counts, "skipped": self.skipped, **means, "bytes_down": self.bytes_down, "bytes_up": self.bytes_up}


def keep_finite(r: Reports) -> Reports:
    """The reports whose update is finite; the others are in `failed`."""
    ok = trees.finite_rows(r.up) if len(r.clients) else []
    if all(ok):
        return r
    good, clients = torch.tensor(ok), r.clients.tolist()
    bad = {i: "not finite: the update holds NaN or Inf" for i, fine in zip(clients, ok, strict=True) if not fine}
    rows = good.to(r.num_examples.device)
    return Reports(r.clients[good], trees.at(r.up, rows), r.num_examples[rows], {**r.failed, **bad})


def spread(values: Tensor) -> dict[str, float]:
    """Mean, 10th and 90th percentile over clients; `values` [n], n > 0."""
    low, high = torch.quantile(values.double(), torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return {"mean": values.double().mean().item(), "p10": low, "p90": high}


def params_sha256(params: Params) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _speed(rows: list[dict[str, Any]]) -> float:
    """Clients a second, without the first round, which also warms up and measures, where there are others."""
    later = rows[1:] or rows
    return float(sum(row["reports"] for row in later) / max(sum(row["seconds"] for row in later), 1e-9))


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, which the round heeds where nothing is half done; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
