"""What one client adds to a secure sum: the only place that makes integers of messages.

Engines in this process call it for every report, a device for its own message; so the
same message becomes the same integers everywhere. In this order: the bound on norms
(`aggregation.clip`, on what is sent, by an honest client itself), the method's news,
the check that all is finite, and the ring.

A message has a number of 32 bits for each entry of its vectors, and words of 64 bits
for its scalars, after five of the client's own:

    0  its weight: its examples, capped, or 1; 0 where the server chose the weight
    1  its entries that were cut off at the reach of the ring
    2  1: the sum counts the clients
    3  1 where its number of examples was above the cap
    4  1 where it has examples: scalars are those of such clients alone

With noise of the clients only word 2 is sent, and no scalar: noise protects neither.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.messages.aggregation.bounds import Bounds
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.messages.secure.ask import Ask, Part, Rule
from fedcore.messages.secure.measures import Measures
from fedcore.messages.secure.ring import Encoded, power_of_two, words_of
from fedcore.messages.vectors import Layout, layout
from fedcore.method import evaluates
from fedcore.reports import Reports
from fedcore.rng import seed_of
from fedcore.types import News, Tree

if TYPE_CHECKING:
    from fedcore.method import Method
    from fedcore.task import Task

__all__ = ["Noising", "Sending", "Sent", "Unusable"]

EXAMPLES = 4096
"""Examples of a client that count at most where the settings name no cap."""

OWN = 5
"""Words of a client's own, before the scalars of its message."""


class Unusable(FedcoreError):
    """A client's message that cannot be summed; the text is the reason."""


class Noising(Protocol):
    """Noise that a client adds to its own vector, in place of the ring's rounding."""

    @property
    def step(self) -> float:
        """gamma: what one unit of the sum stands for."""
        ...

    @property
    def divisor(self) -> float:
        """What a sum is divided by for a mean, whoever is in it."""
        ...

    @property
    def least(self) -> int:
        """Clients in a sum without which it has too little noise."""
        ...

    def numbers(self, vector: Tensor, function: str, t: int, client: int) -> Tensor:
        """The vector [d] float64, all tensors together, as noised integers, int32."""
        ...


class Sent(NamedTuple):
    """A client's message, and what it remembers of it once the sum is recovered."""

    encoded: Encoded
    remembered: Tree = None  # None where the method has no news


class Sending:
    """Makes integers of messages, as the settings of the run have it."""

    def __init__(
        self,
        method: Method[Any],
        task: Task,
        settings: AggregationSettings,
        seed: int,
        noising: Noising | None = None,
        agreed: bytes = b"",
    ) -> None:
        """`noising` takes the place of rounding in all but evaluations.

        `agreed` stands for the run's settings, on which its clients have to agree.
        """
        self._method, self._seed, self.noising = method, seed, noising
        self.agreed = agreed
        self._bounds = Bounds(settings, is_devices=False)
        self.max_examples = settings.max_examples or EXAMPLES
        self.measures = Measures(task)

    def with_noise(self, noising: Noising) -> Sending:
        """The same, of a client that adds this noise."""
        other = copy.copy(self)
        other.noising = noising
        return other

    @property
    def cap(self) -> float:
        """W where clients are weighed by their examples, a power of two."""
        return power_of_two(self.max_examples)

    def send(
        self,
        ask: Ask,
        client: int,
        up: Tree,
        num_examples: float,
        remembered: Tree = None,
    ) -> Sent:
        """What the client adds to the sum that is asked for.

        `up` is its message, without a client axis; `remembered` its row of
        `Round.memory`, where `ask.news` is given. A device asks for one client alone:
        `ask.clients` [1], weights by the server [1]. Call it on one thread
        (`engines.base.one_thread`), as the order of a norm's sum is that of threads.
        Raises Unusable for a message that is not finite, and a count that is no whole
        number.
        """
        _refuse_count(num_examples)
        if evaluates(ask.fn):
            return Sent(self._measured(ask, up, num_examples))
        if not bool(trees.finite(up)):
            raise Unusable("not finite: the update holds NaN or Inf")
        up, now = self._news(ask, self._bounded(up), num_examples, remembered)
        if now is not None and not bool(trees.finite((up, now))):
            raise Unusable("not finite: what the method makes of the update is not")
        return Sent(self._encoded(ask, client, up, num_examples), now)

    def _bounded(self, up: Tree) -> Tree:
        """The message within `aggregation.clip`, every vector by itself."""
        if self._bounds.clip is None:
            return up
        stacked = trees.map(lambda x: x[None], up)
        report = Reports(torch.zeros(1, dtype=torch.int64), stacked, torch.ones(1))
        return trees.at(self._bounds.apply(report).reports.up, 0)

    def _news(
        self, ask: Ask, up: Tree, num_examples: float, remembered: Tree
    ) -> tuple[Tree, Tree]:
        if ask.news is None:
            return up, None
        news: News = getattr(self._method, ask.news)
        sent, before = trees.map(lambda x: x[None], (up, remembered))
        device = next((x.device for x in trees.leaves(up)), None)
        count = torch.tensor([float(num_examples)], device=device)
        message, now = trees.at(news(sent, before, count), 0)
        return message, now

    def _measured(self, ask: Ask, up: Tree, num_examples: float) -> Encoded:
        has_examples = int(num_examples > 0)
        is_capped = int(num_examples > self.max_examples)
        own = [0, 0, 1, is_capped, has_examples]
        words = self.measures.words(up.metrics, num_examples, ask.ring.n_max)
        nothing = torch.empty(0, dtype=torch.int32)
        return Encoded(nothing, torch.cat([torch.tensor(own), words]))

    def _encoded(self, ask: Ask, client: int, up: Tree, num_examples: float) -> Encoded:
        places, leaves = layout(up, axes=0), trees.leaves(up)
        refuse_integers(up, places)
        scalars = scalars_of(leaves, places)
        if self.noising is not None:
            numbers = self._noised(self.noising, ask, client, leaves, places)
            own = [0, 0, 1, 0, 0]
            silence = torch.zeros(len(scalars), dtype=torch.int64)
            return Encoded(numbers, torch.cat([torch.tensor(own), silence]))
        numbers, num_clipped = self._rounded(ask, client, leaves, places, num_examples)
        own = [
            own_weight(ask.parts, num_examples, self.max_examples),
            num_clipped,
            1,
            int(num_examples > self.max_examples),
            int(num_examples > 0),
        ]
        words = words_of(scalars) * own[4]
        return Encoded(numbers, torch.cat([torch.tensor(own), words]))

    def _rounded(
        self,
        ask: Ask,
        client: int,
        leaves: list[Tensor],
        places: Layout,
        num_examples: float,
    ) -> tuple[Tensor, int]:
        """(the integers of all vectors, entries that were cut off)."""
        key = seed_of(self._seed, f"rounding {ask.fn.__name__}", ask.t, client)
        draws = torch.Generator().manual_seed(key)
        pieces, num_clipped = [torch.empty(0, dtype=torch.int32)], 0
        for name, vector in zip(places.names, places.vectors, strict=True):
            rule = rule_of(ask.parts, name)
            ring = ask.ring._replace(cap=cap_of(rule, ask.ring.cap))
            weight = self._weight(rule, ask, client, num_examples)
            x = flat_cpu([leaves[place] for place in vector])
            numbers, count = ring.encode(x, weight, draws)
            pieces.append(numbers)
            num_clipped += count
        return torch.cat(pieces), num_clipped

    def _weight(self, rule: Rule, ask: Ask, client: int, num_examples: float) -> float:
        if isinstance(rule, Tensor):
            row = int(torch.searchsorted(ask.clients, client))
            return float(rule[row])
        if rule == "equally":
            return 1.0
        return min(num_examples, self.max_examples)

    def _noised(
        self,
        noising: Noising,
        ask: Ask,
        client: int,
        leaves: list[Tensor],
        places: Layout,
    ) -> Tensor:
        inside = [leaves[place] for vector in places.vectors for place in vector]
        vector = flat_cpu(inside).double()
        return noising.numbers(vector, ask.fn.__name__, ask.t, client)


def own_weight(parts: tuple[Part, ...], num_examples: float, most: float) -> int:
    """The word of a client's weight: what a mean of the whole message divides by."""
    if len(parts) != 1 or parts[0].field != "":
        return 1  # with weights by field a mean divides by the number of clients
    rule = parts[0].rule
    if isinstance(rule, Tensor):
        return 0  # the server knows it
    return 1 if rule == "equally" else int(min(num_examples, most))


def rule_of(parts: tuple[Part, ...], name: str) -> Rule:
    """The rule of a vector of a message, by its name; "equally" where none is given.

    >>> rule_of((Part("", "examples"),), "delta")
    'examples'
    >>> rule_of((Part("fresh", "examples"),), "news")
    'equally'
    """
    field = name.split(trees.SEPARATOR)[0]
    for part in parts:
        if part.field in ("", field):
            return part.rule
    return "equally"


def cap_of(rule: Rule, cap: float) -> float:
    """W of one vector, where that of the ring is `cap`: 1 for equal weights."""
    return 1.0 if isinstance(rule, str) and rule == "equally" else cap


def scalars_of(leaves: list[Tensor], places: Layout) -> Tensor:
    """The scalars of a message in the order of its layout, float64 [s] on the CPU."""
    values = [leaves[place].reshape(-1).cpu().double() for place in places.scalars]
    return torch.cat([torch.empty(0, dtype=torch.float64), *values])


def flat_cpu(pieces: list[Tensor]) -> Tensor:
    """The tensors as one vector [d] on the CPU, of the widest of their types."""
    if not pieces:
        return torch.empty(0)
    return torch.cat([x.detach().reshape(-1).cpu() for x in pieces])


def refuse_integers(message: Tree, places: Layout) -> None:
    """Raises Unusable for whole numbers in vectors, which a mean would round."""
    paths, leaves = list(trees.flatten(message)), trees.leaves(message)
    others = set(places.others(len(leaves))) - set(places.scalars)
    for place in sorted(others):
        dtype = str(leaves[place].dtype).removeprefix("torch.")
        raise Unusable(
            f'"{paths[place]}" is {dtype} of shape {tuple(leaves[place].shape)}: '
            "a secure sum adds floating-point numbers, and single whole numbers"
        )


def _refuse_count(num_examples: float) -> None:
    if num_examples < 0 or not float(num_examples).is_integer():
        raise Unusable(
            f"bad count: {num_examples:g} examples, expected a whole number from 0 on"
        )
