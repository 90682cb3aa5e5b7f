"""A run among hostile clients: what the server does about them, and what it cannot.

Everything that could not work is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.engines.base import Work
from fedcore.errors import SettingsError
from fedcore.messages.adversary.adversary import Adversary
from fedcore.messages.aggregation.aggregator import Aggregator
from fedcore.messages.aggregation.bounds import Bounds
from fedcore.messages.aggregation.checks import odds_text, refuse_impossible
from fedcore.messages.aggregation.rule import Rule
from fedcore.method import Method
from fedcore.rounds.doors import Receiving
from fedcore.rounds.participation import Process
from fedcore.rounds.reference import Reference

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.task import Task


def adversary(experiment: Experiment, population: int) -> Adversary | None:
    """The malicious clients of a run; None where there are none."""
    if not experiment.adversary.is_active:
        return None
    return Adversary(experiment.adversary, population, experiment.seed)


def receiving(
    experiment: Experiment,
    work: Work,
    adversary: Adversary | None,
    make_folder: Callable[[], Path],
) -> Receiving:
    """What the server does to messages.

    Rows of a large cohort lie in files of `make_folder()`.
    """
    settings = experiment.aggregation
    aggregator, reference = None, None
    if not settings.is_mean:
        aggregator = Aggregator(settings, experiment.seed, make_folder)
        if aggregator.needs_reference:
            reference = Reference(work)
    is_devices = experiment.engine.name == "grid"
    bounds = Bounds(settings, is_devices)
    return Receiving(bounds, aggregator, reference, adversary)


def refuse(
    experiment: Experiment,
    method: Method[Any],
    task: Task,
    process: Process,
    note: Callable[[str], None],
) -> None:
    """Raises SettingsError where a rule or a bound cannot work; notes what it costs."""
    settings, name = experiment.aggregation, experiment.method.name
    if settings.clip is not None and not method.differences:
        raise SettingsError(
            "aggregation.clip bounds differences to the global model, but "
            f"{name} sends other things (whole models, or gradients): leave it out, or "
            "choose a method whose messages are differences, e.g. fedavg"
        )
    if settings.is_mean:
        return
    reason = method.refuses("rule")
    if reason is not None:
        raise SettingsError(
            f'aggregation.rule = "{settings.rule}" cannot take the place of the mean '
            f"of {name}: {reason}"
        )
    asked = process.largest
    refuse_impossible(settings, asked)
    if settings.rule == "fltrust" and task.proxy is None:
        raise SettingsError(
            'aggregation.rule = "fltrust" compares messages with the work of the '
            "server on examples of its own, and the task has none: set proxy, e.g. "
            "proxy = 100"
        )
    least = Rule(settings, experiment.seed).least(settings.f(asked))
    goal = experiment.engine.report_goal
    if experiment.engine.name == "grid" and goal is not None and goal < least:
        raise SettingsError(
            f"engine.report_goal = {goal}: a round ends with so many reports, and "
            f'aggregation.rule = "{settings.rule}" needs {least}; those who attack '
            "answer first: raise it"
        )
    if experiment.defence.noise_multiplier:
        note(
            f'aggregation.rule = "{settings.rule}" beside defence.noise_multiplier: '
            "noise makes all messages equally far from each other, so that what the "
            "rule leaves out is chance"
        )
    odds = _odds(experiment, task.population, asked)
    if odds:
        note(odds)


def _odds(experiment: Experiment, population: int, asked: int) -> str:
    """How likely a round has more malicious clients than the rule bears."""
    settings = experiment.aggregation
    f = settings.f(asked)
    if f == 0 or asked >= population:
        return ""
    if experiment.adversary.is_active:
        malicious = len(Adversary(experiment.adversary, population, 0).clients)
    else:
        malicious = round(f / asked * population)
    return odds_text(population, malicious, asked, f)
