"""The noise that clients add to secure sums: how much a run needs, and what it gives.

Clients that leave take their noise along. A sum is made of t clients at least, of which
a may collude: the noise of n0 = t - a others is counted on. t is `secure.threshold`, or
that of a cohort of the size that is expected. Where more clients stay, there is more
noise than is accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedcore import privacy
from fedcore.clock.settings import goal_of
from fedcore.engines.base import Work
from fedcore.errors import SettingsError
from fedcore.messages.secure import graph
from fedcore.messages.secure.distributed import DistributedNoise, deviation_for
from fedcore.rounds.participation import Process
from fedcore.rounds.secret_checks import SHOWN, probed, share_below
from fedcore.types import Params

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.method import Method

NOISE = "defence.distributed"
DIGITS = 9  # of an expected number of clients
HALF = 2**31  # numbers of a sum from here on would wrap around


def distributed_noise(
    experiment: Experiment,
    work: Work,
    process: Process,
    params: Params,
    note: Callable[[str], None],
) -> DistributedNoise | None:
    """The noise that each client adds; None where none is asked for.

    `params` are the initial ones. Raises SettingsError where it would not guarantee
    what it says; notes how many rounds it costs.
    """
    settings = experiment.defence.distributed
    if not settings.is_active:
        return None
    _refuse_method(experiment, work.method)
    num_entries = _longest_message(experiment, work, process, params)
    expected = expected_clients(experiment, process)
    honest = _honest(experiment, expected)
    noising = DistributedNoise(
        settings.clip,
        settings.noise_multiplier,
        honest,
        num_entries,
        settings.colluding,
        deviation_for(num_entries, honest, settings.noise_multiplier),
        divisor=expected,
        seed=experiment.seed,
        is_secret=experiment.engine.name == "grid",
    )
    _refuse_wrapping(noising, process.largest)
    _refuse_few(experiment, noising, process, note)
    return noising


def mechanism_of(noising: DistributedNoise) -> privacy.Mechanism:
    """The mechanism that one sum with this noise is, for the accountant."""
    return privacy.distributed(noising.effective_multiplier, noising.is_secret)


def expected_clients(experiment: Experiment, process: Process) -> float:
    """The mean number of clients that answer in a round.

    A trace is known beforehand: its mean over the run's rounds. Devices may be asked in
    excess of the reports that a round waits for.
    """
    if process.rates is not None:
        size = math.fsum(process.rates)
    else:
        sizes = [len(process.members(t)) for t in range(experiment.rounds)]
        size = float(np.mean(sizes))
    # 100 clients at a rate of 0.2 are 20, and no rounding of floats makes them fewer:
    # the threshold is that of whole clients.
    size = round(size * (1 - experiment.participation.dropout), DIGITS)
    goal = goal_of(experiment.schedule)
    if goal is not None:
        return min(size, float(goal))
    return size


def _refuse_method(experiment: Experiment, method: Method[Any]) -> None:
    name = experiment.method.name
    if not experiment.aggregation.secure:
        raise SettingsError(
            f"{NOISE}: a client's own noise is too little for its own message, and "
            "only a sum of which nothing else is seen has enough: set "
            "aggregation.secure = true; for noise that is enough for every message "
            "set defence.clip and defence.noise_multiplier"
        )
    reason = method.refuses("distributed")
    if reason is not None:
        raise SettingsError(f"{NOISE} does not fit {name}: {reason}")


def _longest_message(
    experiment: Experiment, work: Work, process: Process, params: Params
) -> int:
    """d: numbers of the longest message that is summed."""
    sums, name = probed(experiment, work, process, params), experiment.method.name
    for asked in sums:
        for _, rule in asked.parts:
            counts_one = rule == "equally"
            if isinstance(rule, Tensor):
                counts_one = bool((rule == 1).all())
            if not counts_one:
                raise SettingsError(
                    f"{NOISE} does not fit {name}: {asked.function} is weighed, and "
                    "one client's share of a sum has to be bounded; choose a method "
                    "in which clients count the same"
                )
    longest = max((asked.num_entries for asked in sums), default=0)
    if longest == 0:
        raise SettingsError(
            f"{NOISE} does not fit {name}: no sum of a first round was found, and the "
            "accountant has to know the length of messages"
        )
    return longest


def _honest(experiment: Experiment, expected: float) -> int:
    """n0, clients whose noise is counted on."""
    colluding = experiment.defence.distributed.colluding
    n = int(expected)
    t = experiment.secure.threshold
    source = f"secure.threshold = {t}"
    if t is None:
        t = graph.threshold(n, experiment.secure.neighbours) if n > 1 else 2
        source = f"the threshold of {n} clients, that are expected, is {t}"
    if colluding >= t:
        raise SettingsError(
            f"{NOISE}.colluding = {colluding}: a sum has {t} clients at least "
            f"({source}), and one of them has to be honest: set it below {t}"
        )
    return t - colluding


def _refuse_wrapping(noising: DistributedNoise, largest: int) -> None:
    """Refuse a sum that 32 bits might not hold."""
    reach = noising.largest_sum(largest)
    if reach >= HALF:
        raise SettingsError(
            f"{NOISE}.noise_multiplier = {noising.noise_multiplier:g}: a number of a "
            f"sum of {largest} clients may reach {reach:.3g} steps, and 32 bits hold "
            f"{HALF:.3g}: more noise makes steps larger, so raise it; or ask fewer "
            "clients"
        )


def _refuse_few(
    experiment: Experiment,
    noising: DistributedNoise,
    process: Process,
    note: Callable[[str], None],
) -> None:
    """Refuse rounds that nearly all have too little noise; note those that have."""
    dropout, least = experiment.participation.dropout, noising.least
    skipped = share_below(least, process, dropout, experiment.rounds)
    if skipped <= SHOWN:
        return
    line = (
        f"{NOISE}: {100 * skipped:.2g} % of the rounds have fewer than {least} "
        "clients, whose noise is counted on, and are skipped"
    )
    if skipped > 0.5:
        raise SettingsError(f"{line}: set secure.threshold lower, or ask more clients")
    note(line)
