"""DLFA - data leakage in federated averaging (Dimitrov, Balunovic, Konstantinov, Vechev, TMLR 2022): the simulated local training.

E, B, eta  the client's epochs, batch size, step size   x_e  dummies of epoch e, N each   U(x)  update of a simulated client
    simulate   E epochs over x_1 ... x_E in batches of B, by SGD from w0, through which gradients flow
    minimise   f |U(x) - (w0 - wT)|^2 / |w0 - wT|^2, layer i weighing exp(-i) in both, + reorder D(x) + tv V(x) + clip C(x)
               D  mean square distance of two epochs' mean images: their order differs, their examples do not
               V  squared total variation of an image   C  squared distance of inputs from those of pixels in [0, 1]
    by         Adam, 400 iterations, falling by 0.995 each 10; f rises from 1 to 2 over the first half
    then       every epoch's images are assigned to those of the first, and averaged
Accurate and slow: an iteration is E N examples in T chained steps, and memory is as deep.
Choice:  the distance is relative to the update, so that the priors weigh the same whatever its scale. Step size and weights of the
         authors' scripts (0.4; reorder 1 000, tv 0.001, clip 2 for FEMNIST) are for the absolute one, and let the priors win here;
         ours were chosen on synthetic clients of Fashion-MNIST.
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
    silent,
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
        description="weight of the squared distance of pixels from [0, 1], a sum over an image",
    )
    reorder: float = Field(
        10.0, ge=0, description="weight of the distance of two epochs' mean images"
    )


class Lane(NamedTuple):
    """What is fixed in one lane."""

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
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        found = []
        for i, (o, y) in enumerate(zip(seen, labels, strict=True)):
            if y is None:
                raise ValueError("needs labels, given or recovered")
            if o.clients > 1:
                raise ValueError("simulates one client, not the mean of several")
            found.append(self._one(o, y, seed, part(progress, i, len(seen))))
        return found

    def _one(
        self, o: Observation, y: Tensor, seed: int, progress: Progress
    ) -> Reconstruction:
        known, n = o.public, o.num_examples
        assert known.lr is not None
        assert known.batch_size is not None
        assert known.epochs is not None
        batches = math.ceil(n / known.batch_size)
        mixed = rng(seed, "audit labels", o.round, o.client).permutation(
            n
        )  # which is in which batch, nobody knows
        y = y[torch.from_numpy(mixed)].to(o.device)
        target = trees.scale(gradient_like(o), 1 / (known.lr * batches))
        least, greatest = box(o)
        x = noise(o, seed, 0, (1, known.epochs, n, *known.shape))
        # f, as a variable that Adam does not move, so that it can change from step to step.
        variables = {"x": x, "f": x.new_ones(1)}
        rise = 2.0 ** (2 / self.s.iterations)

        def project(v: Variables) -> None:
            v["f"].mul_(rise).clamp_(max=2)

        lane = trees.stack([Lane(o.w0, target, y)])
        on = self._objective(o, known.lr, known.batch_size, least, greatest)
        end = optimise(
            on,
            known.model,
            variables,
            lane,
            {"x": self.s.lr},
            self.s.iterations,
            project,
            False,
            0.995**0.1,
            progress=progress,
        )
        return Reconstruction(
            averaged(end.variables["x"][0]),
            y,
            float(end.match[0]),
            end.iterations,
            {},
            end.curve[0],
        )

    def _objective(
        self, o: Observation, lr: float, size: int, least: Tensor, greatest: Tensor
    ) -> Callable[[nn.Module], Objective]:
        known, s = o.public, self.s
        weights, batches = layer_weights(o.delta), math.ceil(o.num_examples / size)

        def on(model: nn.Module) -> Objective:
            def loss(moving: Params, fixed: Params, x: Tensor, y: Tensor) -> Tensor:
                return known.loss(
                    functional_call(model, {**fixed, **moving}, (x,)), y
                ).mean()

            def value(v: Variables, lane: Lane) -> tuple[Tensor, Tensor]:
                moving = start = {name: lane.w0[name] for name in lane.target}
                for epoch in v["x"].unbind():
                    for x, y in zip(
                        torch.split(epoch, size), torch.split(lane.y, size), strict=True
                    ):
                        moving = trees.axpy(
                            -lr, grad(loss)(moving, lane.w0, x, y), moving
                        )
                found = trees.scale(trees.sub(start, moving), 1 / (lr * batches))
                away = torch.stack(
                    [
                        weights[name] * (found[name] - goal).square().sum()
                        for name, goal in lane.target.items()
                    ]
                )
                whole = torch.stack(
                    [
                        weights[name] * goal.square().sum()
                        for name, goal in lane.target.items()
                    ]
                ).sum()
                match = away.sum() / torch.where(whole > 0, whole, 1)
                images = v["x"].flatten(0, 1)
                prior = (
                    s.tv * squared_variation(images)
                    + s.clip * outside(images, least, greatest)
                    + s.reorder * disorder(v["x"])
                )
                return v["f"] * match + prior, match

            return value

        return on


def layer_weights(delta: Params) -> dict[str, float]:
    """exp(-i) for layer i from the input on, over their sum."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in delta))
    raw = {name: math.exp(-modules.index(name.rpartition(".")[0])) for name in delta}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def squared_variation(x: Tensor) -> Tensor:
    """Sum of squared differences of neighbours, mean over images [n, C, H, W]. 0-d."""
    across, down = (
        (x[..., 1:] - x[..., :-1]).square(),
        (x[..., 1:, :] - x[..., :-1, :]).square(),
    )
    return (across.flatten(1).sum(1) + down.flatten(1).sum(1)).mean()


def outside(x: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Squared distance from the box, sum over an image, mean over images [n, C, H, W]. 0-d."""
    return (x - x.clamp(least, greatest)).square().flatten(1).sum(1).mean()


def disorder(x: Tensor) -> Tensor:
    """Mean square distance of the mean images of two epochs, over all pairs; x [E, N, ...]. 0-d."""
    means = x.mean(1).flatten(1)  # [E, pixels]
    return (
        2 * means.var(0, correction=0).mean()
    )  # the mean over ordered pairs, a pair of one with itself included


def averaged(x: Tensor) -> Tensor:
    """[E, N, ...] to [N, ...]: every epoch's images assigned to the first epoch's, and averaged."""
    first = x[0].flatten(1)
    total = x[0].clone()
    for other in x[1:]:
        cost = (
            torch.cdist(first, other.flatten(1))
            .square()
            .nan_to_num(torch.finfo(first.dtype).max)
        )  # NaN where it ran away
        _, order = linear_sum_assignment(cost.cpu().numpy())
        total += other[torch.from_numpy(order)]
    return total / len(x)
