"""Models, losses and metrics that are no functions of their arguments, by name."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcore import Examples, FederatedData, SettingsError, Task
from fedcore.checks.hidden import hidden_state
from fedcore.checks.trials import drawing
from fedcore.checks.watch import Watch
from fedcore.metrics import cross_entropy
from fedcore.models import Cnn, LeNet, Logistic, Mlp, ResNet, Vit

WEIGHT = 1.0
NUMBERS = np.random.default_rng(0)


def data_of(x: Tensor, y: Tensor) -> FederatedData:
    offsets = np.array([0, len(x) // 3, len(x)])
    return FederatedData(Examples(x, y), Examples(x, y), np.arange(len(x)), offsets)


def task_of(model: nn.Module, loss: Any = cross_entropy, **more: Any) -> Task:
    draw = torch.Generator().manual_seed(0)
    dtype = next(model.parameters(), torch.zeros(1)).dtype
    x = torch.randn(30, 4, generator=draw).to(dtype)
    return Task(model, data_of(x, torch.arange(30) % 3), loss, **more)


class Net(nn.Module):
    """A linear layer, behind a function of the test's."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.fn = fn
        self.linear = nn.Linear(4, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.fn(self, x))


def numpy_state() -> str:
    return str(np.random.get_state(legacy=False))  # noqa: NPY002


def refusal(task: Task) -> str:
    """The one line that refuses the task."""
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    with pytest.raises(SettingsError) as refused:
        task.check()
    assert states[0] == random.getstate()
    assert states[1] == numpy_state()
    assert torch.equal(states[2], torch.get_rng_state())
    assert task.model.training
    message = str(refused.value)
    assert "\n" not in message
    return message


def transposed(net: Any, x: Tensor) -> Tensor:
    """Attention and recurrence along the axis of the batch."""
    outputs = net.part(*[x[:, None]] * net.inputs)
    return (outputs if isinstance(outputs, Tensor) else outputs[0])[:, 0]


class Pairs(torch.autograd.Function):
    """The identity, whose gradient is the mean over the batch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * ctx.saved_tensors[0].mean()


def normed(net: Net, x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


MIXING = {
    "batch norm": (
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False)),
        ['"1" (BatchNorm1d)', "mixes the examples", "to_group_norm"],
    ),
    "attention": (
        Net(transposed, part=nn.MultiheadAttention(4, 2), inputs=3),
        ['"part" (MultiheadAttention)', "batch_first=True"],
    ),
    "LSTM": (
        Net(transposed, part=nn.LSTM(4, 4), inputs=1),
        ['"part" (LSTM)', "batch_first=True"],
    ),
    "transformer": (
        Net(transposed, part=nn.TransformerEncoderLayer(4, 2, 8, 0.1), inputs=1),
        ["self_attn", "batch_first=True"],
    ),
    "softmax": (
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(0)),
        ['"1" (Softmax)', "axis 0 is the batch"],
    ),
    "mean": (Net(normed), ["the model (Net) mixes"]),
    "a little": (Net(lambda net, x: x + 1e-4 * x.roll(1, 0)), ["(Net) mixes"]),
    "behind zeros": (
        Net(lambda net, x: x * (1 + x.amax(0))),
        ["the model (Net) mixes"],
    ),
    "in training": (
        Net(lambda net, x: x - x.mean(0) if net.training else x),
        ["the model (Net) mixes"],
    ),
    "in evaluation": (
        Net(lambda net, x: x if net.training else x - x.mean(0)),
        ["the model (Net) mixes"],
    ),
    "size": (Net(lambda net, x: x / len(x)), ["(Net)", "alone in its batch"]),
    "pairs": (
        nn.Sequential(nn.Linear(4, 3), nn.Unflatten(0, (-1, 2)), nn.Flatten(0, 1)),
        ["(Sequential)", "cannot take a batch of 3 examples"],
    ),
    "squeezed": (
        Net(lambda net, x: x.squeeze()),
        ["a batch of one example"],
    ),
    "gradient": (
        Net(lambda net, x: net.part(x), part=nn.Sequential(nn.Linear(4, 4))),
        ["another gradient"],
    ),
}
MIXING["gradient"][0].fn = lambda net, x: Pairs.apply(net.part(x))  # type: ignore
nn.init.zeros_(MIXING["behind zeros"][0].linear.weight)  # type: ignore


@pytest.mark.parametrize("kind", MIXING)
def test_a_model_that_mixes_the_examples_of_a_batch_is_refused(kind: str) -> None:
    model, words = MIXING[kind]
    message = refusal(task_of(model.train()))
    for word in words:
        assert word in message


def test_a_layer_that_reads_the_mask_may_mix_and_nothing_else_may() -> None:
    class Masked(nn.Module):
        mixes_examples_with_mask = True

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            return x - x.mean(0)

    task_of(nn.Sequential(nn.Linear(4, 3), Masked(), nn.Linear(3, 3))).check()
    task = task_of(nn.Sequential(nn.Linear(4, 3), Masked(), nn.Softmax(0)))
    assert '"2" (Softmax)' in refusal(task)


class Average(nn.Module):
    """A moving average, which is kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
        return x


class Stepping(nn.Module):
    """A step that is counted in a buffer, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + int(self.training)
        return x


PARAMETRISED = torch.nn.utils.parametrizations.spectral_norm
BUFFERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "spectral": (
        lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 3)),
        '"weight_u"',
        "(Linear)",
    ),
    "parametrised": (
        lambda: PARAMETRISED(nn.Linear(4, 3)),
        '"_u" (and 1 more)',
        '"parametrizations.weight.0"',
    ),
    "average": (
        lambda: nn.Sequential(Average(), nn.Linear(4, 3)),
        '"mean"',
        '"0" (Average)',
    ),
    "steps": (
        lambda: nn.Sequential(nn.Linear(4, 3), Stepping()),
        '"steps"',
        '"1" (Stepping)',
    ),
}


@pytest.mark.usefixtures("same_models")  # a power iteration may have converged
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_that_a_forward_pass_changes_is_refused(kind: str) -> None:
    build, buffer, module = BUFFERS[kind]
    task = task_of(build())
    before = {name: x.clone() for name, x in task.model.named_buffers()}
    message = refusal(task)
    assert f"changes its buffer {buffer}" in message
    assert module in message
    if kind == "average":
        for name, x in task.model.named_buffers():
            assert torch.equal(x, before[name])


def test_a_buffer_that_stays_is_fine() -> None:
    net = Net(lambda net, x: x * net.scale)
    net.register_buffer("scale", torch.arange(4.0))
    task_of(net).check()


def coin(net: Any, x: Tensor) -> Tensor:
    return x.flip(1) if net.training and random.random() < 0.01 else x


def counted(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return x


def counted_to_100(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return x if net.calls % 100 else 2 * x


def annealed(net: Any, x: Tensor) -> Tensor:
    net.temperature *= 0.999
    return x / net.temperature


def alternating(net: Any, x: Tensor) -> Tensor:
    return x * next(net.factors)


def remembered(net: Any, x: Tensor) -> Tensor:
    outputs = x + net.before
    net.before = 0.1 * x.mean().detach()
    return outputs


def deaf(net: Any, x: Tensor) -> Tensor:
    net.part.train()
    return net.part(x)


STATEFUL: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "random": (
        lambda: nn.Sequential(Net(coin)),
        ['"0" (Net)', "Python's random", "torch.rand"],
    ),
    "NumPy": (
        lambda: Net(lambda net, x: x * np.random.rand()),  # noqa: NPY002
        ["(Net)", "NumPy's global generator", "torch.rand"],
    ),
    "own generator": (
        lambda: Net(lambda net, x: x * net.draw.random(), draw=random.Random(1)),
        ['"draw" is a generator', "torch.rand"],
    ),
    "global generator": (
        lambda: Net(lambda net, x: x * float(NUMBERS.random())),
        ['NUMBERS" is a generator', "torch.rand"],
    ),
    "PyTorch's": (
        lambda: Net(
            lambda net, x: x + torch.rand(4, generator=net.draw), draw=torch.Generator()
        ),
        ['"draw" is a generator', "PyTorch's is seeded"],
    ),
    "calls": (lambda: Net(counted_to_100, calls=7), ['"calls" changes in every call']),
    "temperature": (
        lambda: Net(annealed, temperature=1.0),
        ['"temperature" changes in every call'],
    ),
    "iterator": (
        lambda: Net(alternating, factors=itertools.cycle([1.0, 2.0])),
        ["(Net) gives something else in a second call"],
    ),
    "memory": (
        lambda: Net(remembered, before=torch.zeros(())),
        ['"before" changes', "results follow"],
    ),
    "clock": (
        lambda: nn.Sequential(Net(lambda net, x: x * (time.perf_counter_ns() % 999))),
        ['"0" (Net) gives something else', "clock"],
    ),
    "mode": (
        lambda: Net(deaf, part=nn.Dropout(0.5)),
        ['"part" (Dropout) sets its mode', "override train(mode)"],
    ),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_that_results_follow_from_is_refused(kind: str) -> None:
    build, words = STATEFUL[kind]
    message = refusal(task_of(build()))
    for word in words:
        assert word in message


def test_a_counter_without_a_consequence_is_fine() -> None:
    def noted(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        if net.calls % 10 == 0:
            net.notes.append(f"call {net.calls}")
        return x

    task_of(Net(noted, calls=0, notes=[])).check()
    task_of(Net(counted, calls=0)).check()


class Halved:
    """A loss whose weight is halved in every 100th call."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.calls = 0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 100 == 0:
            self.weight /= 2
        return self.weight * cross_entropy(outputs, y)


def contrast(outputs: Tensor, y: Tensor) -> Tensor:
    """In-batch negatives."""
    alike = outputs @ outputs.T
    return cross_entropy(alike, torch.arange(len(y)))


LOSSES: dict[str, tuple[Any, list[str]]] = {
    "halved": (Halved(), ["Halved", '"calls" changes', "results follow"]),
    "random": (
        lambda outputs, y: cross_entropy(outputs, y) * random.random(),
        ["the loss", "Python's random"],
    ),
    "size": (
        lambda outputs, y: cross_entropy(outputs, y) / len(y),
        ["the loss mixes examples", "by itself"],
    ),
    "contrast": (contrast, ["the loss: cross_entropy: outputs of shape (1, 1)"]),
    "a little": (
        lambda outputs, y: cross_entropy(outputs + 1e-3 * outputs.roll(1, 0), y),
        ["mixes"],
    ),
    "accuracy": (
        lambda outputs, y: (outputs.argmax(1) == y).float(),
        ["no gradient", "is it a metric"],
    ),
    "complex": (
        lambda outputs, y: torch.complex(outputs[:, 0], outputs[:, 1]),
        ["torch.complex64", "real"],
    ),
}


@pytest.mark.usefixtures("same_models")
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_is_no_function_of_one_example_is_refused(kind: str) -> None:
    loss, words = LOSSES[kind]
    message = refusal(task_of(nn.Linear(4, 3), loss))
    for word in words:
        assert word in message


def test_a_parameter_that_is_read_by_another_way_is_refused() -> None:
    layer = nn.Linear(4, 3)
    aliased = Net(lambda net, x: x @ net.weights[0])
    aliased.square = nn.Parameter(torch.eye(4))
    aliased.weights = [aliased.square]
    assert "the model (Net) reads a parameter by another way" in refusal(
        task_of(aliased)
    )

    def decayed(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs, y) + layer.weight.square().sum()

    task = task_of(layer, decayed)
    before = layer.weight.clone()
    message = refusal(task)
    assert "decayed" in message
    assert "penalty=" in message
    assert torch.equal(before, layer.weight)


class Embedded(nn.Module):
    """An embedding that renormalises its rows where it reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0] > 0).long())


def shifted(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs.sub_(1), y)


def relabelled(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y.fmod_(2))


WRITING: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "inputs": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)),
        cross_entropy,
        ["do not change inputs in place", "inplace=True"],
    ),
    "parameters": (
        Embedded,
        cross_entropy,
        ['"table" (Embedding)', 'its parameter "weight"', "max_norm"],
    ),
    "outputs": (lambda: nn.Linear(4, 3), shifted, ["shifted", "outputs.clone()"]),
    "targets": (lambda: nn.Linear(4, 3), relabelled, ["do not change inputs in place"]),
}


@pytest.mark.parametrize("kind", WRITING)
def test_what_is_given_is_not_written_to(kind: str) -> None:
    build, loss, words = WRITING[kind]
    message = refusal(task_of(build(), loss))
    for word in words:
        assert word in message


def test_a_loss_with_parameters_of_its_own_is_refused() -> None:
    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.zeros(3, 3))

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return (outputs - self.centres[y]).square().sum(1)

    message = refusal(task_of(nn.Linear(4, 3), Centres()))
    assert 'has a trainable parameter, "centres"' in message


def test_a_gradient_that_torch_func_does_not_find_is_refused() -> None:
    def apart(net: Any, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        thread = Thread(target=lambda: outputs.append(net.part(x)))
        thread.start()
        thread.join()
        return outputs[0]

    message = refusal(task_of(Net(apart, part=nn.Linear(4, 4))))
    assert "torch.func" in message


def test_a_layer_that_has_not_been_called_is_refused() -> None:
    with pytest.raises(SettingsError, match="has no shape yet"):
        task_of(nn.Sequential(nn.LazyLinear(3)))


def test_a_metric_that_depends_on_the_batch_is_refused() -> None:
    def centred(outputs: Tensor, y: Tensor) -> Tensor:
        return outputs[:, 0] - outputs[:, 0].mean()

    task = task_of(nn.Linear(4, 3), metrics={"centred": centred})
    assert 'the metric "centred" mixes examples' in refusal(task)


def test_shapes_that_broadcast_are_refused() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))

    def squares(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().flatten(1).sum(1)

    task = Task(nn.Linear(4, 1), data_of(x, x[:, 0]), squares, {})
    message = refusal(task)
    assert "outputs of shape (8, 1) and targets of shape (8,)" in message


def test_a_model_without_trainable_parameters_is_refused() -> None:
    assert "no trainable parameter" in refusal(task_of(nn.Identity()))
    frozen = nn.Linear(4, 3).requires_grad_(False)
    assert "requires_grad = True" in refusal(task_of(frozen))


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())[:, :3]


def narrow(dtype: torch.dtype) -> nn.Module:
    layers = [nn.Linear(4, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 3)]
    return nn.Sequential(*layers).to(dtype)


FINE: dict[str, Callable[[], nn.Module]] = {
    "float64": lambda: narrow(torch.float64),
    "bfloat16": lambda: narrow(torch.bfloat16),
    "float16": lambda: narrow(torch.float16),
    "tied": Tied,
    "frozen in part": lambda: nn.Sequential(
        nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)
    ),
    "recurrent": lambda: Net(
        lambda net, x: net.part(x[..., None])[0][:, -1],
        part=nn.LSTM(1, 4, 2, batch_first=True, dropout=0.1),
    ),
    "transformer": lambda: Net(
        lambda net, x: net.part(x[:, None])[:, 0],
        part=nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True),
    ),
    "draws": lambda: Net(lambda net, x: F.gumbel_softmax(x) + torch.rand_like(x)),
}


@pytest.mark.parametrize("kind", FINE)
def test_functions_of_parameters_inputs_and_pytorchs_generator_pass(kind: str) -> None:
    task = task_of(FINE[kind]())
    before = torch.get_rng_state()
    task.check()
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in task.model.modules())


@pytest.mark.parametrize("settings", [Logistic, Mlp, Cnn, LeNet, ResNet, Vit])
def test_bundled_models_pass(settings: Any) -> None:
    x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = settings().build((1, 28, 28), 10)
    Task(model, data_of(x, torch.arange(8))).check()


def test_a_trial_of_one_example() -> None:
    x, y = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    data = FederatedData(Examples(x, y), Examples(x, y), np.arange(1), np.array([0, 1]))
    Task(nn.Linear(4, 3), data).check()


class Stochastic(nn.Module):
    """A residual branch that is left out of some examples."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.full((len(x), 1), 0.5))
        return x + kept * self.branch(x)


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)),
    "Net": lambda: Net(lambda net, x: F.gumbel_softmax(x)),
    "RReLU": lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()),
    "Stochastic": lambda: nn.Sequential(Stochastic(), nn.Linear(4, 3)),
    "LSTM": FINE["recurrent"],
}


@pytest.mark.parametrize("kind", DRAWING)
def test_what_draws_is_found_whatever_it_is(kind: str) -> None:
    assert drawing(task_of(DRAWING[kind]())) == kind


def test_a_loss_that_draws_is_found_and_what_does_not_draw_is_not() -> None:
    def noisy(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs + torch.rand_like(outputs), y)

    assert "noisy" in str(drawing(task_of(nn.Linear(4, 3), noisy)))
    assert drawing(task_of(nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 3)))) is None
    seeded = Net(lambda net, x: x * (torch.initial_seed() % 7))
    assert drawing(task_of(seeded)) == "Net"


def test_values_that_a_loss_reads_from_elsewhere_are_watched() -> None:
    schedule, config = {"weight": 1.0}, [0.5]
    weight = 2.0

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        factor = WEIGHT * schedule["weight"] * config[0] * weight
        return factor * (outputs - y).square().sum(1)

    places = hidden_state({"the loss": loss})
    assert {place.split('"')[1]: value.text for place, value in places.items()} == {
        "WEIGHT": "1.0",
        "schedule['weight']": "1.0",
        "schedule.length": "1",
        "config[0]": "0.5",
        "config.length": "1",
        "weight": "2.0",
    }
    model = nn.Sequential(Net(counted, calls=0), nn.Linear(3, 4), nn.Dropout(0.5))
    watch = Watch(Task(model, data_of(torch.ones(9, 4), torch.ones(9, 4)), loss, {}))
    assert watch.change() is None
    model(torch.ones(1, 4))  # the counter has no consequence
    assert watch.change() is None
    schedule["weight"] = 0.5
    assert "\"schedule['weight']\" was 1.0 and is 0.5" in str(watch.change())
    weight = 3.0
    assert '"weight" was 2.0 and is 3.0' in str(watch.change())
    model[2].p = 0.25
    assert str(watch.change()) == 'the model\'s "2.p" was 0.5 and is 0.25'
    assert watch.change() is None
