"""Membership inference: was this example in the client's training data? Scores from what the server saw of the client over rounds.

w_t  what the client started from in a captured round   w_t'  where it ended   l  loss of one example (x, y)
    loss drop   mean over rounds of l(w_t) - l(w_t'): training lowers the loss of what it saw (after Yeom et al., IEEE CSF 2018)
    gradient    mean over rounds of the cosine of w_t - w_t' and the gradient of l at w_t
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
    """One score a candidate by name, float64 [n], from one client's exchanges in one or more rounds."""
    drops, cosines = [], []
    for o in seen:
        with torch.no_grad():
            before, after = (
                o.public.loss(o.public.predict(w, x), y).double() for w in (o.w0, o.wT)
            )
        drops.append(before - after)
        cosines.append(gradient_cosines(o, x, y))
    return {
        "loss_drop": torch.stack(drops).mean(0),
        "gradient": torch.stack(cosines).mean(0),
    }


def gradient_cosines(o: Observation, x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the update, gradient-like, and each candidate's gradient at w0, float64 [n]."""
    D = gradient_like(o)

    def loss(moving: Params, x: Tensor, y: Tensor) -> Tensor:
        return o.public.loss(
            functional_call(o.public.model, {**o.w0, **moving}, (x[None],)), y[None]
        )[0]

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        g = grad(loss)({name: o.w0[name] for name in D}, x, y)
        return trees.dot(D, g), trees.dot(g, g)

    inner, squares = vmap(one, chunk_size=CHUNK)(x, y)
    norms = (trees.dot(D, D) * squares).double().sqrt().clamp(min=1e-30)
    found: Tensor = inner.double() / norms
    return found
