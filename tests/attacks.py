"""Small models, clients that a server sees, and attacks on them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks.base import Reconstruction
from fedcore.audit.attacks.sme import Lane, cosine_match
from fedcore.audit.observe import Observation, Public, Truth
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.data.sources import Pixels
from fedcore.metrics import cross_entropy
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


def flat(tree: Params) -> Tensor:
    """All values of a tree as one vector."""
    return torch.cat([values.flatten() for values in tree.values()])


def gradient_of(model: nn.Module, w: Params, x: Tensor, y: Tensor) -> Params:
    """Gradient of the mean cross-entropy, by autograd alone."""
    held = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
    outputs = torch.func.functional_call(model, held, (x,))
    loss = functional.cross_entropy(outputs, y)
    slopes = torch.autograd.grad(loss, list(held.values()))
    return dict(zip(held, slopes, strict=True))


def see(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float = 0.05,
    epochs: int = 1,
    batch: int | None = None,
    client: int = 0,
) -> Observation:
    """A client as a server sees it: plain SGD over its examples in order."""
    model.eval()
    w0 = {name: p.detach().clone() for name, p in model.named_parameters()}
    w, batch_size = dict(w0), batch or len(x)
    for _ in range(epochs):
        for rows in torch.arange(len(x)).split(batch_size):
            g = gradient_of(model, w, x[rows], y[rows])
            w = {name: p - lr * g[name] for name, p in w.items()}
    public = Public(
        model,
        cross_entropy,
        tuple(x.shape[1:]),
        outputs=next(reversed(w0.values())).shape[0],
        pixels=PIXELS,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        steps=None,
    )
    delta = trees.sub(w, w0)
    return Observation(public, 1, client, "train", w0, delta, len(x))


def lane(seen: Observation, y: Tensor, rho: float = 1.0) -> Lane:
    """The constants of a lane, for an update that is whole."""
    D = trees.scale(seen.delta, -1.0)
    like = next(iter(seen.w0.values()))
    mask = like.new_ones(len(y))
    return Lane(seen.w0, D, trees.dot(D, D), {}, like.new_tensor(rho), y, mask)


def objective(
    seen: Observation,
    x: Tensor,
    y: Tensor,
    alpha: float,
    tv: float = 0.0,
    rho: float = 1.0,
) -> float:
    """The value that SME minimises."""
    on_model = cosine_match(seen.public, tv)(seen.public.model)
    variables = {"x": x, "alpha": torch.tensor(alpha, dtype=x.dtype)}
    value, _ = on_model(variables, lane(seen, y, rho))
    return value.item()


def by_hand(seen: Observation, x: Tensor, y: Tensor, alpha: float, tv: float) -> float:
    """L(x, alpha) of the specification, section 4, with plain autograd."""
    w, wT = dict(seen.w0), seen.wT
    for name in seen.delta:
        w[name] = alpha * seen.w0[name] + (1 - alpha) * wT[name]
    g, D = flat(gradient_of(seen.public.model, w, x, y)), -flat(seen.delta)
    across = (x[..., 1:] - x[..., :-1]).abs().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    match = 1 - torch.dot(D / D.norm(), g / g.norm())
    return float(match + tv * 0.5 * (across + down))


def digits(**settings: Any) -> Experiment:
    """Handwritten digits and the small convolutional model of the specification."""
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
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment.parse(values, dotted)


class Synthetic(NamedTuple):
    """Synthetic clients under audit."""

    seen: list[Observation]
    labels: list[Tensor]  # in ascending order
    truths: list[Truth]
    pixels: Pixels


def subjects(clients: int, examples: int, **settings: Any) -> Synthetic:
    task = build_task(digits(**settings))
    simulated = simulate(digits(**settings), task, clients, examples)
    truths = [subject.truth for subject in simulated if subject.truth is not None]
    labels = [truth.y.sort().values for truth in truths]
    assert task.pixels is not None
    seen = [subject.seen for subject in simulated]
    return Synthetic(seen, labels, truths, task.pixels)


def decibel(
    found: Sequence[Reconstruction], truths: Sequence[Truth], pixels: Pixels
) -> float:
    """Mean PSNR over images and clients."""
    psnr = []
    for reconstruction, truth in zip(found, truths, strict=True):
        psnr.append(metrics.score(reconstruction.x, truth, pixels).psnr)
    return torch.cat(psnr).mean().item()
