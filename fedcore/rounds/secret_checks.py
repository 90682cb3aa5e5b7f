"""Runs whose sums cannot be made in secret: refused before anything is written."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore import privacy, trees
from fedcore.clock.settings import goal_of
from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.errors import SettingsError
from fedcore.messages.links import LinkSettings
from fedcore.messages.secure import graph
from fedcore.messages.secure.ask import Part
from fedcore.messages.secure.sending import EXAMPLES, Unusable, refuse_integers
from fedcore.messages.secure.settings import SecureSettings
from fedcore.messages.vectors import layout
from fedcore.method import Round
from fedcore.reports import Mean, Reports, Weight, Weights, by_examples
from fedcore.rng import torch_seed
from fedcore.rounds.participation import Process, UniformProcess
from fedcore.rounds.secret import parts_of
from fedcore.types import ClientFunction, News, Params, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.method import Method

log = logging.getLogger("fedcore")

SECURE = "aggregation.secure = true"
MOST = 2**20  # clients in a sum: more would leave too few levels
SHOWN = 1e-3  # share of rounds that are skipped, from which the user is told


def refuse_secret(
    experiment: Experiment,
    work: Work,
    process: Process,
    params: Params,
    note: Callable[[str], None],
) -> None:
    """Raises SettingsError where sums cannot be made in secret; notes what they cost.

    `params` are the initial ones.
    """
    if work.sending is None:
        return
    _refuse_method(work.method, experiment.method.name)
    _refuse_looks(experiment)
    _refuse_sizes(experiment, work.task.population, process, note)
    rules = set[str]()
    for asked in probed(experiment, work, process, params):
        rules.update(part.rule for part in asked.parts if isinstance(part.rule, str))
    _refuse_counts(experiment, work, note, "examples" in rules)
    if experiment.defence.top_k < 1:
        note(
            f"defence.top_k = {experiment.defence.top_k} with {SECURE}: masked "
            "messages are as long as whole ones, and a sum shows entries that one "
            "client alone has sent"
        )


def refuse_telling_skips(
    experiment: Experiment,
    mechanism: privacy.Mechanism | None,
    process: Process,
    population: int,
) -> None:
    """Raises SettingsError where rounds without a sum would tell who was there.

    The accountant of `global_model` knows of rounds with noise alone. A round that is
    skipped leaves the model as it was, and so says that few took part. With p the
    chance of such a round in the run, delta' = delta + (1 + e^epsilon) p.
    """
    is_due = mechanism is not None and mechanism.view == "global_model"
    if not experiment.aggregation.secure or not is_due or mechanism is None:
        return
    z, q, rounds = mechanism.noise_multiplier, mechanism.sample_rate, experiment.rounds
    if z == 0:
        return
    delta = experiment.defence.delta or privacy.default_delta(population)
    dropout = experiment.participation.dropout
    least = max(graph.LEAST, experiment.secure.threshold or 0)
    chance = rounds * share_below(least, process, dropout, rounds)
    epsilon = privacy.epsilon_rdp(z, q, rounds, delta)
    if math.log1p(math.exp(-epsilon)) + epsilon + _log(chance) > _log(delta / 100):
        raise SettingsError(
            f"{SECURE} with {experiment.method.name}: a round of fewer than {least} "
            f"clients is skipped, which tells how many were there, and with a chance "
            f"of {chance:.2g} there is one in this run: too much beside delta = "
            f"{delta:.2g}; ask more clients"
        )


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def refuse_change(changed: Mapping[str, list[Any]], folder: Path) -> None:
    """Raises SettingsError where a run that goes on would change who sees updates.

    `changed` are settings by name, [before, now].
    """
    if "aggregation.secure" in changed:
        before, now = (str(value).lower() for value in changed["aggregation.secure"])
        raise SettingsError(
            f"{folder} cannot be resumed: aggregation.secure was {before} and is now "
            f"{now}, and it says who keeps what is remembered of clients; set it to "
            f"{before}, or start a new run"
        )


def _refuse_method(method: Method[Any], name: str) -> None:
    reason = method.refuses("secure")
    if reason is not None:
        raise SettingsError(f"{SECURE} does not fit {name}: {reason}")


def _refuse_looks(experiment: Experiment) -> None:
    """Refuse what acts on, or looks at, single messages on their way."""
    faults = {
        "links.uplink": (
            experiment.links.uplink != LinkSettings(),
            "noise on a masked message would stay when the masks are taken off",
        ),
        "defence.bits": (
            experiment.defence.bits is not None,
            "numbers are rounded already, to the levels of the ring",
        ),
        "audit.capture": (
            experiment.audit.capture > 0,
            "it keeps single updates, which nobody sees; audit a run without it, with "
            "--defence secagg=M",
        ),
    }
    for setting, (is_there, reason) in faults.items():
        if is_there:
            raise SettingsError(f"{setting} with {SECURE}: {reason}; leave it out")


# Sizes of rounds


def _refuse_sizes(
    experiment: Experiment,
    population: int,
    process: Process,
    note: Callable[[str], None],
) -> None:
    settings, largest = experiment.secure, process.largest
    least = max(graph.LEAST, settings.threshold or 0)
    if largest > MOST:
        raise SettingsError(
            f"{SECURE}: a cohort of up to {largest:,} clients; expected at most "
            f"{MOST:,}, as their sum has to fit into 32 bits"
        )
    if largest < least:
        raise SettingsError(
            f"{SECURE}: a cohort has at most {largest} clients, and a sum needs "
            f"{least}: {_why(settings)}; ask more clients"
        )
    _refuse_graph(settings, largest)
    goal = goal_of(experiment.schedule)
    if goal is not None and goal < least:
        raise SettingsError(
            f"schedule.goal = {goal} with {SECURE}: a round ends with so many "
            f"reports, and a sum needs {least}: {_why(settings)}; raise it"
        )
    evaluated = min(experiment.evaluation.clients, population)
    if 0 < evaluated < graph.LEAST:
        raise SettingsError(
            f"{SECURE}: {evaluated} clients are evaluated, and a sum needs "
            f"{graph.LEAST}: {_why(SecureSettings())}; raise evaluation.clients, or "
            "set it to 0"
        )
    dropout = experiment.participation.dropout
    skipped = share_below(least, process, dropout, experiment.rounds)
    if skipped > 0.5:
        raise SettingsError(
            f"{SECURE}: {100 * skipped:.3g} % of the rounds have fewer than {least} "
            f"clients, and are skipped: {_why(settings)}; ask more clients"
        )
    if skipped > SHOWN:
        note(
            f"{SECURE}: about {100 * skipped:.2g} % of the rounds will have fewer than "
            f"{least} clients, and be skipped"
        )


def _why(settings: SecureSettings) -> str:
    if settings.threshold is not None and settings.threshold > graph.LEAST:
        return f"secure.threshold = {settings.threshold}"
    return "of two clients each would know the other's update"


def _refuse_graph(settings: SecureSettings, largest: int) -> None:
    """Refuse neighbours and a threshold that clients would refuse."""
    k = graph.degree(largest, settings.neighbours)
    t = settings.threshold or graph.threshold(largest, settings.neighbours)
    fault = graph.graph_fault(largest, k, t)
    if fault is not None:
        raise SettingsError(
            f"secure.neighbours, secure.threshold: in a cohort of {largest}: {fault}; "
            "leave them out to have them chosen"
        )


def share_below(least: int, process: Process, dropout: float, rounds: int) -> float:
    """The share of rounds with some clients, but fewer than `least` that answer.

    As if clients took part independently of each other, but for a trace, and for
    cohorts of one size.
    """
    if isinstance(process, UniformProcess):
        return _below(least, np.full(process.size, 1 - dropout))
    if process.rates is not None:
        return _below(least, process.rates * (1 - dropout))
    shares = []
    for t in range(rounds):
        size = len(process.members(t))
        shares.append(_below(least, np.full(size, 1 - dropout)))
    return float(np.mean(shares)) if shares else 0.0


def _below(least: int, rates: np.ndarray) -> float:
    """P(0 < number of clients < least), each there with its rate."""
    deviation = float(np.sqrt((rates * (1 - rates)).sum()))
    if rates.sum() - 8 * deviation > least:
        return 0.0  # less than 1e-14, by Bernstein's inequality
    ways = np.zeros(least)  # P(so many of the clients up to here)
    ways[0] = 1.0
    for rate in rates.tolist():
        ways[1:] = ways[1:] * (1 - rate) + ways[:-1] * rate
        ways[0] *= 1 - rate
    return float(ways[1:].sum())


# Counts


def _refuse_counts(
    experiment: Experiment, work: Work, note: Callable[[str], None], is_weighed: bool
) -> None:
    """Refuse counts that are no whole numbers; note those that are capped unasked."""
    counts = work.task.num_examples(np.arange(work.task.population), "train")
    fractions = np.flatnonzero(counts != np.floor(counts))
    if len(fractions):
        client = int(fractions[0])
        raise SettingsError(
            f"{SECURE}: the sizes of client {client}'s examples add up to "
            f"{counts[client]:g}, and sums count in whole numbers: give the task a "
            "size of whole numbers"
        )
    above = int((counts > EXAMPLES).sum())
    if is_weighed and above and experiment.aggregation.max_examples is None:
        note(
            f"{above} of {len(counts)} clients have more than {EXAMPLES} examples, "
            f"which count as {EXAMPLES} in a secure sum: set aggregation.max_examples "
            f"= {int(counts.max())} to count all, at the price of coarser numbers"
        )


# A round on trial


class Asked(NamedTuple):
    """A sum that a method asks for."""

    function: str
    parts: tuple[Part, ...]  # the rules by which messages are weighed
    num_entries: int  # of all vectors of one message


@dataclass(frozen=True)
class Trial(Round):
    """A round that asks nobody, and looks at what the method asks for."""

    work: Work = field(kw_only=True)
    sums: list[Asked] = field(kw_only=True)

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        weight: Weight | Tensor | Weights = by_examples,
        news: News | None = None,
    ) -> Mean:
        parts = parts_of(weight)
        message = message_shape(self.work, fn, down, self.t, news)
        places, leaves = layout(message, axes=0), trees.leaves(message)
        try:
            refuse_integers(message, places)
        except Unusable as error:
            raise SettingsError(f"{SECURE}: {fn.__name__} sends {error}") from error
        inside = itertools.chain.from_iterable(places.vectors)
        num_entries = sum(leaves[place].numel() for place in inside)
        self.sums.append(Asked(fn.__name__, parts, num_entries))
        zeros = trees.zeros_like(message)
        return Mean(lambda: zeros, torch.ones((), dtype=torch.float64), clients)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        if trees.leaves(down):
            raise SettingsError(
                f"{SECURE}: {type(self.work.method).__name__} takes single updates "
                f"of {fn.__name__} through Round.each, and sums alone can be read"
            )
        return iter(())


class Blank:
    """A memory in which nobody has a row."""

    def __init__(self, row: Tree, device: torch.device) -> None:
        self._row = trees.to(row, device)

    def gather(self, clients: Tensor) -> Tree:
        return trees.map(lambda x: x.expand(len(clients), *x.shape), self._row)

    def put(self, clients: Tensor, rows: Tree) -> None:
        pass


def probed(
    experiment: Experiment, work: Work, process: Process, params: Params
) -> list[Asked]:
    """The sums that the first round asks for.

    Raises SettingsError where one is no secure sum.
    """
    method, task = work.method, work.task
    size, sums = min(process.largest, task.population), list[Asked]()
    rates = None
    if process.rates is not None:
        dropout = experiment.participation.dropout
        rates = torch.from_numpy(process.rates * (1 - dropout))
    r = Trial(
        0,
        torch.arange(size),
        task.population,
        task,
        Blank(method.init_memory(params), task.device),
        experiment.seed,
        rates,
        work=work,
        sums=sums,
    )
    at_start = trees.to(params, task.device)
    server = trees.to(method.init_server(at_start, task.population), task.device)
    try:
        with torch_seed(experiment.seed, "server", 0, device=task.device):
            method.round(server, r)
    except SettingsError:
        raise
    except Exception as error:  # the round itself will tell, with all that is known
        log.debug("a round on trial failed", exc_info=error)
    return sums
