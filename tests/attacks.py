"""Small models, clients that a server sees, and attacks on them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks.sme import (
    Lane,
    cosine_match,
)
from fedcore.audit.observe import Observation, Public, Truth
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.data.sources import Pixels
from fedcore.task import cross_entropy
from fedcore.tasks import build_task
from fedcore.types import Params

PIXELS = Pixels((0.3,), (0.4,))


def cnn(side: int = 8, classes: int = 5) -> nn.Module:
    """A small smooth convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * (side // 2) ** 2, classes),
    )


def mlp(side: int = 8, classes: int = 5, between: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side**2, 12),
        between or nn.Sigmoid(),
        nn.Linear(12, classes),
    )


def data(
    n: int,
    seed: int,
    side: int = 8,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noise images in the box, and labels."""
    draw = torch.Generator().manual_seed(seed)
    x = PIXELS.inputs(torch.rand(n, 1, side, side, generator=draw, dtype=dtype))
    return x, torch.randint(0, classes, (n,), generator=draw)


def ends_of_the_box(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of an input, [1, 1, 1]."""
    black, white = torch.zeros(1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)
    return PIXELS.inputs(black), PIXELS.inputs(white)


def gradient_of(model: nn.Module, w: Params, x: Tensor, y: Tensor) -> Params:
    """Of the mean cross-entropy, by autograd alone."""
    held = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
    outputs = torch.func.functional_call(model, held, (x,))
    slopes = torch.autograd.grad(
        functional.cross_entropy(outputs, y), list(held.values())
    )
    return dict(zip(held, slopes, strict=True))


def see(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float = 0.05,
    epochs: int = 1,
    batch: int | None = None,
    client: int = 0,
    **known: Any,
) -> Observation:
    """What a server sees of a client that trains by plain SGD over its examples in order."""
    model.eval()
    w0 = {name: p.detach().clone() for name, p in model.named_parameters()}
    w, size = dict(w0), batch or len(x)
    for _ in range(epochs):
        for rows in torch.arange(len(x)).split(size):
            g = gradient_of(model, w, x[rows], y[rows])
            w = {name: p - lr * g[name] for name, p in w.items()}
    facts = {
        "pixels": PIXELS,
        "lr": lr,
        "epochs": epochs,
        "batch_size": size,
        "steps": None,
    } | known
    public = Public(
        model,
        cross_entropy,
        tuple(x.shape[1:]),
        next(reversed(w0.values())).shape[0],
        **facts,
    )
    return Observation(
        public,
        1,
        client,
        "train",
        w0,
        {name: w[name] - w0[name] for name in w0},
        len(x),
    )


def lane(o: Observation, y: Tensor, rho: float = 1.0) -> Lane:
    dtype = next(iter(o.w0.values())).dtype
    D = {name: -x for name, x in o.delta.items()}
    return Lane(
        o.w0,
        D,
        trees.dot(D, D),
        {},
        torch.tensor(rho, dtype=dtype),
        y,
        torch.ones(len(y), dtype=dtype),
    )


def objective(
    o: Observation,
    x: Tensor,
    y: Tensor,
    alpha: float,
    tv: float = 0.0,
    rho: float = 1.0,
) -> Tensor:
    value, _ = cosine_match(o.public, tv)(o.public.model)(
        {"x": x, "alpha": torch.tensor(alpha, dtype=x.dtype)}, lane(o, y, rho)
    )
    return value.detach()


def by_hand(o: Observation, x: Tensor, y: Tensor, alpha: float, tv: float) -> float:
    """L(x, alpha) of the specification, section 4, with plain autograd."""
    w = {
        name: alpha * o.w0[name] + (1 - alpha) * (o.w0[name] + change)
        for name, change in o.delta.items()
    }
    g = torch.cat([v.flatten() for v in gradient_of(o.public.model, w, x, y).values()])
    D = -torch.cat([v.flatten() for v in o.delta.values()])
    flat = (x[..., 1:] - x[..., :-1]).abs().mean() + (
        x[..., 1:, :] - x[..., :-1, :]
    ).abs().mean()
    return float(1 - torch.dot(D / D.norm(), g / g.norm()) + tv * 0.5 * flat)


def digits(**settings: Any) -> Experiment:
    """Handwritten digits and the small convolutional model that the specification attacks."""
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
    return Experiment.parse(
        values, {key.replace("__", "."): value for key, value in settings.items()}
    )


def subjects(
    clients: int, examples: int, **settings: Any
) -> tuple[list[Observation], list[Tensor], list[Truth], Pixels]:
    """(what is seen, the labels in ascending order, the truths, the scale of pixels) of synthetic clients."""
    e = digits(**settings)
    task = build_task(e)
    made = simulate(e, task, clients, examples)
    truths = [s.truth for s in made if s.truth is not None]
    assert task.pixels is not None
    return (
        [s.seen for s in made],
        [t.y.sort().values for t in truths],
        truths,
        task.pixels,
    )


def decibel(found: Sequence[Any], truths: Sequence[Truth], pixels: Pixels) -> float:
    """Mean PSNR over images and clients."""
    scores = [
        metrics.score(r.x, t, pixels).psnr for r, t in zip(found, truths, strict=True)
    ]
    return torch.cat(scores).mean().item()
