"""The malicious clients of a simulated run: who they are, and what they do.

They collude, and know the honest messages of the round where their attack needs them.
Data-level attacks change what a client trains on, in every engine. Attacks on messages
replace rows at the server, when all reports are there and before anything is made of
them: the same bits in every engine that has the same honest rows. Without a malicious
or without an honest client in a cohort nothing happens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.messages.adversary.poisoning import Poison
from fedcore.messages.adversary.sending import Crowd, Rule, Scene, Sender
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.messages.links import Links
from fedcore.messages.vectors import layout, matrix, with_leaves, with_rows
from fedcore.method import Method, data_of, evaluates
from fedcore.reports import Reports
from fedcore.rng import rng
from fedcore.types import Batches, ClientFunction, Tree

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = ["Adversary", "Rule"]

ON_DATA = ("label_flip", "backdoor")
# Made of the client's own message, as it arrived: noise of the uplink is in it.
OWN = ("sign_flip", "scaled", "backdoor")
OPTIMISED = ("alie_optimised", "ipm_optimised")
# They mean something for differences to the global model alone.
OF_DIFFERENCES = (*OWN, "gaussian", "zero", "stale", "ipm", "ipm_optimised")
ABSENT = "absent: malicious clients stay away, as a reference for attacks"


class Adversary:
    """The malicious clients of one run.

    >>> settings = AdversarySettings(attack="sign_flip", fraction=0.2)
    >>> sorted(Adversary(settings, population=10, seed=0).clients)
    [7, 9]
    """

    def __init__(
        self,
        settings: AdversarySettings,
        population: int,
        seed: int,
        task: Task | None = None,
    ) -> None:
        """Data-level attacks need the task whose data they change.

        Raises SettingsError for ids outside the population, a fraction of nobody, and a
        task that the attack does not fit.
        """
        self.settings = settings
        self.clients = _malicious(settings, population, seed)
        self._sender = Sender(settings, seed)
        self._poison: Poison | None = None
        if task is not None and settings.attack in ON_DATA:
            self._poison = Poison(settings, task, seed)

    @property
    def _is_scaled(self) -> bool:
        """Whether the update of a backdoor is multiplied."""
        return self.settings.scale not in (None, 1)

    # Data

    def poisons(self, fn: ClientFunction, t: int) -> bool:
        """Whether malicious clients run `fn` on poisoned data in round t."""
        is_on = self._poison is not None and t + 1 >= self.settings.start
        return is_on and data_of(fn) in ("train", "all")

    def poison(
        self, batches: Batches, fn: ClientFunction, clients: list[int], t: int
    ) -> Batches:
        """The batches [n, K, B, ...] of these clients, as they use them."""
        if self._poison is None or not self.poisons(fn, t):
            return batches
        rows = [row for row, client in enumerate(clients) if client in self.clients]
        if not rows:
            return batches
        return self._poison.apply(batches, rows, [clients[row] for row in rows], t)

    # Messages

    @property
    def aims_at_rule(self) -> bool:
        """Whether the attack tries out the rule in force."""
        return self.settings.attack in OPTIMISED

    def is_due(self, fn: ClientFunction, t: int) -> bool:
        """Whether messages of `fn` are replaced in round t: all are then needed."""
        attack = self.settings.attack
        if attack in ("none", "label_flip") or evaluates(fn):
            return False
        if attack == "backdoor" and not self._is_scaled:
            return False
        return t + 1 >= self.settings.start

    def replaced(
        self,
        reports: Reports,
        fn: ClientFunction,
        t: int,
        down: Tree,
        kept: dict[str, Tensor],
        rule: Rule | None = None,
        weights: Tensor | None = None,
        links: Links | None = None,
    ) -> tuple[Reports, dict[str, Tensor]]:
        """All reports of a call, by ascending id, as malicious clients have them.

        And what they remember of the round, which takes the place of `kept` (empty
        before the first) where the round counts. Optimised attacks aim at `rule`; by
        default at the mean with these `weights` [n], by default equal. Noise of the
        uplink comes on top, as `links` has it.
        """
        ids = np.fromiter(self.clients, dtype=np.int64)
        is_hostile = torch.from_numpy(np.isin(reports.clients.numpy(), ids))
        if not bool(is_hostile.any()) or not self.is_due(fn, t):
            return reports, kept
        if self.settings.attack == "absent":
            return _without(reports, is_hostile), kept
        is_finite = _is_finite(reports)
        honest = (is_finite & ~is_hostile).nonzero().flatten()
        hostile = is_hostile.nonzero().flatten()
        if len(honest) == 0:
            return reports, kept
        if weights is None:
            weights = torch.ones(len(reports.clients))
        crowd = Crowd(reports.clients, honest, hostile, weights.cpu().double())
        up, kept = self._rewritten(reports.up, crowd, fn, t, down, kept, rule)
        if links is not None and self.settings.attack not in OWN:
            up = _carried(up, crowd, links, fn, t)
        return reports._replace(up=up), kept

    def _rewritten(
        self,
        up: Tree,
        crowd: Crowd,
        fn: ClientFunction,
        t: int,
        down: Tree,
        kept: dict[str, Tensor],
        rule: Rule | None,
    ) -> tuple[Tree, dict[str, Tensor]]:
        """The messages with the malicious rows, and what is remembered of the round."""
        leaves, places, kept = trees.leaves(up), layout(up), dict(kept)
        broadcasts = _broadcasts(leaves, places.vectors, down)
        for number, vector in enumerate(places.vectors):
            pieces = [leaves[place] for place in vector]
            scene = Scene(
                crowd, matrix(pieces), broadcasts[number], fn.__name__, t, number
            )
            sent = self._sender.sent(scene, kept, rule)
            replaced = with_rows(pieces, crowd.hostile, sent)
            for place, leaf in zip(vector, replaced, strict=True):
                leaves[place] = leaf
        for place in places.scalars:
            leaves[place] = _with_median(leaves[place], crowd)
        return with_leaves(up, leaves), kept

    # Before a run

    def refuse(self, method: Method[Any], name: str) -> None:
        """Raises SettingsError for a method, `name`, that it cannot attack."""
        attack, direction = self.settings.attack, self.settings.direction
        shrinks = attack in ("minmax", "minsum") and direction != "std"
        is_on_messages = attack != "backdoor" or self._is_scaled
        if method.differences or not is_on_messages:
            return
        if shrinks or attack in OF_DIFFERENCES:
            shown = f'attack = "{attack}"'
            if shrinks:
                shown += f' with direction = "{direction}"'
            raise SettingsError(
                f"adversary.{shown} acts on differences to the global model, but "
                f"{name} sends other things (whole models, or gradients): choose "
                '"alie", "minmax", "mimic" or "label_flip", or a method whose messages '
                "are differences, e.g. fedavg"
            )


def _malicious(
    settings: AdversarySettings, population: int, seed: int
) -> frozenset[int]:
    """The ids of the malicious clients."""
    if settings.fraction is None:
        outside = [client for client in settings.clients if client >= population]
        if outside:
            raise SettingsError(
                f"adversary.clients holds {outside[0]}, but the task has {population} "
                f"clients: expected ids from 0 to {population - 1}"
            )
        return frozenset(settings.clients)
    count = math.floor(round(settings.fraction * population, 9))
    if count == 0:
        raise SettingsError(
            f"adversary.fraction = {settings.fraction}: of {population} clients that "
            f"rounds down to nobody; raise it to {1 / population:.3g} at least, or set "
            "adversary.clients"
        )
    drawn = rng(seed, "adversary").permutation(population)[:count]
    return frozenset(drawn.tolist())


def _without(reports: Reports, is_hostile: Tensor) -> Reports:
    """The reports without those of malicious clients."""
    absent = dict.fromkeys(reports.clients[is_hostile].tolist(), ABSENT)
    stay = ~is_hostile
    rows = stay.to(reports.num_examples.device)
    return Reports(
        reports.clients[stay],
        trees.at(reports.up, rows),
        reports.num_examples[rows],
        {**reports.failed, **absent},
    )


def _broadcasts(
    leaves: list[Tensor], vectors: list[list[int]], down: Tree
) -> list[Tensor | None]:
    """For each vector of the message, that of the broadcast which has its shapes.

    The k-th of several with the same shapes has the k-th such.
    """
    sent, by_shapes = trees.leaves(down), dict[Any, list[Tensor]]()
    for vector in layout(down, axes=0).vectors:
        pieces = [sent[place] for place in vector]
        shapes = tuple(x.shape for x in pieces)
        by_shapes.setdefault(shapes, []).append(trees.ravel(pieces))
    found: list[Tensor | None] = []
    for vector in vectors:
        shapes = tuple(leaves[place].shape[1:] for place in vector)
        candidates = by_shapes.get(shapes)
        found.append(candidates.pop(0) if candidates else None)
    return found


def _is_finite(reports: Reports) -> Tensor:
    """Whether each message is finite, bool [n] on the CPU."""
    sums = trees.row_sums(reports.up).cpu()
    if len(sums) == 0:  # messages without numbers
        return torch.ones(len(reports.clients), dtype=torch.bool)
    return sums.isfinite()


def _with_median(x: Tensor, crowd: Crowd) -> Tensor:
    """A scalar of each client [n], in which malicious ones say the honest median."""
    values = x[crowd.honest.to(x.device)].double()
    values = values[values.isfinite()]
    if len(values) == 0:
        return x
    x = x.clone()
    x[crowd.hostile.to(x.device)] = values.quantile(0.5).to(x.dtype)
    return x


def _carried(up: Tree, crowd: Crowd, links: Links, fn: ClientFunction, t: int) -> Tree:
    """The messages as they arrive, noise of the uplink on the malicious ones too."""
    if links.is_silent("uplink", fn):
        return up
    leaves = [x.clone() for x in trees.leaves(up)]
    for row in crowd.hostile.tolist():
        client = int(crowd.clients[row])
        arrived = links.carry(trees.at(up, row), "uplink", fn, t, client)
        for x, value in zip(leaves, trees.leaves(arrived), strict=True):
            x[row] = value
    return with_leaves(up, leaves)
