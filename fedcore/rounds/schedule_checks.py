"""Schedules and clocks that do not fit the rest of a run.

They are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.clock.durations import Durations
from fedcore.clock.settings import Buffered, Replay, Synchronous, buffered_of
from fedcore.errors import SettingsError
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.messages.aggregation.checks import named
from fedcore.messages.aggregation.rule import Rule
from fedcore.rounds.participation import Process, Uniform, UniformProcess

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.method import Method
    from fedcore.task import Task

__all__ = ["expected_seconds", "has_clock", "refuse_schedule"]

Note = Callable[[str], None]

BUFFERED = 'schedule.name = "buffered"'
CLOCK = "clock.step_s, the seconds of one local step, e.g. --set clock.step_s=0.05"


def has_clock(experiment: Experiment) -> bool:
    """Whether the run's time is simulated: devices take the time that they take."""
    return experiment.clock.is_on and experiment.engine.name != "grid"


def expected_seconds(
    experiment: Experiment, task: Task, method: Method[Any]
) -> np.ndarray:
    """Seconds that local steps and latency are expected to take, [population].

    What messages take comes on top. Raises SettingsError for files of the clock that
    cannot be used.
    """
    clients = np.arange(task.population)
    steps = method.passes() * task.data.steps(clients, "train", experiment.local)
    batch_size = experiment.local.batch_size
    durations = Durations(
        experiment.clock, task.population, experiment.seed, batch_size
    )
    return durations.expected(clients, steps, 0, 0)


def refuse_schedule(
    experiment: Experiment,
    task: Task,
    method: Method[Any],
    process: Process,
    note: Note,
) -> None:
    """Raises SettingsError where the schedule does not fit the run.

    What the user should know goes to `note`.
    """
    schedule, is_grid = experiment.schedule, experiment.engine.name == "grid"
    if is_grid and experiment.clock.is_on:
        note("[clock] is of simulations: devices take the time that they take")
    if not is_grid:
        _refuse_without_clock(experiment)
    buffer = buffered_of(schedule)
    if buffer is not None:
        _refuse_method(experiment, buffer, method)
        _refuse_beside_buffer(experiment)
        _refuse_sizes(experiment, buffer, task.population)
        _refuse_rule(experiment, buffer)
        _note_cohort(experiment, buffer, note)
    if isinstance(schedule, Synchronous):
        _refuse_goal(experiment, schedule, process)
        _refuse_rates(experiment, schedule, method)
        _refuse_displaced(experiment, schedule, method, process)
        if has_clock(experiment):
            _refuse_endless(experiment, schedule)
            _refuse_two_who(experiment, process)
            _note_unheard(experiment, schedule, method, note)
            _refuse_deadline(experiment, schedule, task, method, note)


def _refuse_without_clock(experiment: Experiment) -> None:
    """Refuse settings of time where a simulation has none."""
    schedule = experiment.schedule
    if experiment.clock.is_on or isinstance(schedule, Replay):  # that has its own
        return
    if isinstance(schedule, Buffered):
        raise SettingsError(
            f"{BUFFERED} without a clock: in a simulation a clock says whose answer "
            f"comes first; set {CLOCK}"
        )
    if isinstance(schedule, Synchronous):
        for name in ("deadline_s", "goal"):
            value = getattr(schedule, name)
            if value is not None:
                raise SettingsError(
                    f"schedule.{name} = {value:g} without a clock: in a simulation "
                    f"nobody is late without one; set {CLOCK}"
                )
    if experiment.evaluation.every_s is not None:
        raise SettingsError(
            f"evaluation.every_s = {experiment.evaluation.every_s:g} without a clock: "
            f"it counts simulated seconds; set {CLOCK}, or evaluation.every"
        )


# The buffered schedule


def _refuse_method(
    experiment: Experiment, schedule: Buffered, method: Method[Any]
) -> None:
    """Refuse a method of which a buffer of answers cannot be the round."""
    name = experiment.method.name
    reason = method.refuses("buffered")
    if reason is None and method.needs_rates():
        reason = "its settings ask for rates p_i of rounds, and a buffer has none"
    if reason is not None:
        raise SettingsError(
            f"{BUFFERED} does not fit {name}: {reason}; leave schedule.name out, or "
            "choose another method, e.g. fedavg"
        )
    reason = method.refuses("discount")
    if schedule.staleness != "constant" and reason is not None:
        raise SettingsError(
            f'schedule.staleness = "{schedule.staleness}" does not fit {name}: '
            f'{reason}; set schedule.staleness = "constant"'
        )


def _refuse_beside_buffer(experiment: Experiment) -> None:
    """Refuse settings that are about cohorts, or about one version of the model."""
    participation, adversary = experiment.participation, experiment.adversary
    faults = {
        f'participation.name = "{participation.name}"': (
            not isinstance(participation, Uniform),
            "it says who takes part in a round, and work is given to whoever is idle; "
            'set participation.name = "uniform"',
        ),
        "aggregation.secure = true": (
            experiment.aggregation.secure,
            "masks need the clients of a sum before they work, and a buffer's are "
            "known when it is full; leave it out",
        ),
        f"audit.capture = {experiment.audit.capture}": (
            experiment.audit.capture > 0,
            "an update is looked at beside the model that it started from, and a "
            "buffer holds updates of several; capture in a synchronous run",
        ),
        f"audit.canaries = {experiment.audit.canaries}": (
            experiment.audit.canaries > 0,
            "they join rounds by a coin, as the accountant has it, and a buffer has "
            "none; leave it out",
        ),
        f'adversary.attack = "{adversary.attack}"': (
            _acts_on_messages(adversary),
            "malicious clients make their messages from those of a round, and a "
            'buffer\'s come one by one; choose "label_flip", or "backdoor" without '
            "scale",
        ),
    }
    for setting, (is_there, reason) in faults.items():
        if is_there:
            raise SettingsError(f"{setting} with {BUFFERED}: {reason}")


def _acts_on_messages(adversary: AdversarySettings) -> bool:
    """Whether malicious clients do more than to train on other data."""
    if adversary.attack == "backdoor":
        return adversary.scale not in (None, 1)
    return adversary.attack not in ("none", "label_flip")


def _refuse_sizes(experiment: Experiment, schedule: Buffered, population: int) -> None:
    """Refuse more clients than there are, and buffers that are never enough."""
    sizes = {"buffer": schedule.buffer, "concurrency": schedule.concurrency}
    reasons = {
        "buffer": "a client works on a version of the model once, so that a buffer "
        "could never be full",
        "concurrency": "a client works on one thing at a time",
    }
    for name, size in sizes.items():
        if size > population:
            raise SettingsError(
                f"schedule.{name} = {size}: the population is {population}, and "
                f"{reasons[name]}; set it to at most that"
            )
    if experiment.min_reports > schedule.buffer:
        raise SettingsError(
            f"min_reports = {experiment.min_reports}: a buffer has "
            f"{schedule.buffer} answers (schedule.buffer), so that every server "
            "update would be skipped: set it to at most that"
        )


def _refuse_rule(experiment: Experiment, schedule: Buffered) -> None:
    """Refuse a buffer with too few answers for the rule that makes one of them."""
    settings = experiment.aggregation
    if settings.is_mean:
        return
    f = settings.f(schedule.buffer)
    least = Rule(settings, experiment.seed).least(f)
    if schedule.buffer < least:
        raise SettingsError(
            f"schedule.buffer = {schedule.buffer}: {named(settings)} with f = {f} "
            f"malicious clients needs {least} answers: raise it, or lower f"
        )


def _note_cohort(experiment: Experiment, schedule: Buffered, note: Note) -> None:
    """Say that the size of a cohort is no setting of this schedule."""
    participation = experiment.participation
    for name in ("cohort", "fraction"):
        value = getattr(participation, name, None)
        if value is not None:
            note(
                f"participation.{name} = {value:g} does not apply: with {BUFFERED} "
                f"schedule.concurrency = {schedule.concurrency} clients work at a time"
            )


# Synchronous rounds


def _refuse_goal(
    experiment: Experiment, schedule: Synchronous, process: Process
) -> None:
    """Refuse a goal that no round reaches, or that is no report enough."""
    goal = schedule.goal
    if goal is None:
        return
    if process.largest < goal:
        raise SettingsError(
            f"schedule.goal = {goal}: a round asks at most {process.largest} clients; "
            "lower it, or ask more clients than that to over-select, e.g. "
            f"--set participation.cohort={goal + max(1, goal * 3 // 10)}"
        )
    if goal < experiment.min_reports:
        raise SettingsError(
            f"schedule.goal = {goal}: a round ends with so many reports, and "
            f"min_reports = {experiment.min_reports}: every round would be skipped; "
            "lower min_reports"
        )


def _refuse_rates(
    experiment: Experiment, schedule: Synchronous, method: Method[Any]
) -> None:
    """Refuse known rates of participation where to arrive is something else."""
    if not method.needs_rates():
        return
    settings = {
        "schedule.deadline_s": schedule.deadline_s,
        "schedule.goal": schedule.goal,
        "clock.windows": experiment.clock.windows,
    }
    for name, value in settings.items():
        if value is not None:
            raise SettingsError(
                f"{name} = {value}: who takes part may come too late, so that no rate "
                "p_i of arrival is known, which the settings of "
                f"{experiment.method.name} ask for: leave it out, or take fedau, "
                "which estimates them"
            )


def _refuse_displaced(
    experiment: Experiment,
    schedule: Synchronous,
    method: Method[Any],
    process: Process,
) -> None:
    """Refuse a server's noise where a client that joins puts another one out."""
    if schedule.goal is None:
        return
    try:
        mechanism = method.mechanism(process)
    except SettingsError:
        return  # of the process: said elsewhere
    if mechanism is not None and mechanism.noise_multiplier > 0:
        raise SettingsError(
            f"schedule.goal = {schedule.goal} with {experiment.method.name}: a client "
            "that joins a round puts a slower one out of it, so that it changes the "
            "sum by two bounds, and the accountant knows of one: set "
            "schedule.deadline_s instead"
        )


def _refuse_endless(experiment: Experiment, schedule: Synchronous) -> None:
    """Refuse rounds that wait for clients that never answer."""
    dropout = experiment.participation.dropout
    if dropout and schedule.deadline_s is None:
        raise SettingsError(
            f"participation.dropout = {dropout:g} with a clock: who drops out never "
            "answers, and a round without a deadline waits for it: set "
            "schedule.deadline_s, in seconds"
        )


def _refuse_two_who(experiment: Experiment, process: Process) -> None:
    """Refuse windows beside a process that knows when clients take part."""
    if experiment.clock.windows is None or isinstance(process, UniformProcess):
        return
    raise SettingsError(
        f'participation.name = "{experiment.participation.name}" with clock.windows: '
        "both say when a client is there: leave one of them out, or set "
        'participation.name = "uniform", which draws among those who are there'
    )


def _note_unheard(
    experiment: Experiment, schedule: Synchronous, method: Method[Any], note: Note
) -> None:
    """Say that a first round of all clients does without those who are late in it."""
    settings = {
        "schedule.deadline_s": schedule.deadline_s,
        "schedule.goal": schedule.goal,
        "clock.windows": experiment.clock.windows,
    }
    for name, value in settings.items():
        if value is not None and method.asks_everybody_first():
            note(
                f"{name} = {value}: {experiment.method.name} asks every client in its "
                "first round, and has to do without those who do not answer in time"
            )


def _refuse_deadline(
    experiment: Experiment,
    schedule: Synchronous,
    task: Task,
    method: Method[Any],
    note: Note,
) -> None:
    """Refuse a deadline that no client meets; say how many never do."""
    deadline = schedule.deadline_s
    if deadline is None:
        return
    needed = expected_seconds(experiment, task, method)
    late = int((needed > deadline).sum())
    of_all = f"{late} of {len(needed)} clients need longer than that"
    if late == len(needed) and experiment.clock.jitter == 0:
        raise SettingsError(
            f"schedule.deadline_s = {deadline:g}: {of_all}; the fastest needs "
            f"{needed.min():.3g} s, half of them {np.median(needed):.3g} s: raise it"
        )
    if late:
        on_average = " on average" if experiment.clock.jitter else ""
        note(
            f"schedule.deadline_s = {deadline:g}: {of_all}{on_average}, and are "
            f"{'seldom' if on_average else 'never'} heard, whatever their weight; half "
            f"of all need {np.median(needed):.3g} s"
        )
