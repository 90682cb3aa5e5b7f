"""What a method is: two halves, as pure functions over trees of tensors, in one file.

A method also sees a `Round`: who was asked, and the two doors to the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    TypeVar,
    overload,
)

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.local import local_sgd
from fedcore.reports import (
    Mean,
    Reports,
    RunningSum,
    Weight,
    Weights,
    by_examples,
    weights_of,
)
from fedcore.split import Parts, split
from fedcore.statistics import with_statistics
from fedcore.task import Task
from fedcore.types import (
    Batches,
    ClientFunction,
    Memory,
    Metrics,
    Model,
    News,
    Params,
    Stateless,
    Tree,
    Tuning,
)

if TYPE_CHECKING:
    from fedcore.privacy import Mechanism
    from fedcore.rounds.participation import Process

__all__ = ["FinetuneSettings", "Method", "MethodSettings", "Round", "on_client"]

Data = Literal["train", "all", "test", "tune"]
"""The examples that a client function reads.

The round's shuffled minibatches, every training example once, the held-out examples, or
a `Tuning`: minibatches to fine-tune on, and the held-out examples.
"""

Setting = Literal[
    "buffered",
    "discount",
    "rule",
    "secure",
    "distributed",
    "dp",
    "optimizer",
    "clip",
    "schedule",
    "warmup",
    "moments",
    "micro",
    "precision",
]
"""Settings of a run that a method may have a reason to refuse.

"buffered" is a schedule of buffered answers, "discount" weights by staleness in it,
"rule" is a robust rule in the place of the mean, "secure" a sum of which the server
sees nothing else, "distributed" noise of the clients in such a sum; the others are
those of `[local]`.
"""

STEP_SIZES: tuple[Setting, ...] = ("schedule", "warmup")
STEPS: tuple[Setting, ...] = ("optimizer", "clip", *STEP_SIZES)
"""Settings by which K local steps move by something else than K times lr gradients."""

TRAINING: tuple[Setting, ...] = (*STEPS, "moments", "micro", "precision")
"""All settings of local steps."""


class FinetuneSettings(BaseModel):
    """Training of each client's own model after the last round.

    It is measured and thrown away.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(
        0,
        ge=0,
        description="passes over the client's training examples; 0 = no fine-tuning",
    )
    lr: float = Field(0.05, gt=0, description="step size")
    parts: Parts = Field(
        ("all",),
        min_length=1,
        description="parts of the model that are trained, by name, or patterns of "
        "parameter names",
    )
    penalty: float = Field(
        0.0,
        ge=0,
        description="lambda of |v - v_start|^2, without 1/2; with parts = all, Ditto "
        "after the fact",
    )


class MethodSettings(BaseModel):
    """Base of a method's settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str


@dataclass(frozen=True)
class Round:
    """A round: its number, its cohort, and the doors `mean` and `each` to clients."""

    t: int  # from 0 on
    cohort: Tensor  # [m] int64, ascending: who was asked. Reports say who answered.
    population: int
    task: Task
    memory: Memory
    seed: int  # for the method's own draws: rng(r.seed, "purpose", r.t, ...)
    # p_i, [population] float64: how often an update of client i arrives, where known.
    rates: Tensor | None = None
    # For this round's line in metrics.jsonl, as server_<name>: a number, or a list.
    log: dict[str, Any] = field(default_factory=dict)

    def mean(
        self,
        fn: ClientFunction,
        clients: Tensor,
        down: Tree,
        weight: Weight | Tensor | Weights = by_examples,
        news: News | None = None,
    ) -> Mean:
        """The weighted mean of the clients' updates.

        `weight` is `by_examples`, `equally`, or a tensor with one weight for each of
        `clients`, in ascending ids, known before they are asked; or a dict of these by
        field of the update. No single update comes back: it may be summed where clients
        run, in secret, or by a robust rule.

        `news` is a function of the method that makes of an update, and of what is
        remembered of its client (`init_memory` before the first), the part that is
        summed. What is remembered is kept once the round has succeeded.
        """
        total = RunningSum()
        weigh = weights_of(weight, clients)
        for reports in self.each(fn, clients, down):
            total.add_by(self.with_news(reports, news), weigh)
        return total.mean(lambda: self.zero_message(fn, down, news))

    def with_news(self, reports: Reports, news: News | None) -> Reports:
        """The reports with what is new in them, which is remembered from now on."""
        if news is None or len(reports.clients) == 0:
            return reports
        remembered = self.memory.gather(reports.clients)
        message, now = news(reports.up, remembered, reports.num_examples)
        self.memory.put(reports.clients, now)
        return reports._replace(up=message)

    def each(
        self, fn: ClientFunction, clients: Tensor, down: Tree
    ) -> Iterator[Reports]:
        """Every client's update, one report after another.

        For methods that weigh or remember single updates; a method that asks for
        messages through this door says `needs_updates = True`.
        """
        raise NotImplementedError

    def zero_message(
        self, fn: ClientFunction, down: Tree, news: News | None = None
    ) -> Tree:
        """Zeros in the shape of what one client sends: the sum of no updates."""
        raise NotImplementedError

    def known_rates(self) -> Tensor:
        """p_i of every client, float64 [population], for methods that are told.

        Raises SettingsError where the rates are not known.
        """
        if self.rates is None:
            raise SettingsError(
                "this participation process has no rates p_i, which the method's "
                "settings ask for: use another"
            )
        return self.rates


S = TypeVar("S", bound=MethodSettings)
F = TypeVar("F", bound=Callable[..., Any])


@overload
def on_client(fn: F) -> F: ...
@overload
def on_client(*, data: Data) -> Callable[[F], F]: ...
def on_client(fn: Any = None, *, data: Data = "train") -> Any:
    """Mark a function that runs on a client and nowhere else.

    Engines refuse to run any other. What it computes follows from its arguments and the
    method's settings: engines record it, and replay it with other values. Its
    annotations `down`, and the first of the returned pair, are the wire schema.
    """

    def mark(fn: F) -> F:
        fn.client_data = data  # type: ignore[attr-defined]
        return fn

    return mark if fn is None else mark(fn)


def data_of(fn: Callable[..., Any]) -> Data:
    """The examples that `fn` reads. Raises TypeError for one without @on_client."""
    data: Data | None = getattr(fn, "client_data", None)
    if data is None:
        name = getattr(fn, "__qualname__", fn)
        raise TypeError(f"{name} does not run on clients: mark it with @on_client")
    return data


def evaluates(fn: Callable[..., Any]) -> bool:
    """Whether `fn` only measures.

    Its messages arrive undisturbed, and it leaves no trace in the client's state.
    """
    return data_of(fn) in ("test", "tune")


class Method(Generic[S]):
    """A method holds settings and nothing that changes.

    What changes is in its Server or its Client tuple.
    """

    differences: ClassVar[bool] = True
    """Whether all messages are differences to the global model.

    These alone can be clipped or made sparse.
    """

    needs_updates: ClassVar[bool] = False
    """Whether it asks for messages through `Round.each`, to weigh or remember them.

    Settings under which no single update is seen can refuse such a method by name.
    """

    remembers: ClassVar[bool] = False
    """Whether its sums hold the last message of every client (`news`)."""

    buffered: ClassVar[bool] = False
    """Whether a buffer of answers to several versions of the model can be its round.

    It can where a round is one exchange of training, whose mean or memory makes the
    server's step, and neither rounds nor cohorts are counted.
    """

    works_unasked: ClassVar[bool] = False
    """Whether clients outside the cohort work too, by themselves."""

    def __init__(self, settings: S, finetuning: FinetuneSettings | None = None) -> None:
        self.s = settings
        self.finetuning = finetuning or FinetuneSettings()

    def init_server(self, params: Params, population: int) -> Any:
        """The server's state before the first round: a NamedTuple with `params`."""
        return Model(params)

    def init_client(self, params: Params) -> Tree:
        """A client's state before its first round, from the initial global model."""
        return Stateless()

    def init_memory(self, params: Params) -> Tree:
        """A client's row in `Round.memory` before its first write."""
        return Stateless()

    def check(self, task: Task, cohort: int) -> str | None:
        """A look at the run before anything is written.

        Raises SettingsError for what would fail later; returns what the user should
        know. `cohort` is the largest to expect, in clients.
        """
        return None

    def passes(self) -> int:
        """Plans of batches, each freshly shuffled, for a client's training in a round.

        The client gets them one after another.
        """
        return 1

    def personalises(self) -> bool:
        """Whether a client's model is more than the server's.

        Then a run is judged by its clients, not by the test set.
        """
        return type(self).model_for is not Method.model_for

    def asks_everybody_first(self) -> bool:
        """Whether the first round asks every client of the population once."""
        return False

    def exchanged(self, down: Any, up: Any) -> tuple[Params, Params] | None:
        """For an audit: (parameters a client started from, its change of them).

        As the server sees them in this exchange; None where the messages hold none.
        """
        if hasattr(down, "params") and hasattr(up, "delta"):
            return down.params, up.delta
        return None

    def refuses(self, setting: Setting) -> str | None:
        """Why a run of this method cannot have a setting; None where it can."""
        if setting == "moments" and self.passes() > 1:
            return "it trains more than once a round"
        if setting == "buffered" and not self.buffered:
            return "its step needs a cohort that worked on one version of the model"
        if setting == "discount" and self.remembers:
            return "it remembers updates as they are, and weighs none by its age"
        if setting == "rule" and (self.needs_updates or self.remembers):
            return (
                "its step is a sum of messages that it remembers, so that a poisoned "
                "one acts in every later round"
            )
        if setting == "secure" and self.needs_updates:
            return "it looks at every single update"
        if setting == "distributed":
            return self._refuses_noise()
        if setting == "dp":
            return self.refuses("clip")
        return None

    def counts_equally(self) -> bool:
        """Whether every client has weight 1 in all of its means."""
        return False

    def _refuses_noise(self) -> str | None:
        """Why clients cannot add noise to its sums."""
        if self.needs_updates:
            return "it looks at every single update"
        if self.remembers:
            return (
                "it remembers the last message of every client, and with it the noise "
                "of all rounds"
            )
        if not self.differences:
            return "its messages are no differences to the model, so no bound fits them"
        if not self.counts_equally():
            return (
                "its mean counts examples, and one client's share of a sum has to be "
                'bounded: take fedavg with method.weighting = "participating", or '
                "another method in which clients count the same"
            )
        return None

    def needs_rates(self) -> bool:
        """Whether the settings ask for `Round.known_rates`."""
        return False

    def mechanism(self, process: Process) -> Mechanism | None:
        """The noise that the method's server adds, for the accountant; None = none.

        Raises SettingsError where `process` is not the sampling that the accountant
        assumes.
        """
        return None

    @on_client(data="test")
    def evaluate(
        self, task: Task, t: Tensor, down: Model, state: Tree, batches: Batches
    ) -> tuple[Metrics, Tree]:
        """The client's metrics on its held-out examples, of the model it would use."""
        return Metrics(task.evaluate(self.model_for(down, state), batches)), state

    @on_client(data="tune")
    def finetune(
        self, task: Task, t: Tensor, down: Model, state: Tree, batches: Tuning
    ) -> tuple[Metrics, Tree]:
        """`evaluate` after fine-tuning the model that the client would use.

        The fine-tuned model is measured and forgotten.
        """
        settings = self.finetuning
        params = self.model_for(down, state)
        # In the model's order, from which parts such as "output" are read.
        names = [name for name, _ in task.model.named_parameters() if name in params]
        ordered = {name: params[name] for name in names}
        fixed, start = split(ordered, settings.parts)
        # What is no parameter, such as a change of a frozen weight, stays.
        for name, value in params.items():
            if name not in ordered:
                fixed[name] = value
        start, fixed = with_statistics(task.model, start, fixed)
        tuned = local_sgd(
            task.loss,
            start,
            batches.train,
            settings.lr,
            prox=2 * settings.penalty,
            fixed=fixed,
        )
        metrics = task.evaluate({**fixed, **tuned.params}, batches.test)
        return Metrics(metrics), state

    def round(self, server: Any, r: Round) -> Any:
        """One round: the server's state before it to the state after it."""
        raise NotImplementedError(f"{type(self).__name__} defines no round")

    def model_for(self, server: Any, state: Tree) -> Params:
        """The model that a client with this state would use.

        `server` is anything with `params`.
        """
        params: Params = server.params
        return params
