"""What an engine is: where client functions run. The only door between a method and its clients."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.engines.run_client import run_client
from fedcore.errors import SettingsError
from fedcore.messages.defence import Defence, DefenceSettings
from fedcore.messages.links import Links, LinksSettings
from fedcore.method import Method, data_of, evaluates
from fedcore.rng import seed_of, torch_seed
from fedcore.types import Batches, ClientFunction, Reports, Tree, Tuning

if TYPE_CHECKING:
    from fedcore.config import EngineSettings
    from fedcore.data.federated import LocalSettings
    from fedcore.storage.rows import StateStore
    from fedcore.task import Task

log = logging.getLogger("fedcore")


class Engine(Protocol):
    """Runs client functions somewhere, and brings back their reports."""

    choices: dict[
        str, Any
    ]  # what the engine measured and chose (JSON), so that a resumed run computes the same bits

    @property
    def late(self) -> int:
        """Answers so far that came after their round had ended; they change nothing."""
        ...

    @property
    def states(self) -> StateStore | None:
        """What clients keep between rounds; None where they keep it themselves."""
        ...

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        """Run `fn` for every client of `clients` (ascending ids) in round t; reports in any grouping, failures in `failed`.

        Reports of nobody are a pause, in which the run may be stopped. An engine that can sum where clients run returns `Answers`.
        """
        ...

    def describe(self) -> str:
        """One line for the user: where clients run, and how."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


class Work:
    """One client's work, as every engine does it: task, method, batch plan, defence, links and seed."""

    def __init__(
        self,
        task: Task,
        method: Method[Any],
        local: LocalSettings,
        seed: int,
        links: LinksSettings | None = None,
        defence: DefenceSettings | None = None,
    ) -> None:
        """`defence` protects what clients send, `links` disturb what is sent; by default nothing does."""
        self.task, self.method, self.local, self.seed = task, method, local, seed
        self.links, self.defence = (
            Links(links or LinksSettings(), seed),
            Defence(defence or DefenceSettings(), seed),
        )
        self.even = False  # batches padded to few widths, for engines that record steps by shape
        self._now = (-1, torch.empty(0))

    def batches(
        self, fn: ClientFunction, clients: list[int], t: int
    ) -> Batches | Tuning:
        """Stacked over the clients, [n, K, B, ...]."""
        data, ids, kind = self.task.data, np.asarray(clients), data_of(fn)
        if kind == "tune":
            train = data.batches(
                ids, "train", self._tuning(), self.seed, t, 0, self.even
            )
            return Tuning(
                train, data.batches(ids, "test", self.local, self.seed, t, 0, self.even)
            )
        plans = [
            data.batches(ids, kind, self.local, self.seed, t, plan, self.even)
            for plan in range(self.passes(fn))
        ]
        return (
            plans[0]
            if len(plans) == 1
            else Batches(
                *(_one_after_another(pieces) for pieces in zip(*plans, strict=True))
            )
        )

    def passes(self, fn: ClientFunction) -> int:
        """Plans of batches that `fn` gets."""
        return self.method.passes() if data_of(fn) == "train" else 1

    def steps(self, fn: ClientFunction, clients: np.ndarray) -> np.ndarray:
        """Local steps that each client has to do, int64 [n]."""
        kind = data_of(fn)
        if kind == "tune":
            return self.task.data.steps(clients, "train", self._tuning())
        return self.passes(fn) * self.task.data.steps(clients, kind, self.local)

    def _tuning(self) -> LocalSettings:
        return self.local.model_copy(
            update={"epochs": self.method.finetuning.epochs, "steps": None}
        )

    def num_examples(self, fn: ClientFunction, clients: list[int]) -> Tensor:
        """float32 [n]; of a fine-tuning, those that it is measured on."""
        kind = "test" if data_of(fn) == "tune" else data_of(fn)
        counts = self.task.data.num_examples(np.asarray(clients, dtype=np.int64), kind)
        found: Tensor = trees.to(
            torch.from_numpy(counts.astype(np.float32)), self.task.device
        )
        return found

    def now(self, t: int) -> Tensor:
        """The round as a client function gets it: 0-d, on the task's device."""
        if self._now[0] != t:
            self._now = (t, torch.full((), float(t), device=self.task.device))
        return self._now[1]

    def one(
        self, fn: ClientFunction, client: int, down: Tree, state: Tree, t: int
    ) -> tuple[Tree, Tree]:
        """(what arrives of `up`, new state) of one client; `state` is on the task's device."""
        batches = trees.at(self.batches(fn, [client], t), 0)
        down = self.links.carry(down, "downlink", fn, t, client)
        with self.model_noise(fn, t, client):
            up, new = run_client(fn, self.task, self.now(t), down, state, batches)
        return self.send(up, fn, t, client), new

    def send(self, up: Tree, fn: ClientFunction, t: int, client: int) -> Tree:
        """What arrives of a message: protected before it leaves, then disturbed on its way."""
        return self.links.carry(
            self.defence.protect(up, fn, t, client), "uplink", fn, t, client
        )

    def arrives_as_is(self, fn: ClientFunction) -> bool:
        """Whether `send` changes nothing."""
        return self.defence.silent(fn) and self.links.silent("uplink", fn)

    @contextmanager
    def model_noise(self, fn: ClientFunction, t: int, client: int) -> Iterator[None]:
        """Dropout and its like: on in training alone, and drawn from a key instead of from wherever the generator stands."""
        training = data_of(fn) != "test"
        if self.task.model.training != training:
            self.task.model.train(training)
        with torch_seed(self.seed, "model", t, client):
            if (
                self.task.device.type == "cuda"
            ):  # a generator of its own, which nothing else of ours draws from
                torch.cuda.manual_seed(seed_of(self.seed, "model", t, client))
            yield


def _one_after_another(plans: tuple[Tensor, ...]) -> Tensor:
    """[n, K, ...] of each to [n, sum of K, ...], step by step in memory as `FederatedData.batches` has them."""
    return torch.cat([x.transpose(0, 1) for x in plans]).transpose(0, 1)


def report(work: Work, fn: ClientFunction, client: int, up: Tree) -> Reports:
    """One client's report."""
    stacked = trees.map(lambda x: x[None], up)
    return Reports(torch.tensor([client]), stacked, work.num_examples(fn, [client]))


class Done(NamedTuple):
    """Clients that have done their work."""

    reports: Reports
    states: Tree  # new, stacked; nothing of those who failed


def alone(
    work: Work, fn: ClientFunction, client: int, down: Tree, state: Tree, t: int
) -> Done:
    """One client's work, as `sequential` does it; `state` is on the task's device."""
    try:
        up, new = work.one(fn, client, down, state, t)
        return Done(report(work, fn, client, up), trees.map(lambda x: x[None], new))
    except Exception as e:  # a client may fail in any way; the round goes on without it
        return Done(failure([client], e), {})


def keep(states: StateStore, fn: ClientFunction, done: Done) -> Reports:
    """What came back, once the clients' new states are stored."""
    if len(done.reports.clients) and not evaluates(fn):
        states.put(done.reports.clients, done.states)
    return done.reports


def failure(clients: list[int], error: BaseException | str) -> Reports:
    """A report of nothing but why these clients have none. The reason is counted by its text before the first colon."""
    if isinstance(error, BaseException):
        log.debug("client %s failed", clients, exc_info=error)
        error = f"error: {type(error).__name__}: {error}"
    return Reports(
        torch.empty(0, dtype=torch.int64),
        {},
        torch.empty(0),
        dict.fromkeys(clients, error),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Client work on one thread, whatever engine: the number of threads changes the order of sums, hence the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_for(settings: EngineSettings) -> torch.device:
    """The device that the settings name. Raises SettingsError for cuda without one."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            'engine.device = "cuda": PyTorch sees no CUDA device here; set engine.device = "cpu" or "auto"'
        )
    return torch.device(
        "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    )
