"""What a method is: two halves, as pure functions over trees of tensors, in one file of `strategies/`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, overload

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.local import local_sgd
from fedcore.split import Parts, split
from fedcore.task import Task
from fedcore.types import (
    Batches,
    Metrics,
    Model,
    Params,
    Round,
    Stateless,
    Tree,
    Tuning,
)

if TYPE_CHECKING:
    from fedcore.privacy import Mechanism
    from fedcore.rounds.participation import Process

PACKAGE = "strategies"

Data = Literal["train", "all", "test", "tune"]
"""What a client function reads: the round's shuffled minibatches, every training example once, the held-out examples, or a
`Tuning`: minibatches to fine-tune on, and the held-out examples."""


class FinetuneSettings(BaseModel):
    """Training of each client's own model after the last round, measured and thrown away."""

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
        description="what is trained: parts of the model by name, or patterns of parameter names",
    )
    penalty: float = Field(
        0.0,
        ge=0,
        description="lambda of |v - v_start|^2, without 1/2; with parts = all, Ditto after the fact",
    )


class MethodSettings(BaseModel):
    """Base of a method's settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str


S = TypeVar("S", bound=MethodSettings)
F = TypeVar("F", bound=Callable[..., Any])


@overload
def on_client(fn: F) -> F: ...
@overload
def on_client(*, data: Data) -> Callable[[F], F]: ...
def on_client(fn: Any = None, *, data: Data = "train") -> Any:
    """Mark a function that runs on a client and nowhere else; engines refuse to run any other.

    What it computes follows from its arguments and the method's settings: engines record it, and replay it with other values.
    Its annotations `down`, and the first of the returned pair, are the wire schema.
    """

    def mark(fn: F) -> F:
        fn.client_data = data  # type: ignore[attr-defined]
        return fn

    return mark if fn is None else mark(fn)


def data_of(fn: Callable[..., Any]) -> Data:
    """Which of the client's examples `fn` reads. Raises TypeError for a function without @on_client."""
    data: Data | None = getattr(fn, "client_data", None)
    if data is None:
        raise TypeError(
            f"{getattr(fn, '__qualname__', fn)} does not run on clients: mark it with @on_client"
        )
    return data


def evaluates(fn: Callable[..., Any]) -> bool:
    """Whether `fn` only measures: its messages arrive undisturbed, and it leaves no trace in the client's state."""
    return data_of(fn) in ("test", "tune")


class Method(Generic[S]):
    """A method holds settings and nothing that changes: what changes is in its Server or its Client tuple."""

    finetuning = FinetuneSettings()
    differences = True  # whether all messages are differences to the global model, which alone can be clipped or made sparse

    def __init__(self, settings: S) -> None:
        self.s = settings

    def init_server(self, params: Params, population: int) -> Any:
        """What the server keeps between rounds: a NamedTuple with at least `params`."""
        return Model(params)

    def init_client(self, params: Params) -> Tree:
        """What a client keeps between rounds, before its first; `params` are the initial global parameters."""
        return Stateless()

    def init_memory(self, params: Params) -> Tree:
        """What the server keeps of each client between rounds, in `Round.memory`; nothing unless a method says so."""
        return Stateless()

    def check(self, task: Task, cohort: int) -> str | None:
        """Before anything is written: raises SettingsError for what would fail later; or says what the user should know.

        `cohort` is the largest to expect, in clients.
        """
        return None

    def passes(self) -> int:
        """Plans of batches, each freshly shuffled, that a client gets for its training in a round, one after another."""
        return 1

    def personalises(self) -> bool:
        """Whether a client's model is more than the server's: then a run is judged by its clients, not by the test set."""
        return type(self).model_for is not Method.model_for

    def exchanged(self, down: Any, up: Any) -> tuple[Params, Params] | None:
        """For an audit: (parameters a client started from, its change of them) as the server sees them in this exchange.

        None where the messages hold no such change.
        """
        if hasattr(down, "params") and hasattr(up, "delta"):
            return down.params, up.delta
        return None

    def needs_rates(self) -> bool:
        """Whether the settings ask for the true participation rates (`Round.known_rates`)."""
        return False

    def mechanism(self, process: Process) -> Mechanism | None:
        """The noise that the method's server adds by itself, for the accountant; None = it adds none.

        Raises SettingsError where `process` is not the sampling that the accountant assumes.
        """
        return None

    @on_client(data="test")
    def evaluate(
        self, task: Task, t: Tensor, down: Model, state: Tree, batches: Batches
    ) -> tuple[Metrics, Tree]:
        """The client's own metrics on its held-out examples, with the model that it would use."""
        return Metrics(task.evaluate(self.model_for(down, state), batches)), state

    @on_client(data="tune")
    def finetune(
        self, task: Task, t: Tensor, down: Model, state: Tree, batches: Tuning
    ) -> tuple[Metrics, Tree]:
        """`evaluate` after fine-tuning the model that the client would use; what it learns is measured and forgotten."""
        params, s = self.model_for(down, state), self.finetuning
        fixed, start = split(params, s.parts)
        v = local_sgd(
            task.loss, start, batches.train, s.lr, prox=2 * s.penalty, fixed=fixed
        ).params
        task.model.eval()
        return Metrics(task.evaluate({**fixed, **v}, batches.test)), state

    def round(self, server: Any, r: Round) -> Any:
        """One round: the server's state before it to the state after it."""
        raise NotImplementedError(f"{type(self).__name__} defines no round")

    def model_for(self, server: Any, state: Tree) -> Params:
        """The model that a client with this state would use; `server` is anything with `params`."""
        params: Params = server.params
        return params


def load(name: str) -> type[Method[Any]]:
    """The method of `strategies/<name>.py`, or the class at "package.module:Class".

    Raises SettingsError when there is none.
    """
    module_name, colon, class_name = (
        name.partition(":") if ":" in name else (f"{PACKAGE}.{name}", "", "")
    )
    if colon and not (class_name and module_name and not module_name.startswith(".")):
        raise SettingsError(f'method.name = "{name}": expected "package.module:Class"')
    if not class_name and (
        not name.isidentifier() or importlib.util.find_spec(module_name) is None
    ):
        near = difflib.get_close_matches(name, names(), 1)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(names())}"
        raise SettingsError(f'method.name = "{name}": there is no such method; {hint}')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise SettingsError(
            f'method.name = "{name}": cannot import {module_name}: {e}'
        ) from e
    if class_name:
        found = [vars(module)[class_name]] if class_name in vars(module) else []
    else:
        found = [
            c
            for c in vars(module).values()
            if getattr(c, "__module__", None) == module_name
        ]
    found = [c for c in found if inspect.isclass(c) and issubclass(c, Method)]
    if len(found) != 1:
        raise SettingsError(
            f'method.name = "{name}": expected one subclass of Method in {module_name}, found {len(found)}'
        )
    method: type[Method[Any]] = found[0]
    return method


def names() -> list[str]:
    """Every method in `strategies/`."""
    package = importlib.import_module(PACKAGE)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def settings_of(method: type[Method[Any]]) -> type[MethodSettings]:
    """The settings class in `class FedAvg(Method[Settings])`."""
    for base in getattr(method, "__orig_bases__", ()):
        for argument in get_args(base):
            if inspect.isclass(argument) and issubclass(argument, MethodSettings):
                return argument
    raise TypeError(
        f"{method.__name__} names no settings: write class {method.__name__}(Method[Settings])"
    )
