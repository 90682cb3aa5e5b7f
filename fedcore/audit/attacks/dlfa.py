"""DLFA - data leakage in federated averaging (Dimitrov et al., TMLR 2022).

The attack that simulates the client's local training.

E, B, eta  the client's epochs, batch size, step size
x_e        dummies of epoch e, N each   U(x)  update of a simulated client
    simulate   E epochs over x_1 ... x_E in batches of B, by SGD from w0, through which
               gradients flow
    minimise   f |U(x) - (w0 - wT)|^2 / |w0 - wT|^2, layer i weighing exp(-i) in both,
               + reorder D(x) + tv V(x) + clip C(x)
               D  mean square distance of two epochs' mean images: their order differs,
                  their examples do not
               V  squared total variation of an image
               C  squared distance of inputs from those of pixels in [0, 1]
    by         Adam, 400 iterations, falling by 0.995 each 10; f rises from 1 to 2 over
               the first half
    then       every epoch's images are assigned to those of the first, and averaged
Accurate and slow: an iteration is E N examples in T chained steps, and memory is as
deep.
Choice:  the distance is relative to the update, so that the priors weigh the same
         whatever its scale. Step size and weights of the authors' scripts (0.4; reorder
         1 000, tv 0.001, clip 2 for FEMNIST) are for the absolute one, and let the
         priors win here; the defaults were chosen on synthetic clients of
         Fashion-MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedcore import trees
from fedcore.audit.attacks.base import (
    Attack,
    AttackSettings,
    Progress,
    Reconstruction,
    box,
    gradient_like,
    noise,
    part,
    unwatched,
)
from fedcore.audit.attacks.lanes import Objective, Variables, optimise
from fedcore.audit.observe import Observation
from fedcore.rng import rng
from fedcore.types import Params


class Settings(AttackSettings):
    iterations: int = Field(400, ge=1, description="steps of Adam")
    lr: float = Field(0.1, gt=0, description="Adam's step size")
    tv: float = Field(
        1e-4,
        ge=0,
        description="weight of the squared total variation, a sum over an image",
    )
    clip: float = Field(
        0.3,
        ge=0,
        description="weight of the squared distance of pixels from [0, 1], "
        "a sum over an image",
    )
    reorder: float = Field(
        10.0, ge=0, description="weight of the distance of two epochs' mean images"
    )


class Training(NamedTuple):
    """The local training that is simulated."""

    lr: float
    epochs: int
    batch_size: int
    batches: int  # of an epoch


class Lane(NamedTuple):
    """The constants of one lane."""

    w0: Params
    target: Params  # (w0 - wT) / (eta ceil(N / B))
    y: Tensor  # [N]


class DLFA(Attack[Settings]):
    needs = frozenset({"images", "classes", "batches"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = unwatched,
    ) -> list[Reconstruction]:
        found = []
        for i, (observation, y) in enumerate(zip(seen, labels, strict=True)):
            if y is None:
                raise ValueError("needs labels, given or recovered")
            if observation.clients > 1:
                raise ValueError("simulates one client, not the mean of several")
            share = part(progress, i, len(seen))
            found.append(self._one(observation, y, seed, share))
        return found

    def _one(
        self, seen: Observation, y: Tensor, seed: int, progress: Progress
    ) -> Reconstruction:
        public, n, training = seen.public, seen.num_examples, training_of(seen)
        # The adversary does not know which example is in which batch.
        mixed = rng(seed, "audit labels", seen.round, seen.client).permutation(n)
        y = y[torch.from_numpy(mixed)].to(seen.device)
        scale = 1 / (training.lr * training.batches)
        target = trees.scale(gradient_like(seen), scale)
        x = noise(seen, seed, 0, (1, training.epochs, n, *public.shape))
        # f is a variable that Adam does not move, so that it changes step by step.
        variables = {"x": x, "f": x.new_ones(1)}
        rise = 2.0 ** (2 / self.s.iterations)

        def project(v: Variables) -> None:
            v["f"].mul_(rise).clamp_(max=2)

        end = optimise(
            self.objective(seen, training),
            public.model,
            variables,
            trees.stack([Lane(seen.w0, target, y)]),
            {"x": self.s.lr},
            self.s.iterations,
            project,
            False,
            0.995**0.1,
            progress=progress,
        )
        x = averaged(end.variables["x"][0])
        match, curve = float(end.match[0]), end.curve[0]
        return Reconstruction(x, y, match, end.iterations, {}, curve)

    def objective(
        self, seen: Observation, training: Training
    ) -> Callable[[nn.Module], Objective]:
        """The objective on a model, for one lane; the match is the part without f."""
        weights, (least, greatest) = layer_weights(seen.delta), box(seen)

        def on(model: nn.Module) -> Objective:
            def loss(moving: Params, fixed: Params, x: Tensor, y: Tensor) -> Tensor:
                outputs = functional_call(model, {**fixed, **moving}, (x,))
                return seen.public.loss(outputs, y).mean()

            def value(v: Variables, lane: Lane) -> tuple[Tensor, Tensor]:
                update = simulated(loss, v["x"], lane, training)
                match = distance(update, lane.target, weights)
                return v["f"] * match + self.prior(v["x"], least, greatest), match

            return value

        return on

    def prior(self, x: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
        """Weighted priors on dummies x [E, N, C, H, W], 0-d."""
        images = x.flatten(0, 1)
        return (
            self.s.tv * squared_variation(images)
            + self.s.clip * outside(images, least, greatest)
            + self.s.reorder * disorder(x)
        )


def training_of(seen: Observation) -> Training:
    """The client's local training, by what is public."""
    public = seen.public
    assert public.lr is not None
    assert public.batch_size is not None
    assert public.epochs is not None
    batches = math.ceil(seen.num_examples / public.batch_size)
    return Training(public.lr, public.epochs, public.batch_size, batches)


def simulated(
    loss: Callable[[Params, Params, Tensor, Tensor], Tensor],
    x: Tensor,
    lane: Lane,
    training: Training,
) -> Params:
    """(w0 - wT) / (eta ceil(N / B)) of a client with dummies x [E, N, ...]."""
    start = {name: lane.w0[name] for name in lane.target}
    moving, size = start, training.batch_size
    for epoch in x.unbind():
        batches = zip(torch.split(epoch, size), torch.split(lane.y, size), strict=True)
        for inputs, labels in batches:
            g = grad(loss)(moving, lane.w0, inputs, labels)
            moving = trees.axpy(-training.lr, g, moving)
    scale = 1 / (training.lr * training.batches)
    update: Params = trees.scale(trees.sub(start, moving), scale)
    return update


def distance(update: Params, target: Params, weights: dict[str, float]) -> Tensor:
    """Weighted squared distance, relative to the weighted square of `target`. 0-d."""
    away, whole = [], []
    for name, goal in target.items():
        away.append(weights[name] * (update[name] - goal).square().sum())
        whole.append(weights[name] * goal.square().sum())
    size = torch.stack(whole).sum()
    return torch.stack(away).sum() / torch.where(size > 0, size, 1)


def layer_weights(delta: Params) -> dict[str, float]:
    """exp(-i) for layer i from the input on, over their sum."""
    layers = {name: name.rpartition(".")[0] for name in delta}
    order = list(dict.fromkeys(layers.values()))
    raw = {name: math.exp(-order.index(layer)) for name, layer in layers.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def squared_variation(x: Tensor) -> Tensor:
    """Sum of squared differences of neighbours, mean over images [n, C, H, W]. 0-d."""
    across = (x[..., 1:] - x[..., :-1]).square()
    down = (x[..., 1:, :] - x[..., :-1, :]).square()
    return (across.flatten(1).sum(1) + down.flatten(1).sum(1)).mean()


def outside(x: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Squared distance from the box, a sum over an image, mean over images. 0-d."""
    return (x - x.clamp(least, greatest)).square().flatten(1).sum(1).mean()


def disorder(x: Tensor) -> Tensor:
    """Mean square distance of the mean images of two epochs; x [E, N, ...]. 0-d.

    Over all ordered pairs, a pair of an epoch with itself included.
    """
    means = x.mean(1).flatten(1)  # [E, pixels]
    return 2 * means.var(0, correction=0).mean()


def averaged(x: Tensor) -> Tensor:
    """[E, N, ...] to [N, ...]: images assigned to the first epoch's, and averaged."""
    first = x[0].flatten(1)
    most = torch.finfo(first.dtype).max
    total = x[0].clone()
    for other in x[1:]:
        cost = torch.cdist(first, other.flatten(1)).square()
        finite = cost.nan_to_num(most)  # NaN where it ran away
        _, order = linear_sum_assignment(finite.cpu().numpy())
        total += other[torch.from_numpy(order)]
    return total / len(x)
