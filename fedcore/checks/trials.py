"""A task's model, loss and metrics on a few of its examples, and what they read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.checks.hidden import Value, hidden_state, name_of
from fedcore.checks.trace import (
    SAME,
    Call,
    Trace,
    differs,
    eps_of,
    first,
    held,
    is_same,
    largest,
    tensors,
)
from fedcore.types import Params, Tree

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = [
    "GENERATORS",
    "SEED",
    "Subject",
    "Trial",
    "are_alike",
    "buffers",
    "drawing",
    "judges",
    "spread",
    "taken",
    "undisturbed",
]

SEED = 20_190_828  # of PyTorch's generator in a trial, if it is not another one
CANDIDATES = 40  # rows among which different ones are looked for

GENERATORS: dict[str, Callable[[], Any]] = {
    "Python's random": random.getstate,
    "NumPy's global generator": lambda: str(np.random.get_state(legacy=False)),  # noqa: NPY002
}


class Trial(NamedTuple):
    """One forward pass of a few examples."""

    outputs: Tree
    values: dict[str, Tensor]  # of the loss and of each metric, [B]
    penalty: list[Tensor]  # 0-d, where the task has one


class Subject:
    """The task's model, loss and metrics on a few of its examples."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.model
        self.params = task.init_params()
        rows, others = _rows(task)
        self.x, self.y = taken(task, rows)
        # Around the same middle example; and around it, but far away.
        self.other_x, self.other_y = taken(task, others)
        self.far_x = trees.map(_far, self.other_x)

    @property
    def model_name(self) -> str:
        """The whole model in messages."""
        return f"the model ({type(self.model).__name__})"

    def module_name(self, name: str) -> str:
        """A module in messages: its name and class."""
        if not name:
            return self.model_name
        kind = type(self.model.get_submodule(name)).__name__
        return f'the model\'s "{name}" ({kind})'

    def judge_name(self, metric: str) -> str:
        """The loss or a metric in messages."""
        if metric == "loss":
            return f'the loss "{name_of(self.task.metrics["loss"])}"'
        return f'the metric "{metric}"'

    def state(self) -> dict[str, Value]:
        """The values that model, loss and metrics read besides their arguments."""
        return hidden_state(judges(self.task))

    def trial(
        self,
        params: Params | None = None,
        x: Tree | None = None,
        y: Tensor | None = None,
        seed: int = SEED,
    ) -> Trial:
        """Outputs, and the loss and metrics of them, from this seed.

        By default for the model's own parameters, and the three examples.
        """
        self.seed(seed)
        params = self.params if params is None else params
        x, y = self.x if x is None else x, self.y if y is None else y
        outputs = self.task.predict(params, x)
        values = self.judged(outputs, y)
        return Trial(outputs, values, self._penalty(params, x, y))

    def _penalty(self, params: Params, x: Tree, y: Tensor) -> list[Tensor]:
        if self.task.penalty is None or not self.model.training:
            return []

        def mean(params: Params) -> Tensor:
            values = self.task.metrics["loss"](self.task.predict(params, x), y)
            return values.mean()

        return [self.task.penalty(mean, params)]

    def judged(self, outputs: Tree, y: Tensor) -> dict[str, Tensor]:
        """The values of the loss, and in evaluation mode of each metric."""
        values = {}
        for name, fn in self.task.metrics.items():
            if name == "loss" or not self.model.training:
                values[name] = fn(outputs, y)
        return values

    def trace(self, params: Params | None = None, x: Tree | None = None) -> list[Call]:
        """The calls of all modules in one forward pass."""
        self.seed(SEED)
        params = self.params if params is None else params
        with Trace(self.model, self.generators) as calls:
            self.task.predict(params, self.x if x is None else x)
        return calls

    def generators(self) -> dict[str, Any]:
        """The states of all global generators."""
        states = {name: state() for name, state in GENERATORS.items()}
        return {**states, "torch": self.torch_state()}

    def torch_state(self) -> bytes:
        """The state of PyTorch's generators on the CPU and the task's device."""
        state = torch.get_rng_state().numpy().tobytes()
        if self.task.device.type == "cuda":
            state += torch.cuda.get_rng_state(self.task.device).numpy().tobytes()
        return state

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self.task.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @cached_property
    def moved_params(self) -> Params:
        """Parameters near the model's own, so that no zero hides what comes before it.

        The model's own, where it cannot have others.
        """
        draw = torch.Generator().manual_seed(SEED)
        moved = {}
        for name, p in self.params.items():
            size = max(float(p.abs().square().float().mean() ** 0.5), 0.01)
            noise = torch.randn(p.shape, generator=draw)
            moved[name] = p + (0.1 * size * noise).to(p)
        try:
            self.trial(moved)
        except Exception:
            return self.params
        return moved

    @contextmanager
    def other_parameters(self) -> Iterator[None]:
        """Inside, the parameters that the model was built with are other ones."""
        own = dict(self.model.named_parameters())
        try:
            for name, p in self.moved_params.items():
                own[name].data.copy_(p)
            yield
        finally:
            for name, p in self.params.items():
                own[name].data.copy_(p)

    def uneven_modules(self, other_x: Tree) -> list[nn.Module]:
        """Modules that draw more or fewer numbers for other examples, as RReLU does.

        Another row of the batch then shifts the draws for an example.
        """
        uneven: list[nn.Module] = []
        for _ in self.model.modules():
            with held(uneven) as hold:
                one = self.trace(self.moved_params)
                hold()
                two = self.trace(self.moved_params, other_x)
            pairs = zip(one, two, strict=False)
            shifted = [f for f, g in pairs if f.states["torch"] != g.states["torch"]]
            if not shifted or shifted[0].module in uneven:
                break
            uneven.append(shifted[0].module)
        return uneven

    def draws(self) -> bool:
        """Whether a forward pass or its loss follow from PyTorch's generator."""
        self.seed(SEED)
        before = self.torch_state()
        one = self.trial()
        if self.torch_state() != before:
            return True
        return not are_alike(one, self.trial(seed=SEED + 1))

    def drawing_loss(self) -> str | None:
        """The name of the loss, or of a metric, that draws; None: none does."""
        outputs, before = self.trial().outputs, self.torch_state()
        self.judged(outputs, self.y)
        has_drawn = self.torch_state() != before
        return name_of(self.task.metrics["loss"]) if has_drawn else None


def drawing(task: Task) -> str | None:
    """The class of the module that draws from PyTorch's generator; None: none does.

    Or the name of the loss.

    >>> from fedcore import Examples, FederatedData, Task
    >>> rows = Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
    >>> data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
    >>> drawing(Task(nn.Linear(4, 2), data))
    >>> drawing(Task(nn.Sequential(nn.Linear(4, 2), nn.Dropout()), data))
    'Dropout'
    """
    if len(task.data.order) == 0:
        return None
    subject = Subject(task)
    with undisturbed(task), torch.no_grad():
        for is_training in (True, False):
            task.model.train(is_training)
            if not subject.draws():
                continue
            call = first(subject.trace(), lambda call: "torch" in call.moved)
            if call is not None:
                return type(call.module).__name__
            return subject.drawing_loss() or type(task.model).__name__
    return None


def judges(task: Task) -> dict[str, Any]:
    """The model and the functions of a task, by their names in messages."""
    judges: dict[str, Any] = {"the model": task.model, "the penalty": task.penalty}
    for name, fn in task.metrics.items():
        if name == "loss":
            judges[f'the loss "{name_of(fn)}"'] = fn
        else:
            judges[f'the metric "{name}"'] = fn
    return judges


@contextmanager
def undisturbed(task: Task) -> Iterator[None]:
    """Afterwards generators, modes and buffers are as they were before."""
    flags = [(module, module.training) for module in task.model.modules()]
    before = buffers(task.model)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [task.device] if task.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, was_training in flags:
            module.training = was_training
        with torch.no_grad():
            for name, buffer in task.model.named_buffers():
                if name in before and not is_same(before[name], buffer):
                    buffer.copy_(before[name])


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's buffers, by name."""
    return {name: x.detach().clone() for name, x in model.named_buffers()}


# Comparisons


def are_alike(one: Trial | None, two: Trial | None) -> bool:
    """Whether two trials on one shape give the same, up to rounding."""
    pairs = zip(tensors(one), tensors(two), strict=True)
    return not any(differs(f, g, SAME * eps_of(f) * largest(f)) for f, g in pairs)


# Examples


def _rows(task: Task) -> tuple[list[int], list[int]]:
    """Rows of a trial, and others around the same middle one; as unlike as can be."""
    distinct: list[int] = []
    for row in spread(task, CANDIDATES).tolist():
        is_new = not any(_are_equal(task, row, other) for other in distinct)
        if is_new and len(distinct) < 5:
            distinct.append(row)
    if len(distinct) == 5:
        first_, middle, last, *others = distinct
        return [first_, middle, last], [others[0], middle, others[1]]
    # The first and the last change places, or become like the middle one.
    first_, middle, last = (distinct * 3)[:3]
    if len(distinct) > 2:
        return [first_, middle, last], [last, middle, first_]
    return [first_, middle, first_], [middle, middle, middle]


def spread(task: Task, most: int) -> np.ndarray:
    """Rows spread over the clients' examples."""
    order = task.data.order
    places = np.linspace(0, len(order) - 1, min(len(order), most)).astype(int)
    rows: np.ndarray = order[places]
    return rows


def _are_equal(task: Task, i: int, j: int) -> bool:
    return all(torch.equal(x[i], x[j]) for x in tensors(task.data.x))


def _far(x: Tensor) -> Tensor:
    """The rows, of which all but the middle one are far from where they were."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    far = -3 * x + 1
    far[1] = x[1]
    return far


def taken(task: Task, rows: list[int]) -> tuple[Tree, Tensor]:
    """Inputs and targets of these rows."""
    index = torch.tensor(rows, device=task.device)
    x, y = trees.map(lambda part: part[index], (task.data.x, task.data.y))
    return x, y
