"""DLFA - data leakage in federated averaging (Dimitrov et al., TMLR 2022).

Dimitrov, Balunovic, Konstantinov and Vechev simulate the local training.
E, B, eta  the client's epochs, batch size, step size
x_e  dummies of epoch e, N each   U(x)  update of a simulated client
    simulate  E epochs over x_1 ... x_E in batches of B, by SGD from w0, through which
              gradients flow
    minimise  f |U(x) - (w0 - wT)|^2 / |w0 - wT|^2, layer i weighing exp(-i) in both,
              + reorder D(x) + tv V(x) + clip C(x)
              D  mean square distance of two epochs' mean images: their order differs,
                 their examples do not
              V  squared total variation of an image
              C  squared distance of inputs from those of pixels in [0, 1]
    by        Adam, 400 iterations, falling by 0.995 each 10; f rises from 1 to 2 in the
              first half
    then      every epoch's images are assigned to those of the first, and averaged
Accurate and slow: an iteration is E N examples in T chained steps, and memory is as
deep.
Choice:  the distance is relative to the update, so that the priors weigh the same
         whatever its scale. Step size and weights of the authors' scripts (0.4; reorder
         1 000, tv 0.001, clip 2 for FEMNIST) are for the absolute one, and let the
         priors win here; these were chosen on synthetic clients of Fashion-MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import grad

from fedcore import trees
from fedcore.audit.attacks.base import (
    Attack,
    AttackSettings,
    Progress,
    Reconstruction,
    box,
    gradient_like,
    keep_going,
    neighbour_differences,
    noise,
    part,
)
from fedcore.audit.attacks.lanes import Descent, Objective, Variables, optimise
from fedcore.audit.observe import Observation
from fedcore.inputs import model_outputs
from fedcore.rng import rng
from fedcore.types import Params

DECAY = 0.995**0.1  # factor of the step size at each iteration


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


class Lane(NamedTuple):
    """The constants of one lane."""

    w0: Params
    target: Params  # (w0 - wT) / (eta ceil(N / B))
    y: Tensor  # [N]


class LocalTraining(NamedTuple):
    """A client's training, as far as it is public."""

    lr: float  # eta
    epochs: int  # E
    batch_size: int  # B
    batches: int  # ceil(N / B)


def training_of(seen: Observation) -> LocalTraining:
    public = seen.public
    assert public.lr is not None, "the attack needs batches"
    assert public.epochs is not None, "the attack needs batches"
    assert public.batch_size is not None, "the attack needs batches"
    batches = math.ceil(seen.num_examples / public.batch_size)
    return LocalTraining(public.lr, public.epochs, public.batch_size, batches)


class DLFA(Attack[Settings]):
    needs = frozenset({"reals", "slope", "images", "classes", "batches"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = keep_going,
    ) -> list[Reconstruction]:
        reconstructions = []
        for i, (client, y) in enumerate(zip(seen, labels, strict=True)):
            if y is None:
                raise ValueError("needs labels, given or recovered")
            if client.clients > 1:
                raise ValueError("simulates one client, not the mean of several")
            watch = part(progress, i, len(seen))
            reconstructions.append(invert(client, y, self.s, seed, watch))
        return reconstructions


def invert(
    seen: Observation, y: Tensor, settings: Settings, seed: int, progress: Progress
) -> Reconstruction:
    """One client's inputs, by its simulated training."""
    training, n = training_of(seen), seen.num_examples
    # Which example is in which batch is not public.
    mixed = rng(seed, "audit labels", seen.round, seen.client).permutation(n)
    y = y[torch.from_numpy(mixed)].to(seen.device)
    scale = 1 / (training.lr * training.batches)
    target = trees.scale(gradient_like(seen), scale)
    x = noise(seen, seed, 0, (1, training.epochs, n, *seen.public.shape))
    # f, as a variable that Adam does not move, so that it can change from step to step.
    variables = {"x": x, "f": x.new_ones(1)}
    rise = 2.0 ** (2 / settings.iterations)

    def project(v: Variables) -> None:
        v["f"].mul_(rise).clamp_(max=2)

    end = optimise(
        update_match(seen, settings),
        seen.public.model,
        variables,
        trees.stack([Lane(seen.w0, target, y)]),
        Descent({"x": settings.lr}, settings.iterations, project, gamma=DECAY),
        progress,
    )
    images = averaged(end.variables["x"][0])
    objective = float(end.match[0])
    return Reconstruction(images, y, objective, end.iterations, {}, end.curve[0])


def update_match(
    seen: Observation, settings: Settings
) -> Callable[[nn.Module], Objective]:
    """f |U(x) - (w0 - wT)|^2 / |w0 - wT|^2 and the priors, for one lane.

    The match is the quotient.
    """
    training, weights = training_of(seen), layer_weights(seen.delta)
    least, greatest = box(seen)

    def prior(x: Tensor) -> Tensor:
        images = x.flatten(0, 1)
        return (
            settings.tv * squared_variation(images)
            + settings.clip * outside(images, least, greatest)
            + settings.reorder * disorder(x)
        )

    def weighted_square(tree: Params) -> Tensor:
        return torch.stack(
            [weights[name] * x.square().sum() for name, x in tree.items()]
        ).sum()

    def on(model: nn.Module) -> Objective:
        def loss(moving: Params, fixed: Params, x: Tensor, y: Tensor) -> Tensor:
            outputs = model_outputs(model, {**fixed, **moving}, x)
            return seen.public.loss(outputs, y).mean()

        def simulated(x: Tensor, lane: Lane) -> Params:
            """U(x) / (eta ceil(N / B))."""
            w = start = {name: lane.w0[name] for name in lane.target}
            labels = torch.split(lane.y, training.batch_size)
            for epoch in x.unbind():
                batches = torch.split(epoch, training.batch_size)
                for images, y in zip(batches, labels, strict=True):
                    g = grad(loss)(w, lane.w0, images, y)
                    w = trees.axpy(-training.lr, g, w)
            scale = 1 / (training.lr * training.batches)
            update: Params = trees.scale(trees.sub(start, w), scale)
            return update

        def value(v: Variables, lane: Lane) -> tuple[Tensor, Tensor]:
            difference = trees.sub(simulated(v["x"], lane), lane.target)
            whole = weighted_square(lane.target)
            match = weighted_square(difference) / torch.where(whole > 0, whole, 1)
            return v["f"] * match + prior(v["x"]), match

        return value

    return on


def layer_weights(delta: Params) -> dict[str, float]:
    """exp(-i) for layer i from the input on, over their sum."""
    places: dict[str, int] = {}
    raw: dict[str, float] = {}
    for name in delta:
        layer = name.rpartition(".")[0]
        place = places.setdefault(layer, len(places))
        raw[name] = math.exp(-place)
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def squared_variation(x: Tensor) -> Tensor:
    """Sum of squared differences of neighbours, mean over images [n, C, H, W]. 0-d."""
    across, down = neighbour_differences(x)
    by_image = across.square().flatten(1).sum(1) + down.square().flatten(1).sum(1)
    return by_image.mean()


def outside(x: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Squared distance from the box, 0-d.

    A sum over an image, and a mean over images [n, C, H, W].
    """
    return (x - x.clamp(least, greatest)).square().flatten(1).sum(1).mean()


def disorder(x: Tensor) -> Tensor:
    """Mean square distance of the mean images of two epochs, x [E, N, ...]. 0-d.

    A mean over all ordered pairs, a pair of an epoch with itself included.
    """
    means = x.mean(1).flatten(1)  # [E, pixels]
    return 2 * means.var(0, correction=0).mean()


def averaged(x: Tensor) -> Tensor:
    """All epochs' images in the first one's order, averaged.

    [E, N, ...] to [N, ...].
    """
    first = x[0].flatten(1)
    total = x[0].clone()
    largest = torch.finfo(first.dtype).max
    for other in x[1:]:
        cost = torch.cdist(first, other.flatten(1)).square()
        cost = cost.nan_to_num(largest)  # NaN where the optimisation ran away
        _, order = linear_sum_assignment(cost.cpu().numpy())
        total += other[torch.from_numpy(order)]
    return total / len(x)
