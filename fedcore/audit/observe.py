"""Observations: everything that an adversary sees of a client, and nothing else.

The adversary is an honest but curious server, or somebody who reads one client's
channel. It knows the model, what went down to the client, what came up after the
client's defences, and what is public in the federation. Attacks get observations.
A client's real data is a `Truth`, a type that no attack takes: `metrics.py` does.

An observation is made of an exchange that a run kept (`fedcore.rounds.captures`), or
of one in a synthetic round (`simulate.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad

from fedcore import trees
from fedcore.audit.text import Vocabulary, vocabulary_of
from fedcore.data.sources import Pixels
from fedcore.errors import SettingsError
from fedcore.inputs import model_outputs
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.messages.secure.ring import Ring, power_of_two
from fedcore.messages.secure.sending import EXAMPLES
from fedcore.messages.secure.settings import SecureSettings
from fedcore.method import Method, data_of
from fedcore.metrics import PerExample, cross_entropy
from fedcore.rng import seed_of
from fedcore.rounds.captures import Exchange
from fedcore.task import Task
from fedcore.types import Params, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment

CPU = torch.device("cpu")
PROBES = 3000  # public examples that stand for all, at most
FEW = 16  # of them, by which a slope is looked for
BESIDE = 0.1  # standard deviation of the way to other parameters


@dataclass(frozen=True)
class Public:
    """Common knowledge in the federation."""

    model: nn.Module  # in evaluation mode, with the initial parameters as published
    loss: PerExample
    shape: tuple[int, ...]  # of one input; () where it is several tensors
    outputs: int  # of the model, per example; classes where the loss is cross-entropy
    pixels: Pixels | None  # None: inputs are no images
    lr: float | None  # eta, local step size
    epochs: int | None  # E
    batch_size: int | None  # B
    steps: int | None  # K, instead of epochs
    clipped: bool = False  # the update may have been shortened before it left
    sparse: bool = False  # only the largest entries of the update were sent
    has_classes: bool = True  # a target is one class, from 0 on
    unlike_reals: str | None = None  # as `unlike_reals` says of the inputs
    is_reached: bool = True  # a gradient reaches the inputs
    # Of a task of next tokens.
    vocabulary: Vocabulary | None = field(default=None, compare=False)
    # Tokens of an example; num_examples are then tokens, too. None: they are examples.
    length: int | None = None
    # Public inputs [n, ...] in the place of noise, which the model may not take.
    examples: Tree = field(default=None, compare=False)

    @property
    def classes(self) -> int | None:
        """Number of classes; None where the targets are no classes."""
        is_classified = self.loss is cross_entropy and self.has_classes
        return self.outputs if is_classified else None

    def predict(self, params: Params, x: Tree) -> Tensor:
        """Outputs [n, outputs] of inputs x [n, ...] with these parameters."""
        outputs: Tensor = model_outputs(self.model, params, x)
        return outputs

    def to(self, device: torch.device) -> Public:
        return replace(self, model=copy.deepcopy(self.model).to(device))

    def local_steps(self, num_examples: int) -> int | None:
        """T, local steps of a client with so many examples; None where unknown."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None or self.batch_size is None:
            return None
        # Windows of text are full, but for the last.
        rows = math.ceil(num_examples / (self.length or 1))
        return self.epochs * math.ceil(rows / self.batch_size)


@dataclass(frozen=True)
class Observation:
    """One exchange with one client.

    Under secure aggregation only the mean of M `clients` is seen: an observation then
    stands for all of them.
    """

    public: Public
    round: int  # from 1 on
    client: int  # a pseudonym: its number
    function: str  # of the method, that the client ran
    w0: Params  # the client's start; parameters that were never sent are as published
    delta: Params  # local minus global, by the names that came up
    num_examples: int  # N, as reported; of several clients the mean
    clients: int = 1  # M
    together: int | None = None  # examples of all M
    labels: Tensor | None = None  # int64 [M N], where they are granted ("oracle")

    @property
    def wT(self) -> Params:
        """w0 + delta: where the client ended."""
        end = dict(self.w0)
        for name, change in self.delta.items():
            end[name] = end[name] + change
        return end

    @property
    def device(self) -> torch.device:
        """Where its tensors are, and an attack on it runs."""
        return next(iter(self.w0.values())).device

    @property
    def total_examples(self) -> int:
        """Examples to look for, of all M clients."""
        return self.num_examples if self.together is None else self.together

    def to(self, device: torch.device, public: Public) -> Observation:
        """The same on this device, where the model of `public` is already."""
        return replace(
            self,
            public=public,
            w0=trees.to(self.w0, device),
            delta=trees.to(self.delta, device),
            labels=None if self.labels is None else self.labels.to(device),
        )

    def flipped(self) -> Observation:
        """The same, where what came up turns out to be global minus local."""
        return replace(self, delta=trees.map(torch.neg, self.delta))


def moved(seen: Sequence[Observation], device: torch.device) -> list[Observation]:
    """The observations on this device; those of one federation still share a model."""
    there: dict[Public, Public] = {}
    for observation in seen:
        if observation.public not in there:
            there[observation.public] = observation.public.to(device)
    return [o.to(device, there[o.public]) for o in seen]


class Truth(NamedTuple):
    """A client's real examples, for scoring alone."""

    x: Tree  # [N, ...], as the model takes them
    y: Tensor  # [N, ...]


class Subject(NamedTuple):
    """A client under audit."""

    seen: Observation
    truth: Truth | None
    before: tuple[Observation, ...] = ()  # the client's earlier exchanges, if captured
    others: Truth | None = None  # its examples that it did not train on, if any


def truth_of(task: Task, client: int) -> Truth:
    """The examples that a client trained on, in a simulation."""
    return rows_of(task, task.data.rows(client, "train"))


def held_out(task: Task, client: int) -> Truth | None:
    """The examples of a client that are held out; None where none are."""
    rows = task.data.rows(client, "test")
    return rows_of(task, rows) if len(rows) else None


def rows_of(task: Task, rows: np.ndarray) -> Truth:
    """Rows of the clients' data, on the CPU."""
    x, y = trees.at((task.data.x, task.data.y), torch.from_numpy(rows))
    return Truth(trees.to(x, CPU), y.cpu())


def unlike_reals(x: Tree) -> str | None:
    """The reason why inputs like `x` [n, ...] cannot be sought among real numbers.

    None where they can.

    >>> unlike_reals(torch.zeros(2, 3)) is None
    True
    >>> unlike_reals(torch.zeros(2, 3, dtype=torch.int64))
    'these are int64'
    >>> unlike_reals({"ids": torch.zeros(2, 3), "mask": torch.ones(2, 3)})
    'these are 2 tensors an example'
    """
    if not isinstance(x, Tensor):
        return f"these are {len(trees.leaves(x))} tensors an example"
    if not x.is_floating_point():
        return f"these are {str(x.dtype).removeprefix('torch.')}"
    return None


def public_of(experiment: Experiment, task: Task) -> Public:
    """The public part of a run with these settings."""
    model = copy.deepcopy(task.model).cpu().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    data, test = task.data, trees.to(trees.at(task.data.test.x, slice(PROBES)), CPU)
    with torch.no_grad():
        blank = trees.zeros_like(trees.to(trees.at(data.x, slice(1)), CPU))
        outputs = model_outputs(model, {}, blank)
    number = int(outputs.shape[-1]) if outputs.ndim > 1 else 1
    strange = unlike_reals(data.x)
    is_reached = strange is None and _is_reached(model, test)
    shape = tuple(data.x.shape[1:]) if isinstance(data.x, Tensor) else ()
    local, defence = experiment.local, experiment.defence
    vocabulary = vocabulary_of(model, task)
    return Public(
        model=model,
        loss=task.metrics["loss"],
        shape=shape,
        outputs=number,
        pixels=task.pixels if len(shape) == 3 else None,
        lr=_step_size(experiment),
        epochs=local.epochs if local.steps is None else None,
        batch_size=local.batch_size,
        steps=local.steps,
        clipped=defence.clip is not None,
        sparse=defence.top_k < 1,
        has_classes=_are_classes(data.y, outputs),
        unlike_reals=strange,
        is_reached=is_reached,
        vocabulary=vocabulary,
        length=shape[0] if _counts_tokens(task) else None,
        examples=None if is_reached else test,
    )


def _counts_tokens(task: Task) -> bool:
    """Whether an example counts as many times as it has targets."""
    return getattr(task, "size", None) is not None


def _step_size(experiment: Experiment) -> float | None:
    """eta, where an update is so many times the sum of its gradients; else None."""
    local = experiment.local
    is_plain = local.optimizer == "sgd" and local.clip is None
    if not is_plain or local.schedule != "constant" or local.warmup:
        return None
    lr = getattr(experiment.method, "local_lr", None)  # not every method has one
    return float(lr) if isinstance(lr, int | float) else None


def _are_classes(y: Tensor, outputs: Tensor) -> bool:
    """Whether targets y [n, ...] are one class each, of those that a model gives."""
    is_whole = not y.is_floating_point() and not y.is_complex()
    if not is_whole or y.ndim != 1 or outputs.ndim != 2 or len(y) == 0:
        return False
    return bool(y.min() >= 0 and y.max() < outputs.shape[1])


def _is_reached(model: nn.Module, x: Tensor) -> bool:
    """Whether outputs for some of the inputs x [n, ...] have a slope in the inputs.

    At parameters beside those of the model, of which some may be zero at the start.
    """
    draw = torch.Generator().manual_seed(0)
    params: Params = {}
    for name, w in model.named_parameters():
        params[name] = w + BESIDE * torch.randn(w.shape, generator=draw).to(w.dtype)
    x = x[:FEW].detach().clone().requires_grad_()
    outputs = model_outputs(model, params, x)
    if len(x) == 0 or not outputs.requires_grad:
        return len(x) == 0  # nothing is known without an example
    direction = torch.randn(outputs.shape, generator=draw).to(outputs.dtype)
    total = (outputs * direction).sum()
    (slope,) = torch.autograd.grad(total, x, allow_unused=True)
    return slope is not None and bool((slope != 0).any())


def observation(method: Method[Any], public: Public, exchange: Exchange) -> Observation:
    """The exchange, completed by what is public.

    Parameters that never left the clients are as they were published.
    """
    w0 = {name: p.detach() for name, p in public.model.named_parameters()}
    # First what is no parameter (a change of frozen ones): the last is the output's.
    beside = {name: x for name, x in exchange.w0.items() if name not in w0}
    w0 = {**beside, **w0, **exchange.w0}
    if data_of(getattr(method, exchange.function)) == "all":
        # A full gradient is sent as a step of size 1 on all examples at once.
        public = replace(
            public,
            lr=1.0,
            epochs=1,
            batch_size=max(exchange.num_examples, 1),
            steps=None,
        )
    in_order = [name for name in w0 if name in exchange.delta]  # of the model's layers
    return Observation(
        public,
        exchange.round,
        exchange.client,
        exchange.function,
        w0,
        {name: exchange.delta[name] for name in in_order},
        exchange.num_examples,
    )


def aggregate(
    subjects: Sequence[Subject], experiment: Experiment | None = None
) -> Subject:
    """M clients of whom only the mean by examples is seen (secure aggregation).

    It is the sum of their integers, as a secure sum of `experiment` makes them. One
    client alone stays as it is. Raises SettingsError where messages differ in kind.
    """
    if len(subjects) == 1:
        return subjects[0]
    seen = [subject.seen for subject in subjects]
    first, together = seen[0], sum(o.num_examples for o in seen)
    if any(o.delta.keys() != first.delta.keys() for o in seen):
        raise SettingsError(
            "secure aggregation is audited for clients that send one kind of message"
        )
    mean = _secure_mean(seen, experiment)
    observed = replace(
        first,
        delta=mean,
        num_examples=round(together / len(seen)),
        clients=len(seen),
        together=together,
    )
    truths = [subject.truth for subject in subjects if subject.truth is not None]
    if len(truths) < len(subjects):
        return Subject(observed, None)
    held = [subject.others for subject in subjects if subject.others is not None]
    others = _joined(held) if held else None
    return Subject(observed, _joined(truths), others=others)


def _secure_mean(seen: Sequence[Observation], experiment: Experiment | None) -> Params:
    """What a secure sum of these updates gives, divided by its weight."""
    secure, aggregation, seed = SecureSettings(), AggregationSettings(), 0
    if experiment is not None:
        secure, aggregation = experiment.secure, experiment.aggregation
        seed = experiment.seed
    most = aggregation.max_examples or EXAMPLES
    ring = Ring(len(seen), secure.reach, power_of_two(most))
    first = seen[0].delta
    total = torch.zeros(trees.ravel(first).numel(), dtype=torch.int32)
    together = 0
    for o in seen:
        key = seed_of(seed, f"rounding {o.function}", o.round - 1, o.client)
        weight = min(o.num_examples, most)
        draws = torch.Generator().manual_seed(key)
        numbers, _ = ring.encode(trees.ravel(o.delta).cpu(), weight, draws)
        total += numbers
        together += weight
    mean = ring.decode(total) / max(together, 1)
    pieces: Params = trees.unravel(mean, first)
    return {name: piece.to(first[name]) for name, piece in pieces.items()}


def _joined(truths: Sequence[Truth]) -> Truth:
    """The examples of all."""
    x = trees.map(lambda *rows: torch.cat(rows), *(truth.x for truth in truths))
    return Truth(x, torch.cat([truth.y for truth in truths]))


def alignment(seen: Observation, x: Tree, y: Tensor) -> float:
    """Cosine of w0 - wT and the gradient at w0 of the mean loss of public examples.

    Positive where the sign of the update is right.
    """

    def loss(moving: Params) -> Tensor:
        outputs = seen.public.predict({**seen.w0, **moving}, x)
        return seen.public.loss(outputs, y).mean()

    slope = grad(loss)({name: seen.w0[name] for name in seen.delta})
    squares = trees.dot(slope, slope).double()
    norms = (squares * trees.dot(seen.delta, seen.delta).double()).sqrt()
    return float(-trees.dot(slope, seen.delta) / norms.clamp(min=1e-30))
