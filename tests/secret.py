"""Methods and engines for tests of secure sums."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedcore import trees
from fedcore.engines.base import Work, failure
from fedcore.engines.sequential import Sequential
from fedcore.local import local_sgd
from fedcore.messages.secure.ask import Ask, SecretTotal
from fedcore.messages.secure.ring import Encoded
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import Reports, by_examples, equally, joined
from fedcore.rounds.secret import SecretSums
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from fedcore.types import Batches, ClientFunction, Model, Params, Stateless, Tree


class Settings(MethodSettings):
    local_lr: float = 0.05
    weighting: str = "examples"


class Up(NamedTuple):
    delta: Params
    loss: Tensor
    steps: Tensor  # int64, a scalar that is no floating-point number


def by_first_letters(clients: Tensor, num_examples: Tensor) -> Tensor:
    return num_examples + 1


class Weighing(Method[Settings]):
    """FedAvg with weights of many kinds."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, steps, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub(w, down.params), loss, steps.long()), state

    def round(self, server: Model, r: Round) -> Model:
        given = 1.0 / (5 + r.cohort.double())
        every_other = 1.0 + (torch.arange(len(r.cohort)) % 2).double()
        weight: Any = {
            "examples": by_examples,
            "equally": equally,
            "given": given,
            "by field": {"delta": every_other},
            "isolating": {"delta": given},
            "one": (r.cohort == r.cohort[0]).double(),
            "steep": torch.where(r.cohort <= r.cohort[1], 3.0, 1.0),
            "unequal": torch.where(r.cohort == r.cohort[0], 2.0, 1.0),
            "custom": by_first_letters,
        }[self.s.weighting]
        mean = r.mean(self.train, r.cohort, server, weight)
        r.log["weight"] = mean.weight.item()
        r.log["total_steps"] = float(mean.total.steps)
        return Model(trees.add(server.params, mean.value.delta))


class Counting(NamedTuple):
    delta: Params
    seen: dict[str, Tensor]  # int64 [3]


class Integers(Weighing):
    """Its clients send a vector of whole numbers."""

    @on_client
    def train(  # type: ignore[override]
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Counting, Stateless]:
        zeros = trees.zeros_like(down.params)
        return Counting(zeros, {"histogram": torch.zeros(3, dtype=torch.int64)}), state


class Single(Weighing):
    """It asks for single updates, and does not say so."""

    def round(self, server: Model, r: Round) -> Model:
        for _ in r.each(self.train, r.cohort, server):
            pass
        return server


class Unasked(Weighing):
    """Clients outside the cohort go on by themselves, and send nothing."""

    works_unasked = True

    @on_client
    def go_on(
        self, task: Task, t: Tensor, down: Stateless, state: Stateless, batches: Batches
    ) -> tuple[Stateless, Stateless]:
        return Stateless(), state

    def round(self, server: Model, r: Round) -> Model:
        for _ in r.each(self.go_on, torch.arange(r.population), Stateless()):
            pass
        return super().round(server, r)


class Telling(Unasked):
    """Clients outside the cohort tell what nobody asked them for."""

    @on_client
    def go_on(  # type: ignore[override]
        self, task: Task, t: Tensor, down: Stateless, state: Stateless, batches: Batches
    ) -> tuple[Model, Stateless]:
        return Model({"w": batches.y.flatten()[:1].clone()}), state


class Remembered(NamedTuple):
    delta: Params


class Change(NamedTuple):
    change: Params  # delta - what is remembered of the client
    loss: Tensor


class Server(NamedTuple):
    params: Params
    total: Params  # the last deltas of all clients, summed


class Remembering(Method[Settings]):
    """The model moves by the sum of the last delta of every client."""

    remembers = True

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, trees.zeros_like(params))

    def init_memory(self, params: Params) -> Remembered:
        return Remembered(trees.zeros_like(params))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, steps, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub(w, down.params), loss, steps.long()), state

    def news(
        self, up: Up, remembered: Remembered, num_examples: Tensor
    ) -> tuple[Change, Remembered]:
        change = trees.sub(up.delta, remembered.delta)
        return Change(change, up.loss), Remembered(up.delta)

    def round(self, server: Server, r: Round) -> Server:
        if len(r.cohort) == 0:
            return server
        down = Model(server.params)
        mean = r.mean(self.train, r.cohort, down, equally, news=self.news)
        total = trees.add(server.total, mean.total.change)
        return Server(trees.axpy(1 / r.population, total, server.params), total)


class Shuffled(Sequential):
    """Reports come late, in another order, and in groups."""

    def __init__(self, work: Work, states: StateStore, key: int) -> None:
        super().__init__(work, states)
        self._draw = random.Random(key)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        waiting = list(super().each(fn, clients, down, t))
        self._draw.shuffle(waiting)
        while waiting:
            size = self._draw.randint(1, 4)
            group, waiting = waiting[:size], waiting[size:]
            there = [report for report in group if len(report.clients)]
            for report in group:
                if report.failed:
                    yield report
            if there:
                yield joined(there)


class Masking(Sequential):
    """Devices in this process: the server gets sums, and clients keep their memory."""

    def __init__(self, work: Work, states: StateStore) -> None:
        super().__init__(work, states)
        row = work.method.init_memory(work.task.init_params())
        self.memory: dict[tuple[int, int], Tree] = {}  # by client and moment
        self.row = row
        self.lost: dict[int, set[int]] = {}  # by round: in no sum after they trained
        self.asked: list[Ask] = []
        self.garbles = False

    def secret_sum(self, ask: Ask, into: SecretTotal) -> Iterator[Reports]:
        self.asked.append(ask)
        sending = self.work.sending
        assert sending is not None
        moment = (ask.t << 16) + len([one for one in self.asked if one.t == ask.t]) - 1
        yield failure([], "")  # a pause
        for report in self.each(ask.fn, ask.clients, ask.down, ask.t):
            if report.failed:
                yield report
                continue
            client = int(report.clients[0])
            place = int(torch.searchsorted(ask.clients, client))
            known = -1 if ask.moments is None else int(ask.moments[place])
            before = None
            if ask.news is not None:
                before = self.row if known < 0 else self.memory[client, known]
            up, count = trees.at(report.up, 0), float(report.num_examples[0])
            sent = sending.send(ask, client, up, count, before)
            self.memory[client, moment] = sent.remembered
            if client in self.lost.get(ask.t, ()):
                yield failure([client], "disconnected: in the third exchange")
                continue
            into.add(sent.encoded)
            into.clients.append(client)
            into.bytes_up += sent.encoded.nbytes + 1000
        into.moment = moment
        if self.garbles and into.total is not None:
            words = into.total.words + 12345
            into.total = Encoded(into.total.numbers, words)


def secret_of(loop: Any) -> SecretSums:
    """How a loop asks for sums."""
    secret: SecretSums = loop.desk.receiving.secret
    return secret
