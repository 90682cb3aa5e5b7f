"""Small clients under audit: models, images, updates by plain SGD, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.audit import metrics
from fedcore.audit.attacks.base import Reconstruction
from fedcore.audit.observe import Observation, Public, Subject, Truth
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.data.sources import Pixels
from fedcore.rounds import loop
from fedcore.task import cross_entropy
from fedcore.tasks import build_task
from fedcore.types import Params

PIXELS = Pixels((0.3,), (0.4,))


def cnn(side: int = 8, classes: int = 5) -> nn.Module:
    """A small smooth convolutional network; its weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * (side // 2) ** 2, classes),
        )


def mlp(side: int = 8, classes: int = 5, between: nn.Module | None = None) -> nn.Module:
    """Two linear layers and a smooth function between them, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(side**2, 12),
            between or nn.Sigmoid(),
            nn.Linear(12, classes),
        )


class Data(NamedTuple):
    """Images and labels."""

    x: Tensor  # [n, 1, side, side]
    y: Tensor  # [n]


def data(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Data:
    """Noise images of 8 x 8 in the box, and labels of 5 classes."""
    draw = torch.Generator().manual_seed(seed)
    x = PIXELS.inputs(torch.rand(n, 1, 8, 8, generator=draw, dtype=dtype))
    return Data(x, torch.randint(0, 5, (n,), generator=draw))


def exact(n: int, seed: int) -> Data:
    """`data` in float64."""
    return data(n, seed, torch.float64)


def gradient_of(model: nn.Module, w: Params, x: Tensor, y: Tensor) -> Params:
    """Gradient of the mean cross-entropy, by autograd alone."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
    outputs = torch.func.functional_call(model, leaves, (x,))
    loss = functional.cross_entropy(outputs, y)
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, slopes, strict=True))


def flat(tree: Params) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([value.flatten() for value in tree.values()])


def see(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float = 0.05,
    epochs: int = 1,
    batch: int | None = None,
    client: int = 0,
) -> Observation:
    """A client that trains by plain SGD over its examples in order, as it is seen."""
    model.eval()
    w0 = {name: p.detach().clone() for name, p in model.named_parameters()}
    w, size = dict(w0), batch or len(x)
    for _ in range(epochs):
        for rows in torch.arange(len(x)).split(size):
            g = gradient_of(model, w, x[rows], y[rows])
            w = {name: p - lr * g[name] for name, p in w.items()}
    public = Public(
        model=model,
        loss=cross_entropy,
        shape=tuple(x.shape[1:]),
        outputs=next(reversed(w0.values())).shape[0],
        pixels=PIXELS,
        lr=lr,
        epochs=epochs,
        batch_size=size,
        steps=None,
    )
    delta = {name: w[name] - w0[name] for name in w0}
    return Observation(public, 1, client, "train", w0, delta, len(x))


def with_public(seen: Observation, **changes: Any) -> Observation:
    """The observation with another public part."""
    return replace(seen, public=replace(seen.public, **changes))


def without_output_layer(seen: Observation) -> Observation:
    """The observation of a client that keeps all but its first layer."""
    return replace(seen, delta=dict(list(seen.delta.items())[:2]))


def digits(**settings: Any) -> Experiment:
    """Handwritten digits and the convolutional model that the specification attacks."""
    values = {
        "method": {"name": "fedavg", "local_lr": 0.01},
        "task": "digits",
        "population": 20,
        "holdout": 0.0,
        "partition": {"name": "iid"},
        "local": {"batch_size": 4},
        "model": {
            "name": "cnn",
            "channels": [16, 32],
            "kernel": 3,
            "hidden": 64,
            "pool": "avg",
        },
    }
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment.parse(values, overrides)


class Audited(NamedTuple):
    """Synthetic clients, with what scoring needs."""

    subjects: list[Subject]
    pixels: Pixels

    @property
    def seen(self) -> list[Observation]:
        return [subject.seen for subject in self.subjects]

    @property
    def truths(self) -> list[Truth]:
        return [s.truth for s in self.subjects if s.truth is not None]

    @property
    def labels(self) -> list[Tensor]:
        """True labels in ascending order, by client."""
        return [truth.y.sort().values for truth in self.truths]

    def decibel(self, found: Sequence[Reconstruction]) -> float:
        """Mean PSNR over images and clients."""
        scores = []
        for reconstruction, truth in zip(found, self.truths, strict=True):
            scores.append(metrics.score(reconstruction.x, truth, self.pixels).psnr)
        return torch.cat(scores).mean().item()


def audited(clients: int, examples: int, **settings: Any) -> Audited:
    """Synthetic clients of a first round on digits."""
    experiment = digits(**settings)
    task = build_task(experiment)
    assert task.pixels is not None
    return Audited(simulate(experiment, task, clients, examples), task.pixels)


class Silent:
    """An observer of an audit that watches nothing."""

    def cell(self, number: int, cells: int, name: str) -> None:
        pass

    def progress(self, share: float, what: str, objective: float | None) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def training(self) -> loop.Observer:
        return loop.Quiet()
