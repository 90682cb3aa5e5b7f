"""SME - surrogate model extension (Zhu, Yao, Blaschko, ICML 2023).

w0, wT  parameters before and after local training   alpha  in [0, 1]
D = (w0 - wT) / |w0 - wT|   x, y  dummy images, their labels
    surrogate  w(alpha) = alpha w0 + (1 - alpha) wT: one point on the segment, learned
               with the images
    minimise   1 - <D, g / |g|> + lambda TV(x),
               g = gradient of the mean cross-entropy of (x, y) at w(alpha)
    over       x in the box of pixels in [0, 1], alpha in [0, 1]; Adam on each, both
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

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional

from fedcore import trees
from fedcore.audit.attacks.base import (
    Attack,
    InversionSettings,
    Progress,
    Reconstruction,
    box,
    gradient_like,
    keep_going,
    noise,
    part,
    total_variation,
)
from fedcore.audit.attacks.lanes import Descent, Objective, Trace, Variables, optimise
from fedcore.audit.observe import Observation, Public
from fedcore.inputs import model_outputs
from fedcore.types import Params

# rho to try where an update was shortened by an unknown factor
SCALES = (1.0, 3.0, 10.0, 30.0)


class SurrogateSettings(InversionSettings):
    """Settings of attacks that match the direction of an update at one point."""

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
    for name, update in lane.D.items():
        w[name] = torch.addcmul(w[name], update, back)
    return w


def cosine_match(public: Public, tv: float) -> Callable[[nn.Module], Objective]:
    """1 - <D, g / |g|> + lambda TV(x) on a model, for one lane.

    The match is the part without TV.
    """

    def on(model: nn.Module) -> Objective:
        def loss(moving: Params, fixed: Params, v: Variables, lane: Lane) -> Tensor:
            outputs = model_outputs(model, {**fixed, **moving}, v["x"])
            if "logits" in v:
                p = v["logits"].softmax(1)
                losses = -(p * functional.log_softmax(outputs, 1)).sum(1)
            else:
                losses = public.loss(outputs, lane.y)
            return (losses * lane.mask).sum() / lane.mask.sum()

        def value(v: Variables, lane: Lane) -> tuple[Tensor, Tensor]:
            w = surrogate(v["alpha"], lane)
            g = grad(loss)({name: w[name] for name in lane.D}, w, v, lane)
            if lane.keep:
                g = trees.map(torch.mul, g, lane.keep)
            match = 1 - cosine(lane.D, g, lane.square)
            return match + tv * total_variation(v["x"], lane.mask), match

        return value

    return on


def cosine(a: Params, b: Params, aa: Tensor) -> Tensor:
    """Cosine of two trees as one vector each, 0-d; `aa` is <a, a>.

    There is one norm over all tensors, not one for each.
    """
    square = aa * trees.dot(b, b)
    return trees.dot(a, b) / square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


class Start(NamedTuple):
    """The client, the restart and the path scale of a lane."""

    client: int  # its place among the observations
    restart: int
    rho: float


def match_direction(
    seen: Sequence[Observation],
    labels: Sequence[Tensor | None],
    settings: SurrogateSettings,
    seed: int,
    progress: Progress,
) -> list[Reconstruction]:
    """The inputs of all clients, reconstructed side by side.

    Clients with messages that are alike share one batch of optimisations.
    """
    groups: dict[Any, list[int]] = {}
    for i, client in enumerate(seen):
        kind = (tuple(client.delta), client.public, labels[i] is None)
        groups.setdefault(kind, []).append(i)
    by_client: dict[int, Reconstruction] = {}
    for members in groups.values():
        share = part(progress, len(by_client), len(seen), len(members))
        group = Group(
            [seen[i] for i in members], [labels[i] for i in members], settings, seed
        )
        by_client |= zip(members, group.reconstruct(share), strict=True)
    return [reconstruction for _, reconstruction in sorted(by_client.items())]


class Group:
    """Clients with messages that are alike, attacked together."""

    def __init__(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        settings: SurrogateSettings,
        seed: int,
    ) -> None:
        self.seen, self.labels, self.seed = seen, labels, seed
        self.s, self.public = settings, seen[0].public
        self.box = box(seen[0])
        self.most = max(client.total_examples for client in seen)  # dummies in a lane
        self.starts: list[Start] = []
        for i, client in enumerate(seen):
            for restart in range(settings.restarts):
                for rho in scales(client, settings):
                    self.starts.append(Start(i, restart, rho))

    def reconstruct(self, progress: Progress) -> list[Reconstruction]:
        """The best match of each client."""
        lanes = []
        for i, _, rho in self.starts:
            lanes.append(lane_of(self.seen[i], self.labels[i], rho, self.most))
        end = optimise(
            cosine_match(self.public, self.s.tv),
            self.public.model,
            self._variables(),
            trees.stack(lanes),
            self._descent(),
            progress,
        )
        return [self._best(i, end) for i in range(len(self.seen))]

    @property
    def _has_labels(self) -> bool:
        return self.labels[0] is not None

    def _variables(self) -> Variables:
        least, greatest = self.box
        dummies = []
        for i, restart, _ in self.starts:
            shape = (self.seen[i].total_examples, *self.public.shape)
            start = noise(self.seen[i], self.seed, restart, shape)
            dummies.append(_padded(start, self.most))
        x, lanes = torch.stack(dummies).clamp(least, greatest), len(self.starts)
        variables = {"x": x, "alpha": x.new_full((lanes,), self.s.alpha)}
        if not self._has_labels:
            variables["logits"] = x.new_zeros((lanes, self.most, self.public.outputs))
        return variables

    def _descent(self) -> Descent:
        rates = {"x": self.s.lr}
        if self.s.learn_alpha:
            rates["alpha"] = self.s.alpha_lr or 1 / self.s.iterations
        if not self._has_labels:
            rates["logits"] = self.s.lr
        least, greatest = self.box

        def project(v: Variables) -> None:
            v["x"].clamp_(least, greatest)
            v["alpha"].clamp_(0, 1)

        return Descent(
            rates,
            self.s.iterations,
            project,
            milestones=self.s.decay,
            signed=self.s.signed,
        )

    def _best(self, i: int, end: Trace) -> Reconstruction:
        """The client's lane with the lowest objective, never by what is not public."""
        n, y, starts = self.seen[i].total_examples, self.labels[i], self.starts
        lanes = [lane for lane, start in enumerate(starts) if start.client == i]
        best = _lowest(end.match, lanes)
        rho, images = starts[best].rho, end.variables["x"]
        if y is None:
            y = end.variables["logits"][best, :n].argmax(1)
        others = []
        for lane in lanes:
            if lane != best and starts[lane].rho == rho:
                others.append(images[lane, :n])
        return Reconstruction(
            images[best, :n],
            y,
            float(end.match[best]),
            end.iterations,
            {"alpha": float(end.variables["alpha"][best]), "path_scale": rho},
            end.curve[best],
            tuple(others),
        )


def _lowest(match: Tensor, lanes: Iterable[int]) -> int:
    """The lane with the lowest match; NaN is the highest."""
    return min(lanes, key=lambda lane: float(match[lane].nan_to_num(torch.inf)))


def scales(seen: Observation, settings: SurrogateSettings) -> tuple[float, ...]:
    """rho to try for this client."""
    if settings.path_scale is not None:
        return (settings.path_scale,)
    is_shortened = seen.public.clipped or seen.clients > 1
    return SCALES if is_shortened and settings.learn_alpha else (1.0,)


def lane_of(seen: Observation, y: Tensor | None, rho: float, size: int) -> Lane:
    """One lane, with room for `size` dummies."""
    D = gradient_like(seen)
    like = next(iter(D.values()))
    keep: Params = {}
    if seen.public.sparse:
        keep = trees.map(lambda x: (x != 0).to(like.dtype), D)
    labels = like.new_zeros(seen.total_examples, dtype=torch.int64) if y is None else y
    return Lane(
        seen.w0,
        D,
        trees.dot(D, D),
        keep,
        like.new_tensor(rho),
        _padded(labels.to(like.device), size),
        _padded(like.new_ones(seen.total_examples), size),
    )


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.cat([x, x.new_zeros((size - len(x), *x.shape[1:]))])


class SME(Attack[SurrogateSettings]):
    needs = frozenset({"reals", "slope", "images", "classes"})

    def reconstruct(
        self,
        seen: Sequence[Observation],
        labels: Sequence[Tensor | None],
        seed: int,
        progress: Progress = keep_going,
    ) -> list[Reconstruction]:
        return match_direction(seen, labels, self.s, seed, progress)
