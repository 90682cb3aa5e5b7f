"""The timing of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedcore import trees
from fedcore.clock.durations import Durations
from fedcore.clock.queue import Queue
from fedcore.clock.replay import ReplayPlan
from fedcore.clock.settings import Buffered, Replay
from fedcore.clock.windows import Windows
from fedcore.engines.base import BufferedGrid, Engine, Work
from fedcore.engines.message_shape import message_shape
from fedcore.rounds.buffer import BufferedRounds, Flight, Ring, first_exchange
from fedcore.rounds.clocked import ClockedRounds
from fedcore.rounds.field import BufferedField, FieldRounds
from fedcore.rounds.replayed import ReplayedRounds
from fedcore.rounds.sources import ClockSource, Source, TraceSource
from fedcore.rounds.timing import SECOND, Timing, microseconds
from fedcore.storage.rows import StateStore
from fedcore.types import ClientFunction, Params, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment


def timing_of(
    experiment: Experiment,
    work: Work,
    engine: Engine,
    params: Params,
    spill: Callable[[str], Path],
) -> Timing:
    """The timing of a run; `spill(name)` is a directory for rows of that name.

    Raises SettingsError where a file of the clock cannot be used.
    """
    clock, schedule = experiment.clock, experiment.schedule
    if experiment.engine.name == "grid":
        return _field(experiment, work, cast("BufferedGrid", engine), params, spill)
    if isinstance(schedule, Replay):
        return _replayed(experiment, schedule, work, engine, params, spill)
    if not clock.is_on:
        return Timing()
    population, batch_size = work.task.population, experiment.local.batch_size
    durations = Durations(clock, population, experiment.seed, batch_size)
    windows = Windows.of(clock) if clock.windows is not None else None
    if isinstance(schedule, Buffered):
        queue = Queue(
            schedule,
            population,
            experiment.seed,
            dropout=experiment.participation.dropout,
            windows=windows,
        )
        source = ClockSource(queue, durations, round(clock.server_s * SECOND))
        return buffered(experiment, schedule, source, work, engine, params, spill)
    return ClockedRounds(experiment, work, engine, durations, windows)


def buffered(
    experiment: Experiment,
    settings: Buffered,
    source: Source,
    work: Work,
    engine: Engine,
    params: Params,
    spill: Callable[[str], Path],
) -> BufferedRounds:
    """Buffered rounds of this source."""
    timing = BufferedRounds(settings, source, work, engine)
    timing.keeps_last_only = experiment.aggregation.rule != "mean"
    if experiment.engine.name != "vectorised" and (experiment.engine.chunk or 1) == 1:
        timing.piece = 1  # as the engine hands them on, and a server of devices does
    ram = int(experiment.checkpoint.state_ram_gb * 1e9)
    task, states = work.task, engine.states
    fn, down = _first_exchange(work, params)
    if states is not None and not states.is_stateless:
        timing.ring = _ring(experiment, work, down, spill)
    else:
        row = Flight.row_of(message_shape(work, fn, down, 0))
        store = StateStore(row, ram, partial(spill, "flight"), task.device)
        timing.flight = Flight(store)
    return timing


def _replayed(
    experiment: Experiment,
    schedule: Replay,
    work: Work,
    engine: Engine,
    params: Params,
    spill: Callable[[str], Path],
) -> Timing:
    """The timing of a recorded run."""
    server_us = round(experiment.clock.server_s * SECOND)
    plan = ReplayPlan(schedule, work.task.population, server_us)
    functions = set()
    for name in dir(type(work.method)):
        if hasattr(getattr(type(work.method), name), "client_data"):
            functions.add(name)
    plan.refuse(experiment.rounds, functions)
    if isinstance(schedule.of, Buffered):
        source, settings = TraceSource(plan), schedule.of
        return buffered(experiment, settings, source, work, engine, params, spill)
    has_windows = experiment.clock.windows is not None
    deadline = microseconds(schedule.of.deadline_s)
    return ReplayedRounds(plan, work, engine, deadline, has_windows)


def _field(
    experiment: Experiment,
    work: Work,
    engine: BufferedGrid,
    params: Params,
    spill: Callable[[str], Path],
) -> Timing:
    """The timing of devices."""
    schedule = experiment.schedule
    if not isinstance(schedule, Buffered):
        return FieldRounds(engine)
    _, down = _first_exchange(work, params)
    return BufferedField(schedule, engine, _ring(experiment, work, down, spill))


def _first_exchange(work: Work, params: Params) -> tuple[ClientFunction, Tree]:
    task = work.task
    server = work.method.init_server(trees.to(params, task.device), task.population)
    return first_exchange(work.method, server, task)


def _ring(
    experiment: Experiment, work: Work, down: Tree, spill: Callable[[str], Path]
) -> Ring:
    """Room for messages like `down`."""
    ram = int(experiment.checkpoint.state_ram_gb * 1e9)
    row = trees.zeros_like(down)
    return Ring(StateStore(row, ram, partial(spill, "ring"), work.task.device))
