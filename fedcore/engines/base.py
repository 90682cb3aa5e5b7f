"""What an engine is: the place where client functions run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.clock.arrivals import Arrival
from fedcore.clock.queue import Item
from fedcore.clock.settings import Buffered
from fedcore.dpsgd import ExampleDraws, SampledBatches, widened
from fedcore.engines.readout import Readout, added, read
from fedcore.engines.run_client import run_client
from fedcore.errors import SettingsError
from fedcore.local_settings import ExampleSettings
from fedcore.messages.adversary.adversary import Adversary
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.messages.defence import Defence, DefenceSettings
from fedcore.messages.links import Links, LinksSettings
from fedcore.method import Data, Method, data_of, evaluates
from fedcore.optimizers import Training
from fedcore.reports import Reports, RunningSum, Weight
from fedcore.rng import torch_seed
from fedcore.types import Batches, ClientFunction, Params, Tree, Tuning

if TYPE_CHECKING:
    from fedcore.config import EngineSettings
    from fedcore.local_settings import LocalSettings
    from fedcore.messages.secure.sending import Sending
    from fedcore.storage.rows import StateStore
    from fedcore.task import Task

log = logging.getLogger("fedcore")


class Engine(Protocol):
    """Runs client functions somewhere, and brings back their reports."""

    # Measurements and choices (JSON), so that a resumed run computes the same bits.
    choices: dict[str, Any]

    @property
    def late(self) -> int:
        """Answers so far that came after their round had ended; they change nothing."""
        ...

    @property
    def states(self) -> StateStore | None:
        """Rows that clients keep between rounds; None where they keep them."""
        ...

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree, t: int
    ) -> Iterator[Reports]:
        """Run `fn` for every client of `clients` (ascending ids) in round t.

        Reports come in any grouping, failures in `failed`. Reports of nobody are a
        pause, in which the run may be stopped.
        """
        ...

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        t: int,
        weight: Weight,
        total: RunningSum,
    ) -> Iterator[Readout]:
        """As `each`, with updates added to `total` instead of handed over.

        An engine sums where clients run, if it can. Updates that are not finite are
        left out, and named in `failed`.
        """
        ...

    def describe(self) -> str:
        """One line for the user: where clients run, and how."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


def stamp() -> int:
    """Microseconds on a clock of this process, for the times of arrivals in the field.

    They begin anywhere; the run's own time begins with the run.
    """
    return time.monotonic_ns() // 1000


class FieldEngine(Protocol):
    """An engine of devices, whose answers come when they come."""

    def arrivals(self) -> list[Arrival]:
        """Work that has come to its end since the last call, in order of arrival.

        Times are those of `stamp`. A client that is too late has a row in its round,
        and another with the outcome "late" in the round in which its answer comes.
        """
        ...


class BufferedGrid(FieldEngine, Protocol):
    """Devices that are given work as others bring theirs back."""

    def buffer(
        self,
        fn: ClientFunction,
        down: Tree,
        t: int,
        settings: Buffered,
        pending: list[Item],
        down_of: Callable[[int], Tree],
    ) -> Iterator[Reports]:
        """Give work on version t to idle clients until the buffer is full.

        Reports of single clients follow, with `versions`, ascending by version and
        client; reports of nobody before them are pauses, in which the run may be
        stopped. `pending` is the work that a run which is gone on with had in flight,
        and `down_of(version)` the message that it starts from: it is sent again.
        """
        ...

    def sent(self) -> list[int]:
        """Clients that got the version of the last `buffer`, ascending."""
        ...

    def in_flight(self) -> list[Item]:
        """Work that no buffer has taken yet, by `n`; `finish` is -1."""
        ...


class Work:
    """One client's work, as every engine does it.

    Task, method, batch plan, defence, links, malicious clients and seed.
    """

    def __init__(
        self,
        task: Task,
        method: Method[Any],
        local: LocalSettings,
        seed: int,
        links: LinksSettings | None = None,
        defence: DefenceSettings | None = None,
        adversary: AdversarySettings | None = None,
        *,
        rounds: int = 1,
        few_widths: bool = False,
        sending: Sending | None = None,
        draws_secretly: bool = False,
    ) -> None:
        """`defence` protects messages of clients, `links` disturb all messages.

        By default neither does, and nobody is malicious. `rounds` of the run are those
        over which local step sizes follow their schedule. With `few_widths` batches are
        padded to few widths, for engines that record steps by shape. `sending` makes
        integers of messages where only sums can be read. With `draws_secretly` DP-SGD
        draws from the operating system, as on a device. Raises SettingsError for an
        adversary that does not fit the task.
        """
        self.task, self.method, self.local, self.seed = task, method, local, seed
        self._link_settings = links or LinksSettings()
        self._defence_settings = defence or DefenceSettings()
        self._adversary_settings = adversary or AdversarySettings()
        self.links = Links(self._link_settings, seed)
        self.defence = Defence(self._defence_settings, seed)
        self.adversary = Adversary(
            self._adversary_settings, task.population, seed, task
        )
        self.rounds, self.few_widths, self.sending = rounds, few_widths, sending
        self.training = Training.of(local, rounds)
        self.draws_secretly, self.draws = draws_secretly, None
        if local.dp.is_active:
            self.draws = ExampleDraws(task, local, seed, draws_secretly)
        self._now = (-1, torch.empty(0))

    def with_few_widths(self) -> Work:
        """The same work, with batches padded to few widths."""
        return Work(
            self.task,
            self.method,
            self.local,
            self.seed,
            self._link_settings,
            self._defence_settings,
            self._adversary_settings,
            rounds=self.rounds,
            few_widths=True,
            sending=self.sending,
            draws_secretly=self.draws_secretly,
        )

    def first_state(self, params: Params) -> Tree:
        """A client's state before its first round, from the initial global model."""
        own = self.method.init_client(params)
        return self.training.first_state(own, params) if self.training else own

    def batches(
        self, fn: ClientFunction, clients: list[int], t: int
    ) -> Batches | SampledBatches | Tuning:
        """Batches stacked over the clients, [n, K, B, ...]."""
        kind = data_of(fn)
        if kind == "all" and self.draws is not None:
            raise SettingsError(
                f"local.dp: {fn.__name__} reads every example without noise; leave "
                "local.dp out, or choose another method, e.g. fedavg"
            )
        if kind == "tune":
            train = self._plan("train", clients, t, 0, self._tuning())
            return Tuning(train, self._plan("test", clients, t, 0, self.local))
        plans = []
        for number in range(self.passes(fn)):
            plans.append(self._plan(kind, clients, t, number, self.local))
        if self.draws is not None:
            plans = widened(plans)
        joined: Batches = plans[0]
        if len(plans) > 1:
            joined = trees.map(_one_after_another, *plans)
        given = self.adversary.poison(joined, fn, clients, t)
        if kind != "train" or self.draws is None:
            return given
        return self.draws.add(given, fn.__name__, clients, t, self.passes(fn))

    def _plan(
        self, kind: Data, clients: list[int], t: int, number: int, local: LocalSettings
    ) -> Batches:
        ids, widths = np.asarray(clients), self.few_widths
        data, is_secret = self.task.data, self.draws_secretly
        return data.batches(ids, kind, local, self.seed, t, number, widths, is_secret)

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
        epochs = self.method.finetuning.epochs
        plain = {"epochs": epochs, "steps": None, "dp": ExampleSettings()}
        return self.local.model_copy(update=plain)

    def num_examples(self, fn: ClientFunction, clients: list[int]) -> Tensor:
        """float32 [n], sums of sizes; of a fine-tuning, what it is measured on."""
        kind = "test" if data_of(fn) == "tune" else data_of(fn)
        ids = np.asarray(clients, dtype=np.int64)
        counts = self.task.num_examples(ids, kind).astype(np.float32)
        moved: Tensor = trees.to(torch.from_numpy(counts), self.task.device)
        return moved

    def now(self, t: int) -> Tensor:
        """The round as a client function gets it: 0-d, on the task's device."""
        if self._now[0] != t:
            self._now = (t, torch.full((), float(t), device=self.task.device))
        return self._now[1]

    def one(
        self, fn: ClientFunction, client: int, down: Tree, state: Tree, t: int
    ) -> tuple[Tree, Tree]:
        """(`up` as it arrives, new state) of one client.

        `state` is on the task's device.
        """
        batches = trees.at(self.batches(fn, [client], t), 0)
        down = self.links.carry(down, "downlink", fn, t, client)
        with self.model_noise(fn, t, client):
            up, new = run_client(
                fn, self.task, self.now(t), down, state, batches, self.training
            )
        return self.send(up, fn, t, client), new

    def send(self, up: Tree, fn: ClientFunction, t: int, client: int) -> Tree:
        """A message as it arrives: protected before it leaves, then disturbed."""
        protected = self.defence.protect(up, fn, t, client)
        return self.links.carry(protected, "uplink", fn, t, client)

    def arrives_as_is(self, fn: ClientFunction) -> bool:
        """Whether `send` changes nothing."""
        return self.defence.is_silent(fn) and self.links.is_silent("uplink", fn)

    @contextmanager
    def model_noise(self, fn: ClientFunction, t: int, client: int) -> Iterator[None]:
        """Dropout and its like: on in training alone, and drawn from a key."""
        is_training = data_of(fn) != "test"
        if self.task.model.training != is_training:
            self.task.model.train(is_training)
        with torch_seed(self.seed, "model", t, client, device=self.task.device):
            yield


def _one_after_another(*plans: Tensor) -> Tensor:
    """[n, K, ...] of each to [n, sum of K, ...].

    Step by step in memory, as `FederatedData.batches` has them.
    """
    return torch.cat([x.transpose(0, 1) for x in plans]).transpose(0, 1)


class Done(NamedTuple):
    """Clients that have done their work.

    With a `total` no single update is needed: `reports.up` then has its scalars, and is
    empty elsewhere.
    """

    reports: Reports
    states: Tree  # new, stacked; nothing of those who failed
    total: Tree = None  # sum_i weight_i up_i


def run_alone(
    work: Work, fn: ClientFunction, client: int, down: Tree, state: Tree, t: int
) -> Done:
    """One client's work, as `sequential` does it; `state` is on the task's device."""
    try:
        up, new = work.one(fn, client, down, state, t)
        num_examples = work.num_examples(fn, [client])
    except Exception as error:  # a client may fail in any way; the round goes on
        return Done(failure([client], error), {})
    reports = Reports(torch.tensor([client]), _with_client_axis(up), num_examples)
    return Done(reports, _with_client_axis(new))


def _with_client_axis(tree: Tree) -> Tree:
    return trees.map(lambda x: x[None], tree)


def keep_states(states: StateStore, fn: ClientFunction, done: Done) -> Reports:
    """The reports, once the clients' new states are stored."""
    if len(done.reports.clients) and not evaluates(fn):
        states.put(done.reports.clients, done.states)
    return done.reports


def added_done(done: Done, weight: Weight, total: RunningSum) -> Iterator[Readout]:
    """The readout of clients whose sum, or single updates, are added to `total`."""
    reports = done.reports
    if done.total is None:
        yield from added([reports], weight, total)
        return
    weights = weight(reports.clients, reports.num_examples)
    total.add_sum(reports.clients, done.total, weights)
    for _, readout in read([reports]):
        yield readout._replace(nbytes=len(reports.clients) * trees.nbytes(done.total))


def failure(clients: list[int], error: BaseException | str) -> Reports:
    """Reports that hold only why these clients have none.

    The reason is counted by its text before the first colon.
    """
    if isinstance(error, BaseException):
        log.debug("client %s failed", clients, exc_info=error)
        error = f"error: {type(error).__name__}: {error}"
    nobody = torch.empty(0, dtype=torch.int64)
    return Reports(nobody, {}, torch.empty(0), dict.fromkeys(clients, error))


@contextmanager
def one_thread() -> Iterator[None]:
    """Client work on one thread, whatever engine.

    The number of threads changes the order of sums, hence the bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_for(settings: EngineSettings) -> torch.device:
    """The device that the settings name. Raises SettingsError for cuda without one."""
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise SettingsError(
            'engine.device = "cuda": PyTorch sees no CUDA device here; set '
            'engine.device = "cpu" or "auto"'
        )
    return torch.device("cuda" if settings.device != "cpu" and has_cuda else "cpu")
