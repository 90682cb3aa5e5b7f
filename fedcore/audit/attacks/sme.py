"""SME - surrogate model extension (Zhu, Yao, Blaschko, ICML 2023).

w0, wT  parameters before and after local training   alpha  in [0, 1]
D = (w0 - wT) / |w0 - wT|                            x, y  dummy images, their labels
    surrogate    w(alpha) = alpha w0 + (1 - alpha) wT: one point on the segment, learned
                 with the images
    minimise     1 - <D, g / |g|> + lambda TV(x),
                 g = gradient of the mean cross-entropy of (x, y) at w(alpha)
    over         x in the box of pixels in [0, 1], alpha in [0, 1]; Adam on each, both
                 step sizes falling tenfold at 3/8, 5/8, 7/8
Choice:  the step size of alpha is 1 / iterations, so that alpha can reach the ends
         whatever the number of iterations (1e-3 in the authors' code, at 1 000). TV is
         half the sum of the two means, as in that code. alpha multiplies w0, as in the
         paper (in the code, wT). `path_scale` rho >= 1 lengthens the segment,
         w = w0 - (1 - alpha) rho (w0 - wT), where clipping or averaging has shortened
         the update: known, or 1, 3, 10, 30 are tried and the lowest 1 - cosine counts.
         A sparse update masks both sides of the cosine. Without labels, logits are
         optimised with the images. Milestones are whole iterations, 3 it // 8.
Reduces: with alpha held at 1, to gradient inversion at w0 (inverting_gradients.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from fedcore import trees
from fedcore.audit.attacks.base import (
    Attack,
    InversionSettings,
    Progress,
    Reconstruction,
    box,
    gradient_like,
    noise,
    part,
    total_variation,
    unwatched,
)
from fedcore.audit.attacks.lanes import Objective, Trace, Variables, optimise
from fedcore.audit.observe import Observation, Public
from fedcore.types import Params

SCALES = (1.0, 3.0, 10.0, 30.0)  # rho to try where the update was shortened


class SurrogateSettings(InversionSettings):
    """Settings of the attacks that match the direction of an update at one point."""

    lr: float = Field(1.0, gt=0, description="Adam's step size for the images")
    decay: bool = Field(
        True,
        description="step sizes fall tenfold at 3/8, 5/8 and 7/8 of the iterations; "
        "off for transformers",
    )
    signed: bool = Field(
        False, description="Adam gets the sign of the images' gradient"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="alpha at the start, in [0, 1]")
    learn_alpha: bool = Field(
        True, description="whether alpha is optimised with the images"
    )
    alpha_lr: float | None = Field(
        None, gt=0, description="Adam's step size for alpha; default: 1 / iterations"
    )
    path_scale: float | None = Field(
        None,
        ge=1,
        description="rho, where it is known; "
        "default: 1, or tried where updates are clipped",
    )


class SME(Attack[SurrogateSettings]):
    needs = frozenset({"images", "classes"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = unwatched,
    ) -> list[Reconstruction]:
        return match_direction(seen, labels, self.s, seed, progress)


class Lane(NamedTuple):
    """The constants of one lane."""

    w0: Params
    D: Params  # w0 - wT, not normalised; the names that came up
    square: Tensor  # <D, D>, 0-d
    keep: Params  # 1 where an entry came up, of a sparse update; else empty
    rho: Tensor  # 0-d
    y: Tensor  # [N]; unused where logits are optimised
    mask: Tensor  # [N] 1 = a dummy, 0 = padding


def surrogate(alpha: Tensor, lane: Lane) -> Params:
    """w(alpha), by all names."""
    back = (alpha - 1) * lane.rho
    w = dict(lane.w0)
    for name, D in lane.D.items():
        w[name] = torch.addcmul(w[name], D, back)
    return w


def cosine_match(public: Public, tv: float) -> Callable[[nn.Module], Objective]:
    """1 - <D, g / |g|> + lambda TV(x) on a model, for one lane.

    The match is the part without TV.
    """

    def on(model: nn.Module) -> Objective:
        def loss(moving: Params, fixed: Params, v: Variables, lane: Lane) -> Tensor:
            outputs = functional_call(model, {**fixed, **moving}, (v["x"],))
            if "logits" in v:
                likely = functional.log_softmax(outputs, 1)
                values = -(v["logits"].softmax(1) * likely).sum(1)
            else:
                values = public.loss(outputs, lane.y)
            return (values * lane.mask).sum() / lane.mask.sum()

        def value(v: Variables, lane: Lane) -> tuple[Tensor, Tensor]:
            w = surrogate(v["alpha"], lane)
            g = grad(loss)({name: w[name] for name in lane.D}, w, v, lane)
            if lane.keep:
                g = {name: x * lane.keep[name] for name, x in g.items()}
            match = 1 - cosine(lane.D, g, lane.square)
            return match + tv * total_variation(v["x"], lane.mask), match

        return value

    return on


def cosine(a: Params, b: Params, square_of_a: Tensor) -> Tensor:
    """Cosine of two trees as one vector each: one norm over all tensors. 0-d."""
    square = square_of_a * trees.dot(b, b)
    return trees.dot(a, b) / square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


class Start(NamedTuple):
    """The place of a lane among all of them."""

    client: int  # its place in what was seen
    restart: int
    rho: float


def match_direction(
    seen: Sequence[Observation],
    labels: Sequence[Tensor | None],
    settings: SurrogateSettings,
    seed: int,
    progress: Progress,
) -> list[Reconstruction]:
    """Reconstruct all clients side by side.

    Those whose messages are alike are one batch of optimisations.
    """
    alike: dict[Any, list[int]] = {}
    for i, observation in enumerate(seen):
        kind = (tuple(observation.delta), observation.public, labels[i] is None)
        alike.setdefault(kind, []).append(i)
    found: dict[int, Reconstruction] = {}
    for group in alike.values():
        share = part(progress, len(found), len(seen), len(group))
        of_group = [seen[i] for i in group]
        their_labels = [labels[i] for i in group]
        ends = _together(of_group, their_labels, settings, seed, share)
        found |= zip(group, ends, strict=True)
    return [found[i] for i in range(len(seen))]


def _together(
    seen: Sequence[Observation],
    labels: Sequence[Tensor | None],
    settings: SurrogateSettings,
    seed: int,
    progress: Progress,
) -> list[Reconstruction]:
    """Reconstruct clients with one public knowledge and one kind of message."""
    public, most = seen[0].public, max(o.total_examples for o in seen)
    least, greatest = box(seen[0])
    starts = _starts(seen, settings)
    lanes, images = [], []
    for client, restart, rho in starts:
        observation = seen[client]
        lanes.append(lane_of(observation, labels[client], rho, most))
        shape = (observation.total_examples, *public.shape)
        images.append(_padded(noise(observation, seed, restart, shape), most))
    x = torch.stack(images)
    alpha = x.new_full((len(starts),), settings.alpha)
    variables = {"x": x.clamp(least, greatest), "alpha": alpha}
    rates = {"x": settings.lr}
    if settings.learn_alpha:
        rates["alpha"] = settings.alpha_lr or 1 / settings.iterations
    if labels[0] is None:
        variables["logits"] = x.new_zeros((len(starts), most, public.outputs))
        rates["logits"] = settings.lr

    def project(v: Variables) -> None:
        v["x"].clamp_(least, greatest)
        v["alpha"].clamp_(0, 1)

    end = optimise(
        cosine_match(public, settings.tv),
        public.model,
        variables,
        trees.stack(lanes),
        rates,
        settings.iterations,
        project,
        settings.decay,
        signed=settings.signed,
        progress=progress,
    )
    found = []
    for client, observation in enumerate(seen):
        lanes_of = [i for i, start in enumerate(starts) if start.client == client]
        found.append(_best(observation, labels[client], lanes_of, starts, end))
    return found


def _starts(seen: Sequence[Observation], settings: SurrogateSettings) -> list[Start]:
    """A lane for every client, restart and path scale."""
    starts = []
    for client, observation in enumerate(seen):
        for restart in range(settings.restarts):
            for rho in scales(observation, settings):
                starts.append(Start(client, restart, rho))
    return starts


def _best(
    seen: Observation,
    y: Tensor | None,
    lanes: Sequence[int],
    starts: Sequence[Start],
    end: Trace,
) -> Reconstruction:
    """The one of a client's lanes with the lowest objective.

    Never by a comparison with the truth, which an attacker does not have.
    """
    best = min(lanes, key=lambda lane: float(end.match[lane].nan_to_num(torch.inf)))
    n, rho = seen.total_examples, starts[best].rho
    if y is None:
        y = end.variables["logits"][best, :n].argmax(1)
    images = end.variables["x"]
    rivals = [lane for lane in lanes if lane != best and starts[lane].rho == rho]
    return Reconstruction(
        images[best, :n],
        y,
        float(end.match[best]),
        end.iterations,
        {"alpha": float(end.variables["alpha"][best]), "path_scale": rho},
        end.curve[best],
        tuple(images[lane, :n] for lane in rivals),
    )


def scales(seen: Observation, settings: SurrogateSettings) -> tuple[float, ...]:
    """rho to try for this client."""
    if settings.path_scale is not None:
        return (settings.path_scale,)
    is_shortened = seen.public.clipped or seen.clients > 1
    return SCALES if is_shortened and settings.learn_alpha else (1.0,)


def lane_of(seen: Observation, y: Tensor | None, rho: float, size: int) -> Lane:
    """One lane, with room for `size` dummies."""
    D, n = gradient_like(seen), seen.total_examples
    like = next(iter(D.values()))
    keep: Params = {}
    if seen.public.sparse:
        keep = {name: (x != 0).to(like.dtype) for name, x in D.items()}
    if y is None:
        y = like.new_zeros(n, dtype=torch.int64)
    return Lane(
        seen.w0,
        D,
        trees.dot(D, D),
        keep,
        like.new_tensor(rho),
        _padded(y.to(like.device), size),
        _padded(like.new_ones(n), size),
    )


def _padded(x: Tensor, size: int) -> Tensor:
    """x [n, ...] with zeros behind it, [size, ...]."""
    return torch.cat([x, x.new_zeros((size - len(x), *x.shape[1:]))])
