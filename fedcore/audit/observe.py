"""What an adversary sees: an `Observation`. Where it comes from: a run's captured updates, or synthetic rounds.

The adversary is an honest but curious server, or somebody who reads one client's channel: it knows the model, what went down to
the client and what came up after its defences, and what is public in the federation. Attacks get observations and nothing else. A
client's real data is a `Truth`, a type that no attack takes: it goes to `metrics.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.sources import Pixels
from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.engines.sequential import Sequential
from fedcore.errors import RunError, SettingsError
from fedcore.method import Method, Round, data_of
from fedcore.reports import Reports
from fedcore.rng import rng
from fedcore.rounds.participation import UniformProcess
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.rows import StateStore
from fedcore.task import PerExample, Task, cross_entropy
from fedcore.types import ClientFunction, Params, Tree

FOLDER = "captures"


@dataclass(frozen=True)
class Public:
    """What everybody in the federation knows."""

    model: nn.Module  # the architecture, in evaluation mode, with the initial parameters that were published
    loss: PerExample
    shape: tuple[int, ...]  # of one input
    outputs: int  # of the model, per example; classes where the loss is cross-entropy
    pixels: Pixels | None  # None: inputs are no images
    lr: float | None  # eta, local step size
    epochs: int | None  # E
    batch_size: int | None  # B
    steps: int | None  # K, instead of epochs
    clipped: bool = False  # the update may have been shortened before it left
    sparse: bool = False  # only the largest entries of the update were sent

    @property
    def classes(self) -> int | None:
        """Number of classes; None where the targets are no classes."""
        return self.outputs if self.loss is cross_entropy else None

    def predict(self, params: Params, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.model, params, (x,))
        return outputs

    def to(self, device: torch.device) -> Public:
        return replace(self, model=copy.deepcopy(self.model).to(device))

    def local_steps(self, num_examples: int) -> int | None:
        """T, the local steps of a client with so many examples; None where nobody knows."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None or self.batch_size is None:
            return None
        return self.epochs * math.ceil(num_examples / self.batch_size)


@dataclass(frozen=True)
class Observation:
    """One exchange with one client, or with `clients` of them of whom only the mean is seen (secure aggregation)."""

    public: Public
    round: int  # from 1 on
    client: int  # a pseudonym: its number
    function: str  # of the method, that the client ran
    w0: Params  # what the client started from; what was never sent is as it was published
    delta: Params  # what came up: local minus global, by the names that came up
    num_examples: int  # N, as reported; of several clients the mean
    clients: int = 1  # M
    together: int | None = None  # examples of all M
    labels: Tensor | None = (
        None  # int64 [M N], only where the adversary is granted them ("oracle")
    )

    @property
    def wT(self) -> Params:
        """w0 + delta: where the client ended."""
        return {
            name: w + self.delta[name] if name in self.delta else w
            for name, w in self.w0.items()
        }

    @property
    def device(self) -> torch.device:
        """Where its tensors are, and an attack on it runs."""
        return next(iter(self.w0.values())).device

    @property
    def total(self) -> int:
        """Examples to look for, of all M clients."""
        return self.num_examples if self.together is None else self.together

    def to(self, device: torch.device, known: Public) -> Observation:
        """On this device, where the model of `known` is, which is `public` otherwise."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(
            self,
            public=known,
            w0=trees.to(self.w0, device),
            delta=trees.to(self.delta, device),
            labels=labels,
        )

    def flipped(self) -> Observation:
        """The same, where what came up turns out to be global minus local."""
        return replace(
            self, delta={name: -change for name, change in self.delta.items()}
        )


def moved(seen: Sequence[Observation], device: torch.device) -> list[Observation]:
    """On this device, where an attack on them then runs; those of one federation still have one model."""
    known = {o.public: o.public.to(device) for o in seen}
    return [o.to(device, known[o.public]) for o in seen]


class Truth(NamedTuple):
    """A client's real examples, for scoring alone."""

    x: Tensor  # [N, ...], as the model takes them
    y: Tensor  # [N]


class Subject(NamedTuple):
    """A client under audit."""

    seen: Observation
    truth: Truth | None
    before: tuple[
        Observation, ...
    ] = ()  # the client's earlier exchanges that are known


def public(e: Experiment, task: Task) -> Public:
    """What is public of a run with these settings."""
    model = copy.deepcopy(task.model).cpu().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    shape = tuple(task.data.x.shape[1:])
    with torch.no_grad():
        found = model(torch.zeros_like(task.data.x[:1], device="cpu"))
    lr = getattr(e.method, "local_lr", None)
    return Public(
        model=model,
        loss=task.metrics["loss"],
        shape=shape,
        outputs=int(found.shape[-1]) if found.ndim > 1 else 1,
        pixels=task.pixels if len(shape) == 3 else None,
        lr=float(lr) if isinstance(lr, int | float) else None,
        epochs=e.local.epochs if e.local.steps is None else None,
        batch_size=e.local.batch_size,
        steps=e.local.steps,
        clipped=e.defence.clip is not None,
        sparse=e.defence.top_k < 1,
    )


class Exchange(NamedTuple):
    """One client's part in one exchange, as the server had it."""

    round: int
    client: int
    function: str
    w0: Params
    delta: Params
    num_examples: int


def exchanges(
    method: Method[Any],
    t: int,
    fn: ClientFunction,
    down: Tree,
    r: Reports,
    clients: frozenset[int],
) -> Iterator[Exchange]:
    """Those of the reports that are of these clients, and tell a change of parameters."""
    for row, client in enumerate(r.clients.tolist()):
        if (
            client in clients
            and (found := method.exchanged(down, trees.at(r.up, row))) is not None
        ):
            w0, delta = (
                trees.map(lambda x: x.detach().cpu().clone(), side) for side in found
            )
            yield Exchange(
                t + 1, client, fn.__name__, w0, delta, int(r.num_examples[row])
            )


def observation(method: Method[Any], known: Public, x: Exchange) -> Observation:
    """The exchange with what is public; what never left the clients is as it was published."""
    w0 = {**{name: p.detach() for name, p in known.model.named_parameters()}, **x.w0}
    if (
        data_of(getattr(method, x.function)) == "all"
    ):  # one full gradient: a step of size 1 on all examples
        known = replace(
            known, lr=1.0, epochs=1, batch_size=max(x.num_examples, 1), steps=None
        )
    delta = {
        name: x.delta[name] for name in w0 if name in x.delta
    }  # in the order of the model's layers
    return Observation(known, x.round, x.client, x.function, w0, delta, x.num_examples)


def aggregate(subjects: Sequence[Subject]) -> Subject:
    """M clients of whom only the mean by example counts is seen (secure aggregation). One alone is what it was."""
    if len(subjects) == 1:
        return subjects[0]
    seen = [subject.seen for subject in subjects]
    first, together = seen[0], sum(o.num_examples for o in seen)
    if any(o.delta.keys() != first.delta.keys() for o in seen):
        raise SettingsError(
            "secure aggregation is audited for clients that send one kind of message"
        )
    shares = torch.tensor([o.num_examples / together for o in seen])
    mean = {
        name: torch.tensordot(
            shares.to(w), torch.stack([o.delta[name] for o in seen]), 1
        )
        for name, w in first.delta.items()
    }
    observed = replace(
        first,
        delta=mean,
        num_examples=round(together / len(seen)),
        clients=len(seen),
        together=together,
    )
    truths = [subject.truth for subject in subjects if subject.truth is not None]
    whole = len(truths) == len(subjects)
    return Subject(
        observed,
        Truth(torch.cat([t.x for t in truths]), torch.cat([t.y for t in truths]))
        if whole
        else None,
    )


def alignment(seen: Observation, x: Tensor, y: Tensor) -> float:
    """Cosine of w0 - wT and the gradient of the mean loss of public examples at w0: positive, where the sign is right."""

    def loss(moving: Params) -> Tensor:
        return seen.public.loss(seen.public.predict({**seen.w0, **moving}, x), y).mean()

    g = grad(loss)({name: seen.w0[name] for name in seen.delta})
    norms = (
        trees.dot(g, g).double() * trees.dot(seen.delta, seen.delta).double()
    ).sqrt()
    return float(-trees.dot(g, seen.delta) / norms.clamp(min=1e-30))


# Capture: a run's real updates


class Captures:
    """Keeps the updates of `audit.capture` clients, as the server gets them: one file a round in `captures/` of the run."""

    def __init__(self, folder: Path, e: Experiment, method: Method[Any]) -> None:
        self.folder, self.method, self.seed, self.n = (
            folder / FOLDER,
            method,
            e.seed,
            e.audit.capture,
        )
        self.rounds = (
            frozenset(e.audit.rounds or (1, e.rounds)) if self.n else frozenset[int]()
        )
        self._clients = frozenset[int]()
        self._found: list[Exchange] = []

    def begin(self, t: int, cohort: Tensor) -> None:
        """Choose the clients of round t (from 0 on): by an order drawn once, so that a client met before is chosen again."""
        self._found, chosen = [], list[int]()
        if t + 1 in self.rounds:
            chosen = sorted(
                cohort.tolist(),
                key=lambda client: rng(self.seed, "audit", client).random(),
            )[: self.n]
        self._clients = frozenset(chosen)

    @property
    def wanted(self) -> bool:
        """Whether updates of this round are kept."""
        return bool(self._clients)

    def add(self, t: int, fn: ClientFunction, down: Tree, r: Reports) -> None:
        if self.wanted:
            self._found += exchanges(self.method, t, fn, down, r, self._clients)

    def end(self, t: int) -> str | None:
        """Write the round's file; what the user should know, where there is nothing to write."""
        if not self.wanted:
            return None
        if not self._found:
            return f"round {t + 1}: nothing captured for an audit: the chosen clients sent no change of parameters"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(
            self.folder / f"round-{t + 1:06d}.safetensors", _pack(self._found)
        )
        self._found = []
        return None


def _pack(found: Sequence[Exchange]) -> bytes:
    """What went down once a function, what came up once a client; the rest as JSON in the header."""
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for x in found:
        tensors |= {
            f"{x.function}/down/{name}": value.contiguous()
            for name, value in x.w0.items()
        }
        tensors |= {
            f"{x.function}/up/{x.client}/{name}": value.contiguous()
            for name, value in x.delta.items()
        }
        facts.append(
            {
                "round": x.round,
                "client": x.client,
                "function": x.function,
                "num_examples": x.num_examples,
            }
        )
    return save(tensors, {"exchanges": json.dumps(facts)})


def captured(folder: Path) -> list[Exchange]:
    """All exchanges kept in this run directory, in order of rounds. Raises SettingsError when there are none, or damaged ones."""
    files = sorted((folder / FOLDER).glob("round-*.safetensors"))
    if not files:
        raise SettingsError(
            f"{folder} holds no captured updates: run it with --set audit.capture=N, N clients a round"
        )
    found: list[Exchange] = []
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                names = f.keys()
                tensors = {name: f.get_tensor(name) for name in names}
                facts = json.loads(f.metadata()["exchanges"])
            for x in facts:
                down, up = (
                    f"{x['function']}/down/",
                    f"{x['function']}/up/{x['client']}/",
                )
                w0, delta = (
                    {
                        key.removeprefix(side): value
                        for key, value in tensors.items()
                        if key.startswith(side)
                    }
                    for side in (down, up)
                )
                found.append(Exchange(**x, w0=w0, delta=delta))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            raise SettingsError(
                f"{file} is damaged ({e}): remove it, or run again with audit.capture"
            ) from e
    return found


def truth_of(task: Task, client: int) -> Truth:
    """What the client trained on, in a simulation."""
    rows = torch.from_numpy(task.data.rows(client, "train"))
    return Truth(task.data.x[rows].cpu(), task.data.y[rows].cpu())


# Synthetic rounds


def simulate(e: Experiment, task: Task, clients: int, examples: int) -> list[Subject]:
    """One round of the method with `clients` clients of `examples` training examples each, taken from those of the partition.

    The clients are drawn from those that have as many, so their classes are as skewed as the run's. Raises SettingsError when there
    are too few, RunError when a client fails.
    """
    able = np.flatnonzero(task.data.sizes >= examples)
    if len(able) < clients:
        raise SettingsError(
            f"{examples} examples of each of {clients} clients: only {len(able)} of {task.population} clients have as many; lower "
            "one of the two, or the number of clients in the population"
        )
    chosen = np.sort(
        rng(e.seed, "audit clients").choice(able, clients, replace=False, shuffle=False)
    )
    rows = [
        task.data.order[task.data.offsets[i] : task.data.offsets[i] + examples]
        for i in chosen
    ]
    data = FederatedData(
        Examples(task.data.x, task.data.y),
        task.data.test,
        np.concatenate(rows),
        np.arange(clients + 1) * examples,
    )
    small = copy.copy(task)
    small.data = data
    method = e.build_method()
    params = small.init_params()
    work = Work(small, method, e.local, e.seed, e.links, e.defence)
    states = StateStore(method.init_client(params), 10**9, Path)
    engine, everyone = Sequential(work, states), frozenset(range(clients))
    found: list[Exchange] = []

    class SyntheticRound(Round):
        def each(
            self, fn: ClientFunction, ids: Tensor, down: Tree
        ) -> Iterator[Reports]:
            for r in engine.each(fn, ids, down, 0):
                for client, reason in r.failed.items():
                    raise RunError(
                        f"client {client} failed in a synthetic round: {reason}"
                    )
                found.extend(exchanges(method, 0, fn, down, r, everyone))
                yield r

        def zero_message(self, fn: ClientFunction, down: Tree) -> Tree:
            return trees.zeros_like(message_shape(work, fn, down, 0))

    memory = StateStore(method.init_memory(params), 10**9, Path)
    process = UniformProcess(clients, e.seed, clients)
    cohort = torch.arange(clients)
    rates = torch.from_numpy(np.asarray(process.rates))
    method.round(
        method.init_server(params, clients),
        SyntheticRound(0, cohort, clients, small, memory, e.seed, rates),
    )
    last = {
        x.client: x for x in found
    }  # of a method that asks more than once, what it asked last
    if not last:
        raise SettingsError(
            f'method "{e.method.name}": its messages hold no change of parameters that an attack could invert'
        )
    known = public(e, task)
    return [
        Subject(observation(method, known, x), truth_of(small, i))
        for i, x in sorted(last.items())
    ]
