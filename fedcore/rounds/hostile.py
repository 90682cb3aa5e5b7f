"""A run among hostile clients: what the server does about them, and what it cannot.

Everything that could not work is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.clock.settings import goal_of
from fedcore.engines.base import Work
from fedcore.errors import SettingsError
from fedcore.messages.aggregation.aggregator import Aggregator
from fedcore.messages.aggregation.bounds import Bounds
from fedcore.messages.aggregation.checks import named, odds_text, refuse_impossible
from fedcore.messages.aggregation.rule import Rule
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.method import Method
from fedcore.rounds.doors import Receiving
from fedcore.rounds.participation import Process
from fedcore.rounds.reference import Reference

if TYPE_CHECKING:
    from fedcore.config import Experiment


def receiving(
    experiment: Experiment,
    work: Work,
    make_folder: Callable[[], Path],
) -> Receiving:
    """The server's treatment of messages.

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
    return Receiving(bounds, aggregator, reference, _remedy(settings, work.method))


def _remedy(settings: AggregationSettings, method: Method[Any]) -> str:
    """Settings that bear more liars than these."""
    if not settings.is_mean:
        return "with another rule, or a larger f"
    if method.refuses("rule") is None:
        return "with a rule that outvotes liars: --set aggregation.rule=median"
    if method.differences and settings.clip is None:
        return "with a bound on messages: aggregation.clip"
    return "without the clients that are at fault"


def refuse(
    experiment: Experiment,
    work: Work,
    process: Process,
    note: Callable[[str], None],
) -> None:
    """Raises SettingsError where a rule or a bound cannot work; notes what it costs."""
    method, task = work.method, work.task
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
            f"{named(settings)} cannot take the place of the mean of {name}: {reason}"
        )
    asked = process.largest
    is_set = experiment.participation.name == "uniform"  # others draw its size
    largest = task.population if is_set else asked
    has_proxy = task.proxy is not None
    refuse_impossible(settings, asked, largest=largest, has_proxy=has_proxy)
    least = Rule(settings, experiment.seed).least(settings.f(asked))
    goal = goal_of(experiment.schedule)
    if goal is not None and goal < least:
        raise SettingsError(
            f"schedule.goal = {goal}: a round ends with so many reports, and "
            f'aggregation.rule = "{settings.rule}" needs {least}; those who attack '
            "answer first: raise it"
        )
    if experiment.defence.noise_multiplier:
        note(
            f'aggregation.rule = "{settings.rule}" beside defence.noise_multiplier: '
            "noise makes all messages equally far from each other, so that what the "
            "rule leaves out is chance"
        )
    if process.rates is not None:
        usual = round(float(process.rates.sum()))
        needed = Rule(settings, experiment.seed).least(settings.f(usual))
        if usual < needed:
            note(
                f"a round asks {usual} clients on average, and {named(settings)} needs "
                f"{needed} messages: most rounds will be skipped"
            )
    odds = _odds(experiment, work, asked)
    if odds:
        note(odds)


def _odds(experiment: Experiment, work: Work, asked: int) -> str:
    """The odds of more malicious clients in a round than the rule bears, in words."""
    settings, population = experiment.aggregation, work.task.population
    f = settings.f(asked)
    if f == 0 or asked >= population:
        return ""
    malicious = len(work.adversary.clients) or round(f / asked * population)
    if malicious <= f:
        return ""
    return odds_text(settings, population, asked, malicious / population)
