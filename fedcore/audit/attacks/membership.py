"""Membership inference: whether an example was in the client's training data.

Scores follow from what the server saw of the client over rounds.

w_t  the client's start in a captured round   w_t'  its end   l  loss of one (x, y)
    loss drop   mean over rounds of l(w_t) - l(w_t'): training lowers the loss of its
                examples (after Yeom et al., IEEE CSF 2018)
    gradient    mean over rounds of the cosine of w_t - w_t' and the gradient of l at
                w_t
Higher: rather a member. The candidates come without a mark which of them are members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fedcore import trees
from fedcore.audit.attacks.base import gradient_like
from fedcore.audit.observe import Observation
from fedcore.types import Params

CHUNK = 64  # gradients held at once


def scores(seen: Sequence[Observation], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One score a candidate by name, float64 [n].

    `seen` are one client's exchanges in one or more rounds.
    """
    drops = [loss_drops(observation, x, y) for observation in seen]
    cosines = [gradient_cosines(observation, x, y) for observation in seen]
    return {
        "loss_drop": torch.stack(drops).mean(0),
        "gradient": torch.stack(cosines).mean(0),
    }


@torch.no_grad()
def loss_drops(seen: Observation, x: Tensor, y: Tensor) -> Tensor:
    """Loss of each candidate before training less that after it, float64 [n]."""
    loss, predict = seen.public.loss, seen.public.predict
    before = loss(predict(seen.w0, x), y).double()
    after = loss(predict(seen.wT, x), y).double()
    return before - after


def gradient_cosines(seen: Observation, x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the update, gradient-like, and each candidate's gradient, float64 [n].

    Gradients are taken at w0.
    """
    D, public = gradient_like(seen), seen.public

    def loss(moving: Params, x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(public.model, {**seen.w0, **moving}, (x[None],))
        return public.loss(outputs, y[None])[0]

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        g = grad(loss)({name: seen.w0[name] for name in D}, x, y)
        return trees.dot(D, g), trees.dot(g, g)

    inner, squares = vmap(one, chunk_size=CHUNK)(x, y)
    norms = (trees.dot(D, D) * squares).double().sqrt().clamp(min=1e-30)
    cosines: Tensor = inner.double() / norms
    return cosines
