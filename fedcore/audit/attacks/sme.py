"""SME - surrogate model extension (Zhu, Yao, Blaschko, ICML 2023).

w0, wT  parameters before and after local training   alpha  in [0, 1]   D = (w0 - wT) / |w0 - wT|   x, y  dummy images, their labels
    surrogate    w(alpha) = alpha w0 + (1 - alpha) wT: one point on the segment, learned with the images
    minimise     1 - <D, g / |g|> + lambda TV(x),   g = gradient of the mean cross-entropy of (x, y) at w(alpha)
    over         x in the box of pixels in [0, 1], alpha in [0, 1]; Adam on each, both step sizes falling tenfold at 3/8, 5/8, 7/8
Choice:  the step size of alpha is 1 / iterations, so that alpha can reach the ends whatever the number of iterations (1e-3 in the
         authors' code, at 1 000). TV is half the sum of the two means, as in that code. alpha multiplies w0, as in the paper (in
         the code, wT). `path_scale` rho >= 1 lengthens the segment, w = w0 - (1 - alpha) rho (w0 - wT), where clipping or averaging
         has shortened the update: known, or 1, 3, 10, 30 are tried and the lowest 1 - cosine counts. A sparse update masks both
         sides of the cosine. Without labels, logits are optimised with the images. Milestones are whole iterations, 3 it // 8.
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
    silent,
    total_variation,
)
from fedcore.audit.attacks.lanes import Objective, Trace, Variables, optimise
from fedcore.audit.observe import Observation, Public
from fedcore.types import Params

SCALES = (
    1.0,
    3.0,
    10.0,
    30.0,
)  # rho to try where the update was shortened by nobody knows how much


class SurrogateSettings(InversionSettings):
    """Of the attacks that match the direction of an update at one point."""

    lr: float = Field(1.0, gt=0, description="Adam's step size for the images")
    decay: bool = Field(
        True,
        description="step sizes fall tenfold at 3/8, 5/8 and 7/8 of the iterations; off for transformers",
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
        description="rho, where it is known; default: 1, or tried where updates are clipped",
    )


class Lane(NamedTuple):
    """What is fixed in one lane."""

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
    return {
        name: torch.addcmul(w, lane.D[name], back) if name in lane.D else w
        for name, w in lane.w0.items()
    }


def cosine_match(known: Public, tv: float) -> Callable[[nn.Module], Objective]:
    """1 - <D, g / |g|> + lambda TV(x) on a model, for one lane; the match is the part without TV."""

    def on(model: nn.Module) -> Objective:
        def loss(moving: Params, fixed: Params, v: Variables, lane: Lane) -> Tensor:
            outputs = functional_call(model, {**fixed, **moving}, (v["x"],))
            if "logits" in v:
                values = -(
                    v["logits"].softmax(1) * functional.log_softmax(outputs, 1)
                ).sum(1)
            else:
                values = known.loss(outputs, lane.y)
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


def cosine(a: Params, b: Params, aa: Tensor) -> Tensor:
    """Of two trees as one vector each: one norm over all tensors; `aa` is <a, a>. 0-d."""
    square = aa * trees.dot(b, b)
    return trees.dot(a, b) / square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


class Start(NamedTuple):
    """Which lane this is."""

    client: int  # its place in what was seen
    restart: int
    rho: float


def match_direction(
    seen: Sequence[Observation],
    labels: Sequence[Tensor | None],
    s: SurrogateSettings,
    seed: int,
    progress: Progress,
) -> list[Reconstruction]:
    """Reconstruct all clients side by side: those whose messages are alike in one batch of optimisations."""
    alike: dict[Any, list[int]] = {}
    for i, o in enumerate(seen):
        alike.setdefault((tuple(o.delta), o.public, labels[i] is None), []).append(i)
    found: dict[int, Reconstruction] = {}
    for group in alike.values():
        share = part(progress, len(found), len(seen), len(group))
        found |= zip(
            group,
            _together(
                [seen[i] for i in group], [labels[i] for i in group], s, seed, share
            ),
            strict=True,
        )
    return [found[i] for i in range(len(seen))]


def _together(
    seen: Sequence[Observation],
    labels: Sequence[Tensor | None],
    s: SurrogateSettings,
    seed: int,
    progress: Progress,
) -> list[Reconstruction]:
    known, most = seen[0].public, max(o.total for o in seen)
    least, greatest = box(seen[0])
    starts = [
        Start(i, restart, rho)
        for i, o in enumerate(seen)
        for restart in range(s.restarts)
        for rho in scales(o, s)
    ]
    lanes = trees.stack(
        [lane_of(seen[i], labels[i], rho, most) for i, _, rho in starts]
    )
    x = torch.stack(
        [
            _padded(noise(seen[i], seed, restart, (seen[i].total, *known.shape)), most)
            for i, restart, _ in starts
        ]
    )
    variables = {
        "x": x.clamp(least, greatest),
        "alpha": x.new_full((len(starts),), s.alpha),
    }
    rates = {"x": s.lr}
    if s.learn_alpha:
        rates["alpha"] = s.alpha_lr or 1 / s.iterations
    if labels[0] is None:
        variables["logits"], rates["logits"] = (
            x.new_zeros((len(starts), most, known.outputs)),
            s.lr,
        )

    def project(v: Variables) -> None:
        v["x"].clamp_(least, greatest)
        v["alpha"].clamp_(0, 1)

    end = optimise(
        cosine_match(known, s.tv), known.model, variables, lanes, rates, s.iterations, project, s.decay,
        signed=s.signed, progress=progress,
    )  # fmt: skip
    return [
        _best(
            o,
            labels[i],
            [lane for lane, start in enumerate(starts) if start.client == i],
            starts,
            end,
            s,
        )
        for i, o in enumerate(seen)
    ]


def _best(
    o: Observation,
    y: Tensor | None,
    own: list[int],
    starts: list[Start],
    end: Trace,
    s: SurrogateSettings,
) -> Reconstruction:
    """Of one client's lanes the one with the lowest objective; never by what nobody could know."""
    best = min(own, key=lambda lane: float(end.match[lane].nan_to_num(torch.inf)))
    n, rho = o.total, starts[best].rho
    if y is None:
        y = end.variables["logits"][best, :n].argmax(1)
    images = end.variables["x"]
    others = tuple(
        images[lane, :n] for lane in own if lane != best and starts[lane].rho == rho
    )
    facts = {"alpha": float(end.variables["alpha"][best]), "path_scale": rho}
    return Reconstruction(
        images[best, :n],
        y,
        float(end.match[best]),
        end.iterations,
        facts,
        end.curve[best],
        others,
    )


def scales(o: Observation, s: SurrogateSettings) -> tuple[float, ...]:
    """rho to try for this client."""
    if s.path_scale is not None:
        return (s.path_scale,)
    shortened = o.public.clipped or o.clients > 1
    return SCALES if shortened and s.learn_alpha else (1.0,)


def lane_of(o: Observation, y: Tensor | None, rho: float, size: int) -> Lane:
    """One lane, with room for `size` dummies."""
    D = gradient_like(o)
    like = next(iter(D.values()))
    keep = (
        {name: (x != 0).to(like.dtype) for name, x in D.items()}
        if o.public.sparse
        else {}
    )
    labels = (
        like.new_zeros(o.total, dtype=torch.int64) if y is None else y.to(like.device)
    )
    mask = like.new_ones(o.total)
    return Lane(
        o.w0,
        D,
        trees.dot(D, D),
        keep,
        like.new_tensor(rho),
        _padded(labels, size),
        _padded(mask, size),
    )


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.cat([x, x.new_zeros((size - len(x), *x.shape[1:]))])


class SME(Attack[SurrogateSettings]):
    needs = frozenset({"images", "classes"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        return match_direction(seen, labels, self.s, seed, progress)
