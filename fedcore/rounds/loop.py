"""The one round loop: sample, round, evaluate, log, checkpoint; and its continuation after any stop."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore import __version__, engines, privacy, trees
from fedcore.config import Experiment
from fedcore.engines.base import Engine, Work
from fedcore.errors import RunError, SettingsError, TooFewReports
from fedcore.messages.links import LinkSettings
from fedcore.method import Method, evaluates
from fedcore.rng import rng
from fedcore.rounds.captures import Captures
from fedcore.rounds.participation import Process, UniformProcess, answering
from fedcore.rounds.readout import Readout, read
from fedcore.rounds.rundir import (
    PERCENTILES,
    ClientTable,
    lock,
    make_run_dir,
    open_run_dir,
    read_history,
)
from fedcore.split import split
from fedcore.storage.checkpoint import Checkpoint, write_atomically
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.tasks import build_task
from fedcore.types import (
    Answers,
    ClientFunction,
    Model,
    Params,
    Reports,
    Round,
    Tree,
    Weight,
)

log = logging.getLogger("fedcore")

TOGETHER = 1.0  # seconds in which two signals are one: a terminal or systemd sends it to all processes, and the server to its own
PATIENCE = (
    3  # rounds in a row in which every client asked failed, after which the run stops
)


class Interrupted(RunError):
    """The run was stopped from outside; its checkpoint holds the last whole round."""

    exit_status = 130


class State(NamedTuple):
    """What a run is, between two rounds. Client states are in the engine's store."""

    t: int  # rounds done
    server: Any
    participation: Tree
    sent: Tensor  # messages that each client has sent, int64 [population], where clients add noise; else [0]


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
    late_answers: int
    params_sha256: str
    run_dir: str
    params: Params = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the parameters, ready for JSON."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name != "params"
        }


class Observer(Protocol):
    """Is told of a run as it goes; all of it optional to act on."""

    def started(
        self, experiment: Experiment, engine: Engine, population: int, first: int
    ) -> None: ...
    def client_done(self, t: int, n: int, cohort: int) -> None: ...
    def round_done(self, row: dict[str, Any]) -> None: ...
    def note(self, message: str) -> None: ...


class Quiet:
    """The observer that does nothing."""

    def started(
        self, experiment: Experiment, engine: Engine, population: int, first: int
    ) -> None:
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
    try:
        loop = Loop(experiment, folder, observer or Quiet(), engine, resume is not None)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # made for this run, and still empty
        raise
    try:
        return loop.run()
    finally:
        loop.close()


class Loop:
    """One run: the parts, wired; `run` takes it round by round to the end."""

    def __init__(
        self,
        e: Experiment,
        folder: Path,
        observer: Observer,
        engine: Callable[[Work], Engine] | None,
        resume: bool,
    ) -> None:
        self.e, self.folder, self.observer = e, folder, observer
        self.begin = time.perf_counter()
        self._lock = lock(folder) if resume else None
        self.checkpoint = Checkpoint(folder / "checkpoint")
        facts = self.checkpoint.read() if resume and self.checkpoint.exists() else None
        if facts is not None and facts["round"] > e.rounds:
            raise SettingsError(
                f"rounds = {e.rounds}, but {folder} has done {facts['round']}: set rounds to at least that"
            )
        if resume and facts is None and (folder / "metrics.jsonl").exists():
            observer.note(f"{folder} has no checkpoint yet: its run begins anew")
        self.task: Task = build_task(e)
        self.task.check()
        self.method: Method[Any] = e.build_method()
        self.process: Process = e.participation.process(
            self.task.population, e.seed, self._label_counts
        )
        self.process.check(e.rounds)
        self._check_participation()
        self.mechanism = self._mechanism()
        known = self.process.rates
        self.rates = (
            None
            if known is None
            else torch.from_numpy(known * (1 - e.participation.dropout))
        )
        params = self.task.init_params()
        if e.finetune.epochs:
            split(params, e.finetune.parts)  # refused now, not after the last round
        self._initial = params_sha256(params) if e.initial else None
        work = Work(self.task, self.method, e.local, e.seed, e.links, e.defence)
        initial = {
            "clients": self.method.init_client(params),
            "memory": self.method.init_memory(params),
        }
        ram = int(e.checkpoint.state_ram_gb * 1e9) // max(
            sum(trees.nbytes(row) > 0 for row in initial.values()), 1
        )
        clients = StateStore(
            initial["clients"], ram, partial(_spill, folder, "clients")
        )
        self.engine = engine(work) if engine else engines.make(e.engine, work, clients)
        advice = self.method.check(
            self.task, self.process.largest
        )  # the task is now on its device
        if advice:
            observer.note(advice)
        self.memory = StateStore(
            initial["memory"], ram, partial(_spill, folder, "memory"), self.task.device
        )
        self.stores = {"memory": self.memory}
        if self.engine.states is not None:
            self.stores["clients"] = self.engine.states
        server = self.method.init_server(
            trees.to(params, self.task.device), self.task.population
        )
        counted = self.mechanism is not None and self.mechanism.view == "client_update"
        sent = torch.zeros(self.task.population if counted else 0, dtype=torch.int64)
        self.state = State(
            0, trees.to(server, self.task.device), self.process.start(), sent
        )
        self.history: list[dict[str, Any]] = []
        self.clients = ClientTable(folder / "clients.parquet")
        self.captures = Captures(folder, e, self.method)
        if facts is not None:
            self._restore(facts)
        make_run_dir(folder, e)
        self._lock = self._lock or lock(folder)
        # What was logged after the checkpoint goes, for those rounds are run again.
        self.history = read_history(folder, self.state.t)
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomically(folder / "metrics.jsonl", lines.encode())
        self._evaluated = self._evaluated_clients()
        self._saved = time.perf_counter()
        self._warned: set[str] = set()
        self._stop = threading.Event()

    def close(self) -> None:
        self.engine.close()
        if self._lock is not None:
            self._lock.close()
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def run(self) -> Result:
        """To the last round. Raises Interrupted on SIGINT or SIGTERM, with a checkpoint of the last whole round."""
        e = self.e
        self.observer.started(e, self.engine, self.task.population, self.state.t)
        with (self.folder / "metrics.jsonl").open("a") as metrics, signals(self._stop):
            while self.state.t < e.rounds:
                try:
                    self._heed_stop()
                    row = self.round()
                except Interrupted:
                    for store in self.stores.values():
                        store.rollback()
                    self.save(metrics)
                    raise
                self.history.append(row)
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                self.observer.round_done(row)
                hopeless = self._hopeless()
                if (
                    hopeless
                    or time.perf_counter() - self._saved >= e.checkpoint.seconds
                    or self.state.t == e.rounds
                ):
                    self.save(metrics)
                if hopeless:
                    raise RunError(hopeless)
        return self.result()

    def _heed_stop(self) -> None:
        if self._stop.is_set():
            done = f"interrupted after round {self.state.t} of {self.e.rounds}"
            raise Interrupted(f"{done}; go on with: fedcore run --resume {self.folder}")

    def round(self) -> dict[str, Any]:
        """One round: the row that metrics.jsonl gets. Replaces `self.state`."""
        begin, late = time.perf_counter(), self.engine.late
        t, e = self.state.t, self.e
        cohort, participation = self.process.sample(t, self.state.participation)
        tally = Tally(set(cohort.tolist()), silent=e.defence.noise_multiplier > 0)
        self.captures.begin(t, cohort)
        answer = answering(cohort, e.participation.dropout, e.seed, t)
        absent = frozenset(cohort.tolist()) - frozenset(answer.tolist())

        def each(fn: ClientFunction, clients: Tensor, down: Tree) -> Iterator[Reports]:
            heard = bool(
                trees.leaves(down)
            )  # who is sent nothing cannot miss it: it works on its own
            present = (
                clients[[i not in absent for i in clients.tolist()]]
                if absent and heard
                else clients
            )
            return Answers(partial(self._each, fn, present, down, t, tally))

        r = Round(
            t,
            cohort,
            self.task.population,
            self.task,
            each,
            self.memory,
            e.seed,
            self.rates,
        )
        try:
            server = trees.to(self.method.round(self.state.server, r), self.task.device)
            if len(cohort) and len(tally.reported) < e.min_reports:
                raise TooFewReports(
                    f"{len(tally.reported)} reports, expected at least {e.min_reports}"
                )
            if not bool(trees.finite(server)):
                tally.broken = True
                raise TooFewReports("the mean of finite updates is not finite")
            self.memory.commit()
        except TooFewReports as error:
            server = self.state.server
            self.memory.rollback()
            tally.skipped = True
            self._note_once(
                "skipped", f"round {t + 1} left the model as it was: {error}"
            )
        if self.engine.states is not None:
            self.engine.states.commit()  # a client has done its work, whatever became of the round
        if (missing := self.captures.end(t)) is not None:
            self._note_once("captures", missing)
        tally.failed |= dict.fromkeys(absent, "dropout")
        self.state = State(
            t + 1, server, participation, tally.messages(self.state.sent)
        )
        now = time.perf_counter()
        row: dict[str, Any] = {
            "round": t + 1,
            **tally.row(),
            "seconds": round(now - begin, 4),
        }
        row |= {f"server_{name}": value for name, value in r.log.items()}
        if (
            self.engine.late > late
        ):  # since the round before: they belong to earlier ones
            row["late_answers"] = self.engine.late - late
        if t == 0:
            row["first_round_s"] = round(now - self.begin, 3)
        if (t + 1) % e.evaluation.every == 0 or t + 1 == e.rounds:
            row |= self.evaluate() | self._spent()
            row["evaluation_s"] = round(time.perf_counter() - now, 4)
        return {key: _jsonable(value) for key, value in row.items()}

    def _each(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        tally: Tally,
        weight: Weight | None,
    ) -> Iterator[Reports]:
        """What the engine brings back, less what no method should see: updates that are not finite."""
        if len(clients) == 0:
            return
        if trees.leaves(down):
            tally.asked.update(clients.tolist())
        tally.bytes_down += len(clients) * trees.nbytes(down)
        if tally.silent and not evaluates(fn):
            tally.refuse_twice(fn, clients)
        answers = self.engine.each(fn, clients, down, t)
        if (
            weight is not None
            and isinstance(answers, Answers)
            and not self.captures.wanted
        ):
            answers.summed(weight)
        for r, seen in read(answers):
            self._heed_stop()
            tally.count(fn, r)
            if len(r.clients):  # what was sent, whether it is of use or not
                tally.bytes_up += (
                    trees.nbytes(r.up)
                    if r.total is None
                    else len(r.clients) * trees.nbytes(r.total)
                )
            good, seen = keep_finite(r, seen)
            if tally.silent:
                seen = seen._replace(metrics={})
            tally.add(good, seen)
            self._note_failed(good.failed)
            self.observer.client_done(t, len(tally.reported), len(tally.asked))
            if len(good.clients):
                self.clients.add(t + 1, fn.__name__, good.clients, seen)
                self.captures.add(t, fn, down, good)
                yield good

    def _note_failed(self, failed: Mapping[int, str]) -> None:
        for client, reason in failed.items():
            self._note_once(
                reason, f"round {self.state.t + 1}: client {client} left out: {reason}"
            )

    def _note_once(self, reason: str, message: str) -> None:
        if reason not in self._warned and len(self._warned) < 20:
            self._warned.add(reason)
            self.observer.note(message)

    def _hopeless(self) -> str | None:
        """Why the run had better end: PATIENCE rounds in a row without any usable update, or every round that there was."""
        lost = len(list(takewhile(without_use, reversed(self.history))))
        if lost < PATIENCE and not (lost == self.state.t == self.e.rounds):
            return None
        reasons = ", ".join(
            f"{reason} ({n})" for reason, n in self.history[-1]["dropped"].items()
        )
        return (
            f"round {self.state.t}: no usable update in {lost} round(s) in a row; the last: {reasons}. "
            "With updates that are not finite, check the model and lower the learning rate (method.local_lr)"
        )

    # Evaluation

    def _evaluated_clients(self) -> Tensor:
        """A fixed sample, so that the cost does not grow with the population; ascending ids."""
        population, wanted = self.task.population, self.e.evaluation.clients
        if wanted >= population:
            return torch.arange(population)
        drawn = rng(self.e.seed, "evaluation").choice(
            population, wanted, replace=False, shuffle=False
        )
        return torch.from_numpy(np.sort(drawn))

    def evaluate(self) -> dict[str, Any]:
        """Global test metrics of the server's model, and the clients' own metrics of the model each would use."""
        server = self.state.server
        found: dict[str, Any] = {
            f"test_{name}": value
            for name, value in self.task.test(server.params).items()
        }
        failed: set[int] = set()
        measured = {"client": self._measure(self.method.evaluate, failed)}
        if self.state.t == self.e.rounds and self.e.finetune.epochs:
            measured["finetuned"] = self._measure(self.method.finetune, failed)
        for kind, values in measured.items():
            for name, (per_client, examples) in values.items():
                found[f"{kind}_{name}"] = spread(per_client, examples)
        if "client_nmsd" in found:
            found["nmsd_db"] = 10 * float(
                np.log10(max(found["client_nmsd"]["mean"], 1e-300))
            )
        return found | ({"evaluation_failed": len(failed)} if failed else {})

    def _measure(
        self, fn: ClientFunction, failed: set[int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By metric: its value for each evaluated client with examples, and their number; who failed is added to `failed`."""
        values: dict[str, list[tuple[Tensor, Tensor]]] = {}
        t = self.state.t - 1
        for r, seen in read(
            self.engine.each(fn, self._evaluated, Model(self.state.server.params), t)
        ):
            self._heed_stop()
            self._note_failed(r.failed)
            failed.update(r.failed)
            if len(r.clients) == 0:
                continue
            self.clients.add(t + 1, fn.__name__, r.clients, seen)
            some = seen.num_examples > 0
            for name, per_client in seen.metrics.items():
                values.setdefault(name, []).append(
                    (per_client[some].double(), seen.num_examples[some].double())
                )
        columns = {
            name: tuple(torch.cat(column) for column in zip(*pieces, strict=True))
            for name, pieces in values.items()
        }
        return {
            name: (per_client, examples)
            for name, (per_client, examples) in columns.items()
            if len(per_client)
        }

    def result(self) -> Result:
        rows = self.history
        measured: dict[str, Any] = next(
            (row for row in reversed(rows) if "test_loss" in row), {}
        )
        final: dict[str, Any] = {
            "test_loss": None,
            "test_accuracy": None,
            "client_accuracy": None,
        }
        final |= {
            key: value
            for key, value in measured.items()
            if key.startswith(("test_", "client_", "finetuned_", "nmsd_"))
        }
        final |= {"privacy": measured["privacy"]} if "privacy" in measured else {}
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
            late_answers=sum(row.get("late_answers", 0) for row in rows),
            params_sha256=params_sha256(self.state.server.params),
            run_dir=str(self.folder),
            params=self.state.server.params,
        )

    # Checkpoints

    def save(self, metrics: IO[str] | None = None) -> None:
        """The whole state of the run, on disk, in one step; and `metrics` before it, so that no checkpoint knows more rounds."""
        if metrics is not None:
            os.fsync(metrics.fileno())
        facts: dict[str, Any] = {
            "round": self.state.t,
            "engine": self.engine.choices,
            "fedcore": __version__,
        }
        facts["initial"] = self._initial
        keep: set[str] = set()
        for name, store in self.stores.items():
            if not store.stateless:
                facts[name] = store.clients()
                keep |= {
                    f"{name}-{n}" for n in store.in_use() if n not in store.changed
                }
        self.clients.write(self.state.t)
        self.checkpoint.save(self.state.t, facts, self._parts(), keep)
        for store in self.stores.values():
            store.saved()
        self._saved = time.perf_counter()

    def _parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        # Cloned: two fields of a method's server may be the same tensor, which safetensors does not take.
        yield (
            "server",
            {path: x.clone() for path, x in trees.flatten(self.state.server).items()},
        )
        yield "participation", trees.flatten(self.state.participation)
        if len(self.state.sent):
            yield "sent", {"": self.state.sent}
        for name, store in self.stores.items():
            yield from ((f"{name}-{n}", block) for n, block in store.save_blocks())

    def _restore(self, facts: dict[str, Any]) -> None:
        t = int(facts["round"])
        if facts.get("initial") != self._initial:
            raise SettingsError(
                f"initial = {self.e.initial}: its parameters are not the ones that the run in {self.folder} started from, which "
                "it still needs: put them back there, or start the run anew without --resume"
            )
        self.engine.choices.update(facts["engine"])
        server = self._part("server", self.state.server)
        sent = (
            self._part("sent", self.state.sent)
            if len(self.state.sent)
            else self.state.sent
        )
        participation = self._part("participation", self.state.participation)
        self.state = State(t, trees.to(server, self.task.device), participation, sent)
        for name, store in self.stores.items():
            if name in facts:
                store.load(facts[name], partial(self._block, name))
        self.clients.read(t)

    def _block(self, name: str, number: int) -> dict[str, Tensor]:
        return self.checkpoint.part(f"{name}-{number}")

    def _part(self, name: str, like: Tree) -> Tree:
        flat = self.checkpoint.part(name)
        expected = trees.flatten(like)
        if flat.keys() != expected.keys() or any(
            flat[path].shape != x.shape for path, x in expected.items()
        ):
            raise SettingsError(
                f"{self.folder / 'checkpoint'}: its {name} state does not fit this method and model: is it another fedcore's?"
            )
        return trees.unflatten(flat, like)

    def _check_participation(self) -> None:
        """Raises SettingsError for what the first round would find: before anything is written."""
        p = self.e.participation
        if self.process.rates is None and self.method.needs_rates():
            raise SettingsError(
                f'participation.name = "{p.name}" has no known rates p_i, which the settings of the method ask for'
            )
        if (
            isinstance(self.process, UniformProcess)
            and self.process.size < self.e.min_reports
        ):
            found = f"min_reports = {self.e.min_reports}, but a cohort has {self.process.size} clients"
            raise SettingsError(f"{found}: set it to at most that")

    def _mechanism(self) -> privacy.Mechanism | None:
        """The noise that the run adds, where it has a defence. Raises SettingsError where it would not guarantee what it says."""
        e, name = self.e, self.e.method.name
        if not self.method.differences and (
            e.defence.clip is not None or e.defence.top_k < 1
        ):
            raise SettingsError(
                f"defence.clip and defence.top_k act on differences to the global model, but {name} sends other things (whole "
                "models, or gradients): leave them out, or choose a method whose messages are differences, e.g. fedavg"
            )
        try:
            own = self.method.mechanism(self.process)
        except SettingsError as error:
            raise SettingsError(
                f'participation.name = "{e.participation.name}": {error}'
            ) from error
        if own is None:
            return privacy.local(e.defence) if e.defence.active else None
        if e.defence.active:
            raise SettingsError(
                f"{name} clips and adds its own noise: leave out defence.clip, noise_multiplier, top_k and bits"
            )
        if own.noise_multiplier and e.links.uplink != LinkSettings():
            raise SettingsError(
                f"links.uplink: noise after the clipping is not bounded, as the noise of {name} needs it: leave it out"
            )
        if own.noise_multiplier and e.min_reports:
            raise SettingsError(
                f"min_reports = {e.min_reports}: a round that is skipped would tell who was there; with {name} set min_reports = 0"
            )
        return own

    def _spent(self) -> dict[str, Any]:
        """The guarantee up to now, for this round's line; the slower accountant after the last."""
        if self.mechanism is None:
            return {}
        t, sent = self.state.t, self.state.sent
        steps = (
            int(sent.max()) if len(sent) else t
        )  # the guarantee of the client that has sent most
        delta = self.e.defence.delta or privacy.default_delta(self.task.population)
        return {
            "privacy": privacy.guarantee(
                self.mechanism, steps, delta, prv=t == self.e.rounds
            ).to_dict()
        }

    def _label_counts(self) -> np.ndarray:
        y = self.task.data.y
        if y.is_floating_point() or y.ndim != 1:
            raise SettingsError(
                "participation.alpha ties rates to classes, but the task's targets are no classes: leave it out"
            )
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
    silent: bool = False  # clients add noise, so that their scalars say nothing, and are not logged
    sent: dict[str, set[int]] = field(
        default_factory=dict
    )  # by client function, who sent a message

    def add(self, r: Reports, seen: Readout) -> None:
        self.failed.update(
            {client: reason.split(":")[0] for client, reason in r.failed.items()}
        )
        if len(r.clients) and trees.leaves(
            r.up
        ):  # who works on its own, without a message, reports nothing
            self.asked.update(r.clients.tolist())
            self.reported.update(r.clients.tolist())
            for name, values in seen.metrics.items():
                total, n = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + float(values.sum()), n + len(values)

    def count(self, fn: ClientFunction, r: Reports) -> None:
        """Who sent a message, as far as the server can tell: what did not arrive may have been read by others."""
        if not evaluates(fn) and (len(r.clients) == 0 or trees.leaves(r.up)):
            self.sent.setdefault(fn.__name__, set()).update(
                [*r.clients.tolist(), *r.failed]
            )

    def refuse_twice(self, fn: ClientFunction, clients: Tensor) -> None:
        """Noise has a key of function, round and client: the difference of two messages of one key would be bare."""
        if again := self.sent.get(fn.__name__, set()).intersection(clients.tolist()):
            raise RunError(
                f'defence.noise_multiplier: the method asks client {min(again)} for "{fn.__name__}" twice in one round, with the '
                "same noise in both messages; give the second request a client function of its own"
            )

    def messages(self, before: Tensor) -> Tensor:
        """Messages of each client up to this round."""
        after = before.clone()
        for clients in self.sent.values() if len(before) else ():
            after[[i for i in clients if 0 <= i < len(before)]] += 1
        return after

    def row(self) -> dict[str, Any]:
        dropped = Counter(self.failed.values()) + Counter(
            {"server not finite": int(self.broken)}
        )
        counts = {
            "cohort": len(self.asked),
            "reports": len(self.reported),
            "dropped": dict(dropped),
        }
        means = {f"train_{name}": total / n for name, (total, n) in self.sums.items()}
        return {
            **counts,
            "skipped": self.skipped,
            **means,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
        }


def _spill(run_dir: Path, name: str) -> Path:
    """Where a store's mapped files go. No method: a store that knew its loop would keep a finished run in memory."""
    folder = run_dir / "state" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def without_use(row: dict[str, Any]) -> bool:
    """Whether clients were asked in this round, and not one brought anything: to drop out is no failure."""
    dropped = row["dropped"]
    return bool(
        dropped.get("server not finite")
        or (row["reports"] == 0 and row["cohort"] > dropped.get("dropout", 0))
    )


def keep_finite(r: Reports, seen: Readout) -> tuple[Reports, Readout]:
    """The reports whose update is finite; the others are in `failed`. A total is there only where all are."""
    if all(seen.finite):
        return r, seen
    good, clients = torch.tensor(seen.finite), r.clients.tolist()
    bad = {
        i: "not finite: the update holds NaN or Inf"
        for i, fine in zip(clients, seen.finite, strict=True)
        if not fine
    }
    rows = good.to(r.num_examples.device)
    kept = r._replace(
        clients=r.clients[good],
        up=trees.at(r.up, rows),
        num_examples=r.num_examples[rows],
        failed={**r.failed, **bad},
    )
    return kept, Readout([], seen.num_examples[good], trees.at(seen.metrics, good))


def spread(values: Tensor, examples: Tensor) -> dict[str, float]:
    """Over clients, each counting the same: mean, standard deviation, percentiles, and the mean of the lowest tenth.

    `pooled` is the mean over all their examples. `values` and `examples` float64 [n], n > 0.
    """
    quantiles = torch.quantile(
        values, torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    ).tolist()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        **{
            f"p{percent}": value
            for percent, value in zip(PERCENTILES, quantiles, strict=True)
        },
        "lowest_tenth": values.sort().values[: -(-len(values) // 10)].mean().item(),
        "pooled": ((values * examples).sum() / examples.sum()).item(),
    }


def params_sha256(params: Params) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(
            value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    return digest.hexdigest()


def _speed(rows: list[dict[str, Any]]) -> float:
    """Clients a second, without the first round, which also warms up and measures, where there are others."""
    later = rows[1:] or rows
    return float(
        sum(row["reports"] for row in later)
        / max(sum(row["seconds"] for row in later), 1e-9)
    )


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, which the round heeds where nothing is half done; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    begin = 0.0

    def on_signal(number: int, frame: Any) -> None:
        nonlocal begin
        if not stop.is_set():
            begin = time.monotonic()
            stop.set()
        elif time.monotonic() - begin > TOGETHER:
            raise KeyboardInterrupt

    before = {
        number: signal.signal(number, on_signal)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
