"""Canaries: clients beside the population, whose messages are known directions.

A canary does a client's whole work: the method's client function, the defences, and in
a secure sum the integers. Only its loss is another one: it pulls the parameters to

    theta_t + 4 C c_tj,    c_tj uniform on the unit sphere, new in every round,

so that its message is longer than the bound C, and leaves with length C in direction
c_tj if the clipping does its work. Directions of a round follow from nothing that
clients or the server know, and the run looks for them in what an observer sees:

    global_model    theta_{t+1} - theta_t
    secure_sum      the sum that the server recovers
    client_update   the canary's own message, as it arrives

Under the first two canaries take part as clients do: with the rate that the accountant
assumes, their messages in the sum. The observer is that of the definition of privacy,
who knows everything but one canary: what lies along the sum of the other canaries'
directions, and along that of the clients' updates (where the noise is not their own),
is taken out of both sides first. Under the last view canaries are heard and not added.
`canary_bound` says what their scores are worth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.base import Work, one_thread
from fedcore.errors import RunError, SettingsError
from fedcore.messages.secure.ask import SecretTotal
from fedcore.messages.secure.distributed import DistributedNoise
from fedcore.messages.secure.reading import recovered
from fedcore.messages.secure.sending import Sending
from fedcore.method import Method, evaluates
from fedcore.privacy import Mechanism
from fedcore.reports import (
    Mean,
    Reports,
    Weight,
    Weights,
    by_examples,
    equally,
)
from fedcore.rng import rng, seed_of
from fedcore.rounds.canary_bound import Scores, Seen
from fedcore.rounds.doors import OpenRound
from fedcore.task import Task
from fedcore.types import ClientFunction, News, Params, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["Canaries", "PlantedRound", "canaries_of"]

LONGER = 4.0
"""Length of a canary's update before it is clipped, in bounds C."""

ROOM = 10
"""Dimensions for each canary at least: so many are nearly at right angles."""


class PullingTask(Task):
    """A task whose loss pulls parameters to a target, in one step of SGD.

    loss = |theta - target|^2 / (2 lr), whatever the examples.
    """

    def __init__(self, task: Task, data: FederatedData, lr: float) -> None:
        vars(self).update(vars(copy.copy(task)))
        self.data, self.lr = data, lr
        self.target: Params = {}

    def loss(self, params: Params, x: Tree, y: Tensor, mask: Tensor) -> Tensor:
        total = 0 * mask.sum()
        for name, target in self.target.items():
            if name in params:
                total = total + (params[name] - target).square().sum()
        return total / (2 * self.lr)


class Canaries:
    """The canaries of a run: their directions, their messages, their scores."""

    def __init__(
        self, experiment: Experiment, work: Work, mechanism: Mechanism, bound: float
    ) -> None:
        """`mechanism` is the run's, `bound` is C."""
        self.number, self.view = experiment.audit.canaries, mechanism.view
        self.rate, self.bound = mechanism.sample_rate, bound
        self.has_noise = mechanism.noise_multiplier > 0
        self._seed, self._population = experiment.seed, work.task.population
        self._method = work.method
        self._sending = _sending_of(experiment, work)
        lr = getattr(experiment.method, "local_lr", 0.1)
        self._task = PullingTask(
            work.task, _one_example_each(work.task, self.number), lr
        )
        # Another seed: no draw of a canary is that of a client.
        self._work = Work(
            self._task,
            work.method,
            experiment.local,
            seed_of(experiment.seed, "canaries"),
            defence=experiment.defence,
            rounds=experiment.rounds,
        )
        self._first_state = self._work.first_state(work.task.init_params())

    def present(self, t: int) -> list[int]:
        """The canaries that take part in round t."""
        if self.rate == 1:
            return list(range(self.number))
        draws = rng(self._seed, "canaries present", t).random(self.number)
        return np.flatnonzero(draws < self.rate).tolist()

    def direction(self, t: int, canary: int, like: Params) -> Params:
        """c_tj of unit length over the floating-point entries of `like`."""
        key = seed_of(self._seed, "canary", t, canary)
        draw = torch.Generator().manual_seed(key)
        drawn: Params = {}
        for name in sorted(like):
            if like[name].is_floating_point():
                drawn[name] = torch.randn(like[name].shape, generator=draw)
        squares = [float(x.double().square().sum()) for x in drawn.values()]
        return trees.scale(drawn, 1 / math.sqrt(sum(squares)))  # type: ignore[no-any-return]

    def message(self, fn: ClientFunction, down: Any, t: int, canary: int) -> Tree:
        """The canary's message, after its defences."""
        if not hasattr(down, "params"):
            raise RunError(
                f"audit.canaries: what {fn.__name__} gets of the server has no "
                "params, from which a canary could start: leave canaries out"
            )
        direction = self.direction(t, canary, down.params)
        self._task.target = {}
        for name, c in direction.items():
            start = down.params[name]
            step = LONGER * self.bound * c.to(start)
            self._task.target[name] = (start + step).detach()
        state = trees.to(self._first_state, self._task.device)
        with one_thread():
            up, _ = self._work.one(fn, canary, down, state, t)
        return up

    def total(self, r: OpenRound, fn: ClientFunction, down: Tree) -> tuple[Tree, int]:
        """(sum of the messages of the canaries that are there, their number)."""
        present, total = self.present(r.t), None
        if self._sending is not None:
            return self._secret_total(r, fn, down, present), len(present)
        for canary in present:
            message = self.message(fn, down, r.t, canary)
            total = message if total is None else trees.add(total, message)
        return total, len(present)

    def _secret_total(
        self, r: OpenRound, fn: ClientFunction, down: Tree, present: list[int]
    ) -> Tree:
        """The sum as a secure sum has it: of integers."""
        secret, made = r.desk.receiving.secret, SecretTotal()
        assert secret is not None
        assert self._sending is not None
        if not present:
            return None
        ids = torch.tensor(present) + self._population
        ask = secret.ask(fn, ids, down, r.t, equally)
        for canary, client in zip(present, ids.tolist(), strict=True):
            message = self.message(fn, down, r.t, canary)
            made.add(self._sending.send(ask, client, message, 1).encoded)
        made.clients = ids.tolist()
        shape = secret.shape(ask, lambda: r.zero_message(fn, down))
        return recovered(ask, shape, made, self._sending.noising).message

    def own_scores(self, fn: ClientFunction, down: Tree, t: int) -> Scores:
        """The scores of canaries in their own messages of round t."""
        scores, d = [], 0
        for canary in self.present(t):
            message = self.message(fn, down, t, canary)
            changed = self.changes(fn, down, message)
            seen = Seen(changed)
            direction = self.direction(t, canary, down.params)
            scores.append(seen.score(seen.flat(direction)))
            d = seen.dimensions
        return Scores.of(scores, d)

    def scores(self, seen: Seen, t: int, like: Params) -> Scores:
        """The scores in round t of all canaries that took part in it.

        Each is looked for by an observer who knows the others, where there is noise.
        """
        present, total, scores = self.present(t), None, []
        if self.has_noise and len(present) > 1:
            for canary in present:
                direction = seen.flat(self.direction(t, canary, like))
                total = direction if total is None else total + direction
        for canary in present:
            direction = seen.flat(self.direction(t, canary, like))
            others = None if total is None else total - direction
            scores.append(seen.score(direction, others))
        return Scores.of(scores, seen.dimensions)

    def changes(self, fn: ClientFunction, down: Tree, message: Tree) -> Params:
        """The change of parameters in a message, or in a sum of messages."""
        exchanged = self._method.exchanged(down, message)
        if exchanged is None:
            raise RunError(
                f"audit.canaries: the messages of {fn.__name__} hold no change of "
                "parameters, in which a canary could be looked for: leave canaries out"
            )
        return exchanged[1]


class WithoutNoise:
    """What clients do to a message before they add noise.

    The noise in a sum has to come from those that the accountant counts on.
    """

    def __init__(self, noising: DistributedNoise) -> None:
        self._noising = noising

    @property
    def step(self) -> float:
        return self._noising.step

    @property
    def divisor(self) -> float:
        return self._noising.divisor

    @property
    def least(self) -> int:
        return self._noising.least

    def numbers(self, vector: Tensor, function: str, t: int, client: int) -> Tensor:
        """The vector [d] float64 within the bound, as integers, int32."""
        key = seed_of(self._noising.seed, f"rounding {function}", t, client)
        return self._noising.rounded(vector, torch.Generator().manual_seed(key))


def _sending_of(experiment: Experiment, work: Work) -> Sending | None:
    """How canaries make integers of messages; None where no sum is secret."""
    if work.sending is None:
        return None
    noising = work.sending.noising
    if not isinstance(noising, DistributedNoise):
        return work.sending
    quiet = WithoutNoise(noising)
    rules = experiment.aggregation
    return Sending(work.method, work.task, rules, experiment.seed, quiet)


@dataclass
class Planted:
    """What a round has found of its canaries so far."""

    scores: Scores = field(default_factory=Scores)
    known: tuple[Params, ...] = ()  # sums of the updates of all clients but canaries
    like: Params = field(default_factory=dict)  # what went down to them


@dataclass(frozen=True)
class PlantedRound(OpenRound):
    """A round with canaries beside the clients that the method asks."""

    canaries: Canaries = field(kw_only=True)
    planted: Planted = field(kw_only=True)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        yield from super().each(fn, clients, down)
        if self._is_due(fn, down):
            self._hear(fn, down)

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        weight: Weight | Tensor | Weights = by_examples,
        news: News | None = None,
    ) -> Mean:
        mean = super().mean(fn, clients, down, weight, news)
        if not self._is_due(fn, down):
            return mean
        if self.canaries.view == "client_update":
            self._hear(fn, down)
            return mean
        if news is not None or weight is not equally:
            raise SettingsError(
                f"audit.canaries: {fn.__name__} is summed with weights, or by news, "
                "where a canary has no place: leave canaries out"
            )
        return self._with_canaries(fn, down, mean)

    def _is_due(self, fn: ClientFunction, down: Tree) -> bool:
        return bool(trees.leaves(down)) and not evaluates(fn)

    def _hear(self, fn: ClientFunction, down: Tree) -> None:
        if self.canaries.view == "client_update":
            self.planted.scores += self.canaries.own_scores(fn, down, self.t)

    def _with_canaries(self, fn: ClientFunction, down: Any, mean: Mean) -> Mean:
        canaries, others = self.canaries, mean.total
        planted, number = canaries.total(self, fn, down)
        self.planted.like = down.params
        if canaries.has_noise and len(mean.clients) and canaries.view == "global_model":
            known = trees.map(torch.clone, canaries.changes(fn, down, others))
            self.planted.known += (known,)
        if number == 0:
            return mean
        total = trees.add(others, planted)
        if canaries.view == "secure_sum":
            seen = Seen(canaries.changes(fn, down, total))
            self.planted.scores += canaries.scores(seen, self.t, down.params)
            return replace(mean, make_total=lambda: total)
        return replace(mean, make_total=lambda: total, weight=mean.weight + number)

    def row(self, before: Params, after: Params) -> dict[str, Any]:
        """The scores of the round, as metrics.jsonl has them; none, nothing.

        `before` and `after` are the parameters of the server around it.
        """
        planted, scores = self.planted, self.planted.scores
        has_released = self.canaries.view == "global_model" and planted.like
        if has_released and self.canaries.present(self.t):
            release = {name: after[name] - before[name] for name in planted.like}
            seen = Seen(release, planted.known)
            scores = self.canaries.scores(seen, self.t, planted.like)
        if scores.number == 0:
            return {}
        return {"canary_scores": scores._asdict()}


def canaries_of(
    experiment: Experiment, work: Work, mechanism: Mechanism | None
) -> Canaries | None:
    """The canaries of a run; None where it has none.

    Raises SettingsError where they would measure nothing.
    """
    number, method = experiment.audit.canaries, work.method
    if number == 0:
        return None
    refused = f"audit.canaries = {number}:"
    if experiment.engine.name == "grid":
        raise SettingsError(
            f"{refused} canaries are clients of a simulation; take another engine"
        )
    bound = None if mechanism is None else _bound(experiment, mechanism.view)
    if mechanism is None or bound is None:
        raise SettingsError(
            f"{refused} canaries are as long as the bound on messages, and this run "
            "has none: take dpfedavg, or set defence.clip with "
            "defence.noise_multiplier, or defence.distributed"
        )
    view, z = mechanism.view, mechanism.noise_multiplier
    if view == "client_update" and z == 0:
        raise SettingsError(
            f"{refused} a message without noise gives itself away, and nothing is left "
            "to estimate: set defence.noise_multiplier"
        )
    if view != "client_update" and method.needs_updates:
        raise SettingsError(
            f"{refused} {experiment.method.name} takes single updates, among which a "
            "canary has no place: take another method, e.g. dpfedavg"
        )
    _refuse_crowd(number, method, work.task)
    return Canaries(experiment, work, mechanism, bound)


def _bound(experiment: Experiment, view: str) -> float | None:
    """C, the bound on the norm of one client's message."""
    if view == "client_update":
        return experiment.defence.clip
    if view == "secure_sum":
        return experiment.defence.distributed.clip
    return getattr(experiment.method, "clip", None)


def _refuse_crowd(number: int, method: Method[Any], task: Task) -> None:
    """Raises SettingsError where canaries would hide each other."""
    server = method.init_server(task.init_params(), task.population)
    entries = sum(x.numel() for x in server.params.values())
    if number * ROOM > entries:
        raise SettingsError(
            f"audit.canaries = {number}: the model has {entries:,} parameters, in "
            "which so many random directions hide each other; set it to at most "
            f"{entries // ROOM}, or take a larger model"
        )


def _one_example_each(task: Task, number: int) -> FederatedData:
    """The first row that any client holds, for each canary."""
    data = task.data
    order = np.repeat(data.order[:1], number)
    rows = Examples(data.x, data.y)
    return FederatedData(rows, data.test, order, np.arange(number + 1))
