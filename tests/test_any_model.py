"""Models of any parts and clients of any sizes, held against plain PyTorch."""

from __future__ import annotations

import copy
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcore import Examples, Experiment, FederatedData, SettingsError, Task
from fedcore.config import EngineSettings
from fedcore.metrics import cross_entropy
from fedcore.types import Params
from tests.helpers import assert_close, equal, loop_of, small

WIDTH = 4  # of what every part takes and gives, [B, WIDTH]
TOKENS = 5
CLASSES = 3
LR = 0.1
TOLERANCE = 1e-9  # in float64


class Sequence(nn.Module):
    """Attention over the numbers of an example, which are a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.enter, self.leave = nn.Linear(1, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x[..., None])
        return self.leave(self.attention(x, x, x, need_weights=False)[0])[..., 0]


class Recurrent(nn.Module):
    """A recurrent layer over the numbers of an example."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(1, 2, batch_first=True)
        self.leave = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layer(x[..., None])[0])[..., 0]


class Convolution(nn.Conv1d):
    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])[:, 0]


class Pooled(nn.Embedding):
    """The mean vector of an example's tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


class Scale(nn.Module):
    """A buffer that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", 1 + torch.arange(WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class Centring(nn.Module):
    """A buffer that changes in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand_like(x) if self.training else x


class Depth(nn.Module):
    """A branch that is left out of some examples."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.full_like(x[:, :1], 0.5))
        return x + kept * self.branch(x)


class Gumbel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(x)


class Coin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) if random.random() < 0.5 else x


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * np.random.rand())  # noqa: NPY002


class Warmup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * min(1.0, self.calls / 1000)


GOOD = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": nn.Tanh,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "attention": Sequence,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "convolution": Convolution,
    "scale": Scale,
}
DRAWS = {
    "dropout": lambda: nn.Dropout(0.3),
    "rrelu": nn.RReLU,
    "gumbel": Gumbel,
    "depth": Depth,
    "noise": Noise,
}
# By the words that the refusal has to have.
BAD: dict[str, tuple[Any, str]] = {
    "batch norm": (
        lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
        "(BatchNorm1d)",
    ),
    "softmax": (lambda: nn.Softmax(0), "(Softmax)"),
    "centring": (Centring, "(Centring)"),
    "coin": (Coin, "(Coin)"),
    "jitter": (Jitter, "(Jitter)"),
    "warmup": (Warmup, '.calls"'),
}
PARTS = {**GOOD, **DRAWS, **{name: build for name, (build, _) in BAD.items()}}


def make_task(e: Experiment) -> Task:
    """The parts of `options`, on clients of the sizes of `options`."""
    parts = [PARTS[name]() for name in e.options["parts"]]
    tokens = [Pooled(TOKENS, WIDTH)] if e.options["tokens"] else []
    model = nn.Sequential(*tokens, *parts, nn.Linear(WIDTH, CLASSES)).double()
    return Task(model, data_of(e, rows_of(e)))


def rows_of(e: Experiment) -> Examples:
    n, draw = sum(e.options["sizes"]), torch.Generator().manual_seed(7)
    x = torch.randn(n, WIDTH, generator=draw, dtype=torch.float64)
    if e.options["tokens"]:
        x = torch.randint(0, TOKENS, (n, WIDTH), generator=draw)
    return Examples(x, torch.randint(0, CLASSES, (n,), generator=draw))


def data_of(e: Experiment, rows: Examples) -> FederatedData:
    offsets = np.cumsum([0, *e.options["sizes"]])
    # The first clients hold the last rows: row 0 is of the last.
    order = np.arange(len(rows.x))[::-1]
    return FederatedData(rows, rows, order, offsets, e.holdout, e.seed)


def plain_round(e: Experiment) -> Params:
    """FedAvg's first round: torch.optim.SGD on every client's real rows."""
    task = e.build_task()
    numbers = torch.arange(len(task.data.x))
    shadow = data_of(e, Examples(numbers, numbers))
    before = task.init_params()
    total = {name: torch.zeros_like(p) for name, p in before.items()}
    weight = 0
    for client in range(task.population):
        model = copy.deepcopy(task.model)
        optimiser = torch.optim.SGD(model.parameters(), LR)
        batches = shadow.batches(np.array([client]), "train", e.local, e.seed, 0)
        for rows, mask in zip(batches.x[0], batches.mask[0], strict=True):
            real = rows[mask > 0]
            if len(real) == 0:
                continue
            optimiser.zero_grad()
            cross_entropy(model(task.data.x[real]), task.data.y[real]).mean().backward()
            optimiser.step()
        num_examples = int(shadow.kept[client])
        weight += num_examples
        for name, p in model.named_parameters():
            total[name] += num_examples * (p.detach() - before[name])
    return {name: before[name] + total[name] / weight for name in before}


def one_round(e: Experiment, engine: dict[str, Any]) -> Params:
    """The parameters after the first round on this engine."""
    changed = e.model_copy(update={"engine": EngineSettings(**engine)})
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_of(changed, Path(folder))
        loop.round()
        params: Params = loop.state.server.params
        loop.close()
    return params


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    sizes[draw(st.integers(0, len(sizes) - 1))] += 1
    # More good parts than others, so that half of the models run.
    kinds = st.sampled_from([*GOOD, *GOOD, *GOOD, *DRAWS, *BAD])
    options = {
        "parts": draw(st.lists(kinds, max_size=4)),
        "sizes": sizes,
        "tokens": draw(st.booleans()),
    }
    batch_size, count = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    length = draw(st.sampled_from(["epochs", "steps"]))
    holdout = draw(st.sampled_from([0.0, 0.3]))
    return experiment(options, {"batch_size": batch_size, length: count}, holdout)


def experiment(
    options: dict[str, Any], local: dict[str, Any], holdout: float = 0.0
) -> Experiment:
    everybody = {"name": "uniform", "cohort": len(options["sizes"])}
    return small(
        "fedavg",
        task="tests.test_any_model:make_task",
        population=len(options["sizes"]),
        options=options,
        local=local,
        holdout=holdout,
        participation=everybody,
        method__local_lr=LR,
        rounds=1,
    )


def hold_together(e: Experiment) -> None:
    """One round in every way, or a refusal that names a part that is no function."""
    parts = e.options["parts"]
    if words := [BAD[name][1] for name in parts if name in BAD]:
        with pytest.raises(SettingsError) as refused:
            e.build_task().check()
        assert any(word in str(refused.value) for word in words), (parts, refused.value)
        return
    sequential = one_round(e, {"name": "sequential"})
    if any(name in DRAWS for name in parts):
        again = one_round(e, {"name": "sequential"})
        assert equal(sequential, again), f"{parts}: two runs of one seed"
        vectorised = one_round(e, {"name": "vectorised"})
        # The same draws; a sum over clients may have another order.
        assert_close(vectorised, sequential, 1e-12, f"{parts}: vectorised")
        return
    expected = plain_round(e)
    assert_close(sequential, expected, TOLERANCE, f"{parts}: sequential")
    vectorised = one_round(e, {"name": "vectorised", "chunk": 3})
    assert_close(vectorised, expected, TOLERANCE, f"{parts}: vectorised")


RAGGED = {"sizes": [13, 20, 0, 1], "tokens": False}
EPOCH = {"batch_size": 10}


@settings(max_examples=15, derandomize=True)
@given(experiments())
@example(experiment({**RAGGED, "parts": ["linear", "batch norm", "tanh"]}, EPOCH))
@example(experiment({**RAGGED, "parts": ["linear", "tanh"]}, EPOCH, 0.3))
@example(experiment({**RAGGED, "parts": ["dropout", "noise"]}, EPOCH))
@example(experiment({"sizes": [3, 40], "tokens": True, "parts": ["lstm"]}, EPOCH))
def test_engines_and_plain_pytorch_agree_or_a_part_is_refused(e: Experiment) -> None:
    hold_together(e)


@pytest.mark.slow
@settings(max_examples=300, derandomize=True)
@given(experiments())
def test_many_models_agree_or_are_refused(e: Experiment) -> None:
    hold_together(e)


@pytest.mark.parametrize("part", BAD)
def test_each_part_that_is_no_function_is_refused_by_name(part: str) -> None:
    hold_together(experiment({**RAGGED, "parts": ["linear", part, "tanh"]}, EPOCH))


@pytest.mark.parametrize("part", DRAWS)
def test_each_part_that_draws_draws_the_same_in_every_engine(part: str) -> None:
    hold_together(experiment({**RAGGED, "parts": [part]}, EPOCH, 0.3))


@pytest.mark.parametrize("part", GOOD)
def test_each_part_that_is_a_function_runs(part: str) -> None:
    hold_together(experiment({**RAGGED, "parts": [part]}, EPOCH, 0.3))
