"""The round loop: sample, round, evaluate, log, checkpoint; and on after any stop."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedcore import trees
from fedcore.clock.arrivals import Arrivals
from fedcore.clock.settings import counts_discount
from fedcore.errors import RunError, TooFewReports
from fedcore.rng import torch_seed
from fedcore.rounds import canary_bound
from fedcore.rounds.canaries import PlantedRound
from fedcore.rounds.captures import Captures
from fedcore.rounds.client_table import ClientTable
from fedcore.rounds.diagnosis import causes, fruitless_text
from fedcore.rounds.doors import Desk, OpenRound
from fedcore.rounds.evaluation import Evaluation
from fedcore.rounds.example_privacy import sent_again
from fedcore.rounds.history import History
from fedcore.rounds.observer import Notes, Observer, Quiet
from fedcore.rounds.opening import opened
from fedcore.rounds.refusals import refuse_same_noise_twice
from fedcore.rounds.result import Result, outcome
from fedcore.rounds.rundir import (
    changed_rule,
    clear_start,
    lock,
    make_run_dir,
    open_run_dir,
    write_settings,
)
from fedcore.rounds.saving import Saving, State, read_header
from fedcore.rounds.secret import moments_alone
from fedcore.rounds.secret_checks import refuse_change
from fedcore.rounds.setup import MakeEngine, Parts, prepare
from fedcore.rounds.signals import Interrupted, StopRequest, signals
from fedcore.rounds.tally import Exchange
from fedcore.rounds.watch import Watch
from fedcore.storage.checkpoint import Checkpoint
from fedcore.storage.faults import Lines, Unwritable
from fedcore.storage.json import without_nan

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.method import Method

__all__ = ["Interrupted", "Loop", "Observer", "Quiet", "Result", "run"]

# Rounds in a row in which every client asked failed, after which the run stops.
PATIENCE = 3


def run(
    experiment: Experiment,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    observer: Observer | None = None,
    engine: MakeEngine | None = None,
    back_to: int | None = None,
) -> Result:
    """Run an experiment to its last round, or a stopped one from where it is.

    `out` is the run directory (default: a new one in runs/), `resume` an existing one
    to go on with, from its newest checkpoint or from that of round `back_to`. `engine`
    makes another engine than the one that the settings name. Raises SettingsError,
    RunError, and Interrupted (after a checkpoint) on SIGINT.
    """
    folder = open_run_dir(experiment, out, resume, back_to)
    is_old = resume is not None
    try:
        loop = Loop(experiment, folder, observer or Quiet(), engine, is_old, back_to)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # made for this run, and still empty
        raise
    is_writable = True
    try:
        return loop.run()
    except Unwritable:
        is_writable = False
        raise
    finally:
        loop.close(is_writable)


class Loop:
    """One run: the parts, wired; `run` takes it round by round to the end."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        observer: Observer,
        make_engine: MakeEngine | None,
        resume: bool,
        back_to: int | None = None,
    ) -> None:
        self.begin = time.perf_counter()
        self.experiment, self.folder, self.observer = experiment, folder, observer
        self.notes = Notes(observer)
        self._lock = lock(folder) if resume else None
        try:
            self._build(make_engine, resume, back_to)
        except BaseException:
            # A file that is closed later would take the lock of the next run with it.
            if self._lock is not None:
                self._lock.close()
            raise

    def _build(
        self, make_engine: MakeEngine | None, resume: bool, back_to: int | None
    ) -> None:
        experiment, folder, observer = self.experiment, self.folder, self.observer
        checkpoint = Checkpoint(folder / "checkpoint", experiment.checkpoint.keep)
        header = None
        self._changed: dict[str, Any] = {}  # settings of the rule, by this start
        if resume:
            header = read_header(checkpoint, folder, experiment.rounds, back_to)
            self._changed = changed_rule(experiment, folder)
            refuse_change(self._changed, folder)
            if header is None and (folder / "metrics.jsonl").exists():
                observer.note(f"{folder} has no checkpoint yet: its run begins anew")
        parts = prepare(experiment, folder, make_engine, observer.note)
        if back_to is not None:
            refuse_same_noise_twice(experiment, parts.mechanism, bool(self._changed))
        self.parts = parts
        self.task, self.method, self.process = parts.task, parts.method, parts.process
        self.engine, self.memory = parts.engine, parts.memory
        self.stores, self.canaries = parts.stores, parts.canaries
        self.clients, self.arrivals = ClientTable(folder), Arrivals(folder)
        self.timing = parts.timing
        self.captures = Captures(folder, experiment, self.method)
        self.saving = Saving(checkpoint, parts, [self.clients, self.arrivals])
        self.state = self._first_or_restored(parts, header)
        # Lines that were logged after the checkpoint go: those rounds are run again.
        self.history = History.read(folder / "metrics.jsonl", self.state.t)
        if resume:
            sent = sent_again(experiment, self.state, folder)
            self.state = self.state._replace(sent=sent)
        make_run_dir(folder)
        self._lock = self._lock or lock(folder)
        if not resume:
            clear_start(folder)
        if back_to is not None:
            self.saving.go_back()
        write_settings(folder, experiment, self.task.base_sha256)
        self.history.write(folder / "metrics.jsonl")
        self.clients.cut(self.state.t)
        self.arrivals.cut(self.state.t)
        jump, usual = experiment.checkpoint.jump, self.timing.usual
        self._watch = Watch(self.notes, jump, usual)
        self._watch.resume(folder, self.history)
        self._stop = StopRequest(folder, experiment.rounds)
        self._last_problem = ""  # why a round left the model as it was
        self._last_exchange: Exchange | None = None  # of the last round
        self.desk = Desk(
            self.engine,
            parts.work,
            self.clients,
            self.captures,
            observer,
            self.notes,
            self._stop,
            parts.receiving,
            parts.timing,
            counts_discount(experiment.schedule),
        )
        self._evaluation = Evaluation(experiment, parts, self.desk)

    def _first_or_restored(self, parts: Parts, header: dict[str, Any] | None) -> State:
        state = _first_state(parts)
        if header is not None:
            state = self.saving.restore(header, state, self.task.device)
        if self._changed:
            # What another rule kept says nothing to this one.
            state = state._replace(aggregation=moments_alone(state.aggregation))
        return state

    def close(self, is_writable: bool = True) -> None:
        try:
            self.engine.close()
            if is_writable:
                self.clients.merge()
                self.arrivals.merge()
        finally:
            if self._lock is not None:
                self._lock.close()
            shutil.rmtree(self.folder / "state", ignore_errors=True)

    def run(self) -> Result:
        """To the last round.

        Raises Interrupted on SIGINT or SIGTERM, Unwritable where the run directory
        takes no more, and whatever fails in a round, with a checkpoint of the last
        whole round.
        """
        try:
            return self._run()
        except Unwritable as error:
            kept = self.saving.rounds_kept
            then = "then start the run again"
            if kept is not None:
                then = f"then resume the run, from its checkpoint of round {kept}"
            error.message += f", {then}"
            raise

    def _run(self) -> Result:
        rounds, stops = self.experiment.rounds, self.experiment.checkpoint.stop_on_jump
        seconds = self.experiment.checkpoint.seconds
        population, history = self.task.population, self.history
        self.observer.started(self.experiment, self.engine, population, history)
        metrics = Lines(self.folder / "metrics.jsonl")
        with closing(metrics), signals(self._stop):
            while self.state.t < rounds:
                try:
                    self._stop.round_done(self.state.t)
                    self._stop.heed()
                    row = self.round()
                except Exception:
                    for store in self.stores.values():
                        store.rollback()
                    self.saving.save(self.state, metrics, self.history.score)
                    raise
                jump = self._watch.jump(row, history)
                if jump is not None:
                    row["jump"] = jump.field()
                history.add(row)
                metrics.add(json.dumps(row))
                self.observer.round_done(row)
                hopeless, score = self._hopeless(), row.get("test_loss")
                is_end = bool(hopeless) or self.state.t == rounds
                is_end |= jump is not None and stops
                if is_end or self.saving.is_due(seconds, score):
                    self.saving.save(self.state, metrics, score)
                if hopeless:
                    raise RunError(hopeless)
                if jump is not None:
                    remedy = self.desk.receiving.remedy
                    text = jump.advice(self.folder, self.saving.rounds(), remedy)
                    if stops:
                        raise RunError(f"{text} (checkpoint.stop_on_jump)")
                    self.observer.note(text)
        params = self.state.server.params
        return outcome(self.experiment, self.task, history, params, self.folder)

    def round(self) -> dict[str, Any]:
        """One round: the row that metrics.jsonl gets. Replaces `self.state`."""
        before = self._evaluation.before(self.state, self.folder)
        begin, late, t = time.perf_counter(), self.engine.late, self.state.t
        self.timing.begin(t, self.state.timing)
        drawn = self.timing.cohort(self.process, t, self.state.participation)
        cohort, participation = drawn
        self.captures.begin(t, cohort)
        r = self.open_round(t, cohort)
        tally = r.tally
        server, problem = self._attempt(r)
        for _ in self.timing.late_work():
            self.desk.heard(t, {})
        if problem is not None:
            self.memory.rollback()
            if tally.is_secret and not tally.sums and self.engine.states is not None:
                # Devices forget work that is in no sum, and keep what is in one,
                # whatever became of the round.
                self.engine.states.rollback()
            server, tally.is_skipped = self.state.server, True
            self._last_problem = problem
            message = f"round {t + 1} left the model as it was: {problem}"
            self.notes.once("skipped", message)
        missing = self.captures.end(t)
        if missing is not None:
            self.notes.once("captures", missing)
        tally.failed |= dict.fromkeys(r.absent, "dropout")
        watched = self._watch.close_round(t + 1, tally)
        self.clients.close_round(t + 1, tally)
        spent = self.timing.end(tally)
        self.arrivals.add(spent.arrivals)
        for columns in spent.exchanges:
            self.arrivals.add_columns(columns)
        sent = tally.messages(self.state.sent)
        kept = (r.aggregation, r.adversary)
        if problem is not None:
            kept = (self.state.aggregation, self.state.adversary)
        after = State(t + 1, server, participation, sent, *kept, spent.kept)
        now = time.perf_counter()
        row: dict[str, Any] = {"round": t + 1, **before, **tally.row(), **watched}
        row |= spent.row
        if self._changed:
            row["changed"], self._changed = self._changed, {}
        row["seconds"] = round(now - begin, 4)
        row |= {f"server_{name}": value for name, value in r.log.items()}
        if self.engine.late > late:  # since the round before: answers to earlier ones
            row["late_answers"] = self.engine.late - late
        if t == 0:
            row["first_round_s"] = round(now - self.begin, 3)
        if problem is None and isinstance(r, PlantedRound):
            row |= r.row(self.state.server.params, server.params)
        row |= self._evaluation.due(self.state, after, self.folder)
        if self.canaries is not None:
            row |= canary_bound.measured_in([*self.history.rows, row], self.notes.once)
        # Last, so that a stop within the evaluation leaves the whole round undone. A
        # client has done its work, whatever became of the round.
        for store in self.stores.values():
            store.commit()
        self.state, self._last_exchange = after, tally.exchange
        return {key: without_nan(value) for key, value in row.items()}

    def open_round(self, t: int, cohort: torch.Tensor) -> OpenRound:
        """Round t with this cohort, whose doors lead to the engine."""
        return opened(self.experiment, self.parts, self.desk, self.state, t, cohort)

    def _attempt(self, r: OpenRound) -> tuple[Any, str | None]:
        return attempted(self.experiment, self.method, self.state.server, r)

    def _hopeless(self) -> str | None:
        """Why the run had better end.

        PATIENCE rounds in a row without any usable update, or every round that there
        was.
        """
        lost = self.history.fruitless
        is_whole_run = lost == self.state.t == self.experiment.rounds
        if lost < PATIENCE and not is_whole_run:
            return None
        work, states = self.desk.work, self.engine.states
        told = causes(work, states, self._last_exchange, self.state.t - 1)
        text = fruitless_text(self.history, self._last_problem)
        return "; ".join([text, *told])

    def evaluate(self) -> dict[str, Any]:
        """Measures of the current state: of the test set, and over clients."""
        state, rounds = self.state, self.experiment.rounds
        return self._evaluation.row(state.server, state.t - 1, state.t == rounds)


def attempted(
    experiment: Experiment, method: Method[Any], before: Any, r: OpenRound
) -> tuple[Any, str | None]:
    """(the server's state after a round, why it cannot be used)."""
    device = r.task.device
    try:
        with torch_seed(experiment.seed, "server", r.t, device=device):
            server = method.round(before, r)
    except TooFewReports as error:
        is_secret = experiment.aggregation.secure  # and says more itself
        if r.tally.failed and not r.tally.reported and not is_secret:
            return None, "no client sent a usable update"
        return None, str(error)
    server = trees.to(server, device)
    reports, needed = r.tally.num_reports, experiment.min_reports
    is_somebody_asked = len(r.cohort) > 0 or r.desk.timing.is_buffered
    if is_somebody_asked and reports < needed:
        return None, f"{reports} reports, expected at least {needed}"
    if not bool(trees.finite(server)):
        r.tally.is_broken = True
        return None, "the mean of finite updates is not finite"
    return server, None


def _first_state(parts: Parts) -> State:
    """The state before the first round."""
    population, device = parts.task.population, parts.task.device
    server = parts.method.init_server(trees.to(parts.params, device), population)
    mechanism = parts.mechanism
    counts_messages = mechanism is not None and mechanism.counts_messages
    counts_messages |= parts.work.local.dp.is_active
    sent = torch.zeros(population if counts_messages else 0, dtype=torch.int64)
    return State(0, trees.to(server, device), parts.process.start(), sent, {}, {}, {})
